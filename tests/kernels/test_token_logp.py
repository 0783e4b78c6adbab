"""token_logp: Triton (interpreted without a GPU), PyTorch and compiled rows, against float64."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false

import threading
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from tercet.kernels import _row_softmax_cpu as compiled
from tercet.kernels import _row_softmax_triton as kernels
from tercet.kernels import token_logp
from tercet.kernels._checks import choose_rows
from tercet.kernels.reference import token_logp_ref

pytestmark = [
    pytest.mark.parametrize("impl", ["triton", "torch", "auto"]),  # auto: compiled on a CPU
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # of Triton's interpreter
]
BLOCK = kernels.FORWARD_BLOCK_V
SHAPES = [(1, 1), (3, 1000), (2, BLOCK), (2, BLOCK + 1), (2, 2 * BLOCK + 77)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def both(logits, targets, op=token_logp_ref, **options):
    """Log-probs and entropies in one tensor, so that both get an upstream gradient."""
    out = op(logits, targets, return_entropy=True, **options)
    return torch.cat([out.logp.flatten(), out.entropy.flatten()])


def judge_both(judge, impl, logits, targets, **options):
    ours = partial(both, targets=targets, op=partial(token_logp, impl=impl), **options)
    dy = torch.randn(targets.numel() + logits.shape[:-1].numel(), device=logits.device)
    judge(ours, partial(both, targets=targets, **options), [logits], dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(impl, shape, dtype, device, judge):
    impl = "torch" if dtype == torch.float64 and impl == "triton" else impl
    logits = torch.randn(shape, device=device).mul_(4).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], device=device)
    judge_both(judge, impl, logits, targets)


@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per row"])
def test_temperature(impl, per_row, device, judge):
    logits = torch.randn(2, 3, 700, device=device).mul_(4)
    targets = torch.randint(700, (2, 3), device=device)
    temperature = torch.rand(2, 3, device=device) + 0.3 if per_row else 0.7
    judge_both(judge, impl, logits, targets, temperature=temperature)


def test_several_targets_per_row_may_repeat(impl, device, judge):
    logits = torch.randn(4, 900, device=device).mul_(4)
    targets = torch.randint(900, (4, 5), device=device)
    targets[0] = logits[0].topk(2).indices[1]
    targets[1, 3:] = targets[1, 0]
    targets[2, 1] = logits[2].argmax()
    judge_both(judge, impl, logits, targets)


def test_all_targets_sum_to_one(impl, device):
    logits = torch.randn(2, 300, device=device).mul_(5)
    targets = torch.arange(300, device=device).expand(2, 300)
    total = token_logp(logits, targets, impl=impl).logp.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_running_max_that_grows_in_every_block(impl, device, judge):
    row = torch.linspace(-60, 60, 3 * BLOCK, device=device)
    logits = torch.stack([row, row.flip(0)])
    judge_both(judge, impl, logits, torch.tensor([BLOCK, 5], device=device))


def test_padding_of_the_last_block_stays_outside(impl, device):
    storage = torch.full((2, 700), 1e4, device=device)  # what lies behind a row's 601 columns
    logits = storage[:, :601]
    logits.copy_(torch.randn(2, 601))
    targets = torch.tensor([600, 0], device=device)
    expected = token_logp_ref(logits, targets, return_entropy=True)
    result = token_logp(logits, targets, return_entropy=True, impl=impl)
    torch.testing.assert_close(result, expected)


def relative_error(x, truth):
    return float(((x.detach().double() - truth) / truth).abs().max())


@pytest.mark.parametrize("gap", [5.0, 12.0, 20.0, 40.0])
def test_peaked_softmax_keeps_relative_precision(impl, gap, device):
    logits = torch.randn(3, BLOCK + 50, device=device)
    targets = torch.tensor([3, BLOCK + 7, 1000], device=device)
    logits[range(3), targets] = gap + 4
    truth = logits.double().requires_grad_()
    below = truth - truth.gather(1, targets[:, None])
    e = below.exp().scatter(1, targets[:, None], 0.0)  # 1 - p as a sum, without cancellation
    logp = -e.sum(1).log1p()
    entropy = -logp.detach() - (e * below).sum(1).detach() / (1 + e.sum(1).detach())
    expected = torch.autograd.grad(logp.sum(), truth)[0]
    leaf = logits.requires_grad_()
    ours = token_logp(leaf, targets, return_entropy=True, impl=impl)
    dx = torch.autograd.grad(ours.logp.sum(), leaf, retain_graph=True)[0]
    assert relative_error(ours.logp, logp.detach()) < 1e-5
    assert relative_error(dx, expected) < 2e-5
    assert relative_error(ours.entropy, entropy) < 1e-5
    pairs = torch.stack([targets + 1, targets], dim=1)  # the likeliest is the second of two
    both_logp = token_logp(leaf, pairs, impl=impl).logp
    d_second = torch.autograd.grad(both_logp[:, 1].sum(), leaf)[0]
    assert relative_error(both_logp[:, 1], logp.detach()) < 1e-5
    assert relative_error(d_second, expected) < 2e-5


def test_logp_is_never_positive(impl, device):
    logits = torch.randn(400, 50, device=device).mul_(
        torch.logspace(-2, 2, 400)[:, None].to(device)
    )
    targets = logits.argmax(-1)
    result = token_logp(logits.to(torch.bfloat16), targets, return_entropy=True, impl=impl)
    assert (result.logp <= 0).all()
    assert (result.entropy >= 0).all()


@pytest.mark.parametrize("offset", [-1e4, -3e4, 3e4])
def test_very_negative_and_very_large_logits(impl, offset, device, judge):
    logits = (torch.randn(2, 600, device=device) * 8).round() / 8 + offset
    targets = torch.tensor([0, 599], device=device)
    judge_both(judge, impl, logits, targets)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("closed", [-torch.inf, torch.finfo(torch.float32).min])
def test_masked_vocabulary(impl, closed, device):
    logits = torch.randn(3, BLOCK + 900, device=device).mul_(3)
    open_ = torch.rand(BLOCK + 900, device=device) < 0.3
    open_[:BLOCK] = False  # a whole block without a finite logit
    columns = open_.nonzero()[:, 0]
    targets = columns[[0, 5, 9]]
    masked = logits.masked_fill(~open_, closed).requires_grad_()
    small = logits[:, columns].double().requires_grad_()
    short = torch.tensor([0, 5, 9], device=device)
    dy = torch.randn(6, device=device)
    y = both(masked, targets, op=partial(token_logp, impl=impl))
    expected = both(small, short)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    dx = torch.autograd.grad(y, masked, dy)[0]
    d_small = torch.autograd.grad(expected, small, dy.double())[0]
    torch.testing.assert_close(dx[:, columns].double(), d_small, rtol=1e-4, atol=1e-6)
    assert (dx[:, ~open_] == 0).all()


def test_masked_target_has_no_probability(impl, device):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], device=device, requires_grad=True)
    logp = token_logp(logits, torch.tensor([1], device=device), impl=impl).logp
    assert logp.item() == -torch.inf
    dx = torch.autograd.grad(logp, logits, torch.ones_like(logp))[0]
    torch.testing.assert_close(dx[0, 1].item(), 1.0)
    assert dx.isfinite().all()


def test_upstream_gradients_that_differ_and_rows_without(impl, device):
    logits = torch.randn(5, 300, device=device).mul_(3)
    targets = torch.randint(300, (5,), device=device)
    dy = torch.tensor([0.0, 2.0, -0.5, 0.0, 1e3], device=device)
    truth = logits.double().requires_grad_()
    expected = torch.autograd.grad(token_logp_ref(truth, targets).logp, truth, dy.double())[0]
    logits[3] = torch.nan  # a row that the caller drops may hold anything
    leaf = logits.requires_grad_()
    dx = torch.autograd.grad(token_logp(leaf, targets, impl=impl).logp, leaf, dy)[0]
    assert (dx[[0, 3]] == 0).all()
    keep = [1, 2, 4]
    torch.testing.assert_close(dx[keep].double(), expected[keep], rtol=1e-5, atol=1e-6)


def test_callers_mask_drops_rows(impl, device):
    logits = torch.randn(4, 50, device=device)
    logits[2] = torch.nan
    leaf = logits.requires_grad_()
    mask = torch.tensor([True, True, False, True], device=device)
    out = token_logp(leaf, torch.zeros(4, dtype=torch.long, device=device), return_entropy=True,
                     impl=impl)  # fmt: skip
    loss = torch.where(mask, out.logp + out.entropy, 0.0)
    loss.sum().backward()
    assert leaf.grad[mask].isfinite().all()
    assert (leaf.grad[2] == 0).all()
    everything = torch.where(
        torch.zeros_like(mask), token_logp(leaf, mask.long(), impl=impl).logp, 0
    )
    assert (torch.autograd.grad(everything.sum(), leaf)[0] == 0).all()


@pytest.mark.parametrize("bad", [-100, -1, 50])
def test_target_outside_the_vocabulary(impl, bad, device):
    logits = torch.randn(2, 50, device=device, requires_grad=True)
    targets = torch.tensor([3, bad], device=device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"token_logp: targets .*\[0, 50\), got {bad}"):
            token_logp(logits, targets, impl=impl)
        return
    logp = token_logp(logits, targets, impl=impl).logp
    assert logp.isnan().tolist() == [False, True]
    logp.sum().backward()
    assert logits.grad.isnan().any(-1).tolist() == [False, True]


def test_unvisited_target_is_nan(impl, device):
    """What a CUDA device does with a target outside: the kernels meet it nowhere."""
    rs = import_module("tercet.kernels._row_softmax")
    query = rs.Query(torch.tensor([[9], [2], [-3]], device=device), torch.ones(3, device=device))
    x = torch.randn(3, 5, device=device)
    state = rs.empty_state(query)
    module = {"triton": kernels, "cpp": compiled}.get(choose_rows("test", impl, x))
    if module is not None:
        rows = kernels.rows_of("test", "x", x)
        module.forward(x, rows, *query, state, first_column=0, entropy=False)
    else:
        rs.add_tile(state, x, query, first_column=0, work=torch.empty_like(x), scratch=None)
        rs.close(state, query)
    result = rs.finish(state, query)
    assert result.logp.isnan()[:, 0].tolist() == [True, False, True]
    grads = rs.row_grads(result, query, torch.ones(3, 1, device=device), None)
    assert grads.coef[3].isnan().tolist() == [True, False, True]
    dropped = rs.row_grads(result, query, torch.zeros(3, 1, device=device), None)
    assert (dropped.coef[3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_integer_targets_of_any_layout(impl, dtype, device):
    logits = torch.randn(3, 4, 20, device=device)
    targets = torch.randint(20, (4, 6), device=device).to(dtype)[:, ::2].T
    expected = token_logp_ref(logits, targets.long()).logp
    torch.testing.assert_close(token_logp(logits, targets, impl=impl).logp, expected)


def _layouts(x):
    """The same values as x: rows apart, shifted by a token, time first, off a 16-byte boundary."""
    apart = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)
    apart[..., :-3] = x
    longer = torch.zeros(x.shape[0], x.shape[1] + 1, x.shape[2], dtype=x.dtype, device=x.device)
    longer[:, :-1] = x
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    shifted[1:] = x.flatten()
    return {
        "apart": apart[..., :-3],
        "without the last token": longer[:, :-1],
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "misaligned": shifted[1:].view(x.shape),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_give_the_same_result(impl, dtype, device, fwd_bwd):
    x = torch.randn(3, 5, 301, device=device).to(dtype)
    targets = torch.randint(301, (3, 5), device=device)
    dy = torch.randn(30, device=device)
    fn = partial(both, targets=targets, op=partial(token_logp, impl=impl))
    expected = fwd_bwd(fn, [x], dy)
    tol = 1e-5 if device.type == "cuda" else 0.0  # there the alignment decides who adds what
    for name, other in _layouts(x).items():
        for got, wanted in zip(fwd_bwd(fn, [other], dy), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=tol, atol=tol, msg=name)


def test_expanded_rows(impl, device):
    x = torch.randn(1, 40, device=device)
    targets = torch.arange(6, device=device)
    expected = x.log_softmax(-1)[0, :6]
    torch.testing.assert_close(token_logp(x.expand(6, 40), targets, impl=impl).logp, expected)


@pytest.mark.parametrize("rows", [(0,), (2, 0), ()], ids=str)
def test_no_rows_and_one_row_without_axis(impl, rows, device):
    logits = torch.randn(*rows, 30, device=device, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.long, device=device)
    out = token_logp(logits, targets, return_entropy=True, impl=impl)
    assert out.logp.shape == out.entropy.shape == rows
    (out.logp.sum() + out.entropy.sum()).backward()
    assert logits.grad.shape == logits.shape
    torch.testing.assert_close(out.logp, token_logp_ref(logits, targets).logp)


def test_gradcheck_of_both_outputs(impl, device):
    logits = torch.randn(3, 7, dtype=torch.float64, device=device, requires_grad=True)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    for targets in (torch.tensor([0, 6, 3]), torch.tensor([[0, 0], [1, 2], [6, 3]])):
        fn = partial(both, targets=targets.to(device), op=token_logp, temperature=temperature)
        assert torch.autograd.gradcheck(fn, logits)


def test_entropy_alone_has_its_gradient(impl, device):
    logits = torch.randn(2, 90, device=device).mul_(3)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    leaves = [logits.clone().requires_grad_(), logits.double().requires_grad_()]
    ours = token_logp(leaves[0], targets, return_entropy=True, impl=impl).entropy
    truth = token_logp_ref(leaves[1], targets, return_entropy=True).entropy
    dy = torch.randn(2, device=device)
    dx = torch.autograd.grad(ours, leaves[0], dy)[0]
    expected = torch.autograd.grad(truth, leaves[1], dy.double())[0]
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-6)


def test_upstreams_that_leave_only_the_slope_of_the_entropy(impl, device):
    """a = g + g_H H = 0 exactly, so the gradient is that of b alone."""
    logits = torch.randn(3, 90, device=device).mul_(3)
    targets = torch.tensor([4, 80, 33], device=device)
    leaves = [logits.clone().requires_grad_(), logits.double().requires_grad_()]
    ours = token_logp(leaves[0], targets, return_entropy=True, impl=impl)
    g = -ours.entropy.detach()
    truth = token_logp_ref(leaves[1], targets, return_entropy=True)
    pairs = [(ours, leaves[0], g), (truth, leaves[1], g.double())]
    dx, expected = (
        torch.autograd.grad([*out[:2]], leaf, [g, torch.ones_like(g)])[0] for out, leaf, g in pairs
    )
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-6)


def test_axes_of_one_have_no_stride(impl, device):
    logits = torch.randn(3, 4, device=device)[:, ::4]
    assert logits.stride() == (4, 4)
    logp = token_logp(logits, torch.zeros(3, dtype=torch.long, device=device), impl=impl).logp
    assert logp.tolist() == [0.0] * 3
    logits = torch.randn(2, 3, 5, 7, device=device)[:, :, :1].transpose(1, 2)
    assert logits.stride() == (105, 7, 35, 1)
    targets = torch.randint(7, (2, 1, 3), device=device)
    expected = token_logp_ref(logits, targets).logp
    torch.testing.assert_close(token_logp(logits, targets, impl=impl).logp, expected)


def test_same_bits_on_every_run_and_in_every_batch(impl, device, fwd_bwd):
    logits = torch.randn(9, 1500, device=device).mul_(3)
    targets = torch.randint(1500, (9,), device=device)
    dy = torch.randn(9, device=device)

    def run(rows):
        fn = partial(token_logp, targets=targets[rows], impl=impl)
        return fwd_bwd(lambda x: fn(x).logp, [logits[rows]], dy[rows])

    runs = [run(slice(None)), run(slice(None)), run(slice(4, 5))]
    rtol = 1e-5 if impl == "torch" else 0.0  # PyTorch treats the last lanes of a tensor otherwise
    for first, again, alone in zip(*runs, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first[4:5], alone, rtol=rtol, atol=0.0)


def test_two_backward_calls_and_untouched_inputs(impl, device):
    logits = torch.randn(4, 60, device=device, requires_grad=True)
    targets = torch.randint(60, (4,), device=device)
    temperature = torch.rand(4, device=device) + 0.5
    before = [x.detach().clone() for x in (logits, targets, temperature)]
    out = both(logits, targets, op=partial(token_logp, impl=impl), temperature=temperature)
    dy = torch.randn_like(out)
    first = torch.autograd.grad(out, logits, dy, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(out, logits, dy)[0])
    for now, then in zip((logits, targets, temperature), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_backward_gives_the_same_bits_in_the_logits(impl, dtype, device):
    x = torch.randn(3, 4, 301, device=device).to(dtype).requires_grad_()
    targets = torch.randint(301, (3, 4, 2), device=device)
    dy = torch.randn(36, device=device)
    dy[:4] = dy[24:26] = 0.0
    x.data[0, 0] = torch.nan
    grads = []
    for inplace in (False, True):
        logits = x * 2
        options = {"op": partial(token_logp, impl=impl), "inplace_backward": inplace}
        y = both(logits, targets, temperature=0.7, **options)
        before = logits.detach().clone()
        seen = torch.autograd.grad(y, logits, dy)[0]
        assert (seen.data_ptr() == logits.data_ptr()) == inplace
        kept = torch.equal(logits.detach().nan_to_num(), before.nan_to_num())
        assert kept != inplace
        grads.append(seen)
    assert (grads[0][0, 0] == 0).all()
    assert torch.equal(*grads)


def test_inplace_backward_reaches_the_leaf(impl, device, fwd_bwd):
    x, weight = torch.randn(5, 8, device=device), torch.randn(90, 8, device=device)
    targets = torch.randint(90, (5,), device=device)

    def loss(x, weight, inplace):
        logits = torch.nn.functional.linear(x, weight)
        return token_logp(logits, targets, inplace_backward=inplace, impl=impl).logp

    dy = torch.randn(5, device=device)
    runs = [fwd_bwd(partial(loss, inplace=inplace), [x, weight], dy) for inplace in (False, True)]
    for usual, inplace in zip(*runs, strict=True):
        assert torch.equal(usual, inplace)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the bytes of CPU tensors")
def test_inplace_backward_saves_a_tensor_of_the_logits(impl):
    if impl == "triton":
        pytest.skip("the interpreter copies tensors")
    x = torch.randn(64, 4096, requires_grad=True)  # 1 MiB
    targets = torch.randint(4096, (64,))
    made = []
    for inplace in (False, True):
        logp = token_logp(x * 2, targets, inplace_backward=inplace, impl=impl).logp
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            grad = torch.autograd.grad(logp.sum(), x)
        profiler: Any = profile.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        made.append(sum(e.nbytes() for e in events if e.nbytes() >= x.nbytes))
        del grad
    assert made[0] - made[1] == x.nbytes


CHANGED = "modified by an inplace operation"


def test_inplace_backward_runs_once(impl, device):
    x = torch.randn(2, 30, device=device, requires_grad=True)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    logp = token_logp(x * 2, targets, inplace_backward=True, impl=impl).logp
    torch.autograd.grad(logp.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match=CHANGED):
        torch.autograd.grad(logp.sum(), x)
    logp = token_logp(x * 2, targets, inplace_backward=True, impl=impl).logp
    with pytest.raises(RuntimeError, match="must be False for a second derivative"):
        torch.autograd.grad(logp.sum(), x, create_graph=True)


@pytest.mark.parametrize("user", ["before", "output", "base", "twice"])
def test_inplace_backward_is_noticed_by_others_that_saved_the_logits(impl, user, device):
    x = torch.randn(2, 30, device=device, requires_grad=True)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    base = x.tanh() if user == "output" else x * 2
    logits = base.view(2, 1, 30)[:, 0] if user == "base" else base
    other = base.square().sum() if user in ("before", "base") else 0.0
    op = partial(token_logp, logits, targets, inplace_backward=True, impl=impl)
    other = op().logp.sum() if user == "twice" else other
    with pytest.raises(RuntimeError, match=CHANGED):
        torch.autograd.grad(op().logp.sum() + other, x)


def test_inplace_backward_adds_to_what_came_before(impl, device):
    x = torch.randn(2, 30, device=device, requires_grad=True)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    found = []
    for inplace in (False, True):
        logits = x * 2
        logp = token_logp(logits, targets, inplace_backward=inplace, impl=impl).logp
        found.append(torch.autograd.grad(logp.sum() + logits.square().sum(), x)[0])
    assert torch.equal(*found)


def test_inplace_backward_refuses_leaves_and_strides(impl, device):
    x = torch.randn(3, 30, device=device, requires_grad=True)
    targets = torch.zeros(3, dtype=torch.long, device=device)
    op = partial(token_logp, inplace_backward=True, impl=impl)
    with pytest.raises(ValueError, match=r"an operation made, got a leaf.*inplace_backward=False"):
        op(x, targets)
    with pytest.raises(ValueError, match=r"contiguous logits, got strides \(60, 1\)"):
        op((x * 2).repeat(1, 2)[:, :30], targets)
    with pytest.raises(ValueError, match=r"contiguous logits, got strides \(0, 1\)"):
        op((x[:1] * 2).expand(3, 30), targets)
    with torch.no_grad():
        assert not op(x, targets).logp.requires_grad
    assert torch.equal(op(x.detach(), targets).logp, token_logp(x, targets, impl=impl).logp)


def test_no_gradient_wanted(impl, device):
    logits = torch.randn(2, 9, device=device)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    assert not token_logp(logits, targets, impl=impl).logp.requires_grad
    y = token_logp(logits.requires_grad_(), targets, impl=impl).logp
    with pytest.raises(RuntimeError, match="no autograd formula"):  # rather than a silent zero
        torch.autograd.grad(
            torch.autograd.grad(y.sum(), logits, create_graph=True)[0].sum(), logits
        )


def test_backward_in_a_bare_thread(impl, device):
    logits = torch.randn(3, 20, device=device, requires_grad=True)
    targets = torch.tensor([1, 2, 3], device=device)
    logp = token_logp(logits, targets, impl=impl).logp
    thread = threading.Thread(target=lambda: logp.sum().backward())
    thread.start()
    thread.join()
    expected = torch.nn.functional.one_hot(targets, 20) - logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("entropy", [False, True])
def test_registration(impl, entropy, device):
    logits = torch.randn(2, 3, 11, device=device, requires_grad=True)
    targets = torch.randint(11, (2, 3), device=device)
    temperature = torch.rand(2, 3, device=device) + 0.5
    inputs = (logits, targets, temperature, entropy, choose_rows("test", impl, logits), False)
    torch.library.opcheck(torch.ops.tercet.token_logp.default, inputs)
    saved = [x.detach() for x in torch.ops.tercet.token_logp(*inputs)]
    upstream = (torch.randn(2, 3, device=device), torch.randn(2, 3, device=device))
    backward = (*(upstream if entropy else (upstream[0], None)), logits.detach(), *inputs[1:3])
    backward = (*backward, *saved, inputs[-2])
    torch.library.opcheck(torch.ops.tercet.token_logp_backward.default, backward)
    torch.library.opcheck(torch.ops.tercet.token_logp_backward_.default, backward)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(impl, dynamic, inplace, device):
    def loss(logits, targets):
        out = token_logp(
            logits * 2, targets, temperature=0.7, return_entropy=True, impl=impl,
            inplace_backward=inplace,
        )  # fmt: skip
        return (out.logp * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 6):
        logits = torch.randn(rows, 40, device=device, requires_grad=True)
        targets = torch.randint(40, (rows,), device=device)
        expected = torch.autograd.grad(loss(logits, targets), logits)[0]
        torch.testing.assert_close(
            torch.autograd.grad(compiled(logits, targets), logits)[0], expected
        )


def test_temperature_stays_float32_in_a_compiled_graph(impl, device):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        partial(token_logp, temperature=0.7, impl=impl), fullgraph=True, backend=keep
    )
    compiled(torch.randn(2, 8, device=device), torch.zeros(2, dtype=torch.long, device=device))
    fills = [node for node in graphs[0].graph.nodes if node.target is torch.full]
    assert [node.kwargs["dtype"] for node in fills] == [torch.float32]
    call = next(node for node in graphs[0].graph.nodes if "token_logp" in str(node.target))
    assert not any(isinstance(arg, float) for arg in call.args)


def test_a_compiled_graph_plans_its_memory_itself(impl, device):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def fn(x, targets):
        return token_logp(x * 2, targets, inplace_backward=True, impl=impl).logp

    x = torch.randn(2, 8, device=device, requires_grad=True)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    torch.compile(fn, fullgraph=True, backend=keep)(x, targets)
    call = next(node for node in graphs[0].graph.nodes if "token_logp" in str(node.target))
    assert call.args[-1] is False


def test_offsets_beyond_32_bits(impl, device):
    stride = 2**30 + 8  # elements; row 2 begins behind 2^31
    if device.type == "cuda":
        storage = torch.zeros(2 * stride + 64, dtype=torch.float16, device=device)
    else:  # untouched pages of a NumPy array take no memory
        storage = torch.from_numpy(np.zeros(2 * stride + 64, dtype=np.float16))
    logits = storage.as_strided((3, 8), (stride, 1))
    logits[2, 1] = 3.0
    out = token_logp(logits, torch.tensor([1, 1, 1], device=device), impl=impl).logp
    expected = logits.float().log_softmax(-1)[:, 1]
    torch.testing.assert_close(out, expected)


def test_rows_lie_on_the_first_grid_axis(impl, device, monkeypatch):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(kernels, "_row_softmax_fwd", Recorder())
    monkeypatch.setattr(kernels, "_row_softmax_bwd", Recorder())
    logits = torch.zeros(70_000, 4, device=device, requires_grad=True)  # axes 1, 2 end at 65,535
    targets = torch.zeros(70_000, dtype=torch.long, device=device)
    token_logp(logits, targets, impl=impl).logp.sum().backward()
    fused = impl == "triton" or (impl == "auto" and device.type == "cuda")
    assert grids == ([(70_000,)] * 2 if fused else [])


@pytest.mark.gpu
def test_more_rows_than_a_grid_axis_holds(impl):
    logits = torch.randn(70_000, 40, device="cuda")
    targets = torch.randint(40, (70_000,), device="cuda")
    torch.testing.assert_close(
        token_logp(logits, targets, impl=impl).logp, token_logp_ref(logits, targets).logp
    )


@pytest.mark.gpu
def test_more_than_2_to_31_elements(impl):
    logits = torch.randn(16_384, 151_936, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(151_936, (16_384,), device="cuda")
    logp = token_logp(logits, targets, impl=impl).logp
    last = slice(-3, None)
    torch.testing.assert_close(logp[last], token_logp_ref(logits[last], targets[last]).logp)


@pytest.mark.gpu
def test_current_device_need_not_be_the_tensors(impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits = torch.randn(5, 40, device="cuda:1", requires_grad=True)
    targets = torch.zeros(5, dtype=torch.long, device="cuda:1")
    with torch.cuda.device(0):
        logp = token_logp(logits, targets, impl=impl).logp
        logp.sum().backward()
    torch.testing.assert_close(logp, logits.log_softmax(-1)[:, 0])


def _call(impl, shape=(2, 6), rows=(2,), dtype=torch.float32, target=torch.int64, **options):
    logits = torch.zeros(shape, dtype=dtype)
    token_logp(logits, torch.zeros(rows, dtype=target), impl=impl, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(_call, dtype=torch.int64), TypeError, "logits must be a floating-point tensor"),
        (partial(_call, target=torch.int16), TypeError, "targets must be int32 or int64, got"),
        (partial(_call, rows=(3,)), ValueError, r"shape of the rows \(2,\).*got \(3,\)"),
        (partial(_call, rows=(2, 0)), ValueError, "at least one token per row"),
        (partial(_call, shape=(2, 0)), ValueError, r"\[\*, vocab >= 1\], got \(2, 0\)"),
        (partial(_call, temperature=0.0), ValueError, "temperature must be > 0, got 0.0"),
        (partial(_call, temperature=torch.tensor([1.0, -1.0])), ValueError, "> 0, got -1.0"),
        (partial(_call, temperature=torch.ones(3)), ValueError, r"rows \(2,\), got \(3,\)"),
        (partial(_call, temperature=torch.ones(2).requires_grad_()), ValueError, "detach"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_rejects(impl, call, error, match):
    with pytest.raises(error, match=match):
        call(impl)


def test_rejects_layouts_that_would_need_a_copy(impl, device):
    targets = torch.zeros(4, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"unit stride along its last axis.*\.contiguous"):
        token_logp(torch.zeros(6, 4, device=device).T, targets, impl=impl)
    cube = torch.zeros(4, 4, 4, 6, device=device).permute(2, 1, 0, 3)
    targets = torch.zeros(4, 4, 4, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"at most two strides.*\.contiguous"):
        token_logp(cube, targets, impl=impl)


def test_float64_has_no_triton_kernel(impl, device):
    logits = torch.zeros(2, 3, dtype=torch.float64, device=device)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    if impl != "triton":
        assert token_logp(logits, targets, impl=impl).logp.dtype == torch.float64
        return
    with pytest.raises(TypeError, match="computes in float32, got float64"):
        token_logp(logits, targets, impl=impl)

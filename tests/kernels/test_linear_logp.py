"""linear_logp: Triton row kernels (interpreted without a GPU) and PyTorch, against float64."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false

import threading
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tercet.kernels import _linear_tiles as tiles
from tercet.kernels import _row_softmax_cpu as compiled
from tercet.kernels import _row_softmax_triton as kernels
from tercet.kernels import linear_logp, token_logp
from tercet.kernels._checks import choose_rows
from tercet.kernels.reference import linear_logp_ref

pytestmark = [
    pytest.mark.parametrize("impl", ["triton", "torch", "auto"]),  # auto: compiled on a CPU
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # of Triton's interpreter
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 x 128 float32 and a budget in KiB, so that small tensors meet many of them."""
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 8192)
    monkeypatch.setattr(tiles, "CPU_HEIGHT", 16)
    monkeypatch.setattr(tiles, "CUDA_TILE_BYTES", 8192)
    monkeypatch.setattr(tiles, "CUDA_HEIGHT", 16)
    monkeypatch.setattr(tiles, "MEBI", 1024)


def problem(rows, vocab, hidden=24, *, device, dtype=torch.float32, spread=3.0):
    shape = rows if isinstance(rows, tuple) else (rows,)
    x = torch.randn(*shape, hidden, device=device).to(dtype)
    weight = torch.randn(vocab, hidden, device=device).mul_(spread * hidden**-0.5).to(dtype)
    bias = torch.randn(vocab, device=device).to(dtype)
    return [x, weight, bias], torch.randint(vocab, shape, device=device)


def products_flops(run):
    """FLOPs of the matrix products inside run()."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_flops=True) as profile:
        run()
    events = [e for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
    return sum(event.flops for event in events)


def both(hidden, weight, bias=None, *, targets, op=linear_logp_ref, **options):
    """Log-probs and entropies in one tensor, so that both get an upstream gradient."""
    out = op(hidden, weight, targets, bias=bias, return_entropy=True, **options)
    return torch.cat([out.logp.flatten(), out.entropy.flatten()])


def judge_both(judge, impl, inputs, targets, *, budget=8, dy=None, slack=4e-6, **options):
    op = partial(linear_logp, impl=impl, memory_budget_mb=budget)
    if dy is None:
        count = targets.numel() + inputs[0].shape[:-1].numel()
        dy = torch.randn(count, device=targets.device)
    ours = partial(both, targets=targets, op=op, **options)
    judge(ours, partial(both, targets=targets, **options), inputs, dy, slack=slack)


KEPT = {8: "none kept", 30: "some kept", 4096: "all kept"}  # KiB


@pytest.mark.parametrize("budget", KEPT, ids=KEPT.values())
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 129), (21, 300)], ids=str)
def test_matches_float64(impl, shape, budget, device, judge, small_tiles):
    inputs, targets = problem(*shape, device=device)
    judge_both(judge, impl, inputs, targets, budget=budget)


def test_plan_fills_the_budget(impl, device):
    weight = torch.empty(1000, 64, device=device)
    tall = torch.empty(2**16, 4096, device="meta")
    for count, parts in ((2, 0), (1, 2)):
        plan = tiles.make_plan(9000, weight, 4, count, parts, 20)
        spare = 20 * 2**20 - (count * plan.height + parts * 64) * plan.width * 4
        assert 0 < plan.kept == spare // 4000
        plan = tiles.make_plan(16, tall, 4, count, parts, 20)
        assert (count * 16 + parts * 4096) * plan.width * 4 <= 20 * 2**20
    assert tiles.make_plan(1000, tall, 4, 1, 0, 20).width == 2048  # of 2097 that fit
    assert tiles.make_plan(10, torch.empty(8, 2**20, device="meta"), 4, 1, 2, 1).kept == 0
    assert tiles.make_plan(10, weight, 4, 1, 0, 20).kept == 10
    assert tiles.make_plan(4096, torch.empty(2**24, 8, device="meta"), 4, 1, 0, 1).kept == 0
    assert impl in ("triton", "torch", "auto")


CUTS = [(151_936, 20_000), (1150, 600), (513, 350), (1000, 511), (1000, 100), (1000, 5000), (7, 0)]


@pytest.mark.parametrize(("vocab", "most"), CUTS, ids=str)
def test_tiles_on_cuda_are_even_and_whole_blocks(impl, vocab, most):
    width, widest = tiles.even_columns(vocab, most), tiles.columns_of(vocab, most)
    count = -(-vocab // width)
    assert count == -(-vocab // widest)
    assert width == widest or (width < widest and width % 128 == 0)
    narrowest = vocab - (count - 1) * width
    assert width - narrowest < 128 * count
    assert impl in ("triton", "torch", "auto")


def test_plan_on_cuda_has_even_tiles(impl):
    """Nothing of an 8B model's head is allocated."""
    for device, width in (("cuda", 8064), ("cpu", 1024)):
        with FakeTensorMode():
            weight = torch.empty(151_936, 4096, dtype=torch.bfloat16, device=device)
            plan = tiles.make_plan(8192, weight, 4, 1, 0, 4096)
        assert plan.width == width  # of the 8192 that fit; on a CPU, of 2048 rows
    assert impl in ("triton", "torch", "auto")


def test_blocks_of_live_rows(impl, device):
    made = tiles.Tiles(tiles.Plan(16, 64, 32), 0, torch.zeros(32, 64, device=device))
    live = torch.ones(40, dtype=torch.bool, device=device)
    index, blocks = tiles.live_blocks(live, made)
    assert index is None  # nothing to copy
    assert [block.source for block in blocks] == [slice(0, 16), slice(16, 32), None]
    live[16:32] = False
    index, blocks = tiles.live_blocks(live, made)
    assert index.tolist() == [*range(16), *range(32, 40)]
    assert blocks == [(slice(0, 16), slice(0, 16), None), (slice(16, 24), None, None)]
    assert impl in ("triton", "torch", "auto")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(impl, dtype, device, judge, small_tiles):
    impl = "torch" if dtype == torch.float64 and impl == "triton" else impl
    inputs, targets = problem(20, 300, device=device, dtype=dtype)
    judge_both(judge, impl, inputs, targets, budget=40, slack=4e-6 if dtype.itemsize > 2 else 1e-4)
    out = linear_logp(*inputs[:2], targets, impl=impl)
    assert out.logp.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_float32_hidden_with_bfloat16_head(impl, device, small_tiles):
    (hidden, weight, _), targets = problem(20, 300, device=device)
    weight = weight.bfloat16()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out = linear_logp(hidden, weight, targets, impl=impl, memory_budget_mb=40).logp
    expected = linear_logp_ref(hidden, weight, targets).logp
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn(20, device=device)
    for ours, truth in zip(
        torch.autograd.grad(out, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert ours.dtype == truth.dtype
        torch.testing.assert_close(ours, truth, rtol=2e-2, atol=1e-5)


def test_weight_gradient_accumulates_in_float32(impl, device, small_tiles):
    """Blocks of 16 rows add 8.5 each; in bfloat16 such sums round from 128 on."""
    hidden = torch.ones(512, 1, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long, device=device)
    dy = torch.full((512,), 1.0625, device=device)
    logp = linear_logp(hidden, weight, targets, impl=impl, memory_budget_mb=8).logp
    assert torch.autograd.grad(logp, weight, dy)[0].tolist() == [[272.0], [-272.0]]
    assert impl in ("triton", "torch", "auto")


@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per row"])
def test_temperature_and_leading_axes(impl, per_row, device, judge, small_tiles):
    inputs, targets = problem((2, 3, 5), 200, device=device)
    temperature = torch.rand(2, 3, 5, device=device) + 0.4 if per_row else 1.7
    judge_both(judge, impl, inputs, targets, budget=20, temperature=temperature)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("budget", KEPT, ids=KEPT.values())
def test_softcap_and_logit_scale(impl, budget, softcap, device, judge, small_tiles):
    """Logits of deviation 6 at a cap of 4, several targets each, half of the rows without dy."""
    inputs, _ = problem(21, 300, device=device, spread=12.0)
    targets = torch.randint(300, (21, 3), device=device)
    dy = torch.randn(84, device=device)
    dy[:30] = dy[63:73] = 0.0
    options = {"softcap": softcap, "logit_scale": 0.5, "temperature": 0.7}
    judge_both(judge, impl, inputs, targets, budget=budget, dy=dy, **options)


def test_softcap_in_half_precision(impl, device, judge, small_tiles):
    inputs, targets = problem(20, 300, device=device, dtype=torch.bfloat16, spread=12.0)
    judge_both(judge, impl, inputs, targets, budget=80, softcap=5.0)


def test_several_targets_per_row_may_repeat(impl, device, judge, small_tiles):
    inputs, _ = problem(20, 300, device=device)
    targets = torch.randint(300, (20, 4), device=device)
    targets[3] = 150
    targets[4, 2] = targets[4, 0]
    judge_both(judge, impl, inputs, targets, budget=20)


def test_equals_token_logp_of_the_logits(impl, device, small_tiles):
    (hidden, weight, bias), targets = problem(18, 400, device=device)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    options = {"temperature": 0.8, "return_entropy": True, "impl": impl}
    ours = linear_logp(hidden, weight, targets, bias=bias, memory_budget_mb=60, **options)
    torch.testing.assert_close(ours, token_logp(logits, targets, **options), rtol=1e-5, atol=1e-5)


def test_running_max_that_grows_in_every_tile(impl, device, judge, small_tiles):
    weight = torch.linspace(-50, 50, 700, device=device)[:, None]
    hidden = torch.tensor([[1.0], [-1.0]], device=device)
    targets = torch.tensor([650, 130], device=device)
    judge_both(judge, impl, [hidden, weight], targets, budget=8, slack=1e-5)  # of up to 50


@pytest.mark.parametrize("budget", [8, 4096], ids=KEPT.get)
@pytest.mark.parametrize("gap", [12.0, 25.0])
def test_peaked_softmax_keeps_relative_precision(impl, gap, budget, device, small_tiles):
    """d loss / d bias is the gradient of the logits, summed over the rows: here of one row."""
    hidden = torch.randn(1, 8, device=device)
    weight = torch.randn(400, 8, device=device).mul_(0.2)
    bias = torch.zeros(400, device=device)
    bias[260] = gap
    targets = torch.tensor([260], device=device)
    logits = (hidden.double() @ weight.double().T + bias)[0]
    e = (logits - logits[260]).exp()
    rest = e.sum() - 1 if gap < 20 else e[torch.arange(400) != 260].sum()
    expected = -e / (1 + rest)
    expected[260] = rest / (1 + rest)
    bias.requires_grad_()
    out = linear_logp(hidden, weight, targets, bias=bias, impl=impl, memory_budget_mb=budget).logp
    d_bias = torch.autograd.grad(out.sum(), bias)[0]
    assert float(((d_bias.double() - expected) / expected).abs().max()) < 3e-5
    assert float((out.detach().double() / -rest.log1p() - 1).abs().max()) < 3e-5


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_very_negative_and_very_large_logits(impl, offset, device, judge, small_tiles):
    inputs, targets = problem(5, 300, device=device)
    inputs[2] += offset
    rounded = [(x * 8).round() / 8 for x in inputs]  # so that eager's sums are exact
    judge_both(judge, impl, rounded, targets)


def test_masked_vocabulary(impl, device, small_tiles):
    (hidden, weight, bias), _ = problem(20, 700, device=device)
    bias[:300] = -torch.inf  # two whole tiles and a half
    targets = torch.randint(300, 700, (20,), device=device)
    op = partial(both, op=partial(linear_logp, impl=impl, memory_budget_mb=40))
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    y = op(hidden, weight, bias, targets=targets)
    expected = both(hidden, weight[300:], bias[300:], targets=targets - 300)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    for got, want in zip(grads, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (grads[1][:300] == 0).all()


@pytest.mark.parametrize("budget", KEPT, ids=KEPT.values())
def test_rows_without_upstream_leave_exactly(impl, budget, device, small_tiles):
    (hidden, weight, bias), targets = problem(40, 300, device=device)
    dead = torch.rand(40, device=device) < 0.5
    dead[16:32] = True  # a whole block
    hidden[dead] = torch.nan
    dy = torch.randn(40, device=device).masked_fill(dead, 0.0)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_logp(*leaves[:2], targets, bias=leaves[2], impl=impl, memory_budget_mb=budget)
    grads = torch.autograd.grad(out.logp, leaves, dy)
    short = [leaves[0].detach()[~dead].requires_grad_(), *leaves[1:]]
    truth = linear_logp_ref(*short[:2], targets[~dead], bias=short[2]).logp
    expected = torch.autograd.grad(truth, short, dy[~dead])
    assert (grads[0][dead] == 0).all()
    for ours, want in zip((grads[0][~dead], *grads[1:]), expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_dropped_rows_cost_no_products(impl, device, small_tiles):
    (hidden, weight, _), targets = problem(64, 256, device=device)
    dy = torch.zeros(64, device=device)
    dy[[3, 40]] = 1.0
    flops = []
    for upstream in (torch.ones(64, device=device), dy):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = linear_logp(*leaves, targets, impl=impl, memory_budget_mb=8).logp
        flops.append(products_flops(partial(torch.autograd.grad, out, leaves, upstream)))
    assert flops[0] == 3 * 2 * 64 * 256 * 24
    assert flops[1] == 3 * 2 * 2 * 256 * 24


def test_no_row_with_upstream(impl, device, small_tiles):
    inputs, targets = problem(20, 300, device=device)
    leaves = [x.requires_grad_() for x in inputs]
    out = linear_logp(*leaves[:2], targets, bias=leaves[2], impl=impl).logp
    for x, dx in zip(leaves, torch.autograd.grad(out, leaves, torch.zeros_like(out)), strict=True):
        assert dx.shape == x.shape
        assert (dx == 0).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_frozen_inputs_skip_their_products(impl, wanted, device, small_tiles):
    inputs, targets = problem(32, 256, device=device)
    dy = torch.randn(32, device=device)
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    out = linear_logp(*leaves[:2], targets, bias=leaves[2], impl=impl, memory_budget_mb=8).logp
    chosen = [leaves[i] for i in wanted]
    products = 1 + (0 in wanted) + (1 in wanted)
    flops = products_flops(lambda: torch.autograd.grad(out, chosen, dy, retain_graph=True))
    assert flops == products * 2 * 32 * 256 * 24
    grads = torch.autograd.grad(out, chosen, dy)
    truth = linear_logp_ref(*leaves[:2], targets, bias=leaves[2]).logp
    for ours, want in zip(grads, torch.autograd.grad(truth, chosen, dy), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_kept_rows_save_their_recomputation(impl, device, small_tiles):
    (hidden, weight, _), targets = problem(32, 256, device=device)
    flops = {}
    for budget in (8, 24, 4096):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = linear_logp(*leaves, targets, impl=impl, memory_budget_mb=budget).logp
        flops[budget] = products_flops(out.sum().backward) / (2 * 32 * 256 * 24)
    assert flops == {8: 3.0, 24: 2.5, 4096: 2.0}


WORKSPACES = {  # rows, hidden, dtype, options
    "plain": (512, 8, torch.float32, {}),
    "entropy": (512, 8, torch.float32, {"return_entropy": True}),
    "entropy and softcap": (512, 8, torch.float32, {"return_entropy": True, "softcap": 9.0}),
    "half-precision weight": (64, 512, torch.bfloat16, {}),
}


@pytest.mark.parametrize("budget_mb", [2, 12])
@pytest.mark.parametrize(
    ("rows", "hidden", "dtype", "options"), WORKSPACES.values(), ids=WORKSPACES
)
def test_workspace_stays_within_the_budget(impl, budget_mb, rows, hidden, dtype, options, device):
    if device.type != "cpu":
        pytest.skip("the CUDA allocator is asked in the bench")
    impl = "torch" if impl == "triton" else impl  # the interpreter has workspace of its own
    inputs = [torch.randn(n, hidden).to(dtype).requires_grad_() for n in (rows, 16_384)]
    targets = torch.randint(16_384, (rows,))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = linear_logp(*inputs, targets, impl=impl, memory_budget_mb=budget_mb, **options)
        loss = out.logp.sum() + (out.entropy.sum() if options else 0.0)
        grads = torch.autograd.grad(loss, inputs)
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    besides = sum(g.nbytes for g in grads) + 2 * 4 * inputs[0].numel()
    assert peak - besides <= budget_mb * 2**20 + 2**18


def test_entropy_takes_a_tile_in_pytorch_alone(impl, device, small_tiles):
    (hidden, weight, _), targets = problem(20, 300, device=device)
    rows = choose_rows("test", impl, hidden)
    inputs = (hidden, weight, None, targets, torch.ones((), device=device))
    options = (True, 24, rows, 1.0, None, "", 0)
    kept = [len(torch.ops.tercet.linear_logp(*inputs, e, *options)[3]) for e in (False, True)]
    assert kept == [13, 6 if rows == "torch" else 13]


def test_auto_runs_compiled_rows_on_a_cpu(impl, device, monkeypatch, small_tiles):
    calls = []
    for name in ("forward", "backward"):
        one = getattr(compiled, name)
        monkeypatch.setattr(
            compiled, name, lambda *a, f=one, n=name, **k: (calls.append(n), f(*a, **k))
        )
    (hidden, weight, _), targets = problem(20, 300, device=device)
    out = linear_logp(hidden.requires_grad_(), weight, targets, impl=impl)
    out.logp.sum().backward()
    runs = impl == "auto" and device.type == "cpu"
    assert set(calls) == ({"forward", "backward"} if runs else set())


def test_forward_alone_keeps_nothing(impl, device, monkeypatch):
    inputs, targets = problem(20, 300, device=device)
    op = torch.ops.tercet.linear_logp
    temperature = torch.ones((), device=device)
    for save, rows in ((True, 20), (False, 0)):
        options = [False, save, 8, choose_rows("test", impl, inputs[0]), 1.0, None, "", 0]
        kept = op(*inputs, targets, temperature, *options)[3]
        assert kept.shape == (rows, 300)
    seen, made = [], tiles.Tiles
    monkeypatch.setattr(
        tiles, "Tiles", lambda plan, *a: (seen.append(plan.kept), made(plan, *a))[1]
    )
    leaf = inputs[0].requires_grad_()
    linear_logp(leaf, *inputs[1:2], targets, impl=impl)
    with torch.no_grad():
        out = linear_logp(leaf, *inputs[1:2], targets, impl=impl)
    assert seen == [20, 0]
    assert not out.logp.requires_grad


def test_gradcheck_of_both_outputs(impl, device, small_tiles):
    inputs, targets = problem(5, 7, hidden=3, device=device, dtype=torch.float64)
    leaves = tuple(x.requires_grad_() for x in inputs)
    temperature = torch.rand(5, dtype=torch.float64, device=device) + 0.5
    several = torch.randint(7, (5, 2), device=device)
    for chosen in (targets, several):
        op = partial(linear_logp, memory_budget_mb=1, temperature=temperature)
        assert torch.autograd.gradcheck(partial(both, targets=chosen, op=op), leaves)


def test_logp_is_never_positive(impl, device, small_tiles):
    (hidden, weight, bias), targets = problem(20, 300, device=device)
    hidden *= torch.logspace(-2, 2, 20, device=device)[:, None]
    targets = (hidden @ weight.T + bias).argmax(-1)
    out = linear_logp(hidden, weight, targets, bias=bias, impl=impl, return_entropy=True)
    assert (out.logp <= 0).all()
    assert (out.entropy >= 0).all()


@pytest.mark.parametrize("bad", [-100, 300])
def test_target_outside_the_vocabulary(impl, bad, device):
    (hidden, weight, _), targets = problem(4, 300, device=device)
    targets[2] = bad
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"linear_logp: targets .*\[0, 300\), got {bad}"):
            linear_logp(hidden, weight, targets, impl=impl)
        return
    logp = linear_logp(hidden, weight, targets, impl=impl).logp
    assert logp.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("rows", [(0,), (2, 0), ()], ids=str)
def test_no_rows_and_one_row_without_axis(impl, rows, device):
    (hidden, weight, bias), targets = problem(rows, 40, device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = linear_logp(*leaves[:2], targets, bias=leaves[2], return_entropy=True, impl=impl)
    assert out.logp.shape == out.entropy.shape == rows
    grads = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), leaves)
    expected = linear_logp_ref(*leaves[:2], targets, bias=leaves[2], return_entropy=True)
    torch.testing.assert_close(out.logp, expected.logp)
    for x, dx in zip(leaves, grads, strict=True):
        assert dx.shape == x.shape
        assert dx.isfinite().all()


def test_strided_hidden_and_int32_targets(impl, device, small_tiles):
    (hidden, weight, _), targets = problem((3, 20), 200, device=device)
    expected = linear_logp_ref(hidden, weight, targets).logp
    views = [hidden.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T]
    out = linear_logp(*views, targets.to(torch.int32).T.contiguous().T, impl=impl).logp
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", KEPT, ids=KEPT.values())
def test_same_bits_on_every_run(impl, budget, device, fwd_bwd, small_tiles):
    inputs, targets = problem(20, 300, device=device)
    dy = torch.randn(40, device=device)
    op = partial(linear_logp, impl=impl, memory_budget_mb=budget)
    fn = partial(both, targets=targets, op=op)
    for first, again in zip(fwd_bwd(fn, inputs, dy), fwd_bwd(fn, inputs, dy), strict=True):
        assert torch.equal(first, again)


def test_other_rows_do_not_matter(impl, device, small_tiles):
    (hidden, weight, _), targets = problem(40, 300, device=device)
    whole = linear_logp(hidden, weight, targets, impl=impl, memory_budget_mb=8).logp
    hidden[:16] = torch.nan
    other = linear_logp(hidden, weight, targets, impl=impl, memory_budget_mb=8).logp
    assert torch.equal(whole[16:], other[16:])
    alone = linear_logp(hidden[20:21], weight, targets[20:21], impl=impl, memory_budget_mb=8).logp
    torch.testing.assert_close(alone, whole[20:21], rtol=1e-5, atol=1e-6)


def test_two_backward_calls_and_untouched_inputs(impl, device, small_tiles):
    inputs, targets = problem(20, 300, device=device)
    before = [x.clone() for x in (*inputs, targets)]
    leaves = [x.requires_grad_() for x in inputs]
    op = partial(linear_logp, impl=impl, memory_budget_mb=30)
    out = both(*leaves, targets=targets, op=op)
    dy = torch.randn_like(out)
    dy[:5] = dy[20:25] = 0.0
    first = [g.clone() for g in torch.autograd.grad(out, leaves, dy, retain_graph=True)]
    for one, two in zip(first, torch.autograd.grad(out, leaves, dy), strict=True):
        assert torch.equal(one, two)
    for now, then in zip((*inputs, targets), before, strict=True):
        assert torch.equal(now, then)


def test_backward_in_a_bare_thread(impl, device):
    (hidden, weight, _), targets = problem(5, 30, device=device)
    hidden.requires_grad_()
    logp = linear_logp(hidden, weight, targets, impl=impl).logp
    thread = threading.Thread(target=lambda: logp.sum().backward())
    thread.start()
    thread.join()
    expected = linear_logp_ref(hidden, weight, targets).logp
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(expected.sum(), hidden)[0])


@pytest.mark.parametrize("entropy", [False, True])
def test_registration(impl, entropy, device):
    dtype = torch.bfloat16 if entropy else torch.float32
    (hidden, weight, bias), targets = problem((2, 3), 11, device=device, dtype=dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    temperature = torch.rand(2, 3, device=device) + 0.5
    softcap = 5.0 if entropy else None
    options = [entropy, True, 8, choose_rows("test", impl, hidden), 0.5, softcap, "", 0]
    inputs = (*leaves, targets, temperature, *options)
    torch.library.opcheck(torch.ops.tercet.linear_logp.default, inputs)
    saved = [x.detach() for x in torch.ops.tercet.linear_logp(*inputs)]
    upstream = torch.randn(2, 3, device=device)
    plain = [x.detach() for x in inputs[:5]]
    backward = (upstream, upstream if entropy else None, *plain, *saved)
    needs = [True, entropy, True]
    torch.library.opcheck(
        torch.ops.tercet.linear_logp_backward.default,
        (*backward, needs, *options),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(impl, dynamic, device):
    def loss(hidden, weight, targets):
        out = linear_logp(
            hidden * 2, weight, targets, temperature=0.7, return_entropy=True, impl=impl
        )
        return (out.logp * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 6):
        (hidden, weight, _), targets = problem(rows, 40, device=device)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        expected = torch.autograd.grad(loss(*leaves, targets), leaves)
        ours = torch.autograd.grad(compiled(*leaves, targets), leaves)
        torch.testing.assert_close(ours, expected)


def test_rows_lie_on_the_first_grid_axis(impl, device, monkeypatch):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(tiles, "CPU_HEIGHT", 70_000)
    monkeypatch.setattr(kernels, "_row_softmax_fwd", Recorder())
    monkeypatch.setattr(kernels, "_row_softmax_bwd", Recorder())
    hidden = torch.zeros(70_000, 2, device=device, requires_grad=True)  # axes 1, 2 end at 65,535
    weight = torch.zeros(4, 2, device=device)
    targets = torch.zeros(70_000, dtype=torch.long, device=device)
    linear_logp(hidden, weight, targets, impl=impl).logp.sum().backward()
    assert set(grids) == ({(70_000,)} if impl == "triton" and device.type == "cpu" else set(grids))


@pytest.mark.gpu
def test_matches_eager_in_bfloat16_on_a_gpu(impl, judge):
    inputs, targets = problem(5000, 32_001, 256, device="cuda", dtype=torch.bfloat16)
    for budget in (64, 2048):
        judge_both(judge, impl, inputs, targets, budget=budget)


@pytest.mark.gpu
def test_cuda_graph_replays_the_backward(impl):
    (hidden, weight, _), targets = problem(64, 1000, device="cuda")
    hidden[3] = torch.nan
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    dy = torch.randn(64, device="cuda")
    dy[3] = 0.0

    def step():
        return torch.autograd.grad(linear_logp(*leaves, targets, impl="triton").logp, leaves, dy)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert impl in ("triton", "torch", "auto")


def test_rejects_a_sharded_weight(impl, device):
    dist = import_module("torch.distributed")
    tensor = import_module("torch.distributed.tensor")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (1,))
        weight = tensor.distribute_tensor(torch.zeros(6, 3), mesh, [tensor.Shard(0)])
        with pytest.raises(TypeError, match=r"weight must be a plain tensor.*weight\.full_tensor"):
            linear_logp(torch.zeros(2, 3), weight, torch.zeros(2, dtype=torch.long), impl=impl)
        logits = tensor.distribute_tensor(torch.zeros(2, 3), mesh, [tensor.Shard(0)])
        with pytest.raises(TypeError, match=r"logits must be a plain tensor"):
            token_logp(logits, torch.zeros(2, dtype=torch.long), impl=impl)
    finally:
        dist.destroy_process_group()


def _call(impl, hidden=(2, 3), weight=(6, 3), targets=(2,), bias=None, **options):
    target = torch.zeros(targets, dtype=torch.long)
    extra = None if bias is None else torch.zeros(bias)
    linear_logp(torch.zeros(hidden), torch.zeros(weight), target, bias=extra, impl=impl, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(_call, hidden=(2, 4)), ValueError, r"hidden must be \[\*, 3\].*got \(2, 4\)"),
        (partial(_call, weight=(0, 3)), ValueError, r"weight must be \[vocab >= 1, hidden\]"),
        (partial(_call, targets=(3,)), ValueError, r"shape of the rows \(2,\).*got \(3,\)"),
        (partial(_call, bias=(5,)), ValueError, r"bias must be \[6\], got \(5,\)"),
        (partial(_call, temperature=-1.0), ValueError, r"temperature must be > 0, got -1\.0"),
        (partial(_call, memory_budget_mb=0), ValueError, "memory_budget_mb must be >= 1, got 0"),
        (partial(_call, softcap=0.0), ValueError, r"softcap must be > 0 and finite, got 0\.0"),
        (partial(_call, logit_scale=-1), ValueError, "logit_scale must be > 0 and finite, got -1"),
    ],
)
def test_rejects(impl, call, error, match):
    with pytest.raises(error, match=match):
        call(impl)


def test_rejects_mixed_float64(impl):
    with pytest.raises(TypeError, match="both be float64 or neither"):
        linear_logp(
            torch.zeros(2, 3).double(),
            torch.zeros(6, 3),
            torch.zeros(2, dtype=torch.long),
            impl=impl,
        )

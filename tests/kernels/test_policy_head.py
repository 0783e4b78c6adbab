"""policy_head: Triton (interpreted without a GPU), PyTorch and compiled rows, against float64."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportCallIssue=false

import threading
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tercet.kernels import PolicyLossConfig, linear_logp, policy_head, policy_loss
from tercet.kernels import _linear_tiles as tiles
from tercet.kernels import _policy_pass as policy_pass
from tercet.kernels._checks import choose_rows
from tercet.kernels.reference import (
    aggregation_weights,
    linear_logp_ref,
    policy_head_ref,
)

pytestmark = [
    pytest.mark.parametrize("impl", ["triton", "torch", "auto"]),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # of Triton's interpreter
]

# loss_type -> settings under which random tokens meet every branch of it
SETTINGS = {
    "ppo": {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.3, "aggregation": "constant"},
    "grpo": {"epsilon": 0.2},
    "dr_grpo": {"epsilon": 0.3},
    "dapo": {"epsilon": 0.1, "epsilon_high": 0.28},
    "cispo": {"epsilon_high": 1.2},
    "sapo": {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.4},
    "reinforce": {},
    "sft": {},
}
UPSTREAM = 1.7


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 6 KiB and a budget in KiB, so that small tensors meet many chunks and tiles."""
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 6144)
    monkeypatch.setattr(tiles, "CPU_HEIGHT", 16)
    monkeypatch.setattr(tiles, "CUDA_TILE_BYTES", 6144)
    monkeypatch.setattr(tiles, "CUDA_HEIGHT", 16)
    monkeypatch.setattr(tiles, "MEBI", 1024)


@pytest.fixture
def half_products(monkeypatch):
    """Products as CUDA has them: operands stay in half precision, sums are float32."""

    def product(a, b, *, out, add=False):
        assert a.dtype == b.dtype
        exact = a.to(out.dtype) @ b.to(out.dtype)
        return out.add_(exact) if add else out.copy_(exact)

    monkeypatch.setattr(tiles, "half_products", lambda hidden, weight: hidden.itemsize == 2)
    monkeypatch.setattr(tiles, "product", product)


def config_of(loss_type, **options):
    settings = {"max_completion_length": 13, **SETTINGS[loss_type], **options}
    return PolicyLossConfig(loss_type=loss_type, **settings)


def problem(rows, vocab, hidden=8, *, device, dtype=torch.float32, spread=3.0, sft=False):
    """([hidden, weight, bias], targets, what is given of each token)."""
    shape = rows if isinstance(rows, tuple) else (rows,)
    x = torch.randn(*shape, hidden, device=device).to(dtype)
    weight = torch.randn(vocab, hidden, device=device).mul_(spread * hidden**-0.5).to(dtype)
    bias = torch.randn(vocab, device=device).to(dtype)
    targets = torch.randint(vocab, shape, device=device)
    logp = linear_logp_ref(x, weight, targets, bias=bias).logp
    near = [logp + torch.randn(shape, device=device).to(logp.dtype) * 0.5 for _ in range(3)]
    advantage = torch.randn(shape, device=device).to(logp.dtype)
    advantage.view(-1)[::5] = 0.0
    given = {"old_logp": near[0], "advantage": advantage, "ref_logp": near[1]}
    given |= {"sampler_logp": near[2]}
    if sft:
        given = {"old_logp": None, "advantage": None, "ref_logp": near[1]}
    return [x, weight, bias], targets, given


def call(inputs, targets, given, *, op=policy_head, **options):
    hidden, weight, *bias = inputs
    bias = bias[0] if bias else None
    rest = {k: v for k, v in given.items() if k not in ("old_logp", "advantage")}
    return op(
        hidden, weight, targets, given["old_logp"], given["advantage"], bias=bias, **rest, **options
    )


def slopes(loss, leaves):
    return torch.autograd.grad(loss, leaves, torch.tensor(UPSTREAM, dtype=loss.dtype).to(loss))


def leaves_of(inputs):
    return [x.detach().clone().requires_grad_() for x in inputs]


def lift(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def truth_of(inputs, targets, given, *, weights, **options):
    """Loss, gradients and metrics of the definition in float64."""
    exact = leaves_of([x.double() for x in inputs])
    wide = {name: lift(x) for name, x in given.items()}
    options = {name: lift(x) for name, x in options.items()}
    out = call(exact, targets, wide, op=policy_head_ref, weights=weights.double(), **options)
    return out, slopes(out.loss, exact)


def judge(inputs, targets, given, *, impl, weights=None, rtol=2e-5, **options):
    """Ours against float64: each gradient within rtol of its largest element, metrics too."""
    config = options.get("config", PolicyLossConfig())
    counted = targets != options.get("ignore_index", -100)
    counted &= options.get("mask", torch.ones_like(counted))
    if weights is None:
        weights = aggregation_weights(counted, config, num_items=7, dtype=torch.float64)
        ours_options = {"num_items": 7}
    else:
        ours_options = {"weights": weights}
    keep = {"budget": options.pop("budget", 12)}
    truth, expected = truth_of(inputs, targets, given, weights=weights, **options)
    leaves = leaves_of(inputs)
    ours = call(
        leaves, targets, given,
        impl=impl, memory_budget_mb=keep["budget"], **ours_options, **options,
    )  # fmt: skip
    assert ours.loss.item() == pytest.approx(truth.loss.item(), rel=rtol, abs=rtol)
    for got, want, x in zip(slopes(ours.loss, leaves), expected, inputs, strict=True):
        assert got.dtype == x.dtype
        error = (got.double() - want).abs().max()
        assert error <= rtol * want.abs().max() + 1e-12, f"{error} of {want.abs().max()}"
    for name, got, want in zip(ours.metrics._fields, ours.metrics, truth.metrics, strict=True):
        assert got.item() == pytest.approx(want.item(), rel=rtol, abs=rtol), name
    return ours


def products_flops(run):
    """FLOPs of the matrix products inside run()."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_flops=True) as profile:
        run()
    events = [e for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
    return sum(event.flops for event in events)


def flops_of(inputs, targets, given, *, wanted=(0, 1), **options):
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    return products_flops(lambda: call(leaves, targets, given, **options).loss.backward())


@pytest.mark.parametrize(
    "extra", [{}, {"beta": 0.2}, {"beta": 0.2, "kl_estimator": "k2", "entropy_coef": 0.3}], ids=str
)
@pytest.mark.parametrize("loss_type", SETTINGS)
def test_matches_float64(impl, loss_type, extra, device, small_tiles):
    config = config_of(
        loss_type, importance_sampling_clip_max=1.3, **extra | {"aggregation": "token_mean"}
    )
    inputs, targets, given = problem(21, 130, device=device, sft=loss_type == "sft")
    judge(inputs, targets, given, impl=impl, config=config)


BUDGETS = {4: "a row or two per chunk", 16: "some", 4096: "all rows at once"}  # KiB


@pytest.mark.parametrize("budget", BUDGETS, ids=BUDGETS.get)
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 129), (19, 300)], ids=str)
def test_ragged_shapes_and_budgets(impl, shape, budget, device, small_tiles):
    inputs, targets, given = problem(*shape, device=device)
    judge(inputs, targets, given, impl=impl, budget=budget)


@pytest.mark.parametrize("loss_type", ["ppo", "grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("form", ["padded", "bounds", "ids"])
def test_aggregations(impl, loss_type, form, device, small_tiles):
    """Three sequences, the second of them ignored as a whole; and micro-batches of sequences."""
    config = config_of(loss_type)
    inputs, targets, given = problem((3, 7), 130, device=device)
    lengths = torch.tensor([7, 3, 5], device=device)
    valid = torch.arange(7, device=device) < lengths[:, None]
    targets[1] = -100
    targets[0, 3] = -100
    ids = torch.arange(3, device=device)[:, None].expand(3, 7)
    options = {"config": config, "mask": valid}
    weights = aggregation_weights(
        valid & (targets != -100), config, sequence_ids=ids, num_sequences=3, dtype=torch.float64
    )
    if form != "padded":
        inputs[0], targets, weights = inputs[0][valid], targets[valid], weights[valid]
        given = {name: x[valid] for name, x in given.items()}
        options = {"config": config}
    flat = inputs[0].flatten(0, -2), *inputs[1:]
    flat_given = {name: x.flatten() for name, x in given.items()}
    flat_mask = {} if form != "padded" else {"mask": valid.flatten()}
    truth, expected = truth_of(
        flat, targets.flatten(), flat_given, weights=weights.flatten(), config=config, **flat_mask
    )
    if form == "bounds":
        options["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    if form == "ids":
        options["sequence_ids"] = ids[valid].to(torch.int32)
    leaves = leaves_of(inputs)
    out = call(leaves, targets, given, impl=impl, memory_budget_mb=6, **options)
    assert out.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5, abs=1e-6)
    for got, want in zip(slopes(out.loss, leaves), expected, strict=True):
        torch.testing.assert_close(got.double(), want.view(got.shape), rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up(impl, device, small_tiles):
    inputs, targets, given = problem(40, 130, device=device)
    whole = call(inputs, targets, given, impl=impl, num_items=40).loss
    parts = [
        call(
            [inputs[0][part], *inputs[1:]], targets[part],
            {name: x[part] for name, x in given.items()}, impl=impl, num_items=40,
        ).loss
        for part in (slice(0, 7), slice(7, 8), slice(8, 40))
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("bonus", [0.0, 0.2])
@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per row"])
def test_temperature_softcap_and_scale(impl, per_row, bonus, device, small_tiles):
    inputs, targets, given = problem(20, 150, device=device)
    options = {"config": config_of("ppo", beta=0.1, entropy_coef=bonus, aggregation="token_mean")}
    options["temperature"] = torch.rand(20, device=device) + 0.4 if per_row else 1.7
    judge(inputs, targets, given, impl=impl, logit_scale=0.6, **options)
    judge(inputs, targets, given, impl=impl, softcap=4.0, **options)
    judge(inputs, targets, given, impl=impl, logit_scale=2.5, softcap=6.0, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(impl, dtype, device, small_tiles):
    impl = "torch" if dtype == torch.float64 else impl
    inputs, targets, given = problem(20, 150, device=device, dtype=dtype)
    rtol = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-12}[dtype]
    ours = judge(inputs, targets, given, impl=impl, rtol=rtol, config=config_of("dapo", beta=0.1))
    assert ours.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bonus", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 150), (3, 5)], ids=str)
@pytest.mark.usefixtures("small_tiles", "half_products")
def test_half_products_share_the_tiles(impl, shape, dtype, bonus, softcap, device):
    """A tile of the gradient has half the bytes of one of logits, and of 15 elements 30."""
    impl = "torch" if impl == "auto" else impl
    inputs, targets, given = problem(*shape, device=device, dtype=dtype)
    given["advantage"][5:20] = 0.0
    config = config_of("dapo", beta=0.1, entropy_coef=bonus)
    rtol = 2e-3 if dtype == torch.float16 else 1.5e-2
    judge(inputs, targets, given, impl=impl, rtol=rtol, config=config, softcap=softcap)


def head_of(vocab, hidden, device):
    """A head of bfloat16 of which nothing is allocated."""
    with FakeTensorMode():
        rows = torch.empty(0, hidden, dtype=torch.bfloat16, device=device)
        weight = torch.empty(vocab, hidden, dtype=torch.bfloat16, device=device)
        return tiles.Head.of(rows, weight, None)


@pytest.mark.parametrize("budget", [64, 512, 1024, 2384, 8192])
@pytest.mark.parametrize("rows", [16_384, 1_000_000])
def test_chunks_on_cuda_are_whole_blocks_of_cublas(impl, rows, budget):
    """An 8B model's head; 64 MiB hold fewer rows of logits than a block."""
    vocab, hidden = 151_936, 4096
    plan = policy_pass.Plan.of(rows, 0, head_of(vocab, hidden, "cuda"), 1, 2, budget << 20)
    chunks = -(-rows // plan.height)
    assert plan.height % 128 == 0 or (budget == 64 and plan.height > 64)
    assert plan.height - (rows - (chunks - 1) * plan.height) < 128 * chunks
    row = 4 * (vocab + 3 * hidden)
    tile = min(tiles.CUDA_TILE_BYTES, budget << 18)
    assert plan.height * row + tile <= budget << 20
    fewer = rows / (chunks - 1) + 128  # rows of a chunk, were there one chunk less
    assert fewer * row > (budget << 20) - tiles.CUDA_TILE_BYTES
    assert tile >= 2 * plan.width * max(plan.height, hidden) > tile / 2  # or a cast part
    count = -(-vocab // plan.width)
    assert plan.width % 128 == 0
    assert plan.width - (vocab - (count - 1) * plan.width) < 128 * count
    assert impl


def test_tiles_of_half_products_are_twice_as_wide(impl):
    head, rows = head_of(151_936, 4096, "cuda"), 16_384
    kind = policy_pass.pt.Kind.of(config_of("dapo"))
    needs = policy_pass.Needs(hidden=True, weight=True, bias=False)
    options = policy_pass.Options(kind, tiles.Cap(1.0, None), needs, 2384, "triton")
    with FakeTensorMode():
        hidden = torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda")
        query = policy_pass.rs.Query(torch.empty(rows, 1), torch.empty(rows, device="cuda"))
        order = policy_pass._Order(None, rows, rows)
        work = policy_pass._Pass(hidden, head, query, None, options, order)
    assert work.plan == policy_pass.Plan.of(rows, 0, head, 1, 2, 2384 << 20)
    assert [buffer.nbytes for buffer in work.buffers] == [work.plan.tile_bytes(2, 4)]
    assert impl


def test_chunks_without_gradient_on_cuda_are_tall(impl):
    plan = policy_pass.Plan.of(0, 50_000, head_of(151_936, 4096, "cuda"), 1, 2, 2384 << 20)
    assert plan.forward_height == 12_500  # four of at most 16,384
    assert plan.forward_width % 128 == 0
    assert 4 * plan.forward_height * plan.forward_width > tiles.CUDA_TILE_BYTES / 2
    assert impl


def test_chunks_on_a_cpu_are_as_tall_as_needed(impl):
    plan = policy_pass.Plan.of(301, 0, head_of(1000, 64, "cpu"), 1, 4, 88 << 20)
    assert plan.height == 301
    assert impl


def test_a_budget_below_one_row_leaves_one_row(impl):
    head = head_of(2**20, 64, "cpu")
    plans = [policy_pass.Plan.of(9, 9, head, 2, 4, 1 << 20)]
    plans += [policy_pass.Plan.whole_rows(9, 9, head, 3, 1 << 20)]
    assert [(plan.height, plan.forward_height) for plan in plans] == [(1, 1)] * 2
    assert impl


def test_float16_gradients_neither_underflow_nor_overflow(impl, device, small_tiles):
    """As under loss scaling: 1 / num_items and the upstream meet in float32."""
    inputs, targets, given = problem(64, 40, device=device, dtype=torch.float16)
    inputs = [inputs[0] * 300, inputs[1] / 300]
    leaves = leaves_of(inputs)
    given["advantage"] = given["advantage"] * 100
    options = {"impl": impl, "memory_budget_mb": 6, "config": config_of("reinforce")}
    out = call(leaves, targets, given, num_items=1e9, **options)
    grads = torch.autograd.grad(out.loss, leaves, torch.full((), 2.0**16, device=device))
    weights = torch.full((64,), 1e-9, dtype=torch.float64, device=device)
    _, expected = truth_of(inputs, targets, given, weights=weights, config=options["config"])
    for got, want in zip(grads, expected, strict=True):
        want = want * 2.0**16 / UPSTREAM
        assert (got.double() - want).abs().max() <= 2e-3 * want.abs().max() + 6e-8


def test_float32_hidden_with_bfloat16_head(impl, device, small_tiles):
    inputs, targets, given = problem(20, 150, device=device)
    inputs[1] = inputs[1].bfloat16()
    judge(inputs, targets, given, impl=impl, rtol=5e-3)


@pytest.mark.parametrize("gap", [12.0, 25.0])
def test_peaked_softmax_keeps_relative_precision(impl, gap, device, small_tiles):
    """d loss / d bias is the gradient of the logits of one row."""
    hidden = torch.randn(1, 8, device=device)
    weight = torch.randn(400, 8, device=device).mul_(0.2)
    bias = torch.zeros(400, device=device)
    bias[260] = gap
    logits = (hidden.double() @ weight.double().T + bias)[0]
    e = (logits - logits[260]).exp()
    rest = e[torch.arange(400, device=device) != 260].sum()
    expected = e / (1 + rest)
    expected[260] = -rest / (1 + rest)
    loss, _ = policy_head(
        hidden, weight, torch.tensor([260], device=device), None, None,
        bias=bias.requires_grad_(), config=PolicyLossConfig(loss_type="sft"),
        impl=impl, memory_budget_mb=8,
    )  # fmt: skip
    d_bias = torch.autograd.grad(loss, bias)[0]
    assert float(((d_bias.double() - expected) / expected).abs().max()) < 3e-5
    assert loss.item() == pytest.approx(rest.log1p().item(), rel=3e-5)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_very_negative_and_very_large_logits(impl, offset, device, small_tiles):
    inputs, targets, given = problem(9, 150, device=device)
    inputs = [(x * 8).round() / 8 for x in inputs]  # so that their sums are exact
    given = {name: x for name, x in given.items() if name != "ref_logp"}
    given["old_logp"] = linear_logp_ref(*inputs[:2], targets, bias=inputs[2]).logp + 0.1
    inputs[2] += offset
    judge(inputs, targets, given, impl=impl)


def test_masked_vocabulary(impl, device, small_tiles):
    inputs, targets, given = problem(20, 300, device=device)
    inputs[2][:140] = -torch.inf  # whole tiles and a part
    targets = torch.randint(140, 300, (20,), device=device)
    config = config_of("ppo", entropy_coef=0.2, aggregation="token_mean")
    leaves = leaves_of(inputs)
    options = {"config": config, "num_items": 7, "impl": impl, "memory_budget_mb": 6}
    loss, metrics = call(leaves, targets, given, **options)
    short = leaves_of([inputs[0], inputs[1][140:], inputs[2][140:]])
    expected = call(short, targets - 140, given, **options | {"impl": "torch"})
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(metrics.entropy, expected.metrics.entropy)
    for got, want in zip(slopes(loss, leaves), slopes(expected.loss, short), strict=True):
        if len(got) == 300:
            assert (got[:140] == 0).all()
        torch.testing.assert_close(got[len(got) - len(want) :], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", BUDGETS, ids=BUDGETS.get)
def test_ignored_rows_leak_nothing_and_cost_nothing(impl, budget, device, small_tiles):
    inputs, targets, given = problem(40, 130, device=device)
    mask = torch.rand(40, device=device) < 0.5
    mask[16:32] = False
    targets[3:6] = -1
    counted = mask & (targets != -1)
    inputs[0][~counted] = torch.nan
    targets[~mask] = 7_000_000  # out of range where it does not count
    for x in given.values():
        x[~counted] = torch.nan
    temperature = torch.ones(40, device=device).masked_fill_(~counted, torch.nan)
    options = {"impl": impl, "memory_budget_mb": budget, "temperature": temperature}
    options |= {"mask": mask, "ignore_index": -1, "num_items": 7}
    leaves = leaves_of(inputs)
    loss, metrics = call(leaves, targets, given, **options)
    assert metrics.num_tokens.item() == counted.sum()
    grads = slopes(loss, leaves)
    assert (grads[0][~counted] == 0).all()
    few = [inputs[0][counted], *inputs[1:]]
    few_given = {name: x[counted] for name, x in given.items()}
    weights = torch.full((len(few[0]),), 1 / 7, device=device)
    truth, expected = truth_of(few, targets[counted], few_given, weights=weights)
    assert loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    for got, want in zip((grads[0][counted], *grads[1:]), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_dead_rows_leave_before_the_products(impl, device, small_tiles):
    """Of 64 rows 16 are ignored, 16 have advantage 0, 8 are clipped: 48 + 2 x 24 rows of work."""
    inputs, targets, given = problem(64, 256, device=device)
    logp = linear_logp_ref(inputs[0], inputs[1], targets).logp
    given = {"old_logp": logp.clone(), "advantage": torch.ones(64, device=device)}
    targets[:16] = -100
    given["advantage"][16:32] = 0.0
    given["old_logp"][40:48] -= 1.0  # r = e: above the clip
    options = {"impl": impl, "memory_budget_mb": 40}
    unit = 2 * 256 * 8
    assert flops_of(inputs[:2], targets, given, **options) == (48 + 2 * 24) * unit
    assert flops_of(inputs[:2], targets, given, wanted=(0,), **options) == (48 + 24) * unit
    assert flops_of(inputs[:2], targets, given, wanted=(1,), **options) == (48 + 24) * unit
    given["ref_logp"] = logp - 0.1
    config = config_of("dapo", beta=0.1)
    assert flops_of(inputs[:2], targets, given, config=config, **options) == 3 * 48 * unit
    config = config_of("dapo", entropy_coef=0.1)
    assert flops_of(inputs[:2], targets, given, config=config, **options) == 3 * 48 * unit
    with torch.no_grad():
        run = partial(call, leaves_of(inputs[:2]), targets, given, **options)
        assert products_flops(run) == 48 * unit


def test_rows_without_advantage_share_no_chunk_with_the_others(impl, device, small_tiles):
    """A chunk holds 30 rows; only a second chunk would have to add to the weight's gradient."""
    inputs, targets, given = problem(56, 256, device=device)
    given = {"old_logp": given["old_logp"], "advantage": given["advantage"]}
    given["advantage"][::2] = 0.0
    leaves = [inputs[0], inputs[1].requires_grad_()]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call(leaves, targets, given, impl=impl, memory_budget_mb=40)
    assert "aten::addmm" not in {event.key for event in profile.key_averages()}


def test_whole_rows_of_a_chunk_make_three_products(impl, device, small_tiles):
    if device.type != "cpu" or impl != "auto":
        pytest.skip("the others cut the vocabulary into tiles")
    inputs, targets, given = problem(20, 256, device=device)
    given = {"old_logp": given["old_logp"], "advantage": torch.ones(20)}
    leaves = leaves_of(inputs[:2])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call(leaves, targets, given, impl=impl, memory_budget_mb=40)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::mm"] == 3
    assert "aten::addmm" not in counts


def test_one_dead_row_of_many_stays_where_moving_the_others_costs_more(impl, device):
    inputs, targets, _ = problem(64, 256, device=device)
    given = {"old_logp": linear_logp_ref(*inputs[:2], targets).logp, "advantage": targets + 1.0}
    given["old_logp"][7] -= 1.0  # above the clip
    rows = 64 if impl == "torch" else 63  # the others compact as they go
    flops = flops_of(inputs[:2], targets, given, impl=impl)
    assert flops == (64 + 2 * rows) * 2 * 256 * 8


def test_all_rows_clipped(impl, device):
    inputs, targets, _ = problem(40, 130, device=device)
    given = {"old_logp": linear_logp_ref(*inputs[:2], targets).logp - 1.0}
    given["advantage"] = torch.ones(40, device=device)
    leaves = leaves_of(inputs[:2])
    loss, metrics = call(leaves, targets, given, impl=impl)
    assert loss.item() == pytest.approx(-1.2)
    assert metrics.clip_ratio_high.item() == 1
    assert metrics.num_live.item() == 0
    assert all(dx.eq(0).all() for dx in slopes(loss, leaves))


def test_compaction_changes_nothing(impl, device, small_tiles):
    """A row of advantage 0 or a clipped one, dropped or carried along with a gradient of 1e-30."""
    inputs, targets, given = problem(40, 160, device=device)
    given.pop("ref_logp")
    options = {"impl": impl, "memory_budget_mb": 20, "num_items": 7}
    leaves = leaves_of(inputs)
    dropped = slopes(call(leaves, targets, given, **options).loss, leaves)
    given["ref_logp"] = given["old_logp"]
    config = PolicyLossConfig(beta=1e-30, kl_estimator="k1")
    loss, metrics = call(leaves, targets, given, config=config, **options)
    assert metrics.num_live.item() == 40
    for got, want in zip(slopes(loss, leaves), dropped, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_frozen_inputs_skip_their_products(impl, wanted, device, small_tiles):
    inputs, targets, given = problem(32, 256, device=device, sft=True)
    options = {"config": config_of("sft"), "num_items": 7, "impl": impl, "memory_budget_mb": 30}
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    products = 1 + (0 in wanted) + (1 in wanted)
    flops = products_flops(lambda: call(leaves, targets, given, **options))
    assert flops == products * 2 * 32 * 256 * 8
    loss = call(leaves, targets, given, **options).loss
    weights = torch.full((32,), 1 / 7, device=device)
    _, expected = truth_of(inputs, targets, given, weights=weights, config=options["config"])
    grads = slopes(loss, [leaves[i] for i in wanted])
    for got, want in zip(grads, [expected[i] for i in wanted], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_nothing_is_computed_for_a_gradient_that_nobody_wants(impl, device, small_tiles):
    inputs, targets, given = problem(20, 300, device=device)
    leaves = leaves_of(inputs)
    flops = products_flops(lambda: call(inputs, targets, given, impl=impl))
    assert flops == 2 * 20 * 300 * 8
    with torch.no_grad():
        loss, metrics = call(leaves, targets, given, impl=impl, num_items=7)
    assert not loss.requires_grad
    again, more = call(leaves, targets, given, impl=impl, num_items=7)
    torch.testing.assert_close(loss, again.detach())
    assert metrics.num_live.item() == more.num_live.item()


@pytest.mark.parametrize("rows", [(0,), (2, 0), ()], ids=str)
def test_no_rows_and_one_row_without_axis(impl, rows, device):
    inputs, targets, given = problem(rows, 40, device=device)
    leaves = leaves_of(inputs)
    loss, metrics = call(leaves, targets, given, impl=impl)
    grads = slopes(loss, leaves)
    for x, dx in zip(leaves, grads, strict=True):
        assert dx.shape == x.shape
        assert dx.isfinite().all()
    if rows == ():
        assert metrics.num_tokens.item() == 1
        return
    assert loss.item() == 0.0
    assert torch.stack(list(metrics)).eq(0).all()
    assert all(dx.eq(0).all() for dx in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss_type", ["dapo", "sft"])
def test_all_rows_ignored(impl, loss_type, dtype, device, small_tiles):
    inputs, targets, given = problem(20, 300, device=device, dtype=dtype, sft=loss_type == "sft")
    leaves = leaves_of(inputs)
    config = config_of(loss_type)
    loss, metrics = call(leaves, targets.fill_(-100), given, config=config, impl=impl)
    assert loss.item() == 0.0
    assert torch.stack(list(metrics)).eq(0).all()
    assert all(dx.eq(0).all() for dx in slopes(loss, leaves))


@pytest.mark.parametrize("bad", [-1, 300])
def test_target_outside_the_vocabulary(impl, bad, device):
    inputs, targets, given = problem(4, 300, device=device)
    targets[2] = bad
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"policy_head: targets .*\[0, 300\), got {bad}"):
            call(inputs, targets, given, impl=impl)
        return
    assert call(inputs, targets, given, impl=impl).loss.isnan()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("loss_type", SETTINGS)
def test_a_row_of_nan_that_counts_makes_its_gradient_nan(impl, loss_type, bad, device):
    inputs, targets, given = problem(12, 130, device=device, sft=loss_type == "sft")
    inputs[0][4] = bad
    targets[4] = 3
    config = config_of(loss_type, aggregation="token_mean")
    loss, _ = call(leaves := leaves_of(inputs), targets, given, config=config, impl=impl)
    dx, *others = slopes(loss, leaves)
    assert loss.isnan()
    assert dx[4].isnan().all()
    assert dx[torch.arange(12) != 4].isfinite().all()
    assert all(grad.isnan().any() for grad in others)


def test_strided_hidden_and_int32_targets(impl, device, small_tiles):
    inputs, targets, given = problem((3, 20), 200, device=device)
    expected = call(inputs, targets, given, impl=impl)
    hidden = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    views = [hidden, inputs[1].T.contiguous().T, inputs[2]]
    turned = {name: x.T.contiguous().T for name, x in given.items()}
    out = call(views, targets.to(torch.int32).T.contiguous().T, turned, impl=impl)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    buffer = torch.empty(1 + inputs[1].numel(), device=device)
    shifted = buffer[1:].view_as(inputs[1]).copy_(inputs[1])
    out = call([inputs[0], shifted, inputs[2]], targets, given, impl=impl)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", BUDGETS, ids=BUDGETS.get)
def test_same_bits_on_every_run(impl, budget, device, small_tiles):
    inputs, targets, given = problem(19, 300, device=device)
    results = []
    for _ in range(2):
        leaves = leaves_of(inputs)
        out = call(leaves, targets, given, impl=impl, memory_budget_mb=budget)
        results.append([out.loss, *out.metrics, *slopes(out.loss, leaves)])
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)


def test_upstream_scalars_and_untouched_inputs(impl, device, small_tiles):
    inputs, targets, given = problem(20, 300, device=device)
    before = [x.clone() for x in (*inputs, targets, *given.values())]
    leaves = [x.requires_grad_() for x in inputs]
    out = call(leaves, targets, given, impl=impl, memory_budget_mb=30)
    one = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    kept = [g.clone() for g in one]
    for g in one:
        g.zero_()  # the caller's to change
    three = torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
    for first, second in zip(kept, three, strict=True):
        torch.testing.assert_close(3 * first, second)
    squared = torch.autograd.grad(out.loss.square(), leaves)
    for first, second in zip(kept, squared, strict=True):
        torch.testing.assert_close(2 * out.loss.detach() * first, second)
    for now, then in zip((*inputs, targets, *given.values()), before, strict=True):
        assert torch.equal(now, then)


def test_second_derivative_is_refused(impl, device):
    inputs, targets, given = problem(4, 30, device=device)
    leaves = leaves_of(inputs)
    loss = call(leaves, targets, given, impl=impl).loss
    (slope,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    assert not slope.requires_grad
    loss = call(leaves, targets, given, impl=impl).loss
    (slope,) = torch.autograd.grad(loss.square(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(slope.sum(), leaves[0])


def test_equals_policy_loss_of_linear_logp(impl, device, small_tiles):
    inputs, targets, given = problem(40, 300, device=device)
    config = config_of("ppo", beta=0.1, entropy_coef=0.05, aggregation="token_mean")
    leaves = leaves_of(inputs)
    logp, entropy = linear_logp(
        *leaves[:2], targets, bias=leaves[2], temperature=0.8, return_entropy=True, impl=impl
    )
    phased = policy_loss(logp, **given, entropy=entropy, config=config, impl=impl)
    fused = call(leaves, targets, given, config=config, temperature=0.8, impl=impl)
    torch.testing.assert_close(fused.loss, phased.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.metrics, phased.metrics, rtol=1e-5, atol=1e-5)
    for got, want in zip(slopes(fused.loss, leaves), slopes(phased.loss, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_backward_in_a_bare_thread(impl, device):
    inputs, targets, given = problem(5, 30, device=device)
    leaves = leaves_of(inputs)
    loss = call(leaves, targets, given, impl=impl).loss
    expected = torch.autograd.grad(loss, leaves[0], retain_graph=True)[0]
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(leaves[0].grad, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "wanted", "budget_mb"),
    [
        ((256, 16_384, 8), torch.float32, (0, 1), 4),  # logits would take 16 MiB
        ((256, 16_384, 8), torch.float32, (0, 1), 12),
        ((64, 8192, 256), torch.float32, (0, 1), 2),  # and here a gradient 8 MiB
        ((64, 8192, 256), torch.bfloat16, (0,), 1),  # or a cast of the weight
        ((232, 8192, 256), torch.bfloat16, (0,), 4),  # of which a part is cast at a time
        ((2048, 256, 1024), torch.float32, (0, 1), 8),  # and copies of hidden states most
        ((2800, 256, 1024), torch.bfloat16, (1,), 4),  # which, cast at once, would take 11 MiB
    ],
    ids=str,
)
@pytest.mark.parametrize("bonus", [0.0, 0.1])
@pytest.mark.parametrize("dead", [False, True])
def test_workspace_stays_within_the_budget(
    impl, shape, dtype, wanted, budget_mb, bonus, dead, device
):
    if device.type != "cpu" or impl == "triton":
        pytest.skip("the CUDA allocator is asked in the bench")
    inputs, targets, given = problem(*shape, device=device, dtype=dtype)
    given["advantage"] = torch.ones_like(given["advantage"])  # all rows live, in their order
    given["advantage"][::2] *= not dead
    leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(inputs[:2])]
    config = config_of("dapo", entropy_coef=bonus)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = call(leaves, targets, given, config=config, impl=impl, memory_budget_mb=budget_mb)
        kept = torch.autograd.grad(out.loss, [leaves[i] for i in wanted])
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    gradients = sum(4 * x.numel() for x in kept)  # sums are float32
    assert peak <= max(gradients + budget_mb * 2**20, 2 * gradients) + 2**18


@pytest.mark.parametrize("full", [False, True])
def test_registration(impl, full, device):
    inputs, targets, given = problem((2, 3), 11, device=device)
    leaves = leaves_of(inputs)
    temperature = torch.rand(2, 3, device=device) + 0.5
    names = ("old_logp", "advantage", "ref_logp", "sampler_logp")
    rest = [given[name] if full else None for name in names]
    weights, counted = torch.rand(2, 3, device=device), targets != 4
    numbers = [0.8, 1.2, 3.0, 0.1 if full else 0.0, 0.2, 1.0, 1.05, 2.0]
    kind = ("ppo" if full else "sft", "k3", numbers)
    args = (*leaves, targets, temperature, *rest, weights, counted, *kind, 0.7)
    rows = choose_rows("policy_head", impl, leaves[0])
    tail = (None, [True, full, True], 8, rows)
    leaves[1].requires_grad_(full)
    torch.library.opcheck(torch.ops.tercet.policy_head.default, (*args, *tail))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(impl, dynamic, device):
    config = config_of("ppo", beta=0.1, aggregation="token_mean")

    def loss(hidden, weight, targets, given):
        out = call([hidden * 2, weight], targets, given, config=config, temperature=0.7, impl=impl)
        return out.loss * out.metrics.num_tokens

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 6):
        (hidden, weight, _), targets, given = problem(rows, 40, device=device)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        expected = torch.autograd.grad(loss(*leaves, targets, given), leaves)
        ours = torch.autograd.grad(compiled(*leaves, targets, given), leaves)
        torch.testing.assert_close(ours, expected)


def test_gradcheck(impl, device, small_tiles):
    inputs, targets, given = problem(5, 7, hidden=3, device=device, dtype=torch.float64)
    config = config_of("ppo", beta=0.2, entropy_coef=0.1, aggregation="token_mean")
    temperature = torch.rand(5, dtype=torch.float64, device=device) + 0.5
    options = {"config": config, "temperature": temperature, "softcap": 5.0, "impl": "torch"}

    def loss(*leaves):
        return call(leaves, targets, given, memory_budget_mb=1, **options).loss

    assert torch.autograd.gradcheck(loss, tuple(leaves_of(inputs)))
    assert impl


@pytest.mark.gpu
def test_matches_float64_in_bfloat16_on_a_gpu(impl):
    inputs, targets, given = problem(5000, 32_001, 256, device="cuda", dtype=torch.bfloat16)
    targets[::3] = -100
    for budget in (64, 2048):
        options = {"config": config_of("dapo", beta=0.1), "budget": budget}
        judge(inputs, targets, given, impl=impl, rtol=2e-2, **options)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits_on_a_gpu(impl):
    """The last rows of a chunk of 2^31 + logits have the gradient that they have alone."""
    inputs, targets, given = problem(16_400, 131_072, 64, device="cuda", dtype=torch.bfloat16)
    options = {"impl": impl, "num_items": 7, "memory_budget_mb": 12_000}
    leaves = leaves_of(inputs[:2])
    whole = torch.autograd.grad(call(leaves, targets, given, **options).loss, leaves[0])[0]
    last = slice(16_300, None)
    few = leaves_of([inputs[0][last], inputs[1]])
    short = {name: x[last] for name, x in given.items()}
    alone = torch.autograd.grad(call(few, targets[last], short, **options).loss, few[0])[0]
    torch.testing.assert_close(whole[last], alone, rtol=2e-2, atol=1e-4)


@pytest.mark.gpu
def test_cuda_graph_replays_the_step(impl):
    inputs, targets, given = problem(64, 1000, device="cuda")
    targets[3] = -100
    inputs[0][3] = torch.nan
    leaves = leaves_of(inputs)

    def step():
        out = call(leaves, targets, given, impl="triton", num_items=7)
        return torch.autograd.grad(out.loss, leaves)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert impl


def test_rejects_a_sharded_weight(impl, device):
    dist = import_module("torch.distributed")
    tensor = import_module("torch.distributed.tensor")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (1,))
        weight = tensor.distribute_tensor(torch.zeros(6, 3), mesh, [tensor.Shard(0)])
        with pytest.raises(TypeError, match=r"weight must be a plain tensor.*weight\.full_tensor"):
            policy_head(torch.zeros(2, 3), weight, torch.zeros(2).long(), None, torch.ones(2))
    finally:
        dist.destroy_process_group()
    assert impl


def test_rejects_a_module(impl):
    head = torch.nn.Linear(3, 6)
    with pytest.raises(TypeError, match=r"got a module Linear; pass its weight, with adapters"):
        policy_head(torch.zeros(2, 3), head, torch.zeros(2).long(), None, torch.ones(2), impl=impl)


def _call(impl, hidden=(2, 3), weight=(6, 3), targets=(2,), advantage=(2,), bias=None, **options):
    settings = options.pop("config", {})
    policy_head(
        torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets).long(), None,
        None if advantage is None else torch.zeros(advantage),
        bias=None if bias is None else torch.zeros(bias),
        config=PolicyLossConfig(**settings), impl=impl, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"hidden": (2, 4)}, ValueError, r"hidden must be \[\*, 3\].*got \(2, 4\)"),
        ({"weight": (0, 3)}, ValueError, r"weight must be \[vocab >= 1, hidden\]"),
        ({"targets": (3,)}, ValueError, r"shape of the rows \(2,\).*got \(3,\)"),
        ({"targets": (2, 1)}, ValueError, r"targets must be \(2,\), got \(2, 1\)"),
        ({"advantage": (1,)}, ValueError, r"advantage must have one value per token"),
        ({"advantage": None}, TypeError, "advantage must be a tensor, got None"),
        ({"mask": torch.ones(2)}, TypeError, r"mask must be bool, got torch.float32"),
        ({"bias": (5,)}, ValueError, r"bias must be \[6\], got \(5,\)"),
        ({"temperature": -1.0}, ValueError, r"temperature must be > 0, got -1\.0"),
        ({"softcap": 0.0}, ValueError, r"softcap must be > 0 and finite, got 0\.0"),
        ({"logit_scale": -1}, ValueError, "logit_scale must be > 0 and finite, got -1"),
        ({"memory_budget_mb": 0}, ValueError, "memory_budget_mb must be >= 1, got 0"),
        ({"memory_budget_mb": 1.5}, TypeError, "memory_budget_mb must be a whole number"),
        ({"config": {"beta": 0.1}}, ValueError, "beta=0.1 needs ref_logp"),
        ({"config": {"loss_type": "sft"}}, ValueError, "'sft' takes no advantage; pass None"),
        ({"config": {"loss_type": "grpo"}}, ValueError, "'sequence_mean' needs cu_seqlens or"),
        ({"num_items": -1}, ValueError, "num_items must be > 0 and finite, got -1"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_rejects(impl, options, error, match):
    with pytest.raises(error, match=f"policy_head: .*{match}"):
        _call(impl, **options)

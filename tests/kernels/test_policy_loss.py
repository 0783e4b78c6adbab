"""policy_loss against numbers worked out by hand and float64 autograd of its definition."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import math
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tercet.kernels import PolicyLossConfig, policy_loss
from tercet.kernels.reference import aggregation_weights, policy_total_ref

pytestmark = pytest.mark.parametrize("impl", ["triton", "torch"])

# ratio, advantage, loss, d loss / d logp, what is cut;  epsilon 0.2, epsilon_high 0.3, delta 3
TABLE = {
    "inside, good": (1.1, 2.0, -2.2, -2.2, None),
    "inside, bad": (1.1, -2.0, 2.2, 2.2, None),
    "too likely, good: clipped above": (1.5, 2.0, -2.6, 0.0, "high"),
    "too likely, bad: not clipped": (1.5, -2.0, 3.0, 3.0, None),
    "too unlikely, good: not clipped": (0.5, 2.0, -1.0, -1.0, None),
    "too unlikely, bad: clipped below": (0.5, -2.0, 1.6, 0.0, "low"),
    "far too likely, bad: dual clip": (4.0, -2.0, 6.0, 0.0, "dual"),
    "far too likely, good: no dual clip": (4.0, 2.0, -2.6, 0.0, "high"),
    "no advantage": (4.0, 0.0, 0.0, 0.0, None),
}
CLIPPED = {"epsilon": 0.2, "epsilon_high": 0.3, "delta": 3.0}
LOGP = -1.0  # in the table

# loss_type -> settings under which every branch of it is met by random tokens
SETTINGS = {
    "ppo": CLIPPED | {"aggregation": "sequence_mean"},
    "grpo": CLIPPED,
    "dr_grpo": {"max_completion_length": 7, "epsilon": 0.3},
    "dapo": {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.2},
    "cispo": {"epsilon_high": 1.2},
    "sapo": {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.4},
    "reinforce": {},
    "sft": {},
}


def tokens(n, *, device, dtype=torch.float32, sft=False):
    """Random log-probs and all that goes with them; every fifth advantage is 0."""
    shape = n if isinstance(n, tuple) else (n,)
    logp = -torch.rand(shape, device=device, dtype=torch.float64) * 4
    near = [logp + torch.randn_like(logp) * 0.5 for _ in range(3)]
    advantage = torch.randn_like(logp)
    advantage.view(-1)[::5] = 0.0
    given = {"entropy": torch.rand_like(logp) * 3, "ref_logp": near[1]}
    if not sft:
        given |= {"old_logp": near[0], "advantage": advantage, "sampler_logp": near[2]}
    return logp.to(dtype), {name: x.to(dtype) for name, x in given.items()}


def call(logp, old_logp=None, advantage=None, **options):
    return policy_loss(logp, old_logp, advantage, **options)


def slopes(loss, *leaves):
    return torch.autograd.grad(loss, leaves, torch.tensor(1.7, dtype=loss.dtype))


def row(impl, ratio, advantage, **config):
    """One token of the given importance ratio: its loss, derivative and metrics."""
    logp = torch.tensor([LOGP], requires_grad=True)
    out = policy_loss(
        logp,
        LOGP - torch.tensor([ratio]).log(),
        torch.tensor([advantage]),
        config=PolicyLossConfig(**config),
        impl=impl,
    )
    return out.loss.item(), torch.autograd.grad(out.loss, logp)[0].item(), out.metrics


@pytest.mark.parametrize("loss_type", ["ppo", "dapo"])
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.usefixtures("on_device")
def test_truth_table(impl, name, loss_type):
    ratio, advantage, loss, gradient, cut = TABLE[name]
    got, slope, metrics = row(impl, ratio, advantage, loss_type=loss_type, **CLIPPED)
    assert got == pytest.approx(loss, rel=1e-6, abs=1e-9)
    assert slope == pytest.approx(gradient, rel=1e-6, abs=1e-9)
    for kind in ("low", "high", "dual"):
        assert getattr(metrics, f"clip_ratio_{kind}").item() == (kind == cut)
    assert metrics.ratio_mean.item() == pytest.approx(ratio, rel=1e-6)
    assert metrics.num_live.item() == (gradient != 0)
    assert metrics.kl_k3.item() == 0.0


@pytest.mark.usefixtures("on_device")
def test_epsilon_high_defaults_to_epsilon(impl):
    assert row(impl, 1.25, 1.0, epsilon=0.2)[0] == pytest.approx(-1.2)
    assert row(impl, 1.25, 1.0, epsilon=0.2, epsilon_high=0.3)[0] == pytest.approx(-1.25)


@pytest.mark.usefixtures("on_device")
def test_without_delta_a_bad_token_is_not_bounded(impl):
    loss, slope, metrics = row(impl, 50.0, -2.0, epsilon=0.2)
    assert loss == pytest.approx(100.0, rel=1e-5)
    assert slope == pytest.approx(100.0, rel=1e-5)
    assert metrics.clip_ratio_dual.item() == 0


@pytest.mark.usefixtures("on_device")
def test_cispo_cuts_the_weight_and_keeps_the_gradient(impl):
    config = {"loss_type": "cispo", "epsilon_high": 2.0}
    loss, slope, metrics = row(impl, 4.0, 1.5, **config)
    assert (loss, slope) == pytest.approx((-2.0 * 1.5 * LOGP, -2.0 * 1.5))
    assert metrics.clip_ratio_high.item() == 1
    loss, slope, metrics = row(impl, 1.5, -2.0, **config)
    assert (loss, slope) == pytest.approx((3.0 * LOGP, 3.0))
    assert metrics.clip_ratio_high.item() == 0


@pytest.mark.usefixtures("on_device")
def test_sapo_by_hand(impl):
    """On-policy the gate is 1/2 and the slope that of REINFORCE; far away it closes."""
    config = {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 2.0}
    config |= {"aggregation": "token_mean"}
    assert row(impl, 1.0, 3.0, **config)[:2] == pytest.approx((-6.0, -3.0))
    assert row(impl, 1.0, -3.0, **config)[:2] == pytest.approx((3.0, 3.0))
    gate = 1 / (1 + math.exp(-2.0))
    loss, slope, _ = row(impl, 3.0, 1.0, **config)
    assert (loss, slope) == pytest.approx((-4 * gate, -4 * gate * (1 - gate) * 3.0), rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "values", "gradient"),
    [
        ("k1", (-math.log(2), math.log(2), 0.0), (1.0, 1.0, 1.0)),
        ("k2", (math.log(2) ** 2 / 2,) * 2 + (0.0,), (-math.log(2), math.log(2), 0.0)),
        ("k3", (2 - math.log(2) - 1, 0.5 + math.log(2) - 1, 0.0), (1 - 2.0, 1 - 0.5, 0.0)),
    ],
)
@pytest.mark.usefixtures("on_device")
def test_kl_by_hand(impl, estimator, values, gradient):
    """Reference twice as likely, half as likely, equal."""
    logp = torch.full((3,), LOGP, requires_grad=True)
    ref = LOGP + torch.tensor([2.0, 0.5, 1.0]).log()
    config = PolicyLossConfig(beta=0.5, kl_estimator=estimator)
    for i in range(3):
        one = slice(i, i + 1)
        loss, metrics = policy_loss(
            logp[one], None, torch.zeros(1), ref_logp=ref[one], config=config, impl=impl
        )
        assert getattr(metrics, f"kl_{estimator}").item() == pytest.approx(values[i], abs=1e-6)
        assert loss.item() == pytest.approx(0.5 * values[i], abs=1e-6)
        slope = torch.autograd.grad(loss, logp)[0][i].item()
        assert slope == pytest.approx(0.5 * gradient[i], abs=1e-6)


@pytest.mark.usefixtures("on_device")
def test_sampler_weight_is_capped_and_spares_the_kl(impl):
    logp = torch.tensor([LOGP, LOGP], requires_grad=True)
    sampler = LOGP - torch.tensor([1.5, 8.0]).log()
    config = PolicyLossConfig(
        loss_type="reinforce", importance_sampling_clip_max=2.0, beta=0.1, kl_estimator="k1"
    )
    loss, metrics = policy_loss(
        logp, None, torch.ones(2),
        sampler_logp=sampler, ref_logp=logp.detach(), config=config, num_items=1, impl=impl,
    )  # fmt: skip
    assert torch.autograd.grad(loss, logp)[0].tolist() == pytest.approx([-1.4, -1.9])
    assert metrics.sampler_ratio_mean.item() == pytest.approx(4.75)
    assert metrics.sampler_ratio_max.item() == pytest.approx(8.0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss_type", SETTINGS)
def test_matches_float64_autograd_of_the_definition(impl, loss_type, estimator, device):
    """Loss, both derivatives and all metrics, with masked tokens that hold NaN."""
    config = PolicyLossConfig(
        loss_type=loss_type, beta=0.2, entropy_coef=0.3, kl_estimator=estimator,
        importance_sampling_clip_max=1.3, **SETTINGS[loss_type],
    )  # fmt: skip
    dtype = torch.float32 if impl == "triton" else torch.float64
    for n in (1, 1024, 1025, 40):
        logp, given = tokens(n, device=device, dtype=dtype, sft=loss_type == "sft")
        mask = torch.rand(n, device=device) < 0.7
        mask[0] = True
        for x in given.values():
            x[~mask] = torch.nan
        cu = torch.tensor([0, 0, min(n, 9), min(n, 20), n], device=device)
        ids = torch.searchsorted(cu[1:], torch.arange(n, device=device), right=True)
        weights = aggregation_weights(
            mask, config, num_items=11, sequence_ids=ids, num_sequences=4, dtype=torch.float64
        )
        leaf, bonus = (x.detach().clone().requires_grad_() for x in (logp, given["entropy"]))
        ours = call(
            leaf, mask=mask, config=config, num_items=11, cu_seqlens=cu, impl=impl,
            **given | {"entropy": bonus},
        )  # fmt: skip
        exact = [x.detach().double().requires_grad_() for x in (leaf, bonus)]
        truth = policy_total_ref(
            exact[0][mask],
            *(given[k][mask].double() if k in given else None for k in ("old_logp", "advantage")),
            weights=weights[mask],
            entropy=exact[1][mask],
            config=config,
            **{k: given[k][mask].double() for k in ("ref_logp", "sampler_logp") if k in given},
        )
        tight = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {}
        torch.testing.assert_close(ours.loss, truth.loss.to(dtype), **tight)
        for got, want in zip(
            slopes(ours.loss, leaf, bonus), slopes(truth.loss, *exact), strict=True
        ):
            torch.testing.assert_close(got, want.to(dtype), **tight)
        loose = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else tight
        for name, got, want in zip(ours.metrics._fields, ours.metrics, truth.metrics, strict=True):
            torch.testing.assert_close(got, want.to(dtype), **loose, msg=lambda m, n=name: n + m)


def test_on_policy_is_reinforce(impl, device):
    logp, given = tokens(6, device=device)
    logp.requires_grad_()
    for config in (PolicyLossConfig(), PolicyLossConfig(loss_type="reinforce")):
        out = policy_loss(logp, None, given["advantage"], config=config, num_items=1, impl=impl)
        assert out.metrics.ratio_mean.item() == 1.0
        assert out.metrics.clip_ratio_high.item() == 0.0
        torch.testing.assert_close(torch.autograd.grad(out.loss, logp)[0], -given["advantage"])


def test_far_ratios_stay_finite(impl, device):
    logp = torch.tensor([-500.0, -1.0], device=device, requires_grad=True)
    old = torch.tensor([-1.0, -500.0], device=device)
    config = PolicyLossConfig(beta=0.1, delta=3.0)
    out = policy_loss(
        logp, old, torch.tensor([1.0, -1.0], device=device),
        ref_logp=old, sampler_logp=old, config=config, impl=impl,
    )  # fmt: skip
    assert torch.stack(list(out.metrics)).isfinite().all()
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, logp)[0].isfinite().all()


def test_a_ratio_beyond_the_cut_has_no_gradient(impl, device):
    logp = torch.tensor([-500.0, -1.0, -1.0], device=device, requires_grad=True)
    old = torch.tensor([-1.0, -500.0, -2.0], device=device)
    advantage = torch.tensor([1.0, -1.0, -1.0], device=device)  # none of them is clipped
    out = policy_loss(logp, old, advantage, config=PolicyLossConfig(), num_items=1, impl=impl)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, math.e], device=device))


def test_nan_of_a_token_stays_with_it(impl, device):
    logp = torch.tensor([torch.nan, -1.0], device=device, requires_grad=True)
    old = torch.tensor([-1.0, -1.1], device=device)
    out = policy_loss(logp, old, torch.ones(2, device=device), impl=impl)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.isnan()
    assert gradient.isnan().tolist() == [True, False]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_padded_packed_and_split_calls_agree(impl, aggregation, device):
    """Three sequences, one of them masked as a whole, padded, packed and in two calls."""
    config = PolicyLossConfig(
        loss_type="ppo", aggregation=aggregation, max_completion_length=10, epsilon=0.1
    )
    logp, given = tokens((3, 6), device=device)
    lengths = torch.tensor([6, 3, 4], device=device)
    valid = torch.arange(6, device=device) < lengths[:, None]
    mask = valid.clone()
    mask[0, 2] = mask[1] = False
    given = {name: given[name] for name in ("old_logp", "advantage")}
    padded = call(logp, mask=mask, config=config, impl=impl, **given)
    packed = {name: x[valid] for name, x in given.items()}
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    options = {"config": config, "impl": impl}
    by_bounds = call(logp[valid], mask=mask[valid], cu_seqlens=cu, **packed, **options)
    ids = torch.arange(3, device=device).repeat_interleave(lengths)
    by_ids = call(logp[valid], mask=mask[valid], sequence_ids=ids, **packed, **options)
    count = 9 if aggregation == "token_mean" else 2
    parts = [
        call(
            logp[i], mask=mask[i], num_items=count,
            **{name: x[i] for name, x in given.items()}, **options,
        ).loss
        for i in ([0], [1, 2])
    ]  # fmt: skip
    per_token = torch.where(mask, logp - given["old_logp"], 0.0).exp()
    floor, roof = per_token * given["advantage"], per_token.clamp(0.9, 1.1) * given["advantage"]
    terms = torch.where(mask, -torch.minimum(floor, roof), 0.0)
    by_hand = {
        "token_mean": terms.sum() / 9,
        "sequence_mean": (terms[0].sum() / 5 + terms[2].sum() / 4) / 2,
        "constant": terms.sum() / (2 * 10),
    }[aggregation]
    for loss in (padded.loss, by_bounds.loss, by_ids.loss, sum(parts)):
        torch.testing.assert_close(loss, by_hand)


def test_weights_stand_in_for_the_aggregation(impl, device):
    logp, given = tokens(20, device=device)
    logp.requires_grad_()
    weights = torch.rand(20, device=device)
    config = PolicyLossConfig(loss_type="reinforce")
    out = policy_loss(logp, None, given["advantage"], weights=weights, config=config, impl=impl)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, logp)[0], -weights * given["advantage"]
    )


def test_only_logp_and_entropy_have_a_gradient(impl, device):
    logp, given = tokens((4, 3), device=device, dtype=torch.bfloat16)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    config = PolicyLossConfig(beta=0.1, entropy_coef=0.1)
    loss, metrics = call(logp.requires_grad_(), config=config, impl=impl, **leaves)
    assert loss.dtype == torch.float32
    assert not any(x.requires_grad for x in metrics)
    loss.backward()
    assert logp.grad.dtype == leaves["entropy"].grad.dtype == torch.bfloat16
    for name in ("old_logp", "advantage", "ref_logp", "sampler_logp"):
        assert leaves[name].grad is None


def test_inputs_stay_and_runs_agree(impl, device):
    logp, given = tokens(3000, device=device)
    before = [x.clone() for x in (logp, *given.values())]
    logp.requires_grad_()
    config = PolicyLossConfig(beta=0.1, entropy_coef=0.1, **CLIPPED)
    out = [call(logp, config=config, impl=impl, **given) for _ in range(2)]
    first = torch.autograd.grad(out[0].loss, logp, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out[0].loss, logp)[0])
    assert torch.equal(first, torch.autograd.grad(out[1].loss, logp)[0])
    assert torch.equal(torch.stack(list(out[0].metrics)), torch.stack(list(out[1].metrics)))
    for now, then in zip((logp, *given.values()), before, strict=True):
        assert torch.equal(now, then)


def test_no_token_and_no_counted_token(impl, device):
    logp, given = tokens(5, device=device)
    none = torch.zeros(5, dtype=torch.bool, device=device)
    for part, mask in ((slice(0, 0), None), (slice(0, 5), none)):
        leaf = logp[part].clone().requires_grad_()
        out = call(leaf, mask=mask, impl=impl, **{name: x[part] for name, x in given.items()})
        assert out.loss.item() == 0.0
        assert torch.stack(list(out.metrics)).eq(0).all()
        assert torch.autograd.grad(out.loss, leaf)[0].eq(0).all()


def test_more_tokens_than_a_grid_axis_holds(impl, device):
    n = 70_000
    logp, given = tokens(n, device=device)
    weights = torch.full((n,), 1 / n, device=device)
    config = PolicyLossConfig(**CLIPPED)
    ours = call(logp, config=config, impl=impl, **given)
    truth = policy_total_ref(
        logp.double(),
        given["old_logp"].double(),
        given["advantage"].double(),
        weights=weights.double(),
        ref_logp=given["ref_logp"].double(),
        sampler_logp=given["sampler_logp"].double(),
        config=config,
    )
    torch.testing.assert_close(ours.loss, truth.loss.float())
    torch.testing.assert_close(ours.metrics.num_live, truth.metrics.num_live.float())


def test_registration(impl, device):
    logp, given = tokens(7, device=device)
    leaves = [logp.requires_grad_(), given["entropy"].requires_grad_()]
    rest = [given[k] for k in ("old_logp", "advantage", "ref_logp", "sampler_logp")]
    counted = torch.ones(7, dtype=torch.bool, device=device)
    numbers = [0.8, 1.2, 3.0, 0.1, 0.2, 1.0, 1.05, 2.0]
    for absent in ((), (0, 1, 2, 3)):
        tail = [None if i in absent else x for i, x in enumerate(rest)]
        kind = (
            "sft" if absent else "ppo",
            "k3",
            [*numbers[:3], 0.0 if absent else 0.1, *numbers[4:]],
        )
        torch.library.opcheck(
            torch.ops.tercet.policy_loss.default,
            (*leaves, *tail, torch.rand(7, device=device), counted, *kind, impl == "triton"),
        )


def test_second_derivative_is_refused(impl, device):
    logp, given = tokens(4, device=device)
    loss = call(logp.requires_grad_(), impl=impl, **given).loss
    (slope,) = torch.autograd.grad(loss, logp, create_graph=True)
    assert not slope.requires_grad
    loss = call(logp, impl=impl, **given).loss
    (slope,) = torch.autograd.grad(loss.square(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(slope.sum(), logp)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(impl, dynamic, device):
    config = PolicyLossConfig(beta=0.1, entropy_coef=0.1, aggregation="sequence_mean", **CLIPPED)

    def loss(logp, given, cu):
        out = call(logp * 2, config=config, cu_seqlens=cu, impl=impl, **given)
        return out.loss * out.metrics.num_tokens

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (9, 12):
        logp, given = tokens(n, device=device)
        cu = torch.tensor([0, 4, n], device=device)
        logp.requires_grad_()
        expected = torch.autograd.grad(loss(logp, given, cu), logp)[0]
        ours = torch.autograd.grad(compiled(logp, given, cu), logp)[0]
        torch.testing.assert_close(ours, expected)


def test_one_compiled_graph_serves_every_length(impl, device):
    count = CompileCounter()

    def loss(logp, given):
        return call(logp, impl=impl, **given).loss

    compiled = torch.compile(loss, fullgraph=True, backend=count, dynamic=True)
    for n in (33, 47, 100):
        compiled(*tokens(n, device=device))
    assert count.frame_count == 1


def _call(impl, n=3, dtype=torch.float32, config=None, **options):
    shapes = {"old_logp": n, "advantage": n} | {
        k: v for k, v in options.items() if k in ("ref_logp", "mask", "weights", "old_logp")
    }
    rest = {k: v for k, v in options.items() if k not in shapes}
    tensors = {
        k: None if v is None else torch.zeros(v, dtype=torch.bool if k == "mask" else None)
        for k, v in shapes.items()
    }
    settings = PolicyLossConfig(**config or {})
    call(torch.zeros(n, dtype=dtype), config=settings, impl=impl, **tensors, **rest)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dtype": torch.int64}, TypeError, "logp must be a floating-point tensor"),
        ({"old_logp": 1}, ValueError, r"old_logp must have one value per token, \(3,\), got \(1,"),
        ({"mask": 2}, ValueError, r"mask must have one value per token, \(3,\), got \(2,\)"),
        ({"ref_logp": 2}, ValueError, r"ref_logp must have one value per token"),
        ({"config": {"beta": 0.1}}, ValueError, "beta=0.1 needs ref_logp"),
        ({"config": {"entropy_coef": 0.1}}, ValueError, "entropy_coef=0.1 needs entropy"),
        ({"config": {"loss_type": "sft"}}, ValueError, "'sft' takes no advantage; pass None"),
        ({"config": {"loss_type": "grpo"}}, ValueError, "'sequence_mean' needs cu_seqlens or"),
        ({"config": {"loss_type": "dr_grpo"}}, ValueError, "needs config.max_completion_length"),
        ({"num_items": 0}, ValueError, "num_items must be > 0 and finite, got 0"),
        ({"num_items": torch.ones(2)}, ValueError, r"num_items must be a scalar, got \(2,\)"),
        ({"num_items": 3, "weights": 3}, ValueError, "num_items must be None where weights"),
        ({"impl": "cuda"}, ValueError, "impl must be 'auto', 'triton' or 'torch', got 'cuda'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("on_cpu")
def test_rejects(impl, options, error, match):
    with pytest.raises(error, match=f"policy_loss: .*{match}"):
        _call(**{"impl": impl} | options)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 4]], ids=str)
@pytest.mark.usefixtures("on_cpu")
def test_rejects_boundaries(impl, bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to n = 3"):
        _call(impl, config={"loss_type": "grpo"}, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize(("n", "bounds"), [((1, 3), [0, 3]), (3, [[0, 3]])], ids=str)
@pytest.mark.usefixtures("on_cpu")
def test_rejects_boundaries_of_padded_tokens(impl, n, bounds):
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[sequences \+ 1\] over packed"):
        _call(impl, n=n, config={"loss_type": "grpo"}, cu_seqlens=torch.tensor(bounds))


@pytest.mark.usefixtures("on_cpu")
def test_rejects_ids_out_of_range(impl):
    with pytest.raises(ValueError, match=r"sequence_ids must be in \[0, 3\), got 3"):
        _call(impl, config={"loss_type": "grpo"}, sequence_ids=torch.tensor([0, 3, 3]))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epsilon": 1.5}, ValueError, r"epsilon must be in \[0, 1\], got 1.5"),
        ({"epsilon_high": -0.1}, ValueError, "epsilon_high must be >= 0, got -0.1"),
        ({"delta": 1.0}, ValueError, "delta must be > 1, got 1.0"),
        ({"beta": -1.0}, ValueError, "beta must be >= 0 and finite, got -1.0"),
        ({"beta": math.inf}, ValueError, "beta must be >= 0 and finite, got inf"),
        ({"beta": None}, TypeError, "beta must be a number, got None"),
        ({"delta": "a"}, TypeError, "delta must be a number, got str"),
        ({"sapo_temperature_neg": 0.0}, ValueError, "sapo_temperature_neg must be > 0"),
        ({"loss_type": "grop"}, ValueError, "loss_type must be one of .*got 'grop'"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of .*got 'k4'"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of .*got 'mean'"),
        ({"loss_type": "cispo"}, ValueError, "'cispo' needs epsilon_high.*got None"),
        ({"loss_type": "gspo"}, ValueError, "got 'gspo', .* use the two-phase .*gspo_loss"),
        ({"max_completion_length": 1.5}, TypeError, "must be a whole number, got 1.5"),
        ({"max_completion_length": 0}, ValueError, "must be >= 1, got 0"),
    ],
)  # fmt: skip
def test_config_rejects(impl, options, error, match):
    assert impl
    with pytest.raises(error, match=f"PolicyLossConfig: .*{match}"):
        PolicyLossConfig(**options)


def test_gradcheck(impl, device):
    logp, given = tokens(8, device=device, dtype=torch.float64)
    config = PolicyLossConfig(beta=0.3, entropy_coef=0.2, **CLIPPED)
    fn = partial(call, config=config, impl="torch")
    rest = {k: v for k, v in given.items() if k != "entropy"}
    leaves = (logp.requires_grad_(), given["entropy"].requires_grad_())
    assert torch.autograd.gradcheck(lambda x, h: fn(x, entropy=h, **rest).loss, leaves)
    assert impl

"""gspo_loss and dpo_loss against their papers' formulas, sequence by sequence in float64."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false

from functools import partial
from itertools import pairwise

import pytest
import torch

from tercet.kernels import PolicyLossConfig, dpo_loss, gspo_loss
from tercet.kernels.reference import linear_logp_ref

pytestmark = [
    pytest.mark.parametrize("impl", ["triton", "torch"]),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # of Triton's interpreter
]
LENGTHS = [5, 0, 3, 9, 1, 6]
CU = [0, 5, 5, 8, 17, 18, 24]
CONFIG = PolicyLossConfig(
    loss_type="ppo", epsilon=0.05, epsilon_high=0.08, beta=0.2, entropy_coef=0.1
)


def problem(device, dtype=torch.float32):
    """Leaves, targets, logp before and of the reference, boundaries; some tokens ignored."""
    hidden = torch.randn(24, 8, device=device, dtype=dtype)
    weight = torch.randn(40, 8, device=device, dtype=dtype)
    bias = torch.randn(40, device=device, dtype=dtype)
    targets = torch.randint(40, (24,), device=device)
    logp = linear_logp_ref(hidden, weight, targets, bias=bias).logp
    old, ref = (logp + torch.randn_like(logp) * 0.3 for _ in range(2))
    targets[[2, 17]] = -100  # the latter is the whole fifth sequence
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    return leaves, targets, old, ref, torch.tensor(CU, device=device)


def tokens_of(targets):
    """Counted tokens of each sequence."""
    return [[t for t in range(a, b) if targets[t] != -100] for a, b in pairwise(CU)]


def plain_gspo(leaves, targets, old, ref, advantage, config):
    hidden, weight, bias = leaves
    safe = targets.clamp(min=0)
    logp, entropy = linear_logp_ref(hidden, weight, safe, bias=bias, return_entropy=True)
    total, count = torch.zeros((), dtype=logp.dtype), 0
    for i, tokens in enumerate(tokens_of(targets)):
        if not tokens:
            continue
        count += 1
        s = (logp[tokens] - old[tokens]).mean().exp()
        roof = s.clamp(1 - config.epsilon, 1 + config.epsilon_high)
        gap = ref[tokens] - logp[tokens]
        kl = (gap.exp() - gap - 1).mean()
        total = total - torch.minimum(s * advantage[i], roof * advantage[i])
        total = total + config.beta * kl - config.entropy_coef * entropy[tokens].mean()
    return total / count


@pytest.mark.parametrize("config", [CONFIG, PolicyLossConfig(epsilon=0.1)], ids=["all", "clip"])
def test_gspo_is_the_formula(impl, config, device):
    leaves, targets, old, ref, cu = problem(device)
    advantage = torch.randn(6, device=device)
    old[:5] -= 1.0
    advantage[0] = 1.0  # so that at least the first sequence is clipped
    if config.epsilon_high is None:
        config = PolicyLossConfig(epsilon=config.epsilon, epsilon_high=config.epsilon)
    out = gspo_loss(
        *leaves[:2], targets, old, advantage, cu,
        ref_logp=ref, bias=leaves[2], config=config, impl=impl,
    )  # fmt: skip
    exact = [x.detach().double().requires_grad_() for x in leaves]
    rest = (x.double() for x in (old, ref, advantage))
    truth = plain_gspo(exact, targets, *rest, config)
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=1e-6)
    upstream = torch.tensor(1.7, device=device)
    grads = torch.autograd.grad(out.loss, leaves, upstream)
    for got, want in zip(grads, torch.autograd.grad(truth, exact, upstream), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    assert out.metrics.num_tokens.item() == 22
    assert 0 < out.metrics.num_live.item() < 4  # of four sequences
    assert out.metrics.clip_ratio_low.item() + out.metrics.clip_ratio_high.item() > 0
    assert out.metrics.kl_k3.item() > 0


def test_gspo_in_micro_batches(impl, device):
    leaves, targets, old, _, cu = problem(device)
    advantage = torch.randn(6, device=device)
    config = PolicyLossConfig(epsilon=0.05)
    fn = partial(gspo_loss, config=config, impl=impl)
    whole = fn(*leaves[:2], targets, old, advantage, cu).loss
    parts = [
        fn(
            leaves[0][CU[a] : CU[b]], leaves[1], targets[CU[a] : CU[b]], old[CU[a] : CU[b]],
            advantage[a:b], cu[a : b + 1] - CU[a], num_items=4,
        ).loss
        for a, b in ((0, 3), (3, 6))
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


def test_gspo_ignores_what_does_not_count(impl, device):
    leaves, targets, old, ref, cu = problem(device)
    advantage = torch.randn(6, device=device)
    options = {"ref_logp": ref, "config": CONFIG, "impl": impl}
    expected = gspo_loss(*leaves[:2], targets, old, advantage, cu, **options).loss
    mask = targets != -100
    targets[~mask] = 3
    with torch.no_grad():
        leaves[0][~mask] = torch.nan
    for x in (old, ref):
        x[~mask] = torch.nan
    advantage[4] = torch.nan  # of a sequence without a counted token
    loss = gspo_loss(*leaves[:2], targets, old, advantage, cu, mask=mask, **options).loss
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, leaves[:2])
    assert (grads[0][~mask] == 0).all()
    assert grads[1].isfinite().all()


def test_dpo_is_the_formula(impl, device):
    leaves, targets, _, ref, cu = problem(device)
    ref[:8] -= 1.0  # so that the first and the third answer are chosen rightly
    loss, metrics = dpo_loss(*leaves[:2], targets, ref, cu, beta=0.3, bias=leaves[2], impl=impl)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logp = linear_logp_ref(*exact[:2], targets.clamp(min=0), bias=exact[2]).logp
    gaps = [(logp[tokens] - ref[tokens].double()).sum() for tokens in tokens_of(targets)]
    margins = [0.3 * (gaps[i] - gaps[i + 3]) for i in range(3)]
    truth = -sum(torch.nn.functional.logsigmoid(margin) for margin in margins) / 3
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    upstream = torch.tensor(-0.6, device=device)
    grads = torch.autograd.grad(loss, leaves, upstream)
    for got, want in zip(grads, torch.autograd.grad(truth, exact, upstream), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    assert [m.item() > 0 for m in margins] == [True, False, True]
    assert metrics.accuracy.item() == pytest.approx(2 / 3)
    assert metrics.margin.item() == pytest.approx(sum(m.item() for m in margins) / 3, rel=1e-4)
    assert metrics.chosen_reward.item() == pytest.approx(
        sum(0.1 * gap.item() for gap in gaps[:3]), rel=1e-4
    )


def test_compile_without_graph_break(impl, device):
    def loss(hidden, weight, targets, old, ref, advantage, cu):
        gspo = gspo_loss(
            hidden, weight, targets, old, advantage, cu, ref_logp=ref, config=CONFIG, impl=impl
        )
        return gspo.loss + dpo_loss(hidden, weight, targets, ref, cu, impl=impl).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves, targets, old, ref, cu = problem(device)
    rest = (targets, old, ref, torch.randn(6, device=device), cu)
    expected = torch.autograd.grad(loss(*leaves[:2], *rest), leaves[:2])
    ours = torch.autograd.grad(compiled(*leaves[:2], *rest), leaves[:2])
    torch.testing.assert_close(ours, expected)


def _gspo(impl, advantage=2, old=5, cu=(0, 2, 5), config=CONFIG, **options):
    gspo_loss(
        torch.zeros(5, 3), torch.zeros(6, 3), torch.zeros(5).long(), torch.zeros(old),
        torch.zeros(advantage), torch.tensor(cu), config=config, impl=impl, **options,
    )  # fmt: skip


def _dpo(impl, ref=5, cu=(0, 2, 5), **options):
    dpo_loss(
        torch.zeros(5, 3), torch.zeros(6, 3), torch.zeros(5).long(), torch.zeros(ref),
        torch.tensor(cu), impl=impl, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(_gspo, advantage=5), ValueError, r"gspo_loss: advantage must be \(2,\), got \(5"),
        (partial(_gspo, old=2), ValueError, r"gspo_loss: old_logp must be \(5,\), got \(2,\)"),
        (partial(_gspo, cu=(0, 4)), ValueError, "gspo_loss: cu_seqlens must rise from 0 to n = 5"),
        (partial(_gspo, config={}), TypeError, "gspo_loss: config must be a PolicyLossConfig"),
        (partial(_gspo), ValueError, "policy_loss: beta=0.2 needs ref_logp"),
        (partial(_gspo, mask=torch.ones(5)), TypeError, "gspo_loss: mask must be bool"),
        (
            partial(_gspo, config=PolicyLossConfig(loss_type="sapo")),
            ValueError,
            "gspo_loss: loss_type must be one of .*got 'sapo'",
        ),
        (partial(_dpo, ref=4), ValueError, r"dpo_loss: ref_logp must be \(5,\), got \(4,\)"),
        (partial(_dpo, cu=(0, 5)), ValueError, "dpo_loss: .*pairs of sequences, got 1"),
        (partial(_dpo, beta=0.0), ValueError, "dpo_loss: beta must be > 0 and finite, got 0.0"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_rejects(impl, call, error, match):
    with pytest.raises(error, match=match):
        call(impl)

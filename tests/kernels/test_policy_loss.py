"""policy_loss against numbers worked out by hand, one row of the table per branch of a clip."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

import math
from functools import partial

import pytest
import torch

from tercet.kernels import policy_loss
from tercet.kernels.reference import policy_loss_ref

# ratio, advantage, loss, d loss / d logp, clipped;  epsilon 0.2, epsilon_high 0.3, delta 3
TABLE = {
    "inside, good": (1.1, 2.0, -2.2, -2.2, False),
    "inside, bad": (1.1, -2.0, 2.2, 2.2, False),
    "too likely, good: clipped above": (1.5, 2.0, -2.6, 0.0, True),
    "too likely, bad: not clipped": (1.5, -2.0, 3.0, 3.0, False),
    "too unlikely, good: not clipped": (0.5, 2.0, -1.0, -1.0, False),
    "too unlikely, bad: clipped below": (0.5, -2.0, 1.6, 0.0, True),
    "far too likely, bad: dual clip": (4.0, -2.0, 6.0, 0.0, True),
    "far too likely, good: no dual clip": (4.0, 2.0, -2.6, 0.0, True),
    "no advantage": (4.0, 0.0, 0.0, 0.0, False),
}
OPTIONS = {"epsilon": 0.2, "epsilon_high": 0.3, "delta": 3.0}


def run(ratio, advantage, **options):
    """(output, d sum(loss) / d logp) for tokens of the given importance ratios."""
    logp = torch.full((len(ratio),), -1.0, requires_grad=True)
    old = -1.0 - torch.tensor(ratio).log()
    out = policy_loss(logp, old, torch.tensor(advantage), **options)
    return out, torch.autograd.grad(out.loss.sum(), logp)[0]


@pytest.mark.parametrize("name", TABLE)
def test_truth_table(name):
    ratio, advantage, loss, gradient, clipped = TABLE[name]
    out, dlogp = run([ratio], [advantage], **OPTIONS)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6, abs=1e-9)
    assert dlogp.item() == pytest.approx(gradient, rel=1e-6, abs=1e-9)
    assert out.clipped.item() is clipped
    assert out.ratio.item() == pytest.approx(ratio, rel=1e-6)
    assert out.kl.item() == 0.0


def test_epsilon_high_defaults_to_epsilon():
    out, _ = run([1.25, 1.25], [1.0, 1.0], epsilon=0.2)
    assert out.loss.tolist() == pytest.approx([-1.2, -1.2])
    out, _ = run([1.25], [1.0], epsilon=0.2, epsilon_high=0.3)
    assert out.loss.tolist() == pytest.approx([-1.25])


def test_without_delta_a_bad_token_is_not_bounded():
    out, dlogp = run([50.0], [-2.0], epsilon=0.2)
    assert out.loss.item() == pytest.approx(100.0, rel=1e-5)
    assert dlogp.item() == pytest.approx(100.0, rel=1e-5)
    assert not out.clipped.item()


def test_k3_kl_by_hand():
    """Reference twice and half as likely: 2 - log 2 - 1 = 0.3069, 1/2 + log 2 - 1 = 0.1931."""
    logp = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.0 + math.log(2), -1.0 - math.log(2), -1.0])
    out = policy_loss(logp, None, torch.zeros(3), ref_logp=ref, beta=0.5)
    assert out.kl.tolist() == pytest.approx([0.306853, 0.193147, 0.0], abs=1e-6)
    assert out.loss.tolist() == pytest.approx([0.153426, 0.096574, 0.0], abs=1e-6)
    dlogp = torch.autograd.grad(out.loss.sum(), logp)[0]
    assert dlogp.tolist() == pytest.approx([0.5 * (1 - 2), 0.5 * (1 - 0.5), 0.0], abs=1e-6)


def test_on_policy_is_reinforce():
    logp = torch.randn(6, requires_grad=True)
    advantage = torch.randn(6)
    out = policy_loss(logp, None, advantage)
    assert torch.equal(out.ratio, torch.ones(6))
    assert not out.clipped.any()
    torch.testing.assert_close(out.loss, -advantage)
    torch.testing.assert_close(torch.autograd.grad(out.loss.sum(), logp)[0], -advantage)


def test_far_ratios_stay_finite():
    logp = torch.tensor([-500.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0, -500.0])
    out = policy_loss(logp, old, torch.tensor([1.0, -1.0]), ref_logp=old, beta=0.1, delta=3.0)
    assert out.loss.isfinite().all()
    assert torch.autograd.grad(out.loss.sum(), logp)[0].isfinite().all()


def test_gradcheck():
    logp = torch.randn(8, dtype=torch.float64, requires_grad=True)
    old, ref, advantage = (torch.randn(8, dtype=torch.float64) for _ in range(3))
    fn = partial(policy_loss, ref_logp=ref, beta=0.3, **OPTIONS)
    assert torch.autograd.gradcheck(lambda x: fn(x, old, advantage).loss, logp)


def test_only_logp_has_a_gradient_and_half_precision_is_lifted():
    logp, old, ref, advantage = (torch.randn(4, 3).bfloat16().requires_grad_() for _ in range(4))
    out = policy_loss(logp, old, advantage, ref_logp=ref, beta=0.1)
    assert out.loss.dtype == torch.float32
    assert not out.ratio.requires_grad
    out.loss.sum().backward()
    assert logp.grad.dtype == torch.bfloat16
    assert old.grad is None
    assert ref.grad is None
    assert advantage.grad is None


def test_inputs_stay_and_runs_agree():
    tensors = [torch.randn(50) for _ in range(4)]
    before = [x.clone() for x in tensors]
    logp, old, advantage, ref = tensors
    logp.requires_grad_()

    def step():
        out = policy_loss(logp, old, advantage, ref_logp=ref, beta=0.1, **OPTIONS)
        return torch.autograd.grad(out.loss.sum(), logp)[0]

    assert torch.equal(step(), step())
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then)


def test_compiles_without_graph_break():
    def loss(logp, old, advantage):
        return policy_loss(logp, old, advantage, **OPTIONS).loss.sum()

    logp, old, advantage = torch.randn(9, requires_grad=True), torch.randn(9), torch.randn(9)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(logp, old, advantage), logp)[0]
    ours = torch.autograd.grad(compiled(logp, old, advantage), logp)[0]
    torch.testing.assert_close(ours, expected)


def test_equals_the_definition_and_takes_no_tokens():
    logp, old, advantage, ref = (torch.randn(100) for _ in range(4))
    options = {"ref_logp": ref, "beta": 0.2, **OPTIONS}
    ours = policy_loss(logp, old, advantage, **options)
    torch.testing.assert_close(ours, policy_loss_ref(logp, old, advantage, **options))
    assert policy_loss(logp[:0], None, advantage[:0]).loss.shape == (0,)


def _call(logp=3, old=3, advantage=3, ref=None, dtype=torch.float32, **options):
    reference = None if ref is None else torch.zeros(ref)
    policy_loss(
        torch.zeros(logp, dtype=dtype), torch.zeros(old), torch.zeros(advantage),
        ref_logp=reference, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(_call, dtype=torch.int64), TypeError, "logp must be a floating-point tensor"),
        (partial(_call, old=1), ValueError, r"old_logp must have logp's shape \(3,\), got \(1,\)"),
        (partial(_call, advantage=4), ValueError, r"advantage must have logp's shape"),
        (partial(_call, ref=2, beta=0.1), ValueError, r"ref_logp must have logp's shape"),
        (partial(_call, epsilon=1.5), ValueError, r"epsilon must be in \[0, 1\], got 1.5"),
        (partial(_call, epsilon_high=-0.1), ValueError, "epsilon_high must be >= 0, got -0.1"),
        (partial(_call, delta=1.0), ValueError, "delta must be > 1, got 1.0"),
        (partial(_call, beta=-1.0), ValueError, "beta must be >= 0, got -1.0"),
        (partial(_call, beta=0.1), ValueError, "beta=0.1 needs ref_logp"),
        (partial(_call, impl="triton"), ValueError, "impl must be 'auto' or 'torch', got 'triton'"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()

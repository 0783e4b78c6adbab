"""Clipped policy loss per token, from log-probabilities: the checked form of `policy_loss_ref`.

Elementwise and a few bytes per token, so plain PyTorch on every device.
"""

from torch import Tensor

from tercet.kernels._checks import Impl, check_float, check_number, check_same_device
from tercet.kernels._typing import Float
from tercet.kernels.reference import PolicyLoss, accumulator_dtype, policy_loss_ref


def policy_loss(
    logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"] | None,
    advantage: Float[Tensor, "*n"],
    *,
    ref_logp: Float[Tensor, "*n"] | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    impl: Impl = "auto",
) -> PolicyLoss:
    """Clipped surrogate of PPO with dual clip and k3 KL, per token; log-probs in nats.

        r = exp(clamp(logp - old_logp, -20, 20))
        loss = -max(min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), delta A if A < 0)
             + beta (exp(ref - logp) - (ref - logp) - 1)

    Differentiable in logp alone; not reduced, so a mask and a token count are the caller's.
    Source: arXiv:1707.06347, eq. 7; asymmetric clip arXiv:2503.14476, eq. 10; dual clip
    arXiv:1912.09729, eq. 5; KL estimate arXiv:2402.03300, eq. 4.

    Args:
        old_logp: None means on-policy: the ratio is 1 and its gradient that of logp.
        epsilon_high: upper clip; None means epsilon.
        delta: dual clip, > 1: bounds the loss of a token with negative advantage.
        beta: weight of the KL term, >= 0 and finite; needs ref_logp unless 0.

    Raises:
        TypeError: type or dtype of an argument.
        ValueError: shapes or devices differ, or an option is out of its range.
    """
    optional = {"old_logp": old_logp, "ref_logp": ref_logp}
    tensors = {"logp": logp, "advantage": advantage}
    tensors |= {name: x for name, x in optional.items() if x is not None}
    check_float("policy_loss", **tensors)
    check_same_device("policy_loss", **tensors)
    for name, x in tensors.items():
        if x.shape != logp.shape:
            raise ValueError(
                f"policy_loss: {name} must have logp's shape {tuple(logp.shape)}, "
                f"got {tuple(x.shape)}"
            )
    _check_options(epsilon, epsilon_high, delta, beta, has_reference=ref_logp is not None)
    if impl not in ("auto", "torch"):
        raise ValueError(f"policy_loss: impl must be 'auto' or 'torch', got {impl!r}")
    dtype = accumulator_dtype(logp)
    return policy_loss_ref(
        logp.to(dtype),
        None if old_logp is None else old_logp.detach().to(dtype),
        advantage.detach().to(dtype),
        ref_logp=None if ref_logp is None else ref_logp.detach().to(dtype),
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
    )


def _check_options(
    epsilon: float,
    epsilon_high: float | None,
    delta: float | None,
    beta: float,
    *,
    has_reference: bool,
) -> None:
    check_number("policy_loss", epsilon=epsilon, beta=beta)
    bounds = {"epsilon_high": epsilon_high, "delta": delta}
    check_number("policy_loss", **{name: x for name, x in bounds.items() if x is not None})
    if not 0 <= epsilon <= 1:
        raise ValueError(f"policy_loss: epsilon must be in [0, 1], got {epsilon}")
    if epsilon_high is not None and not epsilon_high >= 0:
        raise ValueError(f"policy_loss: epsilon_high must be >= 0, got {epsilon_high}")
    if delta is not None and not delta > 1:
        raise ValueError(f"policy_loss: delta must be > 1, got {delta}")
    if not beta >= 0:
        raise ValueError(f"policy_loss: beta must be >= 0, got {beta}")
    if beta == float("inf"):
        raise ValueError(f"policy_loss: beta must be finite, got {beta}")
    if beta > 0 and not has_reference:
        raise ValueError(
            f"policy_loss: beta={beta} needs ref_logp, got None; give it or set beta=0"
        )

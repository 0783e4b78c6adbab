"""Advantages: how much better each rollout did than what was to be expected of it.

grpo         r - mean of its group                     arXiv:2402.03300; unscaled: arXiv:2503.20783
rloo         r - mean of the *other* rollouts          arXiv:2402.14740, eq. 3
reinforce++  (r - batch mean) / batch std              arXiv:2501.03262, no group baseline
remax        r - reward of the group's greedy answer   arXiv:2310.10505, alg. 1
dapo         (r - group mean) / group std              arXiv:2503.14476, eq. 9; groups without
             spread carry no signal: `flat_groups` names them and the trainer leaves them out

Everything is computed in float64: a reward that all rollouts of a group share gives exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from tercet.engine.train_config import Estimator, ScaleRewards
from tercet.kernels._typing import Bool, Float, Int

STD_EPS = 1e-4  # added to a standard deviation before dividing, as TRL does
FIXED_SCALE: dict[str, ScaleRewards] = {"reinforce++": "batch", "dapo": "group"}


def advantages(
    rewards: Float[Tensor, " n"],
    groups: Int[Tensor, " n"],
    *,
    estimator: Estimator = "grpo",
    scale_rewards: ScaleRewards = "none",
    baseline: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """Advantage of each rollout, float32.

    Args:
        rewards: one per rollout, finite.
        groups: rollouts of one prompt share a number; any numbers, any order.
        estimator: see the module; reinforce++ and dapo bring their own scale.
        scale_rewards: divide by the standard deviation (n - 1) of the group or of the batch.
        baseline: remax only: reward of the greedy completion of each rollout's group.

    Raises:
        ValueError: shapes differ; unknown names; grpo, rloo or dapo with a group of one rollout;
            remax without baseline, or another estimator with one; a scale the estimator refuses.
    """
    _check(rewards, groups, estimator, scale_rewards, baseline)
    r = rewards.double()
    index, sizes = _index(groups)
    if estimator in ("grpo", "rloo", "dapo") and int(sizes.min()) < 2:
        raise ValueError(
            f"advantages: every group needs >= 2 rollouts under {estimator!r}, got a group of "
            f"{int(sizes.min())}; raise num_generations, or use 'reinforce++' or 'remax'"
        )
    if estimator == "reinforce++":
        centred = r - r.mean()
    elif estimator == "remax":
        assert baseline is not None  # checked above; narrows the type
        centred = r - baseline.double()
    else:
        centred = r - _group_mean(r, index, sizes)[index]
        if estimator == "rloo":
            centred = centred * (sizes / (sizes - 1))[index]  # mean of the others, rewritten
    scale = FIXED_SCALE.get(estimator, scale_rewards)
    if scale == "group":
        centred = centred / (_group_std(r, index, sizes)[index] + STD_EPS)
    elif scale == "batch" and len(r) > 1:
        centred = centred / (r.std() + STD_EPS)
    return centred.float()


def flat_groups(rewards: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Rows whose group has one reward for all its rollouts (accuracy 0 or 1 in dapo's words)."""
    index, sizes = _index(groups)
    return (_group_range(rewards.double(), index, len(sizes)) == 0)[index]


def group_spread(values: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> float:
    """Mean over groups of the standard deviation (n - 1) inside the group; 0 for single rows."""
    index, sizes = _index(groups)
    return float(_group_std(values.double(), index, sizes).mean())


def dead_parts(
    parts: Mapping[str, Float[Tensor, " n"]], groups: Int[Tensor, " n"], *, tol: float = 1e-5
) -> list[str]:
    """Names of reward parts that a group baseline cancels: paid, but equal inside every group.

    A part is dead when it is not zero in most groups, and its range inside every group is at
    most tol times its largest magnitude.  A part that is zero (a weight of 0, a penalty that no
    row incurred) pays nothing and is not called dead.
    """
    index, sizes = _index(groups)
    if int(sizes.max()) < 2:
        return []
    dead = []
    for name, part in parts.items():
        x = part.double()
        paid = torch.zeros(len(sizes), dtype=torch.bool, device=x.device)
        paid[index[x != 0]] = True
        flat = _group_range(x, index, len(sizes)) <= tol * x.abs().max()
        if bool(flat.all()) and int(paid.sum()) * 2 > len(sizes):
            dead.append(name)
    return dead


def _check(
    rewards: Float[Tensor, "*rewards"],
    groups: Int[Tensor, "*groups"],
    estimator: str,
    scale: str,
    baseline: Float[Tensor, "*baseline"] | None,
) -> None:
    if rewards.ndim != 1 or rewards.shape != groups.shape or not len(rewards):
        raise ValueError(
            "advantages: rewards and groups must both be [n >= 1], "
            f"got {tuple(rewards.shape)} and {tuple(groups.shape)}"
        )
    for name, value, allowed in (
        ("estimator", estimator, get_args(Estimator)),
        ("scale_rewards", scale, get_args(ScaleRewards)),
    ):
        if value not in allowed:
            raise ValueError(f"advantages: {name} must be one of {allowed}, got {value!r}")
    fixed = FIXED_SCALE.get(estimator)
    if fixed is not None and scale not in ("none", fixed):
        raise ValueError(
            f"advantages: scale_rewards must be 'none' or {fixed!r} under {estimator!r}, "
            f"got {scale!r}; leave it at 'none'"
        )
    if (baseline is not None) != (estimator == "remax"):
        raise ValueError(
            "advantages: baseline must be given for 'remax' and only for it, "
            f"got {estimator!r} with baseline {'given' if baseline is not None else 'None'}"
        )
    if baseline is not None and baseline.shape != rewards.shape:
        raise ValueError(
            f"advantages: baseline must be {tuple(rewards.shape)} like rewards, "
            f"got {tuple(baseline.shape)}"
        )


def _index(groups: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " groups"]]:
    """Groups renumbered 0..g - 1 per row, and the size of each."""
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    return index, sizes


def _group_mean(
    x: Float[Tensor, " n"], index: Int[Tensor, " n"], sizes: Int[Tensor, " groups"]
) -> Float[Tensor, " groups"]:
    return x.new_zeros(len(sizes)).index_add_(0, index, x) / sizes


def _group_std(
    x: Float[Tensor, " n"], index: Int[Tensor, " n"], sizes: Int[Tensor, " groups"]
) -> Float[Tensor, " groups"]:
    squares = (x - _group_mean(x, index, sizes)[index]).square()
    return (_group_mean(squares, index, sizes) * sizes / (sizes - 1).clamp(min=1)).sqrt()


def _group_range(
    x: Float[Tensor, " n"], index: Int[Tensor, " n"], num_groups: int
) -> Float[Tensor, " groups"]:
    top = x.new_zeros(num_groups).scatter_reduce_(0, index, x, "amax", include_self=False)
    low = x.new_zeros(num_groups).scatter_reduce_(0, index, x, "amin", include_self=False)
    return top - low

"""contrastive_reward against the bare matrix product, the plain definition and a per-pair loop."""

from functools import partial

import harness
import torch
import torch.nn.functional as F
from harness import Peer
from torch import Tensor

from tercet.kernels import contrastive_reward
from tercet.kernels.reference import (
    ContrastiveReward,
    Repulsion,
    RewardForm,
    contrastive_reward_ref,
)

PEERS = {
    "ours": Peer(contrastive_reward),
    "eager": Peer(contrastive_reward_ref),
    "torch.compile": Peer(contrastive_reward_ref, compile=True),
}


def python_loop(d: Tensor, q: Tensor, n: Tensor) -> Tensor:
    """The paper's supervised reward, one cosine call per pair: B G (B - 1) for the hard term."""
    groups, rollouts, _ = d.shape

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a, b, dim=-1)

    rewards = []
    for i in range(groups):
        for k in range(rollouts):
            positive = cosine(q[i], d[i, k])
            negative = cosine(q[i], n[i, 0])
            siblings = [cosine(d[i, k], d[i, other]) for other in range(rollouts) if other != k]
            nearest = [cosine(q[i : i + 1], d[j]).max() for j in range(groups) if j != i]
            hard = sum(nearest) / len(nearest)
            rewards.append(positive - negative + 0.2 * sum(siblings) / len(siblings) - 0.2 * hard)
    return torch.stack(rewards).view(groups, rollouts) / 0.1


def call(fn, d: Tensor, q: Tensor, n: Tensor, options: dict) -> list[Tensor]:
    """All parts, each as one row: a cosine near 0 is judged beside the others."""
    return [part.flatten() for part in fn(d, q, n, **options)]


def case(
    groups: int,
    rollouts: int,
    hidden: int,
    form: RewardForm = "sum",
    repulsion: Repulsion = "document",
    *,
    loop: bool = False,
    dtype: torch.dtype = harness.DTYPE,
    spread: float | None = None,
) -> harness.Case:
    """The parts and the total of one step; `loop` times the per-pair loop instead of the peers.

    With `spread` all vectors are one vector plus noise of that size: cosines near 1.
    """
    torch.manual_seed(0)
    shapes = ((groups, rollouts, hidden), (groups, hidden), (groups, 1, hidden))
    d, q, n = (torch.randn(shape, device=harness.DEVICE) for shape in shapes)
    if spread is not None:
        centre = torch.randn(hidden, device=harness.DEVICE)
        d, q, n = (centre + spread * x for x in (d, q, n))
    d, q, n = (x.to(dtype) for x in (d, q, n))
    able = harness.roster({"ours": PEERS["ours"]} if loop else PEERS)
    options = {"form": form, "repulsion": repulsion}
    sides = {side: partial(call, fn, d, q, n, options) for side, fn in able.functions.items()}
    products: dict[str, harness.Side] = {"bare Q @ D.T": lambda: q @ d.flatten(0, 1).T}
    if loop:
        nothing = [None] * 4
        products = {"per-pair loop": lambda: [python_loop(d, q, n).flatten(), *nothing]}
    calls = groups * rollouts * (groups - 1 + rollouts - 1 + 2)
    name = f"B={groups} G={rollouts} H={hidden} {str(dtype)[6:]} {form} {repulsion}"
    return harness.Case(
        op="contrastive_reward",
        name=name + (", loop" if loop else ""),
        sides={**sides, **products},
        truth=lambda: call(contrastive_reward_ref, d.double(), q.double(), n.double(), options),
        outputs=ContrastiveReward._fields,
        limit=harness.LIMITS[dtype],
        roster=able,
        bounds=("bare Q @ D.T",),
        sizes={"B": groups, "G": rollouts, "H": hidden, "dtype": str(dtype)[6:], **options},
        flops=2 * groups * groups * rollouts * hidden,
        formula=f"{calls} cosine calls" if loop else "flops = 2 B B G H, the cosines across groups",
        rounds=3 if loop else 51,
    )  # fmt: skip


MODES: list[tuple[RewardForm, Repulsion]] = [
    ("sum", "query"), ("sum", "document"), ("info_nce", "query"), ("info_nce", "document"),
]  # fmt: skip
SHAPES = [(64, 8, 1536)]
if harness.DEVICE.type == "cuda":
    SHAPES += [(256, 8, 2560), (1024, 16, 4096)]
CASES = {
    f"{b}x{g}x{h}-{form}-{repulsion}": partial(case, b, g, h, form, repulsion)
    for b, g, h in SHAPES
    for form, repulsion in MODES
}
CASES["loop"] = partial(case, 64, 8, 1536, "sum", "query", loop=True)
ACCURACY = {
    (f"{form} {repulsion}", dtype, inputs): partial(
        case, 32, 8, 256, form, repulsion, dtype=dtype, spread=spread
    )
    for form, repulsion in MODES[1:3]
    for dtype in harness.LIMITS
    for inputs, spread in (("random", None), ("cosines near 0.99", 0.1))
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

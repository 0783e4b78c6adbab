"""contrastive_reward against the bare matrix product, the plain definition and a per-pair loop."""

from functools import partial

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.kernels import contrastive_reward
from tercet.kernels.reference import Repulsion, RewardForm, contrastive_reward_ref

DTYPE = torch.bfloat16 if harness.DEVICE.type == "cuda" else torch.float32


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


def case(
    groups: int, rollouts: int, hidden: int, form: RewardForm, repulsion: Repulsion, *, loop: bool
) -> harness.Case:
    """The parts and the total of one step; `loop` times the per-pair loop instead of the peers."""
    torch.manual_seed(0)
    shapes = ((groups, rollouts, hidden), (groups, hidden), (groups, 1, hidden))
    d, q, n = (torch.randn(shape, device=harness.DEVICE, dtype=DTYPE) for shape in shapes)
    ours = partial(contrastive_reward, d, q, n, form=form, repulsion=repulsion)
    plain = partial(contrastive_reward_ref, d, q, n, form=form, repulsion=repulsion)
    looped = partial(python_loop, d, q, n)
    sides = {"ours": ours, "bare Q @ D.T": lambda: q @ d.flatten(0, 1).T, "reference": plain}
    if loop:
        sides = {"ours": ours, "per-pair loop": looped}

    def gate() -> None:
        truth = contrastive_reward_ref(
            d.double(), q.double(), n.double(), form=form, repulsion=repulsion
        )
        for name, wanted, got in zip(truth._fields, truth, ours(), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4, msg=name)
        if loop:
            torch.testing.assert_close(looped().double(), truth.total, rtol=1e-4, atol=1e-4)

    name = f"B={groups} G={rollouts} H={hidden} {str(DTYPE)[6:]} {form} {repulsion}"
    calls = groups * rollouts * (groups - 1 + rollouts - 1 + 2)
    return harness.Case(
        op="contrastive_reward",
        name=name + (", loop" if loop else ""),
        sides=sides,
        gate=gate,
        flops=2 * groups * groups * rollouts * hidden,
        formula=f"{calls} cosine calls" if loop else "flops = 2 B B G H, the cosines across groups",
        rounds=3 if loop else 51,
    )


MODES: list[tuple[RewardForm, Repulsion]] = [
    ("sum", "query"), ("sum", "document"), ("info_nce", "query"), ("info_nce", "document"),
]  # fmt: skip
SHAPES = [(64, 8, 1536)]
if harness.DEVICE.type == "cuda":
    SHAPES += [(256, 8, 2560), (1024, 16, 4096)]
CASES = {
    f"{b}x{g}x{h}-{form}-{repulsion}": partial(case, b, g, h, form, repulsion, loop=False)
    for b, g, h in SHAPES
    for form, repulsion in MODES
}
CASES["loop"] = partial(case, 64, 8, 1536, "sum", "query", loop=True)

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

"""info_nce beside the full matrix, sentence-transformers' loss and Inf-CL; similarity_stats too."""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Peer
from torch import Tensor

from tercet.kernels import info_nce, similarity_stats
from tercet.kernels.reference import info_nce_ref, similarity_stats_ref

TEMPERATURE = 0.05


def full_matrix(q: Tensor, k: Tensor, *, symmetric: bool) -> Tensor:
    """What most training scripts do: the similarities, then cross_entropy in each direction."""
    logits = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).T / TEMPERATURE
    target = torch.arange(len(q), device=q.device)
    loss = F.cross_entropy(logits, target)
    return (loss + F.cross_entropy(logits.T, target)) / 2 if symmetric else loss


def sentence_transformers(q: Tensor, k: Tensor, *, symmetric: bool) -> Tensor:
    """MultipleNegativesRankingLoss on embeddings that exist; it needs no model for that."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    loss: Any = MultipleNegativesRankingLoss(
        torch.nn.Identity(),  # pyright: ignore[reportArgumentType]
        scale=1 / TEMPERATURE,
        directions=directions,
        partition_mode="per_direction",
    )
    return loss.compute_loss_from_embeddings([q, k], None)


def inf_cl(q: Tensor, k: Tensor, *, symmetric: bool) -> Tensor:
    from inf_cl import cal_flash_loss

    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    target = torch.arange(len(q), device=q.device)
    loss = cal_flash_loss(q, k, target, 1 / TEMPERATURE).mean()
    back = cal_flash_loss(k, q, target, 1 / TEMPERATURE).mean() if symmetric else loss
    return (loss + back) / 2


PEERS = {
    "ours": Peer(info_nce),
    "full matrix": Peer(full_matrix),
    "torch.compile": Peer(full_matrix, compile=True),
    "sentence-transformers": Peer(sentence_transformers, package="sentence-transformers"),
    "inf-cl": Peer(inf_cl, package="inf-cl", cuda=True),
}
STATS_PEERS = {"ours": Peer(similarity_stats), "full matrix": Peer(similarity_stats_ref)}


def embeddings(rows: int, hidden: int, dtype: torch.dtype, noise: float) -> list[Tensor]:
    """Queries, and keys that are the queries plus noise of that size."""
    torch.manual_seed(0)
    q = torch.randn(rows, hidden, device=harness.DEVICE)
    k = q + noise * torch.randn(rows, hidden, device=harness.DEVICE)
    return [x.to(dtype).requires_grad_() for x in (q, k)]


def step(loss: Callable[..., Tensor], inputs: list[Tensor], symmetric: bool) -> list[Tensor]:
    """Loss and both gradients."""
    value = loss(*inputs, symmetric=symmetric)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def case(
    rows: int,
    hidden: int,
    *,
    symmetric: bool,
    dtype: torch.dtype = harness.DTYPE,
    noise: float = 2.0,
    rounds: int = 9,
) -> harness.Case:
    """Forward and backward; with little noise the softmax is peaked."""
    inputs = embeddings(rows, hidden, dtype, noise)
    able = harness.roster(PEERS)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    products = 4 if symmetric else 3
    way = "symmetric" if symmetric else "one-sided"
    return harness.Case(
        op="info_nce",
        name=f"B={rows} D={hidden} {str(dtype)[6:]} {way} fwd+bwd",
        sides={side: partial(step, fn, inputs, symmetric) for side, fn in able.functions.items()},
        truth=lambda: step(info_nce_ref, exact, symmetric),
        outputs=("loss", "dq", "dk"),
        limit=harness.LIMITS[dtype],
        roster=able,
        mode="fwd+bwd",
        sizes={"B": rows, "D": hidden, "dtype": str(dtype)[6:], "way": way},
        flops=products * 2 * rows * rows * hidden,
        formula=f"flops = {products} products of 2 B B D",
        rounds=rounds,
    )


def stats_case(rows: int, hidden: int, *, dtype: torch.dtype = harness.DTYPE) -> harness.Case:
    """Positive, log-sum-exp, hardest negative and margin are judged; index and rank are timed."""
    q, k = (x.detach() for x in embeddings(rows, hidden, dtype, 2.0))
    able = harness.roster(STATS_PEERS)

    def values(fn: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        found = fn(*inputs)
        return [found.positive, found.lse, found.hardest, found.margin]

    return harness.Case(
        op="similarity_stats",
        name=f"B={rows} D={hidden} {str(dtype)[6:]}",
        sides={side: partial(values, fn, q, k) for side, fn in able.functions.items()},
        truth=lambda: values(similarity_stats_ref, q.double(), k.double()),
        outputs=("positive", "lse", "hardest", "margin"),
        limit=harness.LIMITS[dtype],
        roster=able,
        sizes={"B": rows, "D": hidden, "dtype": str(dtype)[6:]},
        flops=2 * rows * rows * hidden,
        formula="flops = 2 B B D",
        rounds=9,
    )


SHAPES = [(1024, 768), (4096, 512)]
if harness.DEVICE.type == "cuda":
    SHAPES = [(8192, 1024), (32_768, 1024), (16_384, 4096)]
CASES: dict[str, Callable[[], harness.Case]] = {
    f"{b}x{d}-{'symmetric' if symmetric else 'one-sided'}": partial(case, b, d, symmetric=symmetric)
    for b, d in SHAPES
    for symmetric in (False, True)
}
CASES["stats"] = partial(stats_case, *SHAPES[-1])
ACCURACY = {
    ("symmetric" if symmetric else "one-sided", dtype, inputs): partial(
        case, 128, 64, symmetric=symmetric, dtype=dtype, noise=noise
    )
    for symmetric in (False, True)
    for dtype in harness.LIMITS
    for inputs, noise in (("random", 4.0), ("peaked", 0.3))
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

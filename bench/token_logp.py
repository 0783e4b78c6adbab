"""token_logp against log_softmax + gather, cross_entropy, TRL, Liger and QuACK."""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from functools import partial

import harness
import torch
import torch.nn.functional as F
from harness import Peer
from torch import Tensor

from tercet.kernels import token_logp
from tercet.kernels.reference import token_logp_ref

CUDA = harness.DEVICE.type == "cuda"
Pair = tuple[Tensor, Tensor | None]
OUTPUTS = ("logp", "entropy", "dlogits")


def ours(logits: Tensor, targets: Tensor, entropy: bool) -> Pair:
    return token_logp(logits, targets, return_entropy=entropy)


def definition(logits: Tensor, targets: Tensor, entropy: bool) -> Pair:
    return token_logp_ref(logits, targets, return_entropy=entropy)


def eager(logits: Tensor, targets: Tensor, entropy: bool) -> Pair:
    logp = logits.float().log_softmax(-1)
    picked = logp.gather(-1, targets[:, None]).squeeze(-1)
    return picked, -(logp.exp() * logp).sum(-1) if entropy else None


def cross_entropy(logits: Tensor, targets: Tensor, entropy: bool) -> Pair:
    return -F.cross_entropy(logits, targets, reduction="none"), None


def trl(logits: Tensor, targets: Tensor, entropy: bool) -> Pair:
    from trl.trainer import utils

    if entropy:
        return utils.selective_log_softmax_and_entropy(logits, targets)
    return utils.selective_log_softmax(logits, targets), None


def liger(logits: Tensor, targets: Tensor, entropy: bool) -> Pair:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return -LigerCrossEntropyLoss(reduction="none")(logits, targets), None


def quack(logits: Tensor, targets: Tensor, entropy: bool) -> Pair:
    from quack.cross_entropy import cross_entropy as quack_cross_entropy

    return -quack_cross_entropy(logits, targets, reduction="none"), None


OVERWRITES = ("liger",)  # its input, with the gradient: it gets a copy of its own
WITH_ENTROPY = {
    "ours": Peer(ours),
    "log_softmax + gather": Peer(eager),
    "torch.compile": Peer(eager, compile=True),
    "trl": Peer(trl, "trl"),
}
WITHOUT = {
    **WITH_ENTROPY,
    "cross_entropy": Peer(cross_entropy),
    "liger": Peer(liger, "liger-kernel", cuda=True),
    "quack": Peer(quack, "quack-kernels", cuda=True),
}


def call(fn, logits: Tensor, targets: Tensor, upstream: Tensor, entropy: bool, backward: bool):
    if not backward:
        with torch.no_grad():
            return fn(logits, targets, entropy)
    leaf = logits.detach().requires_grad_()
    logp, spread = fn(leaf, targets, entropy)
    loss = (logp * upstream[0]).sum() + ((spread * upstream[1]).sum() if entropy else 0.0)
    return logp, spread, torch.autograd.grad(loss, leaf)[0]


def make_logits(rows: int, vocab: int, peaked: bool) -> tuple[Tensor, Tensor]:
    """Normal logits and random targets; `peaked` gives the targets odds of exp(4 normal).

    Their log-probs average -1.8 nats, and some probabilities are within 1e-5 of 1.
    """
    logits = torch.randn(rows, vocab, device=harness.DEVICE).mul_(3)
    targets = torch.randint(vocab, (rows,), device=harness.DEVICE)
    if peaked:
        margin = 4 * torch.randn(rows, device=harness.DEVICE)
        logits[torch.arange(rows), targets] = logits.logsumexp(-1) + margin
    return logits, targets


def case(
    rows: int,
    vocab: int,
    dtype: torch.dtype = harness.DTYPE,
    *,
    entropy: bool,
    backward: bool = True,
    peaked: bool = False,
) -> harness.Case:
    torch.manual_seed(0)
    logits, targets = make_logits(rows, vocab, peaked)
    logits = logits.to(dtype)
    upstream = torch.randn(2, rows, device=harness.DEVICE)
    able = harness.roster(WITH_ENTROPY if entropy else WITHOUT)
    few = slice(0, min(rows, 256) if CUDA else rows)  # float64 of all rows may not fit a GPU
    part = targets[few], upstream[:, few]

    def own(side: str) -> Tensor:
        return logits.clone() if side in OVERWRITES else logits

    mode = "fwd+bwd" if backward else "fwd"
    words = f"{' with entropy' if entropy else ''}{' peaked' if peaked else ''}"
    return harness.Case(
        op="token_logp",
        name=f"N={rows} V={vocab} {str(dtype)[6:]}{words} {mode}",
        sides={
            side: partial(call, fn, own(side), targets, upstream, entropy, backward)
            for side, fn in able.functions.items()
        },
        probes={
            side: partial(call, fn, own(side)[few], *part, entropy, backward)
            for side, fn in able.functions.items()
        }
        if CUDA
        else None,
        truth=lambda: call(definition, logits[few].double(), *part, entropy, backward),
        outputs=OUTPUTS if backward else OUTPUTS[:2],
        limit=harness.LIMITS[dtype],
        roster=able,
        sizes={"N": rows, "V": vocab, "dtype": str(dtype)[6:], "entropy": entropy},
        mode=mode,
        bytes_moved=(3 if backward else 1) * logits.nbytes,
        formula="bytes = logits read once" + (", then read and written once" if backward else ""),
    )


SHAPES = [(2048, 32_768)]
if CUDA:
    SHAPES = [(4096, 151_936), (16_384, 151_936)]
CASES = {
    f"{n}x{v}-{'entropy' if entropy else 'logp'}-{'fwd+bwd' if backward else 'fwd'}": partial(
        case, n, v, entropy=entropy, backward=backward
    )
    for n, v in SHAPES
    for entropy in (False, True)
    for backward in (False, True)
}
CASES |= {
    f"{n}x{v}-entropy-fwd+bwd-peaked": partial(case, n, v, entropy=True, peaked=True)
    for n, v in SHAPES
}
ACCURACY = {
    ("logp + entropy" if entropy else "logp", dtype, "peaked" if peaked else "random"): partial(
        case, 256, 4096, dtype, entropy=entropy, peaked=peaked
    )
    for entropy in (False, True)
    for dtype in harness.LIMITS
    for peaked in (False, True)
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

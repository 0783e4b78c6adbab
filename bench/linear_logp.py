"""linear_logp against the full logits, torch, TRL, Liger, CCE and verl's formulas in Liger."""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from functools import partial

import harness
import torch
import torch.nn.functional as F
from harness import Peer
from peers import verl_linear_cross_entropy
from torch import Tensor, nn

from tercet.kernels import linear_logp
from tercet.kernels.reference import linear_logp_ref

CUDA = harness.DEVICE.type == "cuda"
Pair = tuple[Tensor, Tensor | None]
OUTPUTS = ("logp", "entropy", "dhidden", "dweight")


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, **options) -> Pair:
    out = linear_logp(hidden, weight, targets, return_entropy=entropy, **options)
    return out.logp, out.entropy


def definition(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Pair:
    return linear_logp_ref(hidden, weight, targets, return_entropy=entropy)


def full(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Pair:
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    picked = logp.gather(-1, targets[:, None]).squeeze(-1)
    return picked, -(logp.exp() * logp).sum(-1) if entropy else None


def trl_full(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Pair:
    from trl.trainer import utils

    logits = F.linear(hidden, weight)
    if entropy:
        return utils.selective_log_softmax_and_entropy(logits, targets)
    return utils.selective_log_softmax(logits, targets), None


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, chunk=32_768):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ("entropy",) if entropy else ()
    args = (hidden, weight, None, targets, 1.0, chunk, None, 1.0, outputs)
    return ChunkedLogProbFunction.apply(*args)[:2]


def torch_linear_ce(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, **options):
    chosen = nn.LinearCrossEntropyOptions(**options) if options else None
    loss = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=chosen)
    return -loss, None


def liger_scaled(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Pair:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    if entropy:
        nll, spread = Scaled.apply(hidden, weight, targets, return_entropy=True)
        return -nll, spread
    return -Scaled.apply(hidden, weight, targets), None


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Pair:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, targets), None


def cce(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, **options) -> Pair:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", **options), None


def verl(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Pair:
    return verl_linear_cross_entropy()(hidden, weight, targets)  # both, always


OLD_TORCH = "" if hasattr(F, "linear_cross_entropy") else "needs torch 2.13"
WITH_ENTROPY = {
    "ours": Peer(ours),
    "full logits": Peer(full),
    "torch.compile": Peer(full, compile=True),
    "trl selective_log_softmax": Peer(trl_full, "trl"),
    "trl chunked": Peer(trl_chunked, "trl"),
    "liger scaled": Peer(liger_scaled, "liger-kernel"),
    "verl": Peer(verl, "verl", cuda=True),
}
WITHOUT = {
    **WITH_ENTROPY,
    "torch linear_cross_entropy": Peer(torch_linear_ce, missing=OLD_TORCH),
    "torch linear_cross_entropy, chunked": Peer(
        partial(torch_linear_ce, chunking_method="auto"), missing=OLD_TORCH
    ),
    "liger": Peer(liger, "liger-kernel", cuda=True),
    "cut-cross-entropy": Peer(cce, "cut-cross-entropy", cuda=True),
    "cut-cross-entropy, exact": Peer(partial(cce, filter_eps=None), "cut-cross-entropy", cuda=True),
}


def call(fn, hidden, weight, targets, upstream, entropy, mode) -> tuple:
    if mode == "fwd":
        with torch.no_grad():
            return fn(hidden, weight, targets, entropy)
    leaves = [hidden.detach().requires_grad_()]
    head = weight.detach().requires_grad_(mode != "frozen head")
    leaves += [head] if mode != "frozen head" else []
    logp, spread = fn(leaves[0], head, targets, entropy)
    loss = (logp * upstream[0]).sum() + ((spread * upstream[1]).sum() if entropy else 0.0)
    return logp, spread, *torch.autograd.grad(loss, leaves)


def make_head(
    rows: int, hidden_size: int, vocab: int, dtype: torch.dtype, peaked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, LM head and targets: logits of deviation 3.

    `peaked` moves the hidden states towards their targets, which then have odds of about
    exp(4 normal): log-probs that average some -1.8 nats, and probabilities close to 1.
    """
    device = harness.DEVICE
    hidden = torch.randn(rows, hidden_size, device=device)
    weight = torch.randn(vocab, hidden_size, device=device).mul_(3 * hidden_size**-0.5)
    targets = torch.randint(vocab, (rows,), device=device)
    if peaked:
        towards = weight[targets]
        wanted = (hidden @ weight.T).logsumexp(-1) + 4 * torch.randn(rows, device=device)
        missing = wanted - (hidden * towards).sum(-1)
        hidden += (missing / towards.square().sum(-1))[:, None] * towards
    return hidden.to(dtype), weight.to(dtype), targets


def case(
    rows: int,
    hidden_size: int,
    vocab: int,
    mode: str = "fwd+bwd",
    *,
    entropy: bool = False,
    dtype: torch.dtype = harness.DTYPE,
    peaked: bool = False,
) -> harness.Case:
    torch.manual_seed(0)
    hidden, weight, targets = make_head(rows, hidden_size, vocab, dtype, peaked)
    upstream = torch.randn(2, rows, device=harness.DEVICE)
    if mode == "half of the rows without gradient":
        upstream[:, torch.rand(rows, device=harness.DEVICE) < 0.5] = 0.0
    able = harness.roster(WITH_ENTROPY if entropy else WITHOUT)
    few = slice(0, min(rows, 256) if CUDA else rows)  # float64 of all rows may not fit a GPU
    part = targets[few], upstream[:, few], entropy, mode
    products = {"fwd": 1, "frozen head": 2}.get(mode, 3)
    label = f"N={rows} H={hidden_size} V={vocab} {str(dtype)[6:]}"
    words = f"{' with entropy' if entropy else ''}{' peaked' if peaked else ''}"
    return harness.Case(
        op="linear_logp",
        name=f"{label}{words}, {mode}",
        sides={
            side: partial(call, fn, hidden, weight, targets, upstream, entropy, mode)
            for side, fn in able.functions.items()
        },
        probes={
            side: partial(call, fn, hidden[few], weight, *part)
            for side, fn in able.functions.items()
        }
        if CUDA
        else None,
        truth=lambda: call(definition, hidden[few].double(), weight.double(), *part),
        outputs=OUTPUTS[: {"fwd": 2, "frozen head": 3}.get(mode, 4)],
        limit=harness.LIMITS[dtype],
        roster=able,
        sizes={"N": rows, "H": hidden_size, "V": vocab, "dtype": str(dtype)[6:]},
        mode="fwd" if mode == "fwd" else "fwd+bwd",
        flops=products * 2 * rows * hidden_size * vocab,
        formula=f"flops = {products} products of 2 N H V, the least that stores all logits",
        rounds=15 if CUDA else 5,
    )


SHAPES = [(2048, 512, 32_768)]
if CUDA:
    SHAPES = [(4096, 4096, 151_936), (16_384, 4096, 151_936), (16_384, 1024, 151_936)]
MODES = ("fwd", "fwd+bwd", "frozen head", "half of the rows without gradient")
CASES = {
    f"{n}x{h}x{v}-{mode.replace(' ', '-')}{'-entropy' if entropy else ''}": partial(
        case, n, h, v, mode, entropy=entropy
    )
    for n, h, v in SHAPES
    for mode in MODES
    for entropy in ((False, True) if mode == "fwd+bwd" else (False,))
}
CASES |= {f"{n}x{h}x{v}-fwd+bwd-peaked": partial(case, n, h, v, peaked=True) for n, h, v in SHAPES}
ACCURACY = {
    ("logp + entropy" if entropy else "logp", dtype, "peaked" if peaked else "random"): partial(
        case, 256, 256, 4096, entropy=entropy, dtype=dtype, peaked=peaked
    )
    for entropy in (False, True)
    for dtype in harness.LIMITS
    for peaked in (False, True)
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

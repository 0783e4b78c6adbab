"""linear_logp against the full logits, torch's linear_cross_entropy and TRL's chunked log-probs."""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from functools import partial
from importlib.util import find_spec

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet.kernels import linear_logp
from tercet.kernels.reference import linear_logp_ref

CUDA = harness.DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
Pair = tuple[Tensor, Tensor | None]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool, **options) -> Pair:
    out = linear_logp(hidden, weight, targets, return_entropy=entropy, **options)
    return out.logp, out.entropy


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
    del entropy
    chosen = nn.LinearCrossEntropyOptions(**options) if options else None
    loss = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=chosen)
    return -loss, None


def call(fn, hidden, weight, targets, dy, entropy, mode) -> tuple:
    if mode == "fwd":
        with torch.no_grad():
            return fn(hidden, weight, targets, entropy)
    leaves = [hidden.detach().requires_grad_()]
    head = weight.detach().requires_grad_(mode != "frozen head")
    leaves += [head] if mode != "frozen head" else []
    logp, spread = fn(leaves[0], head, targets, entropy)
    loss = (logp * dy).sum() + (spread.sum() if entropy else 0.0)
    return logp, *torch.autograd.grad(loss, leaves)


def case(rows: int, hidden_size: int, vocab: int, mode: str, *, entropy: bool):
    torch.manual_seed(0)
    device = harness.DEVICE
    hidden = torch.randn(rows, hidden_size, device=device, dtype=DTYPE)
    weight = torch.randn(vocab, hidden_size, device=device).mul_(3 * hidden_size**-0.5).to(DTYPE)
    targets = torch.randint(vocab, (rows,), device=device)
    dy = torch.randn(rows, device=device)
    if mode == "half of the rows without gradient":
        dy[torch.rand(rows, device=device) < 0.5] = 0.0
    sides = {"ours": ours, "full logits": full}
    if find_spec("trl") is not None:
        sides |= {"trl selective_log_softmax": trl_full, "trl chunked": trl_chunked}
    if hasattr(F, "linear_cross_entropy") and not entropy:
        sides["torch linear_cross_entropy"] = torch_linear_ce
        sides["torch linear_cross_entropy, chunked"] = partial(
            torch_linear_ce, chunking_method="auto"
        )

    def gate() -> None:
        few = slice(0, min(rows, 256))
        part = (targets[few], dy[few], True, "fwd+bwd")
        truth = call(truth64, hidden[few].double(), weight.double(), *part)
        result = call(ours, hidden[few], weight, *part)
        for got, want in zip(result, truth, strict=True):
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < (1e-2 if CUDA else 1e-5), f"relative error {error:.1e}"

    products = {"fwd": 1, "frozen head": 2}.get(mode, 3)
    label = f"N={rows} H={hidden_size} V={vocab} {str(DTYPE)[6:]}"
    return harness.Case(
        op="linear_logp",
        name=f"{label}{' with entropy' if entropy else ''}, {mode}",
        sides={
            side: partial(call, fn, hidden, weight, targets, dy, entropy, mode)
            for side, fn in sides.items()
        },
        gate=gate,
        peers=("trl",),
        flops=products * 2 * rows * hidden_size * vocab,
        formula=f"flops = {products} products of 2 N H V, the least that stores all logits",
        rounds=15 if CUDA else 7,
    )


def truth64(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool):
    return tuple(linear_logp_ref(hidden, weight, targets, return_entropy=entropy))


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

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

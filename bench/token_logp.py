"""token_logp against log_softmax + gather, cross_entropy and TRL's selective_log_softmax."""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from functools import partial
from importlib.util import find_spec

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.kernels import token_logp
from tercet.kernels.reference import token_logp_ref

CUDA = harness.DEVICE.type == "cuda"


def eager(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    logp = logits.float().log_softmax(-1)
    picked = logp.gather(-1, targets[:, None]).squeeze(-1)
    return picked, -(logp.exp() * logp).sum(-1) if entropy else None


def cross_entropy(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, None]:
    del entropy
    return -F.cross_entropy(logits, targets, reduction="none"), None


def trl(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    from trl.trainer import utils

    if entropy:
        return utils.selective_log_softmax_and_entropy(logits, targets)
    return utils.selective_log_softmax(logits, targets), None


def ours(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    return token_logp(logits, targets, return_entropy=entropy)


def call(fn, logits, targets, dy, entropy, backward) -> tuple:
    if not backward:
        return fn(logits, targets, entropy)
    leaf = logits.detach().requires_grad_()
    logp, spread = fn(leaf, targets, entropy)
    loss = (logp * dy).sum() + (spread.sum() if entropy else 0.0)
    return logp, spread, torch.autograd.grad(loss, leaf)[0]


def case(rows: int, vocab: int, dtype: torch.dtype, *, entropy: bool, backward: bool):
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab, device=harness.DEVICE).mul_(3).to(dtype)
    targets = torch.randint(vocab, (rows,), device=harness.DEVICE)
    logits[torch.arange(rows // 2), targets[: rows // 2]] = 20.0  # half of the rows are peaked
    dy = torch.randn(rows, device=harness.DEVICE)
    sides = {"ours": ours, "log_softmax + gather": eager, "trl": trl}
    if not entropy:
        sides["cross_entropy"] = cross_entropy
    if find_spec("trl") is None:
        del sides["trl"]  # the harness says that it is missing

    def gate() -> None:
        few = slice(rows // 2 - 32, rows // 2 + 32)
        part = (targets[few], dy[few], True, True)
        truth = call(eager_float64, logits[few].double(), *part)
        result = call(ours, logits[few], *part)
        for got, want, rtol in zip(result, truth, (1e-5, 1e-4, 1e-2), strict=True):
            torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=1e-4)

    sweeps = 3 if backward else 1
    name = f"N={rows} V={vocab} {str(dtype)[6:]}{' with entropy' if entropy else ''}"
    return harness.Case(
        op="token_logp",
        name=f"{name} {'fwd+bwd' if backward else 'fwd'}",
        sides={
            side: partial(call, fn, logits, targets, dy, entropy, backward)
            for side, fn in sides.items()
        },
        gate=gate,
        peers=("trl",),
        bytes_moved=sweeps * logits.nbytes,
        formula="bytes = logits read once" + (", then read and written once" if backward else ""),
    )


def eager_float64(logits: Tensor, targets: Tensor, entropy: bool):
    return tuple(token_logp_ref(logits, targets, return_entropy=entropy))


SHAPES = [(1024, 32_768, torch.float32)]
if CUDA:
    SHAPES = [(4096, 151_936, torch.bfloat16), (16_384, 151_936, torch.bfloat16)]
CASES = {
    f"{n}x{v}-{'entropy' if entropy else 'logp'}-{'fwd+bwd' if backward else 'fwd'}": partial(
        case, n, v, dtype, entropy=entropy, backward=backward
    )
    for n, v, dtype in SHAPES
    for entropy in (False, True)
    for backward in (False, True)
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

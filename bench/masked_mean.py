"""masked_mean and segment_mean against sentence-transformers' Pooling and a mean by bmm."""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from functools import partial
from importlib.util import find_spec

import harness
import torch
from torch import Tensor

from tercet.kernels import masked_mean, segment_mean
from tercet.kernels.reference import masked_mean_ref

DTYPE = torch.bfloat16 if harness.DEVICE.type == "cuda" else torch.float32


def bmm_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The cheapest mean one would write by hand; NaN in a masked token poisons it."""
    weight = mask.to(x.dtype)
    return torch.bmm(weight[:, None], x)[:, 0] / weight.sum(1, keepdim=True).clamp(min=1)


def pooling(x: Tensor, mask: Tensor) -> Tensor:
    from sentence_transformers.sentence_transformer.modules import Pooling

    module = Pooling(x.shape[-1], pooling_mode="mean")
    return module({"token_embeddings": x, "attention_mask": mask.long()})["sentence_embedding"]


def pooling_flat(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    from sentence_transformers.sentence_transformer.modules import Pooling

    module = Pooling(x.shape[-1], pooling_mode="mean")
    features = {"token_embeddings": x[None], "cu_seq_lens_q": cu_seqlens}
    return module(features)["sentence_embedding"]


def fwd_bwd(fn, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = fn(leaf)
    return y, torch.autograd.grad(y, leaf, dy.to(y.dtype))[0]


def case(batch: int, t: int, hidden: int, *, full: bool, packed: bool, backward: bool = True):
    """Rows of random length (or all full), right padded; `packed` drops the padding."""
    torch.manual_seed(0)
    device = harness.DEVICE
    lengths = torch.randint(t // 4, t + 1, (batch,), device=device)
    lengths = torch.full_like(lengths, t) if full else lengths
    mask = torch.arange(t, device=device) < lengths[:, None]
    x = torch.randn(batch, t, hidden, device=device, dtype=DTYPE)
    dy = torch.randn(batch, hidden, device=device)
    sides = {
        "ours": partial(masked_mean, mask=mask),
        "sentence-transformers": partial(pooling, mask=mask),
        "bmm": partial(bmm_mean, mask=mask),
    }
    num_tokens = int(mask.sum())
    moved = num_tokens + (x[..., 0].numel() if backward else 0)
    if packed:
        x = x[mask]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        sides = {
            "ours": partial(segment_mean, cu_seqlens=cu_seqlens),
            "sentence-transformers": partial(pooling_flat, cu_seqlens=cu_seqlens),
        }
        moved = num_tokens * (2 if backward else 1)

    if find_spec("sentence_transformers") is None:
        del sides["sentence-transformers"]  # the harness says that it is missing

    def gate() -> None:
        padded = torch.zeros(batch, t, hidden, device=device, dtype=DTYPE)
        padded[mask] = x if packed else x[mask]
        truth = fwd_bwd(partial(masked_mean_ref, mask=mask), padded, dy)
        ours = fwd_bwd(sides["ours"], x, dy)
        torch.testing.assert_close(ours[0], truth[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], truth[1][mask] if packed else truth[1])

    name = f"B={batch} T={t} H={hidden} {str(DTYPE)[6:]} {'fwd+bwd' if backward else 'fwd'}"
    return harness.Case(
        op="segment_mean" if packed else "masked_mean",
        name=f"{name}, {num_tokens / batch / t:.0%} of tokens kept",
        sides={
            side: partial(fwd_bwd, fn, x, dy) if backward else partial(fn, x)
            for side, fn in sides.items()
        },
        gate=gate,
        peers=("sentence-transformers",),
        bytes_moved=moved * hidden * x.element_size(),
        formula="bytes = kept tokens read once" + (", dx written once" if backward else ""),
    )


SHAPES = [(32, 512, 1024)]
if harness.DEVICE.type == "cuda":
    SHAPES = [(64, 2048, 4096), (16, 8192, 4096), (256, 512, 1024), (1024, 128, 1024)]
CASES = {
    f"{layout}-{b}x{t}x{h}-{fill}-{mode}": partial(
        case, b, t, h, full=fill == "full", packed=layout == "packed", backward=mode == "fwd+bwd"
    )
    for b, t, h in SHAPES
    for layout in ("padded", "packed")
    for fill in ("full", "ragged")
    for mode in ("fwd", "fwd+bwd")
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

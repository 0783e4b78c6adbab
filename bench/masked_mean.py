"""masked_mean and segment_mean against sentence-transformers' Pooling and a mean by bmm."""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from functools import partial

import harness
import torch
from harness import Peer
from torch import Tensor

from tercet.kernels import masked_mean, segment_mean
from tercet.kernels.reference import masked_mean_ref, segment_mean_ref


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


PADDED = {
    "ours": Peer(masked_mean),
    "sentence-transformers": Peer(pooling, "sentence-transformers"),
    "bmm": Peer(bmm_mean),
    "torch.compile": Peer(masked_mean_ref, compile=True),
}
PACKED = {
    "ours": Peer(segment_mean),
    "sentence-transformers": Peer(pooling_flat, "sentence-transformers"),
}


def call(fn, x: Tensor, where: Tensor, dy: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """Means, and the gradient of x; `where` is the mask or cu_seqlens."""
    if not backward:
        return (fn(x, where),)
    leaf = x.detach().requires_grad_()
    y = fn(leaf, where)
    return y, torch.autograd.grad(y, leaf, dy.to(y.dtype))[0]


def case(
    batch: int,
    t: int,
    hidden: int,
    *,
    full: bool = False,
    packed: bool = False,
    backward: bool = True,
    dtype: torch.dtype = harness.DTYPE,
    padding: float = 0.0,
) -> harness.Case:
    """Rows of random length (or all full), right padded with `padding`, or packed."""
    torch.manual_seed(0)
    device = harness.DEVICE
    lengths = torch.randint(t // 4, t + 1, (batch,), device=device)
    lengths = torch.full_like(lengths, t) if full else lengths
    mask = torch.arange(t, device=device) < lengths[:, None]
    x = torch.randn(batch, t, hidden, device=device).masked_fill_(~mask[..., None], padding)
    x, where, truth, outputs = x.to(dtype), mask, masked_mean_ref, ("y", "dx")
    dy = torch.randn(batch, hidden, device=device)
    num_tokens = int(mask.sum())
    written = batch * t
    if packed:
        x, written, truth = x[mask], num_tokens, segment_mean_ref
        where = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    able = harness.roster(PACKED if packed else PADDED)
    mode = "fwd+bwd" if backward else "fwd"
    sizes = {"B": batch, "T": t, "H": hidden, "dtype": str(dtype)[6:], "kept": num_tokens}
    return harness.Case(
        op="segment_mean" if packed else "masked_mean",
        name=f"B={batch} T={t} H={hidden} {str(dtype)[6:]} {mode}, "
        f"{num_tokens / batch / t:.0%} of tokens kept",
        sides={
            side: partial(call, fn, x, where, dy, backward) for side, fn in able.functions.items()
        },
        truth=lambda: call(truth, x.double(), where, dy.double(), backward),
        outputs=outputs if backward else outputs[:1],
        limit=harness.LIMITS[dtype],
        roster=able,
        sizes=sizes,
        mode=mode,
        bytes_moved=(num_tokens + written * backward) * hidden * x.element_size(),
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
ACCURACY = {
    (layout, dtype, inputs): partial(
        case, 8, 512, 256, packed=layout == "packed", dtype=dtype, padding=padding
    )
    for layout in ("padded", "packed")
    for dtype in harness.LIMITS
    for inputs, padding in (("random", 0.0), ("NaN in the padding", float("nan")))
    if layout == "padded" or inputs == "random"
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

"""policy_head against its bare products, full logits, TRL, Liger, verl, and linear_logp.

Every side gives the clipped loss and the gradients of hidden and head; "with metrics" adds the
entropy of each row, which ours always has.  Bare products write to logits that exist already.
The mode "cross-entropy" is the loss type "sft" beside fused cross-entropies.
"""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from collections.abc import Callable
from functools import partial

import harness
import torch
import torch.nn.functional as F
from harness import Peer
from linear_logp import OLD_TORCH, make_head
from peers import verl_linear_cross_entropy
from torch import Tensor, nn

from tercet.kernels import PolicyLossConfig, linear_logp, policy_head, policy_loss
from tercet.kernels.reference import policy_head_ref

CUDA = harness.DEVICE.type == "cuda"
CONFIG = PolicyLossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
SFT = PolicyLossConfig(loss_type="sft")
MODES = ("fwd+bwd", "frozen head", "half of the advantages 0", "no gradient")
OUTPUTS = ("loss", "dhidden", "dweight")
SEQUENCES = 8
Given = tuple[Tensor, Tensor, Tensor]  # targets, old log-probs, advantages: one per sequence


def ours(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    return policy_head(hidden, weight, *given, config=CONFIG, num_items=len(hidden)).loss


def definition(hidden: Tensor, weight: Tensor, given: Given, config=CONFIG) -> Tensor:
    targets, old, advantage = given
    count = len(hidden)
    weights = torch.full((count,), 1 / count, dtype=torch.float64, device=hidden.device)
    tokens = (None, None) if config is SFT else (old.double(), advantage.double())
    return policy_head_ref(hidden, weight, targets, *tokens, weights=weights, config=config).loss


def two_phases(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    targets, old, advantage = given
    logp, entropy = linear_logp(hidden, weight, targets, return_entropy=True)
    assert entropy is not None
    count = len(hidden)
    options = {"entropy": entropy.detach(), "num_items": count, "config": CONFIG}
    return policy_loss(logp, old, advantage, **options).loss


def clipped(logp: Tensor, given: Given) -> Tensor:
    _, old, advantage = given
    ratio = (logp.float() - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).mean()


def full(hidden: Tensor, weight: Tensor, given: Given, *, metrics: bool = False) -> Tensor:
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    if metrics:
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
            del entropy
    return clipped(logp.gather(-1, given[0][:, None]).squeeze(-1), given)


def trl(hidden: Tensor, weight: Tensor, given: Given, *, metrics: bool = False) -> Tensor:
    from trl.trainer import utils

    logits = F.linear(hidden, weight)
    if metrics:
        logp, _ = utils.selective_log_softmax_and_entropy(
            logits, given[0], entropy_requires_grad=False
        )
    else:
        logp = utils.selective_log_softmax(logits, given[0])
    return clipped(logp, given)


def liger_grpo(hidden: Tensor, weight: Tensor, given: Given, *, compiled: bool = False) -> Tensor:
    """Chunks of PyTorch, one sequence each; torch.compile of its elementwise part is for CUDA."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    targets, old, advantage = (x.view(SEQUENCES, -1) for x in given)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28
    )
    hidden = hidden.view(SEQUENCES, -1, hidden.shape[-1])
    mask = torch.ones_like(targets)
    return loss(hidden, weight, targets, mask, advantage[:, 0], old_per_token_logps=old)[0]


def liger_triton(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    targets, old, advantage = (x.view(SEQUENCES, -1) for x in given)
    logits = F.linear(hidden, weight).view(SEQUENCES, -1, len(weight))
    logits = F.pad(logits, (0, 0, 0, 1))  # it ignores the last position of each sequence
    options = {"temperature": 1.0, "beta": 0.0, "eps_low": 0.2, "eps_high": 0.28, "inplace": False}
    return triton_grpo_loss(logits, old, None, targets, advantage[:, 0], **options)[0].mean()


def verl(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    return clipped(verl_linear_cross_entropy()(hidden, weight, given[0])[0], given)


def sft_ours(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    return policy_head(hidden, weight, given[0], None, None, config=SFT, num_items=len(hidden)).loss


def sft_full(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), given[0])


def sft_torch(hidden: Tensor, weight: Tensor, given: Given, **options) -> Tensor:
    chosen = nn.LinearCrossEntropyOptions(**options) if options else None
    return F.linear_cross_entropy(hidden, weight, given[0], options=chosen)


def sft_liger(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, given[0])


def sft_cce(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, given[0])


def sft_quack(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, given[0], reduction="mean")


PEERS = {
    "ours": Peer(ours),
    "linear_logp + policy_loss": Peer(two_phases),
    "full logits": Peer(full),
    "full logits with metrics": Peer(partial(full, metrics=True)),
    "torch.compile": Peer(full, compile=True),
    "trl selective_log_softmax": Peer(trl, "trl"),
    "trl with metrics": Peer(partial(trl, metrics=True), "trl"),
    "liger GRPO": Peer(liger_grpo, "liger-kernel"),
    "liger GRPO, compiled": Peer(partial(liger_grpo, compiled=True), "liger-kernel", cuda=True),
    "liger GRPO from logits": Peer(liger_triton, "liger-kernel", cuda=True),
    "verl": Peer(verl, "verl", cuda=True),
}
SFT_PEERS = {
    "ours": Peer(sft_ours),
    "full logits": Peer(sft_full),
    "torch.compile": Peer(sft_full, compile=True),
    "torch linear_cross_entropy": Peer(sft_torch, missing=OLD_TORCH),
    "torch linear_cross_entropy, chunked": Peer(
        partial(sft_torch, chunking_method="auto"), missing=OLD_TORCH
    ),
    "liger": Peer(sft_liger, "liger-kernel", cuda=True),
    "cut-cross-entropy": Peer(sft_cce, "cut-cross-entropy", cuda=True),
    "quack": Peer(sft_quack, "quack-kernels", cuda=True),
}


def call(fn: Callable[..., Tensor], hidden: Tensor, weight: Tensor, given: Given, mode: str):
    if mode == "no gradient":
        with torch.no_grad():
            return (fn(hidden, weight, given),)
    frozen = mode == "frozen head"
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)]
    loss = fn(*leaves, given)
    return loss.detach(), *torch.autograd.grad(loss, leaves[: 1 if frozen else 2])


def bare(hidden: Tensor, weight: Tensor, logits: Tensor, mode: str) -> list[Tensor]:
    torch.mm(hidden, weight.t(), out=logits)
    half = logits[: len(logits) // 2] if mode == "half of the advantages 0" else logits
    products = [] if mode == "no gradient" else [torch.mm(half, weight)]
    if mode not in ("no gradient", "frozen head"):
        products.append(torch.mm(half.t(), hidden[: len(half)]))
    return products


def case(
    rows: int,
    hidden_size: int,
    vocab: int,
    mode: str = "fwd+bwd",
    *,
    dtype: torch.dtype = harness.DTYPE,
    peaked: bool = False,
    drift: float = 0.1,
) -> harness.Case:
    """`drift`: deviation of the old log-probs; at 0.1 some 2 % of the rows are clipped."""
    torch.manual_seed(0)
    device = harness.DEVICE
    hidden, weight, targets = make_head(rows, hidden_size, vocab, dtype, peaked)
    with torch.no_grad():
        logp = linear_logp(hidden, weight, targets).logp
    old = logp + drift * torch.randn(rows, device=device)
    signs = torch.randn(SEQUENCES, device=device)
    if mode == "half of the advantages 0":
        signs[::2] = 0.0
    given = targets, old, signs.repeat_interleave(rows // SEQUENCES)
    sft = mode == "cross-entropy"
    able = harness.roster(SFT_PEERS if sft else PEERS)
    logits = torch.empty(rows, vocab, device=device, dtype=dtype)
    few = slice(0, rows // SEQUENCES * SEQUENCES if not CUDA else 256)
    part = targets[few], given[1][few], given[2][few]
    plain = partial(definition, config=SFT if sft else CONFIG)
    products = {"no gradient": 1, "frozen head": 2, "half of the advantages 0": 2}.get(mode, 3)
    return harness.Case(
        op="policy_head",
        name=f"N={rows} H={hidden_size} V={vocab} {str(dtype)[6:]}"
        f"{' peaked' if peaked else ''}, {mode}",
        sides={
            side: partial(call, fn, hidden, weight, given, mode)
            for side, fn in able.functions.items()
        }
        | {"bare products": partial(bare, hidden, weight, logits, mode)},
        probes={
            side: partial(call, fn, hidden[few], weight, part, mode)
            for side, fn in able.functions.items()
        }
        if CUDA
        else None,
        truth=lambda: call(plain, hidden[few].double(), weight.double(), part, mode),
        outputs=OUTPUTS[: {"no gradient": 1, "frozen head": 2}.get(mode, 3)],
        limit=harness.LIMITS[dtype],
        roster=able,
        bounds=("bare products",),
        sizes={"N": rows, "H": hidden_size, "V": vocab, "dtype": str(dtype)[6:]},
        mode="fwd" if mode == "no gradient" else "fwd+bwd",
        flops=products * 2 * rows * hidden_size * vocab,
        formula=f"flops = {products} products of 2 N H V, the least there is",
        rounds=15 if CUDA else 11,
    )


SHAPES = [(2048, 512, 32_768)]
if CUDA:
    SHAPES = [(4096, 4096, 151_936), (16_384, 4096, 151_936), (16_384, 1024, 151_936)]
CASES = {
    f"{n}x{h}x{v}-{mode.replace(' ', '-')}": partial(case, n, h, v, mode)
    for n, h, v in SHAPES
    for mode in (*MODES, "cross-entropy")
}
CASES |= {f"{n}x{h}x{v}-fwd+bwd-peaked": partial(case, n, h, v, peaked=True) for n, h, v in SHAPES}
ACCURACY = {
    (kind, dtype, "peaked" if peaked else "random"): partial(
        case, 256, 256, 4096, mode, dtype=dtype, peaked=peaked, drift=0.0
    )
    for kind, mode in (("dapo", "fwd+bwd"), ("cross-entropy", "cross-entropy"))
    for dtype in harness.LIMITS
    for peaked in (False, True)
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

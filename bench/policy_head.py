"""policy_head against its bare products, full logits, TRL's log-probs, and linear_logp.

Every side gives the clipped loss and the gradients of hidden and head; "with metrics" adds the
entropy of each row, which ours always has.  Bare products write to logits that exist already.
"""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.kernels import PolicyLossConfig, linear_logp, policy_head, policy_loss
from tercet.kernels.reference import policy_head_ref

CUDA = harness.DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
CONFIG = PolicyLossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
MODES = ("fwd+bwd", "frozen head", "half of the advantages 0", "no gradient")
Given = tuple[Tensor, Tensor, Tensor]  # targets, old log-probs, advantages


def ours(hidden: Tensor, weight: Tensor, given: Given) -> Tensor:
    return policy_head(hidden, weight, *given, config=CONFIG, num_items=len(hidden)).loss


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


def full(hidden: Tensor, weight: Tensor, given: Given, *, metrics: bool) -> Tensor:
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    if metrics:
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
            del entropy
    return clipped(logp.gather(-1, given[0][:, None]).squeeze(-1), given)


def trl(hidden: Tensor, weight: Tensor, given: Given, *, metrics: bool) -> Tensor:
    from trl.trainer import utils

    logits = F.linear(hidden, weight)
    if metrics:
        logp, _ = utils.selective_log_softmax_and_entropy(
            logits, given[0], entropy_requires_grad=False
        )
    else:
        logp = utils.selective_log_softmax(logits, given[0])
    return clipped(logp, given)


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


def case(rows: int, hidden_size: int, vocab: int, mode: str) -> harness.Case:
    torch.manual_seed(0)
    device = harness.DEVICE
    hidden = torch.randn(rows, hidden_size, device=device, dtype=DTYPE)
    weight = torch.randn(vocab, hidden_size, device=device).mul_(3 * hidden_size**-0.5).to(DTYPE)
    targets = torch.randint(vocab, (rows,), device=device)
    with torch.no_grad():
        logp = linear_logp(hidden, weight, targets).logp
    old = logp + 0.1 * torch.randn(rows, device=device)  # some 2 % of the rows are clipped
    advantage = torch.randn(rows, device=device)
    if mode == "half of the advantages 0":
        advantage[torch.rand(rows, device=device) < 0.5] = 0.0
    given = targets, old, advantage
    sides: dict[str, Callable[..., Tensor]] = {
        "ours": ours,
        "linear_logp + policy_loss": two_phases,
        "full logits": partial(full, metrics=False),
        "full logits with metrics": partial(full, metrics=True),
    }
    if find_spec("trl") is not None:
        sides["trl selective_log_softmax"] = partial(trl, metrics=False)
        sides["trl with metrics"] = partial(trl, metrics=True)
    logits = torch.empty(rows, vocab, device=device, dtype=DTYPE)

    def gate() -> None:
        few = slice(0, min(rows, 256))
        part = targets[few], old[few], advantage[few]
        options = {"config": CONFIG, "weights": torch.full((few.stop,), 1 / few.stop)}
        options["weights"] = options["weights"].to(device).double()
        wide = targets[few], old[few].double(), advantage[few].double()
        plain = lambda h, w, g: policy_head_ref(h, w, *g, **options).loss  # noqa: E731
        truth = call(plain, hidden[few].double(), weight.double(), wide, mode)
        for got, want in zip(call(ours, hidden[few], weight, part, mode), truth, strict=True):
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < (2e-2 if CUDA else 1e-5), f"relative error {error:.1e}"

    products = {"no gradient": 1, "frozen head": 2, "half of the advantages 0": 2}.get(mode, 3)
    timed: dict[str, harness.Side] = {
        side: partial(call, fn, hidden, weight, given, mode) for side, fn in sides.items()
    }
    timed["bare products"] = partial(bare, hidden, weight, logits, mode)
    return harness.Case(
        op="policy_head",
        name=f"N={rows} H={hidden_size} V={vocab} {str(DTYPE)[6:]}, {mode}",
        sides=timed,
        gate=gate,
        peers=("trl",),
        flops=products * 2 * rows * hidden_size * vocab,
        formula=f"flops = {products} products of 2 N H V, the least there is",
        rounds=15 if CUDA else 7,
    )


SHAPES = [(2048, 512, 32_768)]
if CUDA:
    SHAPES = [(4096, 4096, 151_936), (16_384, 4096, 151_936), (16_384, 1024, 151_936)]
CASES = {
    f"{n}x{h}x{v}-{mode.replace(' ', '-')}": partial(case, n, h, v, mode)
    for n, h, v in SHAPES
    for mode in MODES
}

test_speed = harness.as_test(CASES)
if __name__ == "__main__":
    harness.main(CASES)

"""Hidden states of ragged rows: packed with our attention, padded, and transformers' own packing.

    python bench/packed_forward.py

The share of padding saved is 1 - tokens / (rows * longest row).
"""

import copy
from collections.abc import Callable

import harness
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tercet.engine.model import Policy
from tercet.engine.records import Packed, pack

VOCAB = 2000
DTYPE = torch.bfloat16 if harness.DEVICE.type == "cuda" else torch.float32
NEAR = {torch.bfloat16: 5e-2, torch.float32: 1e-3}[DTYPE]


def tiny_qwen3(layers: int, hidden: int) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=4096,
    )
    model = Qwen3ForCausalLM(config).eval()
    torch.nn.Module.to(model, harness.DEVICE, DTYPE)
    return model


def padded_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    out = model.base_model(ids, attention_mask=mask, use_cache=False)
    return out.last_hidden_state[mask.bool()]


def stock_packed_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:
    """What transformers does with restarting positions: one row, an [n, n] block mask."""
    out = model.base_model(packed.ids[None], position_ids=packed.positions[None], use_cache=False)
    return out.last_hidden_state[0]


def with_backward(model: PreTrainedModel, forward: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        forward().square().sum().backward()
        model.zero_grad(set_to_none=True)

    return run


def case(rows: int, longest: int, *, backward: bool, layers: int = 4, hidden: int = 256):
    """Rows of 8 to `longest` tokens, uniformly."""
    torch.manual_seed(0)
    lengths = torch.randint(8, longest + 1, (rows,)).tolist()
    texts = [torch.randint(VOCAB, (n,)).tolist() for n in lengths]
    packed = pack(texts, device=harness.DEVICE)
    width, n = max(lengths), sum(lengths)
    ids = torch.zeros(rows, width, dtype=torch.int64, device=harness.DEVICE)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
    stock = tiny_qwen3(layers, hidden)
    policy = Policy(copy.deepcopy(stock))
    policy.prove_isolation()
    forwards: dict[str, tuple[PreTrainedModel, Callable[[], Tensor]]] = {
        "ours": (policy.model, lambda: policy.hidden(packed)),
        "padded": (stock, lambda: padded_hidden(stock, ids, mask)),
        "transformers packed": (stock, lambda: stock_packed_hidden(stock, packed)),
    }

    def gate() -> None:
        with torch.no_grad():
            truth = forwards["padded"][1]()
            torch.testing.assert_close(forwards["ours"][1](), truth, rtol=NEAR, atol=NEAR)

    saved = 1 - n / (rows * width)
    kind = "fwd+bwd" if backward else "fwd"
    weights = sum(p.numel() for name, p in stock.named_parameters() if ".layers." in name)
    sides = {
        name: with_backward(model, run) if backward else torch.no_grad()(run)
        for name, (model, run) in forwards.items()
    }
    return harness.Case(
        op="packed_forward",
        name=f"{rows} rows of 8-{longest}, {n} tokens, {layers} layers H={hidden} {kind}",
        sides=sides,
        gate=gate,
        flops=2 * n * weights * (3 if backward else 1),
        formula="flops = 2 * tokens * layer weights (x3 with backward); attention not counted",
        rounds=5 if longest < 512 else 3,  # a side takes 9 s
        notes={"tokens": n, "padded_tokens": rows * width, "padding_saved": round(saved, 3)},
    )


CASES = {
    "short-fwd": lambda: case(64, 128, backward=False),
    "short-fwd+bwd": lambda: case(64, 128, backward=True),
    "long-fwd": lambda: case(64, 512, backward=False),
    "long-fwd+bwd": lambda: case(64, 512, backward=True),
}

test_speed = harness.as_test(CASES)

if __name__ == "__main__":
    harness.main(CASES)

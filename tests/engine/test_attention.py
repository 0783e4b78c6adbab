"""Attention over packed rows: equal to separate forwards, and proven so before it is used."""

import copy
import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from tercet.engine.attention import plan_layout
from tercet.engine.model import Policy
from tercet.engine.records import pack

ARCHITECTURES = ["qwen2", "qwen3", "llama"]
LENGTHS = [7, 1, 23, 7, 12, 9, 1, 40]  # several buckets: of one row, of rows of unlike length


def ragged_rows(lengths=LENGTHS, vocab=384) -> list[list[int]]:
    return [torch.randint(vocab, (n,)).tolist() for n in lengths]


def separate_hidden(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Each row alone, by transformers' own path."""
    parts = [model.base_model(torch.tensor([row]), use_cache=False) for row in rows]
    return torch.cat([part.last_hidden_state[0] for part in parts])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_hidden_and_gradients_equal_separate_forwards(arch, make_tiny_model):
    rows, model = ragged_rows(), make_tiny_model(arch).train()
    expected = separate_hidden(copy.deepcopy(model), rows)
    policy, other = Policy(model), copy.deepcopy(model)
    hidden = policy.hidden(pack(rows))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)

    upstream = torch.randn_like(hidden)
    hidden.backward(upstream)
    separate_hidden(other, rows).backward(upstream)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            message = f"gradient of {name}"
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=message: f"{n}: {m}"
            )


@pytest.mark.parametrize("window", [1, 4, 100])
def test_sliding_window_layers_equal_separate_forwards(window, make_tiny_model):
    rows = ragged_rows()
    settings = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    model = make_tiny_model("qwen2", **settings)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    expected = separate_hidden(copy.deepcopy(model), rows)
    torch.testing.assert_close(Policy(model).hidden(pack(rows)), expected, rtol=1e-4, atol=1e-5)


def test_window_of_every_layer_is_kept():
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=3, initializer_range=0.3,
    )  # fmt: skip
    model, rows = MistralForCausalLM(config).eval(), ragged_rows(vocab=50)
    expected = separate_hidden(copy.deepcopy(model), rows)
    torch.testing.assert_close(Policy(model).hidden(pack(rows)), expected, rtol=1e-4, atol=1e-5)


def test_learned_positions_restart_in_every_row():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    )
    rows = ragged_rows(vocab=50)
    expected = separate_hidden(copy.deepcopy(model).eval(), rows)
    hidden = Policy(model.eval()).hidden(pack(rows))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_float64_model_agrees_to_rounding(make_tiny_model):
    model, rows = make_tiny_model("qwen3").double(), ragged_rows()
    expected = separate_hidden(copy.deepcopy(model), rows)
    policy = Policy(model)
    # transformers computes rotary angles and norms in float32 whatever the model's dtype
    torch.testing.assert_close(policy.hidden(pack(rows)), expected, rtol=1e-6, atol=1e-6)
    assert policy.prove_isolation() < 1e-6


def test_bfloat16_model_passes_its_proof(make_tiny_model):
    assert Policy(make_tiny_model("llama").bfloat16()).prove_isolation() < 0.1


def test_hidden_of_one_row_and_of_equal_rows(tiny_policy):
    for rows in (ragged_rows([9]), ragged_rows([6, 6, 6])):
        expected = separate_hidden(tiny_policy.model, rows)
        torch.testing.assert_close(tiny_policy.hidden(pack(rows)), expected, rtol=1e-4, atol=1e-5)


def test_a_row_is_bitwise_untouched_by_its_neighbours(tiny_policy):
    first, other, last = ragged_rows([8, 8, 5])
    a = tiny_policy.hidden(pack([first, last]))[-5:]
    b = tiny_policy.hidden(pack([other, last]))[-5:]
    assert torch.equal(a, b)


def test_buckets_hold_every_token_once_and_pad_little():
    lengths = torch.randint(1, 200, (64,))
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    layout = plan_layout(cu, int(lengths.max()), "sdpa", torch.float32)
    n = int(lengths.sum())
    assert torch.equal(layout.gather[layout.scatter], torch.arange(n))
    assert len(layout.gather) == sum(rows * length for rows, length in layout.buckets)
    assert len(layout.gather) < 1.2 * n
    assert len(layout.buckets) < 20


def with_attention_that_ignores_the_layout(model):
    """Real stock SDPA in the layers: transformers builds no mask, so rows see those before them."""
    for layer in model.base_model.layers:
        stock = copy.deepcopy(model.config)
        stock._attn_implementation = "sdpa"
        layer.self_attn.config = stock
    return model


def test_stock_attention_leaks_and_is_refused(make_tiny_model):
    policy = Policy(make_tiny_model("qwen3"))
    with_attention_that_ignores_the_layout(policy.model)
    with pytest.raises(
        RuntimeError, match=r"must equal separate forwards, got relative error .*leak"
    ):
        policy.hidden(pack(ragged_rows()))
    with pytest.raises(RuntimeError):  # a refusal is not remembered as a proof
        policy.hidden(pack(ragged_rows()))


def test_a_leak_below_the_rounding_limit_is_refused(make_tiny_model):
    """A model that hardly attends: packed is close to separate, but a row still sees the others."""
    model = make_tiny_model("llama")
    for layer in model.base_model.layers:
        layer.self_attn.o_proj.weight.data.mul_(2e-5)
    policy = Policy(model)
    with_attention_that_ignores_the_layout(model)
    with pytest.raises(RuntimeError) as refusal:
        policy.prove_isolation()
    found = re.search(
        r"error (\S+) \(limit (\S+)\) and leak between rows (\S+);", str(refusal.value)
    )
    assert found is not None
    error, limit, leak = map(float, found.groups())
    assert error < limit
    assert leak > 1e-5


@pytest.mark.parametrize(
    ("use_cache", "ones"), [(False, True), (True, False), (True, True)], ids=str
)
def test_the_proof_sees_what_transformers_own_packing_does_silently(
    use_cache, ones, make_tiny_model
):
    """Stock SDPA isolates packed rows only without cache and mask; the proof's measure tells."""
    model, rows = make_tiny_model("llama"), ragged_rows([5, 9])
    packed = pack(rows)
    mask = torch.ones_like(packed.ids)[None] if ones else None
    call = {"position_ids": packed.positions[None], "use_cache": use_cache, "attention_mask": mask}
    stock = model.base_model(packed.ids[None], **call).last_hidden_state[0]
    expected = separate_hidden(model, rows)
    assert (stock - expected).abs().max() > 0.1  # the leak is real
    ours = Policy(model).hidden(packed)
    assert (ours - expected).abs().max() < 1e-4


def test_bidirectional_model_is_refused():
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    policy = Policy(BertLMHeadModel(config).eval())
    with pytest.raises(RuntimeError, match="not causal"):
        policy.hidden(pack([[1, 2, 3], [4, 5]]))


def test_head_that_changes_its_logits_is_refused_by_the_proof(make_tiny_model):
    policy = Policy(make_tiny_model("llama"))
    policy.model.lm_head.register_forward_hook(lambda module, args, logits: 3 * logits)
    with pytest.raises(RuntimeError, match=r"hidden @ weight\.T \+ bias"):
        policy.hidden(pack([[1, 2, 3]]))


def test_hidden_states_that_overflow_are_no_isolation_fault(tiny_policy):
    with torch.no_grad():
        tiny_policy.model.base_model.norm.weight.fill_(3e38)
    with pytest.raises(
        FloatingPointError, match="hidden states of Qwen3ForCausalLM must be finite"
    ):
        tiny_policy.hidden(pack([[1, 2]]))


def test_proof_runs_once_and_keeps_training_mode(tiny_policy):
    calls = []
    tiny_policy.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    tiny_policy.model.train()
    tiny_policy.hidden(pack([[1, 2, 3]]))
    first = len(calls)
    tiny_policy.hidden(pack([[1, 2, 3]]))
    assert (first > 1, len(calls) - first) == (True, 1)
    assert all(module.training for module in tiny_policy.model.modules())


def test_attention_exchanged_behind_the_policys_back_is_refused(tiny_policy):
    tiny_policy.hidden(pack([[1, 2]]))
    tiny_policy.model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="must stay 'tercet', got 'sdpa'"):
        tiny_policy.hidden(pack([[1, 2]]))


def test_outside_of_packed_calls_the_model_is_stock(tiny_policy):
    """Padding masks, caches and transformers' own packing work as with stock SDPA."""
    stock = copy.deepcopy(tiny_policy.model)
    stock.set_attn_implementation("sdpa")
    ids = torch.randint(384, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    packed = pack(ragged_rows([4, 5]))
    for call in (
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "use_cache": True},
        {"input_ids": packed.ids[None], "position_ids": packed.positions[None], "use_cache": False},
    ):
        assert torch.equal(tiny_policy.model(**call).logits, stock(**call).logits)


def norm_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("attn", "dtype"),
    [
        ("sdpa", torch.float32),
        ("sdpa", torch.bfloat16),
        ("varlen", torch.bfloat16),
        ("varlen", torch.float16),
        ("auto", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 6], ids=["full", "window"])
def test_backends_on_cuda_err_no_more_than_stock_sdpa(attn, dtype, window, make_tiny_model):
    """Truth is float64 on the CPU; values and gradients."""
    settings = {} if window is None else {"use_sliding_window": True, "sliding_window": window}
    settings |= {} if window is None else {"max_window_layers": 1}
    rows, master = ragged_rows(), make_tiny_model("qwen2", **settings)
    upstream = torch.randn(sum(LENGTHS), 32)

    def outcome(model, hidden):
        weight = model.base_model.layers[0].self_attn.q_proj.weight
        (grad,) = torch.autograd.grad(hidden, weight, upstream.to(hidden))
        return hidden.detach().cpu(), grad.cpu()

    exact = copy.deepcopy(master).double()
    truth = outcome(exact, separate_hidden(exact, rows))
    stock = copy.deepcopy(master).to("cuda", dtype)
    separate = [stock.base_model(torch.tensor([row], device="cuda")) for row in rows]
    eager = outcome(stock, torch.cat([out.last_hidden_state[0] for out in separate]))
    policy = Policy(copy.deepcopy(master).to("cuda", dtype), attn=attn)
    ours = outcome(policy.model, policy.hidden(pack(rows, device="cuda")))
    for name, t, e, o in zip(("hidden", "gradient"), truth, eager, ours, strict=True):
        assert norm_error(o, t) <= 2 * norm_error(e, t) + 1e-5, name


@pytest.mark.gpu
def test_packed_flash_backends_do_not_wait_for_the_device(make_tiny_model):
    policy = Policy(make_tiny_model("qwen3").to("cuda", torch.bfloat16), attn="varlen")
    packed = pack(ragged_rows(), device="cuda")
    policy.hidden(packed)  # the proof does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.hidden(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")

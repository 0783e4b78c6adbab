"""The policy: what it refuses, what score returns, what it writes and reads."""

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tercet.engine.attention import choose_backend
from tercet.engine.model import Policy, evaluating, score
from tercet.engine.records import pack

ARCHITECTURES = ["qwen2", "qwen3", "llama"]


def ragged_rows(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(384, (n,)).tolist() for n in lengths]


@pytest.mark.parametrize(
    ("config", "model", "named"),
    [
        (Gemma2Config, Gemma2ForCausalLM, "final_logit_softcapping"),
        (CohereConfig, CohereForCausalLM, "logit_scale"),
    ],
)
def test_scaled_or_capped_logits_are_refused(config, model, named):
    small = config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=named):
        Policy(model(small))


@pytest.mark.wrong_types
def test_models_that_are_no_causal_lm_are_refused():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="causal language model with a head, got BertModel"):
        Policy(BertModel(config))
    with pytest.raises(ValueError, match="got BertForMaskedLM"):  # has a head, reads both ways
        Policy(BertForMaskedLM(config))
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration"):
        Policy(T5ForConditionalGeneration(t5))
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        Policy(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_unknown_or_impossible_attention_is_refused(make_tiny_model):
    with pytest.raises(ValueError, match=r"attn must be 'auto' or one of .*got 'flash'"):
        Policy(make_tiny_model(), attn="flash")
    with pytest.raises(ValueError, match="use attn='auto'"):
        Policy(make_tiny_model(), attn="flash_attention_2")
    assert choose_backend("auto", torch.device("cpu"), torch.bfloat16) == "sdpa"


def test_rows_longer_than_the_positions_are_refused(make_tiny_model):
    policy = Policy(make_tiny_model("qwen3", max_position_embeddings=16))
    policy.hidden(pack([[1] * 16]))
    with pytest.raises(ValueError, match=r"at most 16 tokens long .*got 17"):
        policy.hidden(pack([[1, 2], [1] * 17]))


def test_rotary_scaling_that_depends_on_the_batch_is_limited():
    rope = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", **rope},
    )  # fmt: skip
    policy = Policy(Phi3ForCausalLM(config).eval())
    policy.hidden(pack([[1] * 16, [2]]))
    with pytest.raises(ValueError, match=r"at most 16 tokens long .*got 17"):
        policy.hidden(pack([[1] * 17, [2]]))


@pytest.mark.parametrize("bad", [-1, 384])
def test_ids_outside_of_the_vocabulary_are_refused(bad, tiny_policy):
    with pytest.raises(ValueError, match=r"ids must be in \[0, 384\)"):
        tiny_policy.hidden(pack([[1, 2, bad]]))


def test_a_scored_first_token_is_refused(tiny_policy):
    with pytest.raises(ValueError, match="first token of a row"):
        score(tiny_policy, pack([[1, 2], []], [[3], [4, 5]]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_equals_full_logits(arch, temperature, make_tiny_model):
    model = make_tiny_model(arch)
    prompts, completions = ragged_rows([4, 9, 2]), ragged_rows([5, 1, 8])
    got = score(Policy(model), pack(prompts, completions), temperature=temperature, entropy=True)
    logp, entropy = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
        full = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        logp.append(full.gather(1, torch.tensor(completion)[:, None])[:, 0])
        entropy.append(-(full.exp() * full).sum(-1))
    torch.testing.assert_close(got.logp.double(), torch.cat(logp), rtol=1e-4, atol=1e-4)
    assert got.entropy is not None
    torch.testing.assert_close(got.entropy.double(), torch.cat(entropy), rtol=1e-4, atol=1e-4)


def test_score_takes_a_temperature_per_token(tiny_policy):
    packed = pack([[1, 2], [3, 4, 5]], [[6, 7], [8]])
    temperatures = torch.tensor([0.5, 2.0, 1.5])
    got = score(tiny_policy, packed, temperature=temperatures).logp
    each = [
        score(tiny_policy, packed, temperature=float(t)).logp[i] for i, t in enumerate(temperatures)
    ]
    torch.testing.assert_close(got, torch.stack(each))


def test_embedding_is_the_mean_by_hand_and_carries_gradient(tiny_policy):
    rows = ragged_rows([6, 4, 5])
    packed = pack(rows, pool_from=[2, None, 0])
    got = score(tiny_policy, packed, embed="mean")
    model = tiny_policy.model.base_model
    hidden = [model(torch.tensor([row])).last_hidden_state[0] for row in rows]
    by_hand = torch.stack([hidden[0][2:].mean(0), torch.zeros(32), hidden[2].mean(0)])
    assert got.embedding is not None
    torch.testing.assert_close(got.embedding, by_hand, rtol=1e-4, atol=1e-5)
    assert got.logp.shape == (0,)
    upstream = torch.randn_like(by_hand)
    weight = tiny_policy.model.base_model.norm.weight
    (ours,) = torch.autograd.grad(got.embedding, weight, upstream)
    (expected,) = torch.autograd.grad(by_hand, weight, upstream)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_score_gradient_equals_full_logits(make_tiny_model):
    model = make_tiny_model("qwen2")
    other = copy.deepcopy(model)
    prompts, completions = ragged_rows([4, 9]), ragged_rows([5, 3])
    upstream = torch.randn(8)
    score(Policy(model), pack(prompts, completions)).logp.backward(upstream)
    logp = []
    for prompt, completion in zip(prompts, completions, strict=True):
        full = other(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        logp.append(full[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0])
    torch.cat(logp).backward(upstream)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_logits_are_never_made(tiny_policy):
    made = []
    tiny_policy.hidden(pack([[1, 2]]))  # the proof, which looks at the head once
    tiny_policy.model.lm_head.register_forward_hook(lambda *_: made.append(1))
    score(tiny_policy, pack([[1, 2, 3]], [[4, 5]]), entropy=True, embed="mean")
    assert not made


def test_activation_checkpointing_changes_no_gradient(tmp_path, make_tiny_model):
    make_tiny_model("qwen3").save_pretrained(tmp_path / "model")
    packed, gradients, saved = pack(ragged_rows([9, 30]), ragged_rows([8, 20])), [], []
    for checkpointing in (False, True):
        policy = Policy.from_pretrained(tmp_path / "model", activation_checkpointing=checkpointing)
        policy.model.train()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            saved.clear()
            loss = score(policy, packed).logp.sum()
        loss.backward()
        gradients.append(([p.grad for p in policy.model.parameters()], sum(saved)))
    (plain, plain_saved), (checked, checked_saved) = gradients
    for a, b in zip(plain, checked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert checked_saved < plain_saved / 2


def test_evaluating_restores_each_flag(make_tiny_model):
    model = make_tiny_model().train()
    frozen = model.base_model.layers[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert not any(module.training for module in frozen.modules())
    assert model.training
    assert model.base_model.layers[1].training


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_save_and_load_round_trip(tied, tmp_path, make_tiny_model, tiny_tokenizer):
    policy = Policy(make_tiny_model("qwen3", tie_word_embeddings=tied), tiny_tokenizer)
    policy.save(tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]  # nothing temporary is left
    again = Policy.from_pretrained(tmp_path / "saved")
    assert (again.head().weight is again.model.get_input_embeddings().weight) == tied
    packed = pack([[1, 2, 3]], [[4, 5]])
    assert torch.equal(score(again, packed).logp, score(policy, packed).logp)
    assert again.tokenizer is not None
    assert again.tokenizer.chat_template == tiny_tokenizer.chat_template
    assert again.tokenizer("the red boat").input_ids == tiny_tokenizer("the red boat").input_ids
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "tercet" not in json.dumps(config)  # plain transformers can load the folder
    assert not list((tmp_path / "saved").glob("*.bin"))


def test_save_over_an_older_save_keeps_other_files(tmp_path, make_tiny_model):
    Policy(make_tiny_model(seed=1)).save(tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    policy = Policy(make_tiny_model(seed=2))
    policy.save(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], policy.head().weight)
    assert (tmp_path / "saved" / "notes.txt").read_text() == "mine"


def test_load_names_what_is_wrong(tmp_path, make_tiny_model, caplog):
    with pytest.raises(FileNotFoundError, match="no folder"):
        Policy.from_pretrained(tmp_path / "nowhere")
    model = make_tiny_model("qwen3")
    state = {k: v for k, v in model.state_dict().items() if "q_norm" not in k}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match=r"must hold every weight of Qwen3ForCausalLM.*q_norm"):
        Policy.from_pretrained(tmp_path / "part")
    model.save_pretrained(tmp_path / "bare")
    with caplog.at_level(logging.WARNING, logger="tercet.engine.pretrained"):
        assert Policy.from_pretrained(tmp_path / "bare").tokenizer is None
    assert "no tokenizer" in caplog.text


def test_pickled_weights_are_not_read(tmp_path, make_tiny_model):
    model = make_tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Policy.from_pretrained(tmp_path)


def test_dtype_and_sizes(tmp_path, make_tiny_model):
    make_tiny_model("llama").save_pretrained(tmp_path / "m")
    policy = Policy.from_pretrained(str(tmp_path / "m"), dtype=torch.bfloat16, device="cpu")
    assert (policy.dtype, policy.device.type) == (torch.bfloat16, "cpu")
    assert (policy.hidden_size, policy.vocab_size, policy.max_length) == (32, 384, 512)
    assert policy.hidden(pack([[1, 2]])).dtype == torch.bfloat16

"""The tokenizer and the model that an experiment makes on the spot."""

import random

import pytest
import torch

from tercet.engine.grace.experiment_config import ScratchModel
from tercet.engine.grace.fit import fit
from tercet.engine.grace.fit_config import FitConfig, PretrainConfig
from tercet.engine.grace.prompts import PromptBuilder
from tercet.engine.grace.scratch import (
    END,
    RationaleModelling,
    Salience,
    build_policy,
    build_tokenizer,
    draw_words,
)
from tercet.engine.metrics import RunLog

SIZES = ScratchModel(
    vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
NAMES = ["Martha", "Toby", "Ahito", "Wanda", "Pedro", "Ingrid"]
PAIRS = [
    (f"{name} has {i + 2} plums . How many ?", f"{name} keeps {i + 2} * 3 = {3 * i + 6}")
    for i, name in enumerate(NAMES)
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([text for pair in PAIRS for text in pair], 512)


def objective(tokenizer, **changes):
    policy = build_policy(tokenizer, SIZES)
    prompt = PromptBuilder(tokenizer, max_prompt_length=128, system_prompt="Name.")
    config = PretrainConfig(per_device_train_batch_size=4, min_words=1, max_words=2, **changes)
    return RationaleModelling(policy, PAIRS, prompt, config)


def test_tokenizer_gives_text_back(tokenizer):
    text = "Martha’s 1234 plums <|im_end|> ü"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(END) == [tokenizer.eos_token_id] == [2]


def test_words_of_a_rationale_have_the_tokens_they_have_in_a_text(tokenizer):
    modelling = objective(tokenizer)
    in_text = tokenizer.encode(" Martha has 12 plums", add_special_tokens=False)
    first, *_ = modelling.rationale_ids(["Martha", "plums"])
    assert first == in_text[0]
    assert modelling.rationale_ids(["Martha", "plums"])[-1] == tokenizer.eos_token_id


def test_model_ends_where_the_tokenizer_says_and_depends_on_its_seed(tokenizer):
    policy = build_policy(tokenizer, SIZES, seed=1)
    assert policy.model.config.eos_token_id == tokenizer.eos_token_id
    again, other = (build_policy(tokenizer, SIZES, seed=s) for s in (1, 2))
    weights = [p.model.model.layers[0].mlp.up_proj.weight for p in (policy, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_shared_words_leave_common_ones_out_and_keep_numbers():
    salience = Salience([f"{name} has 3 plums" for name in NAMES] + ["fresh plums 3"] * 60)
    text = "Toby has 3 plums , Toby has 5 ."
    assert salience.shared(text, "toby has 3 plums") == ["Toby", "has", "3"]
    assert "plums" in salience.common
    assert salience.shared("a", "b") == []


def test_words_are_drawn_in_their_order():
    rng = random.Random(0)
    drawn = [draw_words("abcdef", 2, 4, rng) for _ in range(200)]
    assert {len(words) for words in drawn} == {2, 3, 4}
    assert all(words == sorted(words) for words in drawn)
    assert {word for words in drawn for word in words} == set("abcdef")
    assert draw_words(["x"], 3, 6, rng) == ["x"]


def test_loss_is_the_mean_over_rationale_tokens_and_weighted_text_tokens(tokenizer):
    modelling = objective(tokenizer, text_weight=0.25)
    metrics = modelling.backward(1)
    assert metrics["loss"] == pytest.approx(
        metrics["loss/rationale"] + 0.25 * metrics["loss/text"], rel=1e-5
    )
    assert modelling.backward(1)["loss"] == metrics["loss"]  # a pure function of the step
    assert modelling.backward(2)["loss"] != metrics["loss"]


def test_header_and_system_tokens_are_not_learnt(tokenizer):
    """Tokens 1..n of a row are judged one by one against the model's own logits."""
    modelling = objective(tokenizer, text_weight=1.0)
    modelling.config = PretrainConfig(
        per_device_train_batch_size=1, min_words=2, max_words=2, text_weight=1.0
    )
    row = modelling._epochs.rows(0, 1)[0]
    text, words = modelling.rows[row]
    prompt = modelling.prompt(text)
    ids = torch.tensor([[*prompt.ids, *modelling.rationale_ids(words)]])
    logp = modelling.policy.model(ids).logits[0, :-1].log_softmax(-1)
    token_loss = -logp.gather(1, ids[0, 1:, None])[:, 0]
    start, stop = prompt.pool_from, len(prompt.ids)
    header = len(modelling.prompt.suffix_ids)
    metrics = modelling.backward(1)
    assert metrics["loss/text"] == pytest.approx(
        token_loss[start - 1 : stop - header - 1].mean().item(), rel=1e-4
    )
    assert metrics["loss/rationale"] == pytest.approx(
        token_loss[stop - 1 :].mean().item(), rel=1e-4
    )


def test_a_few_steps_lower_the_loss(tokenizer, tmp_path):
    settings = FitConfig(max_steps=25, learning_rate=5e-3, save_steps=0)
    modelling = objective(tokenizer, fit=settings)
    before = modelling.backward(1)["loss/rationale"]
    modelling.policy.model.zero_grad()
    with RunLog.create(tmp_path, settings, total_steps=25) as log:
        fit(modelling.policy, modelling, settings, log)
    assert modelling.backward(1)["loss/rationale"] < before - 1.0


def test_bad_settings_are_named(tokenizer):
    with pytest.raises(ValueError, match="vocab_size must be >= 512"):
        ScratchModel(vocab_size=100)
    with pytest.raises(ValueError, match="multiple of num_attention_heads"):
        ScratchModel(hidden_size=30)
    with pytest.raises(ValueError, match="1 <= min_words <= max_words"):
        PretrainConfig(min_words=4, max_words=2)
    with pytest.raises(ValueError, match=r"text_weight must be finite and >= 0, .* got nan and 32"):
        PretrainConfig(text_weight=float("nan"))
    with pytest.raises(ValueError, match="must be texts"):
        build_tokenizer([], 512)
    prompt = PromptBuilder(tokenizer, max_prompt_length=128, system_prompt="Name.")
    with pytest.raises(ValueError, match="must share words"):
        RationaleModelling(
            build_policy(tokenizer, SIZES), [("one", "two")], prompt, PretrainConfig()
        )


def test_weights_that_overflow_are_not_saved(tokenizer, tmp_path):
    config = FitConfig(max_steps=1, learning_rate=1e20, weight_decay=1e30)
    modelling = objective(tokenizer, fit=config)
    with (
        RunLog.create(tmp_path, config, total_steps=1) as log,
        pytest.raises(
            RuntimeError, match=r"^fit: step 1: weights after the update must be finite, got"
        ),
    ):
        fit(modelling.policy, modelling, config, log)
    assert not list(tmp_path.glob("checkpoint-*"))

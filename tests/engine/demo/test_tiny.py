"""The tiny tokenizer and model: real chat template, real prompts, a stated accuracy or an error."""

import pytest
import torch
from transformers import AutoTokenizer

from tercet.engine.demo.config import PretrainConfig
from tercet.engine.demo.tiny import (
    EOS_ID,
    MAX_LENGTH,
    SYSTEM_PROMPT,
    Pretrainer,
    build_policy,
    build_tokenizer,
    pretrain,
)
from tercet.engine.demo.world import TOPICS, World
from tercet.engine.grace.prompts import build_prompt
from tercet.engine.model import Policy


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world.corpus())


def test_every_word_of_the_world_is_one_token_and_comes_back(world, tokenizer):
    for text in [t.text for t in world.held_out()]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text.replace(" ?", "?").replace(" .", ".")
    names = [n for t in TOPICS for n in t.names]
    assert all(len(tokenizer.encode(n, add_special_tokens=False)) == 1 for n in names)
    assert tokenizer.eos_token_id == EOS_ID


def test_rationales_keep_their_think_block_and_lose_the_end_token(tokenizer):
    text = "<think> clearly </think> it is about bees"
    ids = [*tokenizer.encode(text, add_special_tokens=False), EOS_ID]
    assert len(ids) == 8
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_unknown_words_are_spelled(tokenizer):
    ids = tokenizer.encode("Xylophone 42", add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "xylophone 42"


def test_prompt_pools_text_and_assistant_header(tokenizer):
    prompt = build_prompt(
        tokenizer,
        "tom left the hive near the swarm .",
        max_prompt_length=MAX_LENGTH,
        system_prompt=SYSTEM_PROMPT,
    )
    tokens = tokenizer.convert_ids_to_tokens(prompt.ids)
    assert " ".join(tokens[: prompt.pool_from]) == (
        "<bos> <system> read reason understand <end> <user>"
    )
    assert " ".join(tokens[prompt.pool_from :]) == (
        "tom left the hive near the swarm . <end> <assistant>"
    )


def test_saved_folder_loads_with_template_and_weights(world, tokenizer, tmp_path):
    policy = build_policy(tokenizer, seed=5)
    policy.save(tmp_path / "base")
    again = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert again.chat_template == tokenizer.chat_template
    assert again.encode("<think> maria found bees</think>") == tokenizer.encode(
        "<think> maria found bees</think>"
    )
    loaded = Policy.from_pretrained(tmp_path / "base").model.state_dict()
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, loaded[name])


def test_clean_batch_marks_the_first_name_word(world, tokenizer):
    trainer = Pretrainer(world, build_policy(tokenizer), PretrainConfig(batch_size=8), seed=0)
    batch = trainer.batch(noisy=False)
    ids = batch.packed.ids[batch.packed.loss_mask]
    words = tokenizer.convert_ids_to_tokens(ids[batch.first_name].tolist())
    assert all(w in TOPICS[k].names for w, k in zip(words, batch.topics.tolist(), strict=True))
    before = tokenizer.convert_ids_to_tokens(ids[batch.first_name - 1].tolist())
    assert before == ["about"] * 8
    text = tokenizer.decode(ids[batch.role == 1])
    assert "<" not in text  # neither header nor rationale
    assert text.count(".") + text.count("?") == 8  # to the last token
    assert tokenizer.decode(ids[batch.role == 2]).count("<eos>") == 8


def test_pretraining_stops_at_the_stated_accuracy_and_is_seeded(world):
    config = PretrainConfig(accuracy=0.01, noisy_steps=2)
    seen = []
    first = pretrain(world, config, progress=lambda step, accuracy: seen.append((step, accuracy)))
    second = pretrain(world, config)
    assert first.steps == second.steps == len(seen) + 2
    assert first.accuracy == seen[-1][1] >= 0.01 > max(a for _, a in seen[:-1])
    for a, b in zip(first.policy.model.parameters(), second.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accuracy_out_of_reach_is_an_error(world):
    with pytest.raises(RuntimeError, match=r"accuracy must reach 0\.93 within 3 steps, got 0\.00"):
        pretrain(world, PretrainConfig(max_steps=3))
    with pytest.raises(ValueError, match=r"accuracy must be in \(0, 1\), got 1\.5"):
        PretrainConfig(accuracy=1.5)

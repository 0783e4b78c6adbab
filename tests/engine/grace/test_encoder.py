"""Texts to vectors: what is pooled, what repeats, what is counted, what is refused."""

import json
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from tercet.engine.choices import Pooling
from tercet.engine.grace.encoder import GraceEncoder, sample_variance
from tercet.engine.grace.prompts import SYSTEM_PROMPT
from tercet.engine.model import Policy, score
from tercet.engine.records import Completion, Request, pack
from tercet.engine.sampler import Sampler

TEXTS = ["the red boat", "a gardener waters the roses before the sun rises", "bread"]
SYSTEM = "Read the text."


@pytest.fixture
def encoder(tiny_policy) -> GraceEncoder:
    return GraceEncoder(tiny_policy, max_prompt_length=64, system_prompt=SYSTEM, max_batch_size=4)


class Recorder:
    """A sampler that keeps what passes through it."""

    def __init__(self, inner: Sampler) -> None:
        self.inner = inner
        self.completions: list[Completion] = []

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        found = self.inner.sample(requests)
        self.completions += found
        return found


@pytest.fixture
def recorder(encoder) -> Recorder:
    encoder.sampler = Recorder(encoder.sampler)
    return encoder.sampler


def test_vector_is_the_mean_state_of_text_header_and_rationale(encoder, recorder):
    found = encoder.encode(TEXTS, max_completion_length=6, normalize=False)
    prompts = [encoder.prompt(text) for text in TEXTS]
    packed = pack(
        [p.ids for p in prompts],
        [c.ids for c in recorder.completions],
        pool_from=[p.pool_from for p in prompts],
    )
    expected = score(encoder.policy, packed, embed="mean").embedding
    torch.testing.assert_close(found.vectors, expected, rtol=1e-4, atol=1e-5)
    assert found.rationales == [
        encoder.tokenizer.decode(c.ids, skip_special_tokens=True).strip()
        for c in recorder.completions
    ]


def test_without_generation_only_the_prompt_is_pooled(encoder):
    found = encoder.encode(TEXTS, generate=False, normalize=False)
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        prompt = encoder.prompt(text)
        hidden = encoder.policy.hidden(pack([prompt.ids]))
        torch.testing.assert_close(vector, hidden[prompt.pool_from :].mean(0), rtol=1e-4, atol=1e-5)
    assert found.rationales == ["", "", ""]
    assert found.num_truncated == 0
    assert not found.vectors.requires_grad
    small = GraceEncoder(
        encoder.policy, max_prompt_length=64, system_prompt=SYSTEM, max_tokens_per_batch=1
    )
    parts = small.encode(TEXTS, generate=False, normalize=False)
    torch.testing.assert_close(parts.vectors, found.vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_every_pooling_equals_encoding_from_scratch(tiny_policy, pooling, generate):
    encoder = GraceEncoder(
        tiny_policy, max_prompt_length=64, system_prompt=SYSTEM, pooling=pooling, max_batch_size=2
    )
    tiny_policy.model.generation_config.eos_token_id = list(range(3, 60))
    encoder.sampler = recorder = Recorder(encoder.sampler)
    texts = [*TEXTS, ""]
    found = encoder.encode(texts, generate=generate, max_completion_length=5, normalize=False)
    answers = [c.ids for c in recorder.completions] if generate else [[]] * len(texts)
    for text, answer, vector in zip(texts, answers, found.vectors, strict=True):
        prompt = encoder.prompt(text)
        ids = torch.tensor([prompt.ids + answer])
        output = tiny_policy.model.base_model(ids, use_cache=False, output_hidden_states=True)
        last, before = (output.hidden_states[layer][0, prompt.pool_from :] for layer in (-1, -2))
        expected = {
            "mean": last.mean(0),
            "penultimate_mean": before.mean(0),
            "max": last.amax(0),
            "last_token": last[-1],
        }
        torch.testing.assert_close(vector, expected[pooling], rtol=1e-4, atol=1e-4)
    if generate:
        assert {c.finished for c in recorder.completions} == {True, False}


@pytest.mark.parametrize("generate", [True, False])
def test_vectors_have_length_one_unless_asked(encoder, generate):
    unit = encoder.encode(TEXTS, generate=generate, max_completion_length=4)
    raw = encoder.encode(TEXTS, generate=generate, max_completion_length=4, normalize=False)
    torch.testing.assert_close(unit.vectors.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(unit.vectors, F.normalize(raw.vectors, dim=-1))
    assert not torch.allclose(raw.vectors, unit.vectors)


def test_seeded_samples_depend_on_seed_and_text_alone(encoder):
    settings = {"temperature": 1.0, "max_completion_length": 8}
    first = encoder.encode(TEXTS, seed=3, **settings)
    turned = encoder.encode(["another text", *TEXTS[::-1]], seed=3, **settings)
    assert turned.rationales[:0:-1] == first.rationales
    torch.testing.assert_close(turned.vectors[1:].flip(0), first.vectors, rtol=1e-4, atol=1e-5)
    assert encoder.encode(TEXTS, seed=4, **settings).rationales != first.rationales
    unseeded = [encoder.encode(TEXTS, **settings).rationales for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_every_sample_has_a_seed_of_its_own(encoder):
    seen: list[int] = []

    class Seeds:
        def sample(self, requests: Sequence[Request]) -> list[Completion]:
            seen.extend(r.params.seed for r in requests if r.params.seed is not None)
            return inner.sample(requests)

    inner, encoder.sampler = encoder.sampler, Seeds()
    settings = {"temperature": 1.0, "num_samples": 2, "max_completion_length": 1}
    encoder.encode(TEXTS, seed=1, **settings)
    encoder.encode(TEXTS, seed=2, **settings)
    assert len(set(seen)) == 2 * 2 * len(TEXTS)


def test_equal_texts_are_written_about_once_when_that_changes_nothing(encoder, recorder):
    twice = [*TEXTS, TEXTS[0]]
    greedy = encoder.encode(twice, max_completion_length=3)
    assert len(recorder.completions) == 3
    assert torch.equal(greedy.vectors[0], greedy.vectors[3])
    written = [*recorder.completions, recorder.completions[0]]
    assert greedy.num_truncated == sum(not c.finished for c in written)  # per text, as given
    drawn = encoder.encode(twice, max_completion_length=8, temperature=1.0)
    assert len(recorder.completions) == 3 + 4
    assert drawn.rationales[0] != drawn.rationales[3]


def test_several_samples_are_averaged_and_their_spread_reported(encoder, recorder):
    settings = {"temperature": 1.0, "seed": 1, "max_completion_length": 8}
    found = encoder.encode(TEXTS, num_samples=3, **settings)
    raw = torch.stack([c.embedding for c in recorder.completions]).view(3, 3, -1)
    assert [len(run) for run in found.samples] == [3, 3, 3]
    assert found.rationales == [run[0] for run in found.samples]
    assert found.rationales == encoder.encode(TEXTS, **settings).rationales
    unit = F.normalize(raw, dim=-1)
    torch.testing.assert_close(found.vectors, F.normalize(unit.mean(1), dim=-1))
    cosine = unit @ unit.transpose(1, 2)
    mean_cosine = (cosine.sum((1, 2)) - 3) / 6
    torch.testing.assert_close(found.variance, 1 - mean_cosine, rtol=1e-3, atol=1e-5)
    plain = encoder.encode(TEXTS, num_samples=3, normalize=False, **settings)
    torch.testing.assert_close(plain.vectors, raw.mean(1), rtol=1e-4, atol=1e-5)


def test_sample_variance_by_hand():
    at_angles = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(sample_variance(at_angles), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="at least two samples"):
        sample_variance(at_angles[:, :1])


def test_cut_rationales_and_cut_prompts_are_counted_and_said(encoder, caplog):
    long = "the red boat to the sea " * 40
    found = encoder.encode([*TEXTS, long], max_completion_length=1)
    assert caplog.messages == [
        "encode: 1 of 4 texts lost their end to fit max_prompt_length=64",
        f"encode: {found.num_truncated} of 4 texts have a rationale cut off by "
        "max_completion_length=1",
    ]
    assert found.num_truncated
    caplog.clear()
    encoder.encode([long], max_completion_length=1, warn=False)
    encoder.encode(TEXTS, generate=False)
    assert caplog.messages == []
    ended = [text == "" for text in found.rationales]
    assert found.num_truncated == 4 - sum(ended)
    assert found.num_prompts_truncated == 1
    assert len(encoder.prompt(long).ids) == 64


@pytest.mark.parametrize("generate", [True, False])
def test_no_texts_give_no_vectors(encoder, generate):
    found = encoder.encode([], generate=generate)
    assert found.vectors.shape == (0, 32)
    assert found.rationales == []
    assert len(found) == 0


def test_an_empty_text_is_its_header_and_rationale(encoder):
    found = encoder.encode(["", "bread"], generate=False, normalize=False)
    prompt = encoder.prompt("")
    hidden = encoder.policy.hidden(pack([prompt.ids]))
    torch.testing.assert_close(
        found.vectors[0], hidden[-len(encoder.prompt.suffix_ids) :].mean(0), rtol=1e-4, atol=1e-5
    )
    assert encoder.encode([""], max_completion_length=4).vectors.isfinite().all()


@pytest.mark.wrong_types
def test_bad_input_is_named(encoder, make_tiny_model):
    with pytest.raises(TypeError, match="got generator; put it in a list"):
        encoder.encode(text for text in ["a"])
    with pytest.raises(TypeError, match="got one string"):
        encoder.encode("bread")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got NoneType"):
        encoder.encode(["bread", None])
    with pytest.raises(ValueError, match="num_samples must be 1"):
        encoder.encode(["bread"], num_samples=2)
    with pytest.raises(ValueError, match="must have a tokenizer"):
        GraceEncoder(Policy(make_tiny_model()))
    with pytest.raises(ValueError, match=r"GraceEncoder: pooling must be one of \['mean', .*'cls'"):
        GraceEncoder(encoder.policy, pooling="cls")  # type: ignore[arg-type]


@pytest.mark.parametrize("generate", [True, False])
def test_what_the_model_has_no_room_for_names_the_settings(
    make_tiny_model, tiny_tokenizer, generate
):
    policy = Policy(make_tiny_model(max_position_embeddings=64), tiny_tokenizer)
    encoder = GraceEncoder(policy, max_prompt_length=65, system_prompt=SYSTEM)
    room = 64 - len(encoder.prompt("bread").ids)
    assert len(encoder.encode(["bread"], max_completion_length=room)) == 1
    assert len(encoder.encode(["bread"], max_completion_length=room + 1, generate=False)) == 1
    what = "prompt and rationale" if generate else "prompt"
    with pytest.raises(ValueError, match=rf"^encode: {what} must fit") as error:
        encoder.encode(["the", "bread " * 40], max_completion_length=9, generate=generate)
    assert "set max_prompt_length (--max-prompt-length) below 64, or shorten" in str(error.value)
    assert ("max_completion_length" in str(error.value)) == generate
    frame = encoder.prompt.frame
    for positions, only in ((frame + generate, True), (frame + generate + 1, False)):
        policy = Policy(make_tiny_model(max_position_embeddings=positions), tiny_tokenizer)
        with pytest.raises(ValueError, match=r"shorten the system prompt \(--system-p") as error:
            GraceEncoder(policy, system_prompt=SYSTEM).encode(
                ["bread " * 40], max_completion_length=9, generate=generate
            )
        assert ("set max_prompt_length" not in str(error.value)) == only
    if generate:
        with pytest.raises(
            ValueError, match=rf"the model's 64 .* got a prompt of {64 - room}"
        ) as e:
            encoder.encode(["bread", "the"], max_completion_length=room + 1)
        assert f"set max_completion_length (--max-completion-length) to at most {room}," in str(
            e.value
        )


def test_nan_in_hidden_states_is_refused(encoder):
    encoder.encode(["bread"], generate=False)
    with torch.no_grad():
        encoder.policy.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity for 1 of 1 texts, first 'bread'"):
        encoder.encode(["bread"], generate=False)


def test_a_saved_encoder_gives_the_same_vectors(encoder, tmp_path):
    expected = encoder.encode(TEXTS, max_completion_length=4)
    encoder.policy.save(tmp_path / "model")
    loaded = GraceEncoder.from_pretrained(
        tmp_path / "model", max_prompt_length=64, system_prompt=SYSTEM, device="cpu"
    )
    found = loaded.encode(TEXTS, max_completion_length=4)
    assert found.rationales == expected.rationales
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=1e-4, atol=1e-5)


PROMPT = {"system_prompt": "Hm.", "max_prompt_length": 80}


@pytest.mark.parametrize("settings", [{"data": PROMPT}, PROMPT], ids=["GRACE", "baseline"])
def test_a_checkpoint_says_how_it_embeds(encoder, tmp_path, settings):
    encoder.policy.save(tmp_path / "a")
    (tmp_path / "config.yaml").write_text("pooling: max\n")  # of a run beside it: not looked at
    saved = tmp_path / "a" / "tercet.json"
    saved.write_text(
        json.dumps({"settings": {**settings, "max_completion_length": 3, "pooling": "last_token"}})
    )
    loaded = GraceEncoder.from_pretrained(tmp_path / "a")
    assert (loaded.prompt.system_prompt, loaded.prompt.max_prompt_length) == ("Hm.", 80)
    assert (loaded.max_completion_length, loaded.pooling) == (3, "last_token")
    expected = loaded.encode(TEXTS, max_completion_length=3).vectors
    assert torch.equal(loaded.encode(TEXTS).vectors, expected)
    given = GraceEncoder.from_pretrained(
        tmp_path / "a", system_prompt="Oh.", max_completion_length=4, pooling="max"
    )
    assert (given.prompt.system_prompt, given.prompt.max_prompt_length) == ("Oh.", 80)
    assert (given.max_completion_length, given.pooling) == (4, "max")
    saved.unlink()
    plain = GraceEncoder.from_pretrained(tmp_path / "a")
    assert (plain.prompt.max_prompt_length, plain.max_completion_length) == (1024, 256)
    assert (plain.prompt.system_prompt, plain.pooling) == (SYSTEM_PROMPT, "mean")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "cls"}, r"pooling: .*got 'cls'"),
        ({"data": {"max_prompt_length": "64"}}, r"max_prompt_length: .*got '64'"),
        ({"max_completion_length": 0}, r"max_completion_length must be >= 1, got 0"),
        ({"data": {"system_prompt": None}}, r"system_prompt: .*got None"),
        ([1], "settings must be an object, got list"),
    ],
)
def test_settings_that_cannot_be_are_named_with_their_file(tmp_path, settings, message):
    (tmp_path / "tercet.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match=rf"^GraceEncoder\.from_pret.*tercet\.json: .*{message}"):
        GraceEncoder.from_pretrained(tmp_path)


def test_training_flags_survive(encoder):
    encoder.policy.model.train()
    encoder.encode(TEXTS, generate=False)
    encoder.encode(TEXTS, max_completion_length=2)
    assert encoder.policy.model.training

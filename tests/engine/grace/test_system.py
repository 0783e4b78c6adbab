"""GraceSystem: what a step asks for, what it pays, and what it counts."""

import math
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
import torch

from tercet.engine.attention import Backend
from tercet.engine.grace.config import Attention, GraceConfig, GraceData, GraceEval
from tercet.engine.grace.data import Dataset, Example
from tercet.engine.grace.reward_config import RewardConfig
from tercet.engine.grace.system import GraceSystem, shared_text_ids
from tercet.engine.model import Policy
from tercet.engine.records import Completion, Request, Rollouts, SamplingParams
from tercet.engine.sampler import TransformersSampler
from tercet.engine.train_config import TrainConfig

PAIRS = [
    Example(query=f"is the {a} red", document=f"a {a} in the sun", negatives=("the sea",))
    for a in ("boat", "rose", "river", "bread", "garden")
]
TEXTS = [Example(document=example.document) for example in PAIRS]


@pytest.fixture
def make_system(tiny_policy):
    """make_system(examples, test=(), **GraceConfig fields) -> GraceSystem of 2 groups by 2."""

    def make(examples=tuple(PAIRS), test=(), data=None, **settings):
        config = GraceConfig(
            model="tiny",
            data=data or GraceData(path="data.jsonl", max_prompt_length=200),
            **{
                "num_generations": 2,
                "generation_batch_size": 4,
                "max_completion_length": 6,
                **settings,
            },
        )
        dataset = Dataset(train=list(examples), test=list(test), notes=[])
        return GraceSystem(tiny_policy, TransformersSampler(tiny_policy), dataset, config)

    return make


def test_a_step_asks_for_every_text_of_its_groups(make_system):
    system = make_system(num_generations=3, generation_batch_size=6, temperature=0.9, top_k=5)
    requests = system.requests(1)
    assert Counter((r.group, r.role) for r in requests) == {
        (g, role): n for g in (0, 1) for role, n in (("rollout", 3), ("query", 1), ("negative", 1))
    }
    for request in requests:
        example = system.examples(1)[request.group]
        text = {"rollout": example.document, "query": example.query, "negative": "the sea"}
        decoded = system.tokenizer.decode(request.prompt_ids[request.pool_from :])
        assert decoded == f"{text[request.role]}<|im_end|>\n<|im_start|>assistant\n"
        assert request.params == SamplingParams(
            max_completion_length=6, temperature=0.9 if request.role == "rollout" else 0.5, top_k=5
        )


def test_every_text_of_a_step_and_of_an_evaluation_is_pooled_alike(make_system):
    system = make_system(pooling="last_token", test=PAIRS)
    assert {request.pooling for request in system.requests(1)} == {"last_token"}
    found = system.evaluate(1)
    assert found != make_system(test=PAIRS).evaluate(1)


def test_an_unsupervised_anchor_is_the_document_again(make_system):
    requests = make_system(TEXTS).requests(1)
    assert [r.role for r in requests] == ["rollout", "rollout", "query"] * 2
    assert requests[0].prompt_ids == requests[2].prompt_ids != requests[3].prompt_ids
    assert (requests[0].params.temperature, requests[2].params.temperature) == (1.0, 0.5)


def test_requests_are_a_pure_function_of_seed_and_step(make_system):
    first, second = make_system(), make_system()
    steps = {step: first.requests(step) for step in (1, 2, 3, 4, 5)}
    assert [second.requests(step) for step in (4, 2)] == [steps[4], steps[2]]
    dealt = Counter(e.document for step in steps for e in first.examples(step))
    assert set(dealt.values()) == {2}  # two epochs of five rows in five steps of two
    other = make_system(train=TrainConfig(seed=1))
    assert [other.requests(step) for step in steps] != list(steps.values())


def on_circle(*degrees):
    return [torch.tensor([math.cos(math.radians(d)), math.sin(math.radians(d))]) for d in degrees]


def rollouts_of(system, rollouts, queries, negatives, finished=(True, True, True, True)):
    """The requests of step 1, answered with these embeddings, which need not be normalised."""
    vectors = {"rollout": iter(rollouts), "query": iter(queries), "negative": iter(negatives)}
    ends = iter(finished)
    requests = system.requests(1)
    completions = [
        Completion(
            ids=[5, 2],
            logp=[-1.0, -1.0],
            finished=next(ends) if request.role == "rollout" else True,
            embedding=3.0 * next(vectors[request.role]),
        )
        for request in requests
    ]
    return Rollouts(requests=requests, completions=completions)


GOLDEN = on_circle(30, -10, 60, 135), on_circle(0, 90), on_circle(80, 20)


def test_supervised_rewards_in_the_paper_form(make_system):
    system = make_system(reward=RewardConfig(form="paper"))
    rewards = system.rewards(rollouts_of(system, *GOLDEN))
    expected = torch.tensor([7.45586, 8.64369, 4.75769, 3.16850])
    torch.testing.assert_close(rewards.total, expected, atol=2e-5, rtol=0)
    negative = torch.tensor([-1.73648, -1.73648, -3.42020, -3.42020])
    torch.testing.assert_close(rewards.parts["negative"], negative, atol=2e-5, rtol=0)


def test_unsupervised_rewards_in_the_released_form(make_system):
    system = make_system(TEXTS, reward=RewardConfig(form="released", truncation="flat"))
    finished = (True, True, False, True)
    rewards = system.rewards(rollouts_of(system, *GOLDEN[:2], [], finished))
    expected = torch.tensor([9.19234, 11.72746, -1.0, 9.00292])
    torch.testing.assert_close(rewards.total, expected, atol=2e-5, rtol=0)


def test_one_text_per_step_has_no_other_groups(make_system):
    system = make_system(TEXTS, generation_batch_size=2)
    rewards = system.rewards(rollouts_of(system, GOLDEN[0][:2], GOLDEN[1][:1], []))
    assert rewards.total.isfinite().all()
    assert rewards.parts["hard"].tolist() == [0.0, 0.0]


def test_groups_that_share_a_text_do_not_repel_each_other(make_system):
    twice = make_system([PAIRS[0]])  # one row: both groups of the step are the same
    rewards = twice.rewards(rollouts_of(twice, *GOLDEN))
    assert rewards.parts["hard"].tolist() == [0.0] * 4
    assert rewards.counts["groups/sharing_a_text"] == 1
    apart = make_system()
    rewards = apart.rewards(rollouts_of(apart, *GOLDEN))
    assert (rewards.parts["hard"] != 0).all()
    assert rewards.counts["groups/sharing_a_text"] == 0


SHARED = {
    "none": ([(1, 2), (3, 4)], [0, 1]),
    "document": ([(1, 2), (1, 3)], [0, 0]),
    "query": ([(1, 2), (3, 2)], [0, 0]),
    "document of one, query of the other": ([(1, 2), (3, 1), (4, 5)], [0, 0, 2]),
    "a link to a group that has joined another": (
        [(10, 11), (1, 2), (3, 4), (1, 3), (10, 4)],
        [0, 0, 0, 0, 0],
    ),
    "chain": ([(1, 2), (3, 4), (5, 4), (5, 2), (6, 7)], [0, 0, 0, 0, 4]),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_text_is_found(name):
    texts, expected = SHARED[name]  # (document, query) of each group
    requests = [
        Request(prompt_ids=[text], params=SamplingParams(), group=group, role=role)
        for group, (document, query) in enumerate(texts)
        for text, role in ((document, "rollout"), (document, "rollout"), (query, "query"))
    ]
    assert shared_text_ids(Rollouts(requests=requests, completions=[])).tolist() == expected


def test_truncated_prompts_and_anchors_are_counted(make_system):
    long = Example(query="q " * 300, document="d " * 300, negatives=("the sea",))
    system = make_system([long, PAIRS[0]])
    rollouts = rollouts_of(system, *GOLDEN)
    assert {r.role for r in rollouts.requests if r.truncated} == {"rollout", "query"}
    assert all(len(r.prompt_ids) <= 200 for r in rollouts.requests)
    pairs = zip(rollouts.requests, rollouts.completions, strict=True)
    cut = [replace(c, finished=r.role != "query") for r, c in pairs]
    counts = system.rewards(replace(rollouts, completions=cut)).counts
    assert counts["prompts/truncated"] == 2  # texts, not rows: the document counts once
    assert counts["anchors/clipped_ratio"] == 0.5  # two queries of two queries and two negatives


def test_a_truncated_anchor_is_its_document_and_counts_once(make_system):
    system = make_system([Example(document="d " * 300), TEXTS[0]])
    counts = system.rewards(rollouts_of(system, *GOLDEN[:2], [])).counts
    assert counts["prompts/truncated"] == 1


def test_samples_are_readable(make_system):
    system = make_system()
    rollouts = rollouts_of(system, *GOLDEN)
    rewards = system.rewards(rollouts)
    rows = system.samples(rollouts, rewards)
    first, worst = rows[:2]
    assert [row["group"] for row in rows] == [0, 0, 1, 1]
    assert first["reward"] == max(rewards.total[:2].tolist())
    assert worst["reward"] == min(rewards.total[:2].tolist())
    assert first["text"] == system.examples(1)[0].document
    assert first["query"] == system.examples(1)[0].query
    parts = sum(value for key, value in first.items() if key.startswith("reward/"))
    assert parts == pytest.approx(first["reward"], abs=1e-5)


def test_evaluation_is_seeded_and_needs_two_rows(make_system):
    system = make_system(test=PAIRS, evaluation=GraceEval(num_texts=4))
    found = system.evaluate(7)
    assert found == system.evaluate(9)
    assert 0.25 <= found["mrr"] <= 1.0
    assert found["recall@10"] == 1.0  # four documents
    assert make_system(test=PAIRS[:1]).evaluate(1) == {}
    assert make_system(test=PAIRS, evaluation=GraceEval(num_texts=0)).evaluate(1) == {}


def test_evaluation_finds_a_text_by_itself(make_system):
    """Greedy completions of one text are equal, so a text's nearest text is itself."""
    system = make_system(TEXTS, test=TEXTS, evaluation=GraceEval(temperature=0.0))
    assert system.evaluate(1)["recall@1"] == 1.0


def test_a_query_with_two_documents_may_find_either(make_system):
    same = Example(query="the sea", document="the sea")  # greedy: the query is its document
    other = Example(query="the sea", document="a rose in the sun")
    system = make_system(test=[other, same], evaluation=GraceEval(temperature=0.0))
    found = system.evaluate(1)
    assert found["recall@1"] == 0.5  # of its two documents, one can be first
    assert found["mrr"] == 1.0


def test_a_sampler_that_does_not_pool_is_named(make_system):
    system = make_system()
    rollouts = rollouts_of(system, *GOLDEN)
    bare = [replace(c, embedding=None) for c in rollouts.completions]
    with pytest.raises(ValueError, match=r"^stack_embeddings: .* got none for 2 of 2; use a"):
        system.rewards(replace(rollouts, completions=bare))


def test_a_policy_without_tokenizer_is_named(make_tiny_model):
    policy = Policy(make_tiny_model("qwen3"))
    config = GraceConfig(model="tiny", data=GraceData(path="data.jsonl"))
    dataset = Dataset(train=PAIRS, test=[], notes=[])
    with pytest.raises(ValueError, match=r"^GraceSystem: the policy must have a tokenizer, got N"):
        GraceSystem(policy, TransformersSampler(policy), dataset, config)


def test_rows_that_cannot_fit_the_positions_are_refused(make_system):
    make_system(max_completion_length=312)
    with pytest.raises(ValueError, match=r"^GraceSystem: .* at most 512 .*, got 513; lower one"):
        make_system(max_completion_length=313)


BAD_SETTINGS = {
    "model must not be empty, got ''": {"model": ""},
    "output_dir must not be empty, got ' '": {"output_dir": " "},
    "attn must be one of ('auto', 'flash_attention_2', 'varlen', 'sdpa'), got 'x'": {"attn": "x"},
    "top_p must be in (0, 1], got 0.0": {"top_p": 0.0},
    "top_p must be in (0, 1], got nan": {"top_p": math.nan},
    "top_k must be in [0, 2^31), got -1": {"top_k": -1},
    "max_batch_size must be >= 1, got 0": {"max_batch_size": 0},
    "num_generations must be >= 2 under 'grpo'": {"num_generations": 1},
    "generation_batch_size must be a multiple of num_generations (8), got 12": {
        "generation_batch_size": 12
    },
    "max_completion_length must be >= 1, got 0": {"max_completion_length": 0},
    "temperature must be > 0, got 0": {"temperature": 0.0},
    "anchor_temperature must be finite and >= 0, got nan": {"anchor_temperature": math.nan},
    "dtype must be one of ('float32', 'bfloat16'), got 'int8'": {"dtype": "int8"},
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_bad_settings(message):
    with pytest.raises(ValueError, match=r"^GraceConfig: ") as caught:
        GraceConfig(**{"model": "tiny", "data": GraceData(path="d"), **BAD_SETTINGS[message]})
    assert message in str(caught.value)


BAD_DATA = {
    "path must not be empty, got ''": {"path": ""},
    "test_path must not be empty, got ''": {"test_path": ""},
    "max_prompt_length must be >= 1, got 0": {"max_prompt_length": 0},
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data_settings(message):
    with pytest.raises(ValueError, match=f"^GraceData: {message}"):
        GraceData(**{"path": "d", **BAD_DATA[message]})


def test_settings_know_every_attention_backend():
    assert get_args(Attention) == ("auto", *get_args(Backend))

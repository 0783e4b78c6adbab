"""Every pooling, while decoding and in a packed pass, against transformers' own hidden states."""

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tercet.engine.choices import Pooling
from tercet.engine.model import Policy, score
from tercet.engine.pooling import POOLS, RunningPool
from tercet.engine.records import Request, SamplingParams, pack
from tercet.engine.sampler import TransformersSampler

ARCHITECTURES = ["qwen2", "qwen3", "llama"]
POOLINGS = get_args(Pooling)


def padded_states(model: PreTrainedModel, rows: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """transformers' hidden_states of the rows in one left-padded batch, each [row, t, hidden]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return model.base_model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states


def by_hand(
    model: PreTrainedModel, rows: list[list[int]], pool_from: list[int], pooling: Pooling
) -> torch.Tensor:
    """What the documentation says, on rows encoded from scratch."""
    states = padded_states(model, rows)
    layer = states[-2] if pooling == "penultimate_mean" else states[-1]
    vectors = []
    for row, ids, start in zip(layer, rows, pool_from, strict=True):
        pooled = row[len(row) - len(ids) + start :]
        if pooling == "max":
            vectors.append(pooled.max(dim=0).values)
        elif pooling == "last_token":
            vectors.append(pooled[-1])
        else:
            vectors.append(pooled.mean(dim=0))
    return torch.stack(vectors)


def make_requests(pooling: Pooling) -> list[Request]:
    """Unlike prompts and limits; pooled from the start, from within, from behind, or not at all."""
    requests = []
    for group, length in enumerate((3, 12, 6, 1)):
        prompt = torch.randint(60, 384, (length,)).tolist()
        for k, start in enumerate((0, length // 2, length, None, 0)):
            params = SamplingParams(max_completion_length=2 + 4 * k, seed=10 * group + k)
            own = Request(prompt_ids=prompt, params=params, group=group, pool_from=start)
            requests.append(replace(own, pooling=pooling))
    return requests


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pooled_while_decoding_equals_encoding_from_scratch(arch, pooling, where, make_tiny_model):
    model = make_tiny_model(arch, num_hidden_layers=3).to(where)
    model.generation_config.eos_token_id = list(range(3, 40))
    stock, requests = copy.deepcopy(model), make_requests(pooling)
    completions = TransformersSampler(Policy(model), max_batch_size=12).sample(requests)
    assert {c.finished for c in completions} == {True, False}
    wanted = [i for i, r in enumerate(requests) if r.pool_from is not None]
    assert all((c.embedding is not None) == (i in wanted) for i, c in enumerate(completions))
    expected = by_hand(
        stock,
        [requests[i].prompt_ids + completions[i].ids for i in wanted],
        [requests[i].pool_from or 0 for i in wanted],
        pooling,
    )
    got = torch.stack([e for c in completions if (e := c.embedding) is not None])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pooled_in_a_packed_pass_equals_encoding_from_scratch(arch, pooling, make_tiny_model):
    """Values and, under a random upstream gradient, every parameter's gradient."""
    model = make_tiny_model(arch, num_hidden_layers=3)
    stock = copy.deepcopy(model)
    rows, starts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15]], [2, 0, 3]
    got = score(Policy(model), pack(rows, pool_from=starts), embed=pooling).embedding
    expected = by_hand(stock, rows, starts, pooling)
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(expected)
    got.backward(upstream)
    expected.backward(upstream)
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_differ_and_a_row_without_pooled_tokens_is_zero(pooling, tiny_policy):
    packed = pack([[5, 6, 7], [8, 9], [10]], pool_from=[1, None, 1])
    mine = score(tiny_policy, packed, embed=pooling).embedding
    assert mine is not None
    assert not mine[1:].any()
    for other in set(POOLINGS) - {pooling}:
        vectors = score(tiny_policy, packed, embed=other).embedding
        assert vectors is not None
        assert not torch.isclose(vectors[0], mine[0]).all()


def test_max_and_last_token_by_hand():
    states = torch.tensor([[9.0, 0.0], [1.0, -3.0], [-2.0, -1.0], [5.0, 5.0], [-4.0, -6.0]])
    packed = pack([[1, 1, 1], [1], [1]], pool_from=[1, None, 0])
    cut = replace(packed, pool_mask=torch.tensor([False, True, False, False, True]))
    expected: dict[Pooling, list] = {
        "max": [[1.0, -1.0], [0, 0], [-4, -6]],
        "last_token": [[-2.0, -1.0], [0, 0], [-4, -6]],
    }
    for name, vectors in expected.items():
        assert torch.equal(POOLS[name].rows(states, packed), torch.tensor(vectors))
        got = POOLS[name].rows(states.bfloat16(), cut)
        assert torch.equal(got, torch.tensor([[1.0, -3.0], [0, 0], [-4, -6]]))  # of the mask alone


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nan_is_not_pooled_away(pooling):
    states = torch.zeros(4, 2)
    states[3, 1] = torch.nan
    packed = pack([[1, 1], [1, 1]], pool_from=[0, 0])
    assert POOLS[pooling].rows(states, packed).isnan().tolist() == [[False] * 2, [False, True]]
    running = RunningPool(POOLS[pooling], states[:2].clone(), torch.tensor([1, 0]))
    running.add(torch.tensor([0]), states[3:])
    assert running.vectors().isnan().tolist() == [[False, True], [False] * 2]


def test_last_token_is_not_where_the_released_code_looks(make_tiny_model):
    """It takes state number sum(mask) - 1, in left-padded rows whose mask leaves the prefix out."""
    model = make_tiny_model("qwen2")
    rows, prefix = [[20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35, 36, 37, 38]], 2
    states = padded_states(model, rows)[-1]  # [2, 9, hidden]; three padding tokens before row 0
    pooled = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    released = pooled.sum(dim=1) - 1
    assert released.tolist() == [3, 6]  # the first token of the prefix; a token of the text
    got = score(Policy(model), pack(rows, pool_from=[prefix, prefix]), embed="last_token").embedding
    assert got is not None
    torch.testing.assert_close(got, states[:, 8], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(got, states[torch.arange(2), released], atol=0.1).all(dim=1).any()


def test_penultimate_states_of_models_without_output_capturing_and_of_one_layer(make_tiny_model):
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    rows = [[1, 2, 3, 4], [5, 6]]
    for model in (GPT2LMHeadModel(config).eval(), make_tiny_model(num_hidden_layers=1)):
        expected = by_hand(copy.deepcopy(model), rows, [1, 0], "penultimate_mean")
        packed = pack(rows, pool_from=[1, 0])
        got = score(Policy(model), packed, embed="penultimate_mean").embedding
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_no_gradient_of_the_penultimate_mean(
    tmp_path, make_tiny_model
):
    make_tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    packed, gradients = pack([[5, 6, 7], [8]], pool_from=[1, 0]), []
    upstream = torch.randn(2, 32)
    for checkpointing in (False, True):
        policy = Policy.from_pretrained(tmp_path / "model", activation_checkpointing=checkpointing)
        policy.model.train()
        vectors = score(policy, packed, embed="penultimate_mean").embedding
        assert vectors is not None
        vectors.backward(upstream)
        gradients.append([p.grad for p in policy.model.model.layers[:2].parameters()])
    for plain, checked in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checked, rtol=1e-4, atol=1e-5)


@pytest.mark.wrong_types
def test_unknown_and_mixed_poolings_are_refused(tiny_policy):
    known = r"\['mean', 'penultimate_mean', 'max', 'last_token'\], got 'cls'"
    with pytest.raises(ValueError, match=f"score: pooling must be one of {known}"):
        score(tiny_policy, pack([[1, 2]], pool_from=[0]), embed="cls")  # type: ignore[arg-type]
    first = Request(prompt_ids=[5, 6], params=SamplingParams(max_completion_length=2), pool_from=0)
    sampler = TransformersSampler(tiny_policy)
    with pytest.raises(ValueError, match=f"TransformersSampler: pooling must be one of {known}"):
        sampler.sample([replace(first, pooling="cls")])
    mixed = [first, replace(first, pooling="max")]
    with pytest.raises(ValueError, match=r"must share their pooling, got \['max', 'mean'\]; make"):
        sampler.sample(mixed)
    unpooled = replace(first, pool_from=None)  # has no embedding: its pooling does not matter
    assert len(sampler.sample([unpooled, mixed[1]])) == 2


def test_the_default_asks_the_model_for_no_further_layer(tiny_policy):
    """Hidden states beside the last layer's cost memory: they are kept only when pooled."""
    asked = []
    tiny_policy.prove_isolation()
    tiny_policy.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs.get("output_hidden_states")),
        with_kwargs=True,
    )
    for pooling in POOLINGS:
        asked.clear()
        score(tiny_policy, pack([[5, 6]], pool_from=[0]), embed=pooling)
        TransformersSampler(tiny_policy).sample(make_requests(pooling)[:1])
        assert set(asked) == {-2 if pooling == "penultimate_mean" else None}

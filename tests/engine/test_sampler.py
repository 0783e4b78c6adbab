"""The embedded sampler: agrees with score, with transformers, and with itself in any company."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tercet.engine.decode import GrowingLayer, Rules, draw, prefill, wide_head, wide_logits
from tercet.engine.model import Policy, score
from tercet.engine.pooling import LAST, POOLS
from tercet.engine.records import Completion, Request, SamplingParams, pack
from tercet.engine.sampler import TransformersSampler

ARCHITECTURES = ["qwen2", "qwen3", "llama"]


def make_requests(lengths=(3, 11, 6, 6), group_size=3, **params) -> list[Request]:
    """Groups of unlike prompts; limits, temperatures and pooling differ inside each group."""
    requests = []
    for group, length in enumerate(lengths):
        prompt = torch.randint(3, 384, (length,)).tolist()
        for k in range(group_size):
            own = {
                "max_completion_length": 4 + 9 * k,
                "temperature": (1.0, 0.6, 1.5)[k % 3],
                "seed": 100 * group + k,
            }
            requests.append(
                Request(
                    prompt_ids=prompt,
                    params=SamplingParams(**{**own, **params}),
                    group=group,
                    pool_from=(2, 0, None)[k % 3],
                )
            )
    return requests


def rescore(policy: Policy, requests: list[Request], completions: list[Completion]):
    """score of the sampled rows: log-probs per row, and the embeddings."""
    packed = pack(
        [r.prompt_ids for r in requests],
        [c.ids for c in completions],
        pool_from=[r.pool_from for r in requests],
    )
    temperatures = torch.tensor([r.params.temperature or 1.0 for r in requests])
    per_token = temperatures[packed.row_of_token()[packed.loss_mask]]
    with torch.no_grad():
        scored = score(policy, packed, temperature=per_token, embed="mean")
    assert scored.embedding is not None
    return scored.logp.split([len(c.ids) for c in completions]), scored.embedding


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logp_and_embedding_equal_score(arch, make_tiny_model):
    policy, requests = Policy(make_tiny_model(arch)), make_requests()
    completions = TransformersSampler(policy).sample(requests)
    logps, embeddings = rescore(policy, requests, completions)
    for request, completion, logp, embedding in zip(
        requests, completions, logps, embeddings, strict=True
    ):
        torch.testing.assert_close(torch.tensor(completion.logp), logp, rtol=1e-4, atol=1e-4)
        assert (completion.embedding is None) == (request.pool_from is None)
        if completion.embedding is not None:
            torch.testing.assert_close(completion.embedding, embedding, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_logp_equals_score(how, make_tiny_model):
    """Both make their logits in float32, so only the hidden states differ, by rounding."""
    model = make_tiny_model("qwen3")
    policy, requests = Policy(model.bfloat16() if how == "weights" else model), make_requests()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        completions = TransformersSampler(policy).sample(requests)
        logps, embeddings = rescore(policy, requests, completions)
    got = torch.tensor([value for c in completions for value in c.logp])
    assert (got - torch.cat(list(logps))).abs().mean() < 0.03
    for completion, embedding in zip(completions, embeddings, strict=True):
        if completion.embedding is not None:
            assert completion.embedding.dtype == torch.float32
            torch.testing.assert_close(completion.embedding, embedding, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_never_rounded_to_half(dtype, make_tiny_model):
    policy = Policy(make_tiny_model("llama", hidden_size=64).to(dtype))
    hidden, weight = torch.randn(5, 64).to(dtype), policy.head().weight
    with torch.autocast("cpu", torch.bfloat16):
        logits = wide_logits(hidden, wide_head(policy))
    exact = hidden.double() @ weight.double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_ends_at_an_end_token_or_the_limit_and_pools_the_last_token(tiny_policy):
    requests = [
        replace(r, pool_from=0) for r in make_requests((5, 8), 40, max_completion_length=30)
    ]
    requests = [replace(r, params=replace(r.params, seed=i)) for i, r in enumerate(requests)]
    completions = TransformersSampler(tiny_policy).sample(requests)
    assert {c.finished for c in completions} == {True, False}  # both endings occur
    for completion in completions:
        assert completion.finished == (completion.ids[-1] == 2)
        assert 2 not in completion.ids[:-1]
        assert completion.finished or len(completion.ids) == 30
        assert len(completion.logp) == len(completion.ids)
    logps, embeddings = rescore(tiny_policy, requests, completions)
    got = torch.stack([c.embedding for c in completions if c.embedding is not None])
    torch.testing.assert_close(got, embeddings, rtol=1e-5, atol=1e-5)
    for completion, logp in zip(completions, logps, strict=True):
        torch.testing.assert_close(torch.tensor(completion.logp), logp, rtol=1e-4, atol=1e-4)


def test_completion_does_not_depend_on_the_batch(tiny_policy):
    requests = make_requests()
    together = TransformersSampler(tiny_policy).sample(requests)
    alone = [TransformersSampler(tiny_policy, seed=7).sample([r])[0] for r in requests]
    reordered = TransformersSampler(tiny_policy, max_batch_size=5).sample(requests[::-1])[::-1]
    for a, b, c in zip(together, alone, reordered, strict=True):
        assert a.ids == b.ids == c.ids
        assert a.finished == b.finished == c.finished
        torch.testing.assert_close(a.logp, b.logp, rtol=1e-4, atol=1e-4)


def test_seeds_decide(tiny_policy):
    requests = make_requests(lengths=(6,), group_size=6, max_completion_length=20, seed=None)

    def ids(sampler):
        return [c.ids for c in sampler.sample(requests)]

    sampler = TransformersSampler(tiny_policy, seed=3)
    first, second = ids(sampler), ids(sampler)
    assert len({tuple(i) for i in first}) == 6  # rollouts of a group differ
    assert first != second  # the stream moves on
    assert ids(TransformersSampler(tiny_policy, seed=3)) == first
    assert ids(TransformersSampler(tiny_policy, seed=4)) != first
    state = sampler.generator.get_state()
    third = ids(sampler)
    sampler.generator.set_state(state)
    assert ids(sampler) == third


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sliding"])
def test_greedy_equals_generate(arch, make_tiny_model):
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = make_tiny_model("qwen2", **sliding) if arch == "sliding" else make_tiny_model(arch)
    stock, policy = copy.deepcopy(model), Policy(model)
    requests = make_requests((4, 9, 2), 1, temperature=0.0, max_completion_length=24)
    completions = TransformersSampler(policy).sample(requests)
    for request, completion in zip(requests, completions, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        expected = stock.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False
        )
        assert completion.ids == expected[0, prompt.shape[1] :].tolist()
    logps, _ = rescore(policy, requests, completions)  # temperature 0 reports softmax(logits)
    for completion, logp in zip(completions, logps, strict=True):
        torch.testing.assert_close(torch.tensor(completion.logp), logp, rtol=1e-4, atol=1e-4)


def test_every_end_token_of_the_generation_config_and_the_tokenizer_ends(
    make_tiny_model, tiny_tokenizer
):
    policy = Policy(make_tiny_model("llama"), tiny_tokenizer)
    policy.model.generation_config.eos_token_id = [5, 9]
    assert TransformersSampler(policy).end_tokens == {5, 9, 2}
    policy.model.generation_config.eos_token_id = list(range(3, 384))
    completion = TransformersSampler(policy).sample(make_requests((4,), 1))[0]
    assert (len(completion.ids), completion.finished) == (1, True)
    policy.model.generation_config.eos_token_id = None
    policy.tokenizer = None
    assert TransformersSampler(policy).end_tokens == frozenset()


def test_model_reads_each_distinct_prompt_once_and_finished_rows_leave(tiny_policy):
    read = []
    tiny_policy.prove_isolation()
    tiny_policy.model.base_model.embed_tokens.register_forward_hook(
        lambda module, args, out: read.append(args[0].numel())
    )
    prompt = [5, 6, 7, 8]
    limits = [1] * 12 + [20] * 4
    tiny_policy.model.generation_config.eos_token_id = None
    tiny_policy.tokenizer = None
    TransformersSampler(tiny_policy).sample(
        [
            Request(prompt_ids=prompt, params=SamplingParams(max_completion_length=n, seed=i))
            for i, n in enumerate(limits)
        ]
    )
    assert read[0] == 4  # one packed prefill of the shared prompt
    assert read[1:] == [4] * 19  # the rows of limit 1 are never read again; last tokens neither


def test_training_flag_and_weights_stay(make_tiny_model):
    policy = Policy(make_tiny_model("llama", attention_dropout=0.5).train())
    before = copy.deepcopy(policy.model.state_dict())
    completion = TransformersSampler(policy).sample(make_requests((5,)))[0]
    assert policy.model.training
    assert completion.embedding is not None
    assert not completion.embedding.requires_grad
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_dropout_is_off_while_sampling(make_tiny_model):
    policy = Policy(make_tiny_model("llama", attention_dropout=0.9).train())
    requests = make_requests((9,), temperature=0.0)
    assert [c.ids for c in TransformersSampler(policy).sample(requests)] == [
        c.ids for c in TransformersSampler(policy).sample(requests)
    ]


def rules_of(policy, n, **params) -> Rules:
    return Rules.of([SamplingParams(**params)] * n, range(n), policy)


def test_draws_follow_the_distribution(tiny_policy):
    logits = torch.randn(384).mul_(2)
    n = 20_000
    tokens, logp = draw(logits.expand(n, -1), rules_of(tiny_policy, n, temperature=1.3), 0)
    expected = (logits / 1.3).softmax(-1)
    counts = torch.bincount(tokens, minlength=384) / n
    assert (counts - expected).abs().max() < 4 * math.sqrt(0.25 / n)
    assert 0.5 * (counts - expected).abs().sum() < 0.06  # total variation
    torch.testing.assert_close(logp, (logits / 1.3).log_softmax(-1)[tokens])


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0, 1}),  # 0.4 alone is not half: the next one crosses it
        ({"top_p": 0.4}, {0}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 3, "top_p": 0.5}, {0, 1}),  # of the 0.8 that top_k leaves
        ({"top_k": 99}, {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_top_k_and_top_p_keep(params, kept, tiny_policy):
    logits = torch.tensor([0.4, 0.25, 0.15, 0.2]).log()[[0, 1, 3, 2]]  # 0.4, 0.25, 0.2, 0.15
    logits = torch.cat([logits, torch.full((380,), -torch.inf)])
    tokens, logp = draw(logits.expand(2000, -1), rules_of(tiny_policy, 2000, **params), 0)
    assert set(tokens.tolist()) == kept
    share = 0.4 / sum([0.4, 0.25, 0.2, 0.15][i] for i in kept)  # what is left is renormalised
    assert abs((tokens == 0).float().mean() - share) < 0.05
    torch.testing.assert_close(logp, logits[tokens])  # of the whole softmax, as score computes it


def test_the_largest_uniform_finds_a_token_of_positive_probability(tiny_policy):
    logits = torch.full((1, 384), -torch.inf)
    logits[0, :3] = 0.0
    rules = rules_of(tiny_policy, 1)
    rules.uniform.fill_(1 - 2**-53)
    assert draw(logits, rules, 0)[0].item() == 2
    rules.uniform.fill_(0.0)
    logits[0, 0] = -torch.inf
    assert draw(logits, rules, 0)[0].item() == 1


def test_prefill_keeps_the_cache_of_each_row(tiny_policy):
    """The spread cache continues each prompt as the prompt's own forward does."""
    prompts = [[5, 6, 7], [8], [5, 6, 7], [9, 10, 11, 12, 13]]
    state, pooled = prefill(tiny_policy, prompts, [0, None, 0, 4], POOLS["mean"])
    state.select(torch.tensor([3, 0, 1]))
    state.read(torch.tensor([20, 21, 22]), LAST)
    model = tiny_policy.model.base_model
    for row, (prompt, token) in enumerate([(prompts[3], 20), (prompts[0], 21), (prompts[1], 22)]):
        expected = model(torch.tensor([[*prompt, token]])).last_hidden_state[0, -1]
        torch.testing.assert_close(state.hidden[row], expected, rtol=1e-4, atol=1e-5)
    whole = model(torch.tensor([prompts[0]])).last_hidden_state[0]
    torch.testing.assert_close(pooled.vectors()[0], whole.mean(0), rtol=1e-4, atol=1e-5)
    assert not pooled.vectors()[1].any()
    whole = model(torch.tensor([prompts[3]])).last_hidden_state[0]
    torch.testing.assert_close(pooled.vectors()[3], whole[4], rtol=1e-4, atol=1e-5)
    assert pooled.count.tolist() == [3, 0, 3, 1]


def test_growing_layer_holds_what_concatenation_would():
    keys, values = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    layer = GrowingLayer(keys, values)
    index = torch.tensor([2, 0])
    for step in range(150):  # past CACHE_ROOM, twice
        new = torch.randn(2, len(keys), 2, 1, 4)
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        got = layer.update(new[0], new[1])
        assert torch.equal(got[0], keys)
        assert torch.equal(got[1], values)
        if step == 70:
            layer.batch_select_indices(index)
            keys, values = keys[index], values[index]
    assert layer.get_seq_length() == 155


def test_finished_rows_that_stay_do_not_run_past_the_positions():
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, eos_token_id=None
    )  # fmt: skip
    policy = Policy(GPT2LMHeadModel(config))
    short = Request(prompt_ids=[1, 2], params=SamplingParams(max_completion_length=14, seed=1))
    long = Request(prompt_ids=[3] * 14, params=SamplingParams(max_completion_length=2, seed=2))
    completions = TransformersSampler(policy).sample([short] * 5 + [long])
    assert [len(c.ids) for c in completions] == [14] * 5 + [2]


def test_no_requests_give_no_completions(tiny_policy):
    assert TransformersSampler(tiny_policy).sample([]) == []


def test_bad_requests_are_refused(make_tiny_model):
    sampler = TransformersSampler(Policy(make_tiny_model("qwen3", max_position_embeddings=16)))
    params = SamplingParams(max_completion_length=6)
    good = Request(prompt_ids=[1] * 10, params=params)
    assert len(sampler.sample([good])) == 1
    with pytest.raises(ValueError, match=r"16 positions, got 11 \+ 6 in request 1; shorten"):
        sampler.sample([good, replace(good, prompt_ids=[1] * 11)])
    with pytest.raises(ValueError, match="at least one token, got none in request 1"):
        sampler.sample([good, replace(good, prompt_ids=[])])
    with pytest.raises(ValueError, match=r"pool_from must be in \[0, 10\], got 11 in request 0"):
        sampler.sample([replace(good, pool_from=11)])
    with pytest.raises(ValueError, match="max_batch_size must be >= 1, got 0"):
        TransformersSampler(sampler.policy, max_batch_size=0)


def test_diverged_weights_are_named(tiny_policy):
    tiny_policy.prove_isolation()  # which would name them too, had they been so from the start
    with torch.no_grad():
        tiny_policy.model.base_model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="log-probs must be finite, got nan"):
        TransformersSampler(tiny_policy).sample(make_requests())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=str
)
def test_on_cuda_logp_and_embedding_equal_score(dtype, tolerance, make_tiny_model):
    policy = Policy(make_tiny_model("qwen3").to("cuda", dtype))
    requests = make_requests()
    completions = TransformersSampler(policy).sample(requests)
    packed = pack(
        [r.prompt_ids for r in requests],
        [c.ids for c in completions],
        pool_from=[r.pool_from for r in requests],
        device="cuda",
    )
    temperatures = torch.tensor([r.params.temperature for r in requests], device="cuda")
    with torch.no_grad():
        scored = score(
            policy,
            packed,
            temperature=temperatures[packed.row_of_token()[packed.loss_mask]],
            embed="mean",
        )
    got = torch.tensor([value for c in completions for value in c.logp], device="cuda")
    assert (got - scored.logp).abs().mean() < tolerance
    assert scored.embedding is not None
    for completion, embedding in zip(completions, scored.embedding, strict=True):
        if completion.embedding is not None:
            limit = 10 * tolerance
            torch.testing.assert_close(completion.embedding, embedding, rtol=limit, atol=limit)

"""One optimiser step against a plain one: full logits, row by row, no packing, float64."""

from dataclasses import replace

import pytest
import torch

from tercet.engine.guards import NonFiniteError, NonFiniteWeightsError
from tercet.engine.model import Policy
from tercet.engine.records import Completion, Request, Rollouts, SamplingParams
from tercet.engine.scoring import score_completions, score_rollouts
from tercet.engine.train_config import TrainConfig
from tercet.engine.update import Batch, optimise

PROMPTS = [[7, 8, 9], [7, 8, 9], [20, 21, 22, 23, 24], [20, 21, 22, 23, 24]]
COMPLETIONS = [[5, 6, 2], [30, 31, 32, 33, 34, 35, 2], [40], [41, 42, 43, 44]]
ADVANTAGE = torch.tensor([0.75, -1.5, 0.0, 2.0])


@pytest.fixture
def policy(make_tiny_model) -> Policy:
    return Policy(make_tiny_model("qwen3").double())


def row_logp(model, prompt, completion, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of one completion, from its own logits."""
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
    logp = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    picked = logp.gather(1, torch.tensor(completion)[:, None])[:, 0]
    return picked, -(logp.exp() * logp).sum(-1)


def make_batch(policy, *, temperature=1.0, drift=0.0, counted=None) -> Batch:
    """Four rollouts; `drift` is how far old and reference log-probs lie from the policy's."""
    logps = []
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            logps.append(row_logp(policy.model, prompt, completion, temperature)[0])
    noise = torch.Generator().manual_seed(1)
    drifted = [
        [x + drift * torch.randn(x.shape, generator=noise, dtype=x.dtype) for x in logps]
        for _ in range(2)
    ]
    return Batch(
        row=[0, 1, 2, 3],
        requests=[
            Request(prompt_ids=p, params=SamplingParams(temperature=temperature), group=i // 2)
            for i, p in enumerate(PROMPTS)
        ],
        completions=[
            Completion(ids=c, logp=x.tolist(), finished=True)
            for c, x in zip(COMPLETIONS, logps, strict=True)
        ],
        advantage=ADVANTAGE,
        counted=torch.ones(4, dtype=torch.bool) if counted is None else counted,
        old_logp=drifted[0] if drift else None,
        ref_logp=drifted[1] if drift else None,
    )


def plain_loss(policy, batch: Batch, config: TrainConfig, temperature: float) -> torch.Tensor:
    """The loss as the module's header writes it, one token after the other."""
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        if not batch.counted[i]:
            continue
        logp, entropy = row_logp(policy.model, prompt, completion, temperature)
        advantage = float(batch.advantage[i])
        for t in range(len(completion)):
            tokens += 1
            old = logp[t].detach() if batch.old_logp is None else batch.old_logp[i][t]
            ratio = (logp[t] - old).exp()
            high = config.epsilon if config.epsilon_high is None else config.epsilon_high
            gain = torch.min(
                ratio * advantage, ratio.clamp(1 - config.epsilon, 1 + high) * advantage
            )
            if config.delta is not None and advantage < 0:
                gain = gain.clamp(min=config.delta * advantage)
            total = total - gain - config.entropy_coef * entropy[t]
            if config.beta and batch.ref_logp is not None:
                gap = batch.ref_logp[i][t] - logp[t]
                total = total + config.beta * (gap.exp() - gap - 1)
    return total / tokens


def step_and_plain_gradient(policy, batch, config, temperature=1.0):
    """Largest difference between an SGD step's and the plain loss's gradient; also the metrics."""
    loss = plain_loss(policy, batch, config, temperature)
    parameters = list(policy.model.parameters())
    expected = torch.autograd.grad(loss, parameters)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    metrics = optimise(policy, optimizer, batch, config)
    got = [b - p.detach() for b, p in zip(before, parameters, strict=True)]
    scale = max(float(g.abs().max()) for g in expected)
    error = max(float((g - e).abs().max()) for g, e in zip(got, expected, strict=True))
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
    return error / scale, metrics


CONFIGS = {
    "on-policy": ({}, 0.0),
    "clip": ({"epsilon": 0.1}, 0.3),
    "asymmetric clip": ({"epsilon": 0.1, "epsilon_high": 0.28}, 0.3),
    "dual clip": ({"delta": 1.2}, 0.5),
    "kl": ({"beta": 0.1}, 0.3),
    "entropy": ({"entropy_coef": 0.05}, 0.0),
    "all": ({"epsilon_high": 0.3, "delta": 1.5, "beta": 0.1, "entropy_coef": 0.01}, 0.4),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_tokens", [16384, 10], ids=lambda n: f"{n} tokens per pass")
def test_gradient_is_that_of_the_plain_loss(policy, name, max_tokens):
    settings, drift = CONFIGS[name]
    config = TrainConfig(max_tokens_per_batch=max_tokens, max_grad_norm=1e9, **settings)
    error, metrics = step_and_plain_gradient(policy, make_batch(policy, drift=drift), config)
    assert error < 1e-9
    if drift and name != "kl":
        assert metrics["clip_ratio"] > 0


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_gradient_under_the_sampling_temperature(policy, temperature):
    batch = make_batch(policy, temperature=temperature)
    config = TrainConfig(max_grad_norm=1e9)
    error, _ = step_and_plain_gradient(policy, batch, config, temperature)
    assert error < 1e-9


def test_every_row_is_scored_under_its_own_temperature(policy):
    batch = make_batch(policy)
    warmth = [0.7, 1.3, 0.7, 2.0]
    requests = [
        replace(request, params=replace(request.params, temperature=t))
        for request, t in zip(batch.requests, warmth, strict=True)
    ]
    scored = score_completions(policy, requests, batch.completions, TrainConfig())
    rows = [
        row_logp(policy.model, prompt, completion, t)[0]
        for prompt, completion, t in zip(PROMPTS, COMPLETIONS, warmth, strict=True)
    ]
    torch.testing.assert_close(scored.logp, torch.cat(rows))


def test_bf16_scores_in_bfloat16(make_tiny_model):
    policy = Policy(make_tiny_model("qwen3"))
    batch = make_batch(policy)
    full, half = (
        score_completions(policy, batch.requests, batch.completions, TrainConfig(bf16=bf16)).logp
        for bf16 in (False, True)
    )
    torch.testing.assert_close(full, half, rtol=0, atol=0.2)
    assert (full - half).abs().max() > 1e-3


def test_rows_keep_what_belongs_to_them(policy):
    batch = make_batch(policy, drift=0.1, counted=torch.tensor([True, True, True, False]))
    some = batch.rows([0, 3, 2]).rows([1, 2])
    assert some.row == [3, 2]
    assert some.counted.tolist() == [False, True]
    assert some.advantage.tolist() == [2.0, 0.0]
    assert [c.ids for c in some.completions] == [COMPLETIONS[3], COMPLETIONS[2]]
    assert batch.old_logp is not None
    assert batch.ref_logp is not None
    assert some.old_logp == [batch.old_logp[3], batch.old_logp[2]]
    assert some.ref_logp == [batch.ref_logp[3], batch.ref_logp[2]]


@pytest.mark.parametrize(("max_tokens", "num_passes"), [(16384, 1), (10, 3)])
def test_a_pass_holds_at_most_max_tokens_per_batch(policy, max_tokens, num_passes):
    passes = forward_passes(policy)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    config = TrainConfig(max_tokens_per_batch=max_tokens)  # three rows learn
    optimise(policy, optimizer, make_batch(policy), config)
    assert len(passes) - 4 == num_passes  # make_batch has scored four


@pytest.mark.parametrize("max_tokens", [16384, 10], ids=lambda n: f"{n} tokens per pass")
def test_metrics_are_means_over_the_scored_tokens(policy, max_tokens):
    batch = make_batch(policy, drift=0.3)
    config = TrainConfig(beta=0.1, epsilon=0.1, max_tokens_per_batch=max_tokens)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    metrics = optimise(policy, optimizer, batch, config)
    scored = [
        row_logp(policy.model, prompt, completion, 1.0)
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    logp = torch.cat([x for x, _ in scored])
    entropy = torch.cat([x for _, x in scored])
    ratio = (logp - torch.cat(batch.old_logp or [])).exp()
    gap = torch.cat(batch.ref_logp or []) - logp
    advantage = ADVANTAGE.repeat_interleave(batch.lengths())
    low, high = (ratio < 0.9) & (advantage < 0), (ratio > 1.1) & (advantage > 0)
    assert low.any()
    assert high.any()
    assert metrics["entropy"] == pytest.approx(entropy.mean().item())
    assert metrics["kl"] == pytest.approx((gap.exp() - gap - 1).mean().item())
    assert metrics["clip_ratio"] == pytest.approx((low | high).double().mean().item())


def test_accumulation_cannot_change_the_result_in_float32(make_tiny_model):
    steps = []
    for max_tokens in (16384, 1):
        policy = Policy(make_tiny_model("qwen3"))
        before = [p.detach().clone() for p in policy.model.parameters()]
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
        batch = make_batch(policy)
        optimise(policy, optimizer, batch, TrainConfig(max_tokens_per_batch=max_tokens))
        after = policy.model.parameters()
        steps.append(
            torch.cat([(p - b).detach().flatten() for p, b in zip(after, before, strict=True)])
        )
    assert float((steps[0] - steps[1]).abs().max()) < 1e-6
    assert float(steps[0].abs().max()) > 1e-2


def test_rows_without_advantage_are_left_out_but_stay_in_the_token_count(policy):
    error, metrics = step_and_plain_gradient(
        policy, make_batch(policy), TrainConfig(max_grad_norm=1e9)
    )
    assert error < 1e-9  # the plain loss runs all four rows and divides by their 15 tokens
    assert metrics["rows_left_out"] == 1
    _, metrics = step_and_plain_gradient(
        policy, make_batch(policy, drift=0.1), TrainConfig(max_grad_norm=1e9, beta=0.1)
    )
    assert metrics["rows_left_out"] == 0  # the KL pulls on them


def test_rows_that_are_not_counted_leave_the_token_count_too(policy):
    counted = torch.tensor([False, False, True, True])
    batch = make_batch(policy, counted=counted)
    error, metrics = step_and_plain_gradient(policy, batch, TrainConfig(max_grad_norm=1e9))
    assert error < 1e-9
    assert metrics["rows_left_out"] == 3


def test_nothing_to_learn_from_moves_nothing(policy):
    before = [p.detach().clone() for p in policy.model.parameters()]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1)
    batch = make_batch(policy, counted=torch.zeros(4, dtype=torch.bool))
    metrics = optimise(policy, optimizer, batch, TrainConfig())
    assert metrics["updates_skipped"] == 1
    assert metrics["rows_left_out"] == 4
    assert all(map(torch.equal, before, policy.model.parameters()))
    assert not optimizer.state


def test_gradient_norm_is_clipped_and_reported_unclipped(policy):
    before = [p.detach().clone() for p in policy.model.parameters()]
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    metrics = optimise(policy, optimizer, make_batch(policy), TrainConfig(max_grad_norm=0.01))
    moved = [p.detach() - b for p, b in zip(policy.model.parameters(), before, strict=True)]
    norm = float(torch.cat([m.flatten() for m in moved]).norm())
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] > 0.02
    assert "kl" not in metrics  # there is no reference
    assert all(p.grad is None for p in policy.model.parameters())


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("max_tokens", [16384, 1], ids=["one pass", "a pass for each row"])
def test_mismatch_with_the_sampler_is_measured(policy, row, max_tokens):
    batch = make_batch(policy)
    batch.completions[row].logp[2] += 0.5
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    metrics = optimise(policy, optimizer, batch, TrainConfig(max_tokens_per_batch=max_tokens))
    assert metrics["sampling/logp_mismatch_max"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["sampling/logp_mismatch"] == pytest.approx(0.5 / 14, abs=1e-5)


def test_off_policy_mismatch_is_that_of_the_old_policy_and_not_of_its_updates(policy):
    batch = make_batch(policy, drift=0.3)
    sampled = [
        replace(c, logp=x.tolist())
        for c, x in zip(batch.completions, batch.old_logp or [], strict=True)
    ]
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    metrics = optimise(
        policy, optimizer, replace(batch, completions=sampled), TrainConfig(beta=0.1)
    )
    assert metrics["sampling/logp_mismatch_max"] == pytest.approx(0.0, abs=1e-6)


def test_dual_clips_are_counted_among_the_clipped_tokens(policy):
    batch = replace(make_batch(policy), advantage=torch.tensor([0.0, -1.0, 0.0, 0.0]))
    old = [x - 2.0 for x in make_batch(policy, drift=1e-9).old_logp or []]  # ratio e^2 > delta
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    ratios = [
        optimise(policy, optimizer, replace(batch, old_logp=old), TrainConfig(delta=delta))
        for delta in (3.0, None)
    ]
    assert [metrics["clip_ratio"] for metrics in ratios] == [1.0, 0.0]


def test_weights_that_an_update_spoilt_are_told(policy):
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=float("inf"))
    with pytest.raises(NonFiniteWeightsError, match="weights after the update must be finite"):
        optimise(policy, optimizer, make_batch(policy), TrainConfig())


@pytest.mark.parametrize("where", ["hidden", "loss alone", "gradient"])
def test_nan_stops_before_the_weights_move(policy, where):
    batch = make_batch(policy)
    if where != "gradient":
        norm = policy.model.model.norm
        policy.prove_isolation()
        norm.register_forward_hook(lambda module, args, out: out * float("nan"))
    else:
        policy.head().weight.register_hook(lambda grad: grad * float("inf"))
    if where == "loss alone":
        for parameter in policy.model.parameters():
            parameter.register_hook(torch.zeros_like)
    before = [p.detach().clone() for p in policy.model.parameters()]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1)
    expected = "gradient norm" if where == "gradient" else "loss"
    with pytest.raises(NonFiniteError, match=rf"^{expected} of rollouts must be finite") as caught:
        optimise(policy, optimizer, batch, TrainConfig())
    assert caught.value.rows == [0, 1, 3]
    assert all(map(torch.equal, before, policy.model.parameters()))
    assert all(p.grad is None for p in policy.model.parameters())


def test_scoring_gives_old_log_probs_only_off_policy(policy):
    batch = make_batch(policy)
    rollouts = Rollouts(requests=batch.requests, completions=batch.completions)
    assert score_rollouts(policy, None, rollouts, TrainConfig()).old_logp is None
    for config in (TrainConfig(mini_batches=2), TrainConfig(num_iterations=2)):
        scored = score_rollouts(policy, policy, rollouts, config)
        assert scored.old_logp is not None
        assert scored.ref_logp is not None
        for row, old, ref in zip(batch.completions, scored.old_logp, scored.ref_logp, strict=True):
            torch.testing.assert_close(old, torch.tensor(row.logp).double(), rtol=0, atol=1e-6)
            assert torch.equal(old, ref)
            assert not old.requires_grad


def test_the_reference_and_not_the_policy_gives_reference_log_probs(policy, make_tiny_model):
    batch = make_batch(policy)
    rollouts = Rollouts(requests=batch.requests, completions=batch.completions)
    reference = Policy(make_tiny_model("qwen3", seed=1).double())
    scored = score_rollouts(policy, reference, rollouts, TrainConfig(mini_batches=2))
    for model, rows in ((policy.model, scored.old_logp), (reference.model, scored.ref_logp)):
        for prompt, completion, row in zip(PROMPTS, COMPLETIONS, rows or [], strict=True):
            expected = row_logp(model, prompt, completion, 1.0)[0].detach()
            torch.testing.assert_close(row, expected)


def test_scoring_has_no_dropout(make_tiny_model):
    policy = Policy(make_tiny_model("qwen3", attention_dropout=0.5).double())
    batch = make_batch(policy)
    rollouts = Rollouts(requests=batch.requests, completions=batch.completions)
    policy.model.train()
    scored = score_rollouts(policy, None, rollouts, TrainConfig(mini_batches=2))
    assert policy.model.training
    for sampled, old in zip(batch.completions, scored.old_logp or [], strict=True):
        torch.testing.assert_close(old, torch.tensor(sampled.logp).double())


def forward_passes(policy) -> list:
    """Grows by one at every pass through the model."""
    policy.prove_isolation()
    passes = []
    policy.model.model.norm.register_forward_hook(lambda *args: passes.append(1))
    return passes


def pooled_rollouts(policy, *, embedding) -> Rollouts:
    """The four rollouts, then a greedy query of another role, all to be pooled from token 1 on."""
    batch = make_batch(policy)
    query = Request(
        prompt_ids=[50, 51, 52], params=SamplingParams(temperature=0.0), role="query", pool_from=1
    )
    answer = Completion(ids=[60, 61], logp=[-1.0, -1.0], finished=True)
    requests = [replace(request, pool_from=1) for request in batch.requests]
    return Rollouts(
        requests=[*requests, query],
        completions=[replace(c, embedding=embedding) for c in (*batch.completions, answer)],
    )


def test_nothing_is_scored_on_policy_when_the_sampler_has_pooled(policy):
    rollouts = pooled_rollouts(policy, embedding=torch.ones(32))
    passes = forward_passes(policy)
    scored = score_rollouts(policy, None, rollouts, TrainConfig())
    assert passes == []
    assert scored.rollouts == rollouts


@pytest.mark.parametrize("pooling", ["mean", "penultimate_mean"])
@pytest.mark.parametrize("mini_batches", [1, 2], ids=["on-policy", "off-policy"])
def test_one_pass_gives_old_log_probs_and_missing_embeddings(policy, mini_batches, pooling):
    rollouts = pooled_rollouts(policy, embedding=None)
    requests = [replace(request, pooling=pooling) for request in rollouts.requests]
    rollouts = replace(rollouts, requests=requests)
    passes = forward_passes(policy)
    scored = score_rollouts(policy, None, rollouts, TrainConfig(mini_batches=mini_batches))
    assert len(passes) == 1
    assert (scored.old_logp is None) == (mini_batches == 1)
    if scored.old_logp is not None:
        assert [len(row) for row in scored.old_logp] == [3, 7, 1, 4]
    pairs = zip(rollouts.requests, scored.rollouts.completions, strict=True)
    for request, completion in pairs:
        ids = torch.tensor([request.prompt_ids + completion.ids])
        states = policy.model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        hidden = states.hidden_states[-1 if pooling == "mean" else -2][0, 1:]
        assert completion.embedding is not None
        torch.testing.assert_close(completion.embedding, hidden.mean(0).detach())

"""The contrastive loss against its formula, and the loop: memory, resume, dropout, refusals."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from tercet.engine.choices import Pooling
from tercet.engine.grace.baselines import (
    Contrastive,
    cached_backward,
    held_out_measures,
    train_contrastive,
)
from tercet.engine.grace.data import Example
from tercet.engine.grace.encoder import GraceEncoder, pool_prompts
from tercet.engine.grace.evaluate import retrieval_metrics
from tercet.engine.grace.fit_config import ContrastiveConfig, FitConfig
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.kernels import info_nce

SYSTEM = "Read the text."
WORDS = ["river", "boat", "sea", "garden", "roses", "sun", "bread", "kitchen", "red", "warm"]
PAIRS = [
    Example(query=f"{a} {b} ?", document=f"the {b} {a}", negatives=(f"{a} {a}",))
    for i, a in enumerate(WORDS)
    for b in WORDS[:i]
][:24]


def config(**changes) -> ContrastiveConfig:
    fit = {"max_steps": 6, "learning_rate": 1e-3, "save_steps": 2, **changes.pop("fit", {})}
    settings = {"per_device_train_batch_size": 8, "max_prompt_length": 64, **changes}
    return ContrastiveConfig(system_prompt=SYSTEM, fit=FitConfig(**fit), **settings)


def run_log(folder, settings, *, resume=False) -> RunLog:
    return RunLog.create(folder, settings, total_steps=settings.fit.max_steps, resume=resume)


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def test_loss_by_hand():
    # cosines q.d = [[1, 0], [0, 1]] and q.n = [[0], [-1]], temperature 0.5
    q, d = torch.eye(2), torch.eye(2) * 3
    n = torch.tensor([[0.0, -2.0]])
    e2 = math.exp(2)
    plain = -math.log(e2 / (e2 + 1))
    hard = -(math.log(e2 / (e2 + 2)) + math.log(e2 / (e2 + 1 + math.exp(-2)))) / 2
    assert info_nce(q, d, temperature=0.5).item() == pytest.approx(plain, rel=1e-6)
    assert info_nce(q, d, n, temperature=0.5).item() == pytest.approx(hard, rel=1e-6)
    both = info_nce(q, d, n, temperature=0.5, symmetric=True).item()
    assert both == pytest.approx((hard + plain) / 2, rel=1e-6)


def test_rows_of_one_text_are_not_each_others_negatives():
    q, d = torch.randn(4, 3), torch.randn(4, 3)
    q[3], d[3] = q[0], d[0]
    ids = torch.tensor([0, 1, 2, 0])
    of_rows = torch.stack(
        [_row_loss(q, d, i, {j for j in range(4) if ids[j] != ids[i]} | {i}) for i in range(4)]
    )
    torch.testing.assert_close(info_nce(q, d, ids=ids), of_rows.mean())
    assert info_nce(q, d, ids=ids) < info_nce(q, d)


def _row_loss(q, d, i, candidates):
    cosine = F.cosine_similarity(q[i][None], d, dim=-1) / 0.05
    return torch.logsumexp(cosine[sorted(candidates)], 0) - cosine[i]


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_parts_of_a_batch_give_the_gradient_of_the_whole(tiny_policy, pooling):
    objective = Contrastive(tiny_policy, PAIRS, config())
    prompts = [objective.prompt(e.document) for e in PAIRS[:6]]
    weight = torch.randn(6, 32)

    def gradient(limit):
        tiny_policy.model.zero_grad()
        loss, vectors = cached_backward(
            tiny_policy,
            prompts,
            lambda v: (F.normalize(v, dim=-1) * weight).sum().square(),
            pooling=pooling,
            max_tokens_per_batch=limit,
        )
        parameters = tiny_policy.model.model.parameters()  # the penultimate layer is not the last
        grads = [p.grad.flatten() for p in parameters if p.grad is not None]
        return loss, vectors, torch.cat(grads)

    for whole, parts in zip(gradient(10_000), gradient(60), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_an_objective_pools_as_its_settings_say(tiny_policy, pooling):
    objective = Contrastive(tiny_policy, PAIRS, config(pooling=pooling))
    measured = objective.backward(1)["cosine/positive"]
    rows = objective.batch(1)
    prompts = [objective.prompt(str(e.query)) for e in rows]
    prompts += [objective.prompt(e.document) for e in rows]
    q, d = F.normalize(pool_prompts(tiny_policy, prompts, pooling), dim=-1).split(len(rows))
    assert measured == pytest.approx((q * d).sum(-1).mean().item(), abs=1e-5)


def test_parts_see_the_same_dropout_twice(make_tiny_model, tiny_tokenizer):
    policy = Policy(make_tiny_model(attention_dropout=0.5), tiny_tokenizer)
    objective = Contrastive(policy, PAIRS, config())
    prompts = [objective.prompt(e.document) for e in PAIRS[:4]]
    policy.model.train()

    def backward():
        torch.manual_seed(5)
        policy.model.zero_grad()
        _, vectors = cached_backward(
            policy, prompts, lambda v: v.square().sum(), max_tokens_per_batch=1
        )
        return vectors, policy.model.model.embed_tokens.weight.grad

    vectors, gradient = backward()
    torch.manual_seed(5)
    policy.model.zero_grad()
    one_by_one = torch.cat([pool_prompts(policy, [prompt]) for prompt in prompts])
    torch.testing.assert_close(one_by_one, vectors)
    one_by_one.square().sum().backward()
    expected = policy.model.model.embed_tokens.weight.grad
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_info_nce_learns_to_retrieve(tiny_policy, tmp_path):
    settings = config(
        per_device_train_batch_size=24,
        fit={"max_steps": 30, "eval_steps": 30, "learning_rate": 3e-3},
    )
    recall = held_out_measures(tiny_policy, PAIRS, settings)
    before = recall(0)["recall@1"]
    with run_log(tmp_path, settings) as log:
        metrics = train_contrastive(tiny_policy, PAIRS, settings, log, evaluate=recall)
    assert metrics["eval/recall@1"] > before + 0.3
    assert metrics["cosine/positive"] > metrics["cosine/others"] + 0.3


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_held_out_rows_are_embedded_as_in_training(tiny_policy, pooling):
    settings = config(pooling=pooling)
    encoder = GraceEncoder(tiny_policy, max_prompt_length=64, system_prompt=SYSTEM, pooling=pooling)
    queries = encoder.encode([str(e.query) for e in PAIRS], generate=False).vectors
    documents = encoder.encode([e.document for e in PAIRS], generate=False).vectors
    expected = retrieval_metrics(queries, documents, torch.arange(len(PAIRS)))
    found = held_out_measures(tiny_policy, PAIRS, settings)(0)
    assert set(found) == {
        "recall@1", "recall@10", "ndcg@10", "mrr", "anisotropy", "prompts_truncated"
    }  # fmt: skip
    assert found["mrr"] == pytest.approx(expected["mrr"])
    with pytest.raises(ValueError, match="must be held-out rows, got none"):
        held_out_measures(tiny_policy, [], settings)


@pytest.mark.parametrize(
    ("method", "pooling"),
    [("info_nce", "mean"), ("simcse", "mean"), ("simcse", "penultimate_mean")],
)
def test_a_resumed_run_ends_with_the_same_weights(method, pooling, tiny_policy, tmp_path):
    first = weights(tiny_policy).clone()
    tiny_policy.save(tmp_path / "start")
    settings = config(method=method, pooling=pooling, attention_dropout=0.2)

    def final(folder, *, stop_after=None):
        policy = Policy.from_pretrained(tmp_path / "start", device="cpu")
        objective_calls = iter(range(1000))

        def stop(step):
            if stop_after is not None and step == stop_after:
                raise KeyboardInterrupt(next(objective_calls))
            return {"step": float(step)}

        fit = {"eval_steps": 1, "save_steps": 2}
        evaluating = config(method=method, pooling=pooling, attention_dropout=0.2, fit=fit)
        with run_log(tmp_path / folder, evaluating, resume=stop_after is None) as log:
            train_contrastive(policy, PAIRS, evaluating, log, evaluate=stop)
        return weights(policy)

    whole = final("whole")
    with pytest.raises(KeyboardInterrupt):
        final("cut", stop_after=5)
    assert torch.equal(final("cut"), whole)
    assert not torch.equal(whole, first)
    assert GraceEncoder.from_pretrained(tmp_path / "cut" / "checkpoint-6").pooling == pooling
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == settings.fit.max_steps + 1  # step 0 is the evaluation before training


def test_simcse_needs_dropout(tiny_policy, tmp_path):
    texts = [Example(document=e.document) for e in PAIRS]
    settings = config(method="simcse")
    with run_log(tmp_path, settings) as log, pytest.raises(ValueError, match="needs dropout"):
        train_contrastive(tiny_policy, texts, settings, log)


def test_simcse_views_differ_and_dropout_ends_with_training(tiny_policy, tmp_path):
    texts = [Example(document=e.document) for e in PAIRS]
    settings = config(method="simcse", attention_dropout=0.3, fit={"max_steps": 2})
    with run_log(tmp_path, settings) as log:
        metrics = train_contrastive(tiny_policy, texts, settings, log)
    assert 0.2 < metrics["cosine/positive"] < 0.9999
    layers = [m for m in tiny_policy.model.modules() if hasattr(m, "attention_dropout")]
    assert [layer.attention_dropout for layer in layers] == [0.0, 0.0]


def test_simcse_stops_when_the_model_ignores_its_dropout(tiny_policy):
    objective = Contrastive(tiny_policy, PAIRS, config(method="simcse"))
    with pytest.raises(RuntimeError, match="two different views"):
        objective.backward(1)  # in evaluation mode, so without dropout


def test_a_loss_that_is_not_finite_leaves_the_weights(tiny_policy, tmp_path):
    settings = config()
    objective = Contrastive(tiny_policy, PAIRS, settings)
    objective.backward(1)  # the isolation proof needs healthy weights
    tiny_policy.model.zero_grad()
    with torch.no_grad():
        tiny_policy.model.model.norm.weight[3] = float("inf")
    before = weights(tiny_policy).clone()
    with run_log(tmp_path, settings) as log, pytest.raises(RuntimeError, match="must be finite"):
        train_contrastive(tiny_policy, PAIRS, settings, log)
    assert torch.equal(weights(tiny_policy), before)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.wrong_types
def test_bad_settings_are_named(tiny_policy):
    with pytest.raises(ValueError, match=r"at least 8 rows .* got 3"):
        Contrastive(tiny_policy, PAIRS[:3], config())
    with pytest.raises(ValueError, match="needs a query in every row, got none in 1 rows"):
        Contrastive(tiny_policy, [*PAIRS, Example(document="x")], config())
    with pytest.raises(ValueError, match="method must be one of"):
        config(method="clip")
    with pytest.raises(ValueError, match=r"pooling must be one of \('mean', .* got 'cls'"):
        config(pooling="cls")
    with pytest.raises(ValueError, match="temperature must be finite"):
        config(temperature=0.0)
    with pytest.raises(ValueError, match="FitConfig: max_steps must be >= 1, got 0"):
        config(fit={"max_steps": 0})

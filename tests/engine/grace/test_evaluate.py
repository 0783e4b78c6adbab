"""Every metric against an example worked by hand, and against an independent implementation."""

import math

import pandas as pd
import pytest
import torch

from tercet.engine.grace.evaluate import (
    anisotropy,
    completion_loss,
    distinct_share,
    held_out_loss,
    mean_and_spread,
    metrics_of_ranks,
    retrieval_metrics,
    score_metrics,
    spearman,
    sts_spearman,
)


def at(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_retrieval_by_hand():
    # cosine order per query: 0 deg -> docs 0 1 2 3; 100 deg -> docs 2 3 1 0; 70 deg -> docs 2 1 0 3
    documents = at(5, 30, 80, 170)
    result = retrieval_metrics(at(0, 100, 70), documents, [{0}, {1, 3}, {0}], ks=(1, 2))
    assert result["recall@1"] == pytest.approx((1 + 0 + 0) / 3)
    assert result["recall@2"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert result["hit@2"] == pytest.approx((1 + 1 + 0) / 3)
    assert result["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    second = (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert result["ndcg@10"] == pytest.approx((1 + second + 1 / math.log2(4)) / 3)


def test_relevant_documents_with_others_between_them():
    # order 1 2 0 3 from 0 degrees; the relevant ones stand at ranks 1 and 4
    result = retrieval_metrics(at(0), at(40, 5, 20, 90), [{3, 1}], ks=(1, 3, 4))
    assert (result["recall@1"], result["recall@3"], result["recall@4"]) == (0.5, 0.5, 1.0)
    assert result["mrr"] == 1.0
    gain = 1 + 1 / math.log2(5)
    assert result["ndcg@10"] == pytest.approx(gain / (1 + 1 / math.log2(3)))


def test_all_ways_to_name_the_relevant_documents_agree():
    queries, documents = torch.randn(7, 5), torch.randn(9, 5)
    index = torch.arange(7) % 4
    expected = retrieval_metrics(queries, documents, [{int(i)} for i in index])
    assert retrieval_metrics(queries, documents, index) == expected
    mask = torch.nn.functional.one_hot(index, 9).bool()
    assert retrieval_metrics(queries, documents, mask) == expected


def test_length_of_vectors_does_not_matter():
    queries, documents, index = torch.randn(20, 4), torch.randn(30, 4), torch.arange(20)
    scaled = retrieval_metrics(queries * torch.rand(20, 1), documents * 3, index)
    assert scaled == retrieval_metrics(queries, documents, index)


def test_a_collapsed_model_finds_nothing_whatever_the_order():
    same = torch.ones(4, 3)
    result = retrieval_metrics(same, same * 2, torch.arange(4), ks=(1, 3))
    assert result["recall@1"] == result["recall@3"] == 0.0
    assert result["mrr"] == pytest.approx(1 / 4)


def test_a_tie_counts_against_the_relevant_document():
    documents = at(10, 10, 50)
    for relevant in (0, 1):
        assert retrieval_metrics(at(0), documents, [{relevant}])["mrr"] == pytest.approx(1 / 2)
    both = retrieval_metrics(at(0), documents, [{0, 1}], ks=(1, 2))
    assert both["recall@2"] == both["mrr"] == both["ndcg@10"] == 1.0


def test_against_a_plain_sort_on_random_vectors_in_several_chunks(monkeypatch):
    monkeypatch.setattr("tercet.engine.grace.evaluate.SCORES_PER_CHUNK", 100)
    queries, documents, index = torch.randn(50, 6), torch.randn(40, 6), torch.randint(40, (50,))
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], documents[None], dim=-1)
    place = (cosine.argsort(dim=1, descending=True) == index[:, None]).nonzero()[:, 1] + 1
    result = retrieval_metrics(queries, documents, index, ks=(1, 10))
    assert result["mrr"] == pytest.approx((1 / place).mean().item())
    assert result["recall@10"] == pytest.approx((place <= 10).float().mean().item())
    gain = torch.where(place <= 10, 1 / (place + 1.0).log2(), 0.0)
    assert result["ndcg@10"] == pytest.approx(gain.mean().item())


def test_score_metrics_takes_scores_as_they_are():
    scores = torch.tensor([[3.0, 9.0, 1.0], [0.0, 0.0, 0.0]])
    assert score_metrics(scores, torch.tensor([0, 2]))["mrr"] == pytest.approx((1 / 2 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        ([{0}], "one entry per query"),
        ([{0}, {3}], r"must be in \[0, 3\), got 3 for query 1"),
        ([{0}, set()], r"got none for queries \[1\]"),
        (torch.tensor([0, -1]), r"got -1 for query 1"),
    ],
)
def test_retrieval_refuses_bad_relevance(relevant, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(torch.randn(2, 4), torch.randn(3, 4), relevant)


@pytest.mark.wrong_types
def test_retrieval_refuses_nan_and_other_shapes():
    good, index = torch.randn(2, 4), torch.arange(2)
    bad = good.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"document_vectors must be finite.*rows \[1\]"):
        retrieval_metrics(good, bad, index)
    with pytest.raises(ValueError, match="as wide as the documents"):
        retrieval_metrics(good, torch.randn(2, 5), index)
    with pytest.raises(ValueError, match="every k >= 1"):
        metrics_of_ranks([[1]], ks=(0,))


def test_spearman_with_ties_by_hand():
    # average ranks 1, 2.5, 2.5, 4 and 2, 1, 3.5, 3.5
    x, y = torch.tensor([1.0, 5.0, 5.0, 9.0]), torch.tensor([2.0, 1.0, 7.0, 7.0])
    assert spearman(x, y) == pytest.approx(2.25 / 4.5)  # what scipy.stats.spearmanr gives


def test_spearman_against_pandas_ranks():
    x, y = torch.randint(6, (200,)).double(), torch.randn(200).double()
    y = y + x / 3
    expected = pd.Series(x.numpy()).rank().corr(pd.Series(y.numpy()).rank())
    assert spearman(x, y) == pytest.approx(expected, abs=1e-12)
    assert spearman(x, -y) == pytest.approx(-expected, abs=1e-12)


@pytest.mark.wrong_types
def test_spearman_of_a_constant_is_nan_and_bad_input_is_refused():
    assert math.isnan(spearman(torch.ones(4), torch.arange(4.0)))
    with pytest.raises(ValueError, match="one length >= 2"):
        spearman(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="got NaN"):
        spearman(torch.tensor([1.0, math.nan]), torch.ones(2))


def test_sts_ranks_the_cosines_of_pairs():
    first, second = at(0, 0, 0, 0), at(80, 10, 40, 60)
    assert sts_spearman(first * 7, second, torch.tensor([1.0, 4.0, 3.0, 2.0])) == pytest.approx(1.0)
    assert sts_spearman(first, second, torch.tensor([1.0, 4.0, 2.0, 3.0])) == pytest.approx(0.8)
    equal = sts_spearman(first, at(10, -10, 40, -40), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert equal == pytest.approx(-4 / math.sqrt(20))  # ranks 3.5 3.5 1.5 1.5


def test_anisotropy_against_all_pairs():
    vectors = torch.randn(30, 5) + 1
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    cosine = unit @ unit.T
    expected = (cosine.sum() - cosine.trace()) / (30 * 29)
    assert anisotropy(vectors) == pytest.approx(expected.item(), abs=1e-12)
    assert anisotropy(at(0, 180)) == pytest.approx(-1.0)
    assert anisotropy(torch.ones(5, 3)) == pytest.approx(1.0)
    with_zero = torch.cat([at(0, 0), torch.zeros(1, 2)])
    assert anisotropy(with_zero) == pytest.approx(2 / 6)  # one pair of three agrees
    with pytest.raises(ValueError, match="at least two vectors"):
        anisotropy(torch.ones(1, 3))


def test_equal_pairs_tie_though_their_cosines_round_differently():
    first = torch.randn(6, 64)
    scaled = first * torch.tensor([1.0, 3.0, 0.1, 7.0, 1e-3, 1e3])[:, None]
    first[0], scaled[0] = scaled[0].clone(), -scaled[0]  # one pair is opposite, five are equal
    gold = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert sts_spearman(first, scaled, gold) == pytest.approx(1.0)


def logits_loss(policy, ids, first):
    """Mean loss of tokens first.. of one row from the model's own logits, and their number."""
    row = torch.tensor([ids])
    logp = policy.model(row).logits[0, :-1].log_softmax(-1)
    losses = -logp.gather(1, row[0, 1:, None])[first - 1 :]
    return losses.sum().item(), len(losses)


def test_completion_loss_is_a_token_mean_of_the_models_own_logits(tiny_policy):
    prompts, completions = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], []]
    rows = [(p + c, len(p)) for p, c in zip(prompts, completions, strict=True)]
    parts = [logits_loss(tiny_policy, ids, first) for ids, first in rows]
    expected = sum(total for total, _ in parts) / sum(count for _, count in parts)
    assert completion_loss(tiny_policy, prompts, completions) == pytest.approx(expected, rel=1e-5)
    small = completion_loss(tiny_policy, prompts, completions, max_tokens_per_batch=1)
    assert small == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="each with a prompt token"):
        completion_loss(tiny_policy, [[]], [[1]])


def test_held_out_loss_reads_texts_up_to_their_limit(tiny_policy):
    texts = ["the red boat to the sea", "x", "bread rises slowly"]
    rows = [tiny_policy.tokenizer.encode(text) for text in texts]
    assert len(rows[1]) == 1  # nothing to predict: left out
    parts = [logits_loss(tiny_policy, row[:4], 1) for row in (rows[0], rows[2])]
    expected = sum(total for total, _ in parts) / sum(count for _, count in parts)
    cut = {"held_out_loss": pytest.approx(expected, rel=1e-5), "held_out_truncated": 1}
    assert held_out_loss(tiny_policy, texts, max_length=4) == cut
    whole = held_out_loss(tiny_policy, texts)
    assert whole["held_out_loss"] != pytest.approx(expected, rel=1e-5)
    assert whole["held_out_truncated"] == 0
    assert held_out_loss(tiny_policy, texts, max_length=len(rows[0])) == whole
    tiny_policy.model.train()
    assert held_out_loss(tiny_policy, texts) == pytest.approx(whole)
    assert tiny_policy.model.training
    with pytest.raises(ValueError, match="at least two tokens, got none in 1"):
        held_out_loss(tiny_policy, ["x"])


def test_held_out_loss_reads_what_the_model_has_positions_for(tiny_policy):
    row = tiny_policy.tokenizer.encode("the red boat " * 300)[: tiny_policy.max_length]
    total, count = logits_loss(tiny_policy, row, 1)
    found = held_out_loss(tiny_policy, ["the red boat " * 300])
    assert found == {
        "held_out_loss": pytest.approx(total / count, rel=1e-5),
        "held_out_truncated": 1,
    }


def test_distinct_share_and_spread():
    assert distinct_share(["a", "b", "a", "c"]) == 0.75
    with pytest.raises(ValueError, match="at least one rationale"):
        distinct_share([])
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([5.0]) == (5.0, 0.0)
    with pytest.raises(ValueError, match="at least one value"):
        mean_and_spread([])

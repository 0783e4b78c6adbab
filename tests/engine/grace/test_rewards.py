"""Golden numbers, the cancellation of the paper's repulsion, and the truncation rule."""

import math

import pytest
import torch

from tercet.engine.advantage import advantages, dead_parts
from tercet.engine.grace.reward_config import RewardConfig
from tercet.engine.grace.rewards import grace_reward
from tercet.kernels.reference import contrastive_reward_ref

FORMS = ["paper", "released", "document", "info_nce"]
LOOSE = {"rtol": 0, "atol": 2e-5}


def at(*degrees):
    """Unit vectors of the plane."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


# Two groups of two rollouts; the numbers below follow from these angles.
ROLLOUTS = torch.stack((at(30, -10), at(60, 135)))
QUERIES = at(0, 90)
NEGATIVES = at(80, 20)[:, None]
FINISHED = torch.ones(2, 2, dtype=torch.bool)


def cos(degrees):
    return math.cos(math.radians(degrees))


def random_batch(groups=6, rollouts=4, hidden=32, negatives=1):
    return (
        torch.randn(groups, rollouts, hidden),
        torch.randn(groups, hidden),
        torch.randn(groups, negatives, hidden) if negatives else None,
        torch.ones(groups, rollouts, dtype=torch.bool),
    )


def group_of(rewards, rollouts):
    return torch.arange(len(rewards.total)) // rollouts


@pytest.mark.parametrize("form", ["paper", "released"])
def test_golden_supervised(form):
    r = grace_reward(ROLLOUTS, QUERIES, NEGATIVES, FINISHED, RewardConfig(form=form))
    expected = {
        "positive": [8.66025, 9.84808, 8.66025, 7.07107],
        "negative": [-1.73648, -1.73648, -3.42020, -3.42020],
        "consistency": [0.2 * 7.66044, 0.2 * 7.66044, 0.2 * 2.58819, 0.2 * 2.58819],
        "hard": [-1.0] * 4,
        "truncation": [0.0] * 4,
    }
    assert list(r.parts) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(r.parts[name], torch.tensor(values), **LOOSE)
    total = torch.tensor([7.45586, 8.64369, 4.75769, 3.16850])
    torch.testing.assert_close(r.total, total, **LOOSE)
    advantage = advantages(r.total, torch.tensor([0, 0, 1, 1]))
    expected_advantage = torch.tensor([-0.59391, 0.59391, 0.79459, -0.79459])
    torch.testing.assert_close(advantage, expected_advantage, **LOOSE)


def test_golden_unsupervised_released():
    r = grace_reward(ROLLOUTS, QUERIES, None, FINISHED, RewardConfig(form="released"))
    total = torch.tensor([9.19234, 11.72746, 8.17789, 9.00292])
    torch.testing.assert_close(r.total, total, **LOOSE)
    advantage = advantages(r.total, torch.tensor([0, 0, 1, 1]))
    expected = torch.tensor([-1.26756, 1.26756, -0.41251, 0.41251])
    torch.testing.assert_close(advantage, expected, **LOOSE)


def test_golden_truncation_of_the_paper():
    """The third rollout was cut off: its reward is -1 and the others keep theirs."""
    finished = torch.tensor([[True, True], [False, True]])
    config = RewardConfig(form="released", truncation="flat")
    r = grace_reward(ROLLOUTS, QUERIES, None, finished, config)
    torch.testing.assert_close(r.total, torch.tensor([9.19234, 11.72746, -1.0, 9.00292]), **LOOSE)


def test_unsupervised_paper_repels_on_the_query_side():
    r = grace_reward(ROLLOUTS, QUERIES, None, FINISHED, RewardConfig(form="paper"))
    # query 0 against {60, 135}, query 90 against {30, -10}: the nearer one is 60 degrees away
    torch.testing.assert_close(r.parts["hard"], torch.full((4,), -0.2 * cos(60) / 0.1), **LOOSE)


def test_document_form_by_hand():
    r = grace_reward(ROLLOUTS, QUERIES, NEGATIVES, FINISHED, RewardConfig(form="document"))
    negative = torch.tensor([-cos(50), -cos(90), -cos(40), -cos(115)]) / 0.1
    hard = -0.2 * torch.tensor([cos(60), cos(100), cos(60), cos(135)]) / 0.1
    torch.testing.assert_close(r.parts["negative"], negative, **LOOSE)
    torch.testing.assert_close(r.parts["hard"], hard, **LOOSE)


@pytest.mark.parametrize("temperature", [0.1, 0.4])
@pytest.mark.parametrize("supervised", [True, False])
def test_info_nce_form_by_hand(supervised, temperature):
    negatives = NEGATIVES if supervised else None
    config = RewardConfig(form="info_nce", temperature=temperature)
    r = grace_reward(ROLLOUTS, QUERIES, negatives, FINISHED, config)
    expected = []
    for angle, own, other, mined in ((30, 0, 90, 80), (-10, 0, 90, 80), (60, 90, 0, 20)):
        candidates = [cos(angle - own), cos(angle - other)]
        candidates += [cos(angle - mined)] if supervised else []
        log_sum = math.log(sum(math.exp(c / temperature) for c in candidates))
        expected.append(math.log(len(candidates)) + candidates[0] / temperature - log_sum)
    consistency = 0.2 * torch.tensor([cos(40), cos(40), cos(75)]) / temperature
    torch.testing.assert_close(r.total[:3], torch.tensor(expected) + consistency, **LOOSE)


@pytest.mark.parametrize("form", ["paper", "document"])
def test_every_weight_counts(form):
    rollouts, queries, negatives, finished = random_batch()
    config = RewardConfig(
        form=form, temperature=0.3, negative_weight=0.4, consistency_weight=0.7, hard_weight=1.3
    )
    r = grace_reward(rollouts, queries, negatives, finished, config)
    repulsion = "query" if form == "paper" else "document"
    parts = contrastive_reward_ref(rollouts, queries, negatives, repulsion=repulsion)
    wanted = parts.positive + 0.4 * parts.negative + 0.7 * parts.consistency + 1.3 * parts.hard
    torch.testing.assert_close(r.total.view(6, 4), wanted / 0.3, **LOOSE)


def test_several_negatives_are_summed():
    two = torch.stack((at(80, 20), at(10, 200)), dim=1)
    r = grace_reward(ROLLOUTS, QUERIES, two, FINISHED, RewardConfig(form="paper"))
    by_group = [-(cos(80) + cos(10)) / 0.1, -(cos(70) + cos(110)) / 0.1]
    torch.testing.assert_close(r.parts["negative"][::2], torch.tensor(by_group), **LOOSE)


@pytest.mark.parametrize("negatives", [1, 0], ids=["supervised", "unsupervised"])
def test_the_papers_repulsion_cancels(negatives):
    batch = random_batch(negatives=negatives)
    r = grace_reward(*batch, RewardConfig(form="paper"))
    groups = group_of(r, 4)
    without = advantages(r.parts["positive"] + r.parts["consistency"], groups)
    torch.testing.assert_close(advantages(r.total, groups), without, rtol=0, atol=2e-6)
    dead = ["negative", "hard"] if negatives else ["hard"]
    assert dead_parts(r.parts, groups) == dead


@pytest.mark.parametrize("negatives", [1, 0], ids=["supervised", "unsupervised"])
@pytest.mark.parametrize("form", ["document", "info_nce"])
def test_repaired_repulsion_reaches_the_advantage(form, negatives):
    r = grace_reward(*random_batch(negatives=negatives), RewardConfig(form=form))
    groups = group_of(r, 4)
    without = advantages(r.parts["positive"] + r.parts["consistency"], groups)
    assert (advantages(r.total, groups) - without).abs().max() > 0.1
    assert dead_parts(r.parts, groups) == []


def test_released_unsupervised_is_alive_and_supervised_is_not():
    batch = random_batch()
    r = grace_reward(*batch, RewardConfig(form="released"))
    assert dead_parts(r.parts, group_of(r, 4)) == ["negative", "hard"]
    rollouts, queries, _, finished = batch
    r = grace_reward(rollouts, queries, None, finished, RewardConfig(form="released"))
    assert dead_parts(r.parts, group_of(r, 4)) == []


def test_truncation_does_not_hide_a_dead_part():
    rollouts, queries, negatives, finished = random_batch()
    finished[:, 1] = False
    r = grace_reward(rollouts, queries, negatives, finished, RewardConfig(form="paper"))
    assert dead_parts(r.parts, group_of(r, 4)) == ["negative", "hard"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("truncation", ["relative", "flat"])
@pytest.mark.parametrize("form", FORMS)
def test_parts_add_up_to_the_total_exactly_in_any_order(form, truncation, dtype):
    rollouts, queries = torch.randn(16, 8, 32, dtype=dtype), torch.randn(16, 32, dtype=dtype)
    negatives = torch.randn(16, 1, 32, dtype=dtype)
    finished = torch.rand(16, 8) > 0.4
    finished[3] = False
    config = RewardConfig(form=form, truncation=truncation, truncation_penalty=0.3)
    r = grace_reward(rollouts, queries, negatives, finished, config)
    assert r.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    names = list(r.parts)
    for order in (names, names[::-1], names[2:] + names[:2]):
        summed = torch.zeros_like(r.total)
        for name in order:
            summed = summed + r.parts[name]
        assert torch.equal(summed, r.total)


def test_float64_keeps_its_precision():
    rollouts, queries = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(3, 8).double()
    finished = torch.ones(3, 2, dtype=torch.bool)
    r = grace_reward(rollouts, queries, None, finished, RewardConfig(hard_weight=0.2))
    wanted = contrastive_reward_ref(rollouts, queries, repulsion="document").total
    torch.testing.assert_close(r.total.view(3, 2), wanted, rtol=0, atol=1e-13)


def test_relative_truncation_is_below_the_group_whatever_the_level():
    rollouts, queries, negatives, finished = random_batch()
    finished[0, 1] = finished[0, 2] = False
    config = RewardConfig(truncation_penalty=0.5)
    free = grace_reward(rollouts, queries, negatives, torch.ones_like(finished), config)
    r = grace_reward(rollouts, queries, negatives, finished, config)
    lowest = min(free.total[0], free.total[3])
    torch.testing.assert_close(r.total[1:3], (lowest - 0.5).expand(2), rtol=0, atol=1e-5)
    assert torch.equal(r.total[finished.flatten()], free.total[finished.flatten()])


def test_a_penalty_that_nobody_pays_costs_no_precision():
    batch = random_batch()
    free, dear = (
        grace_reward(*batch, RewardConfig(truncation_penalty=gamma)) for gamma in (0.0, 1e9)
    )
    assert torch.equal(free.total, dear.total)


@pytest.mark.parametrize("gamma", [1.0, 1e4 / 3, 1e7 / 3])
def test_a_penalty_among_truncated_rows_keeps_the_sum_exact(gamma):
    rollouts, queries, negatives, finished = random_batch()
    finished[0, 1] = False
    r = grace_reward(rollouts, queries, negatives, finished, RewardConfig(truncation_penalty=gamma))
    for order in (list(r.parts), list(r.parts)[::-1]):
        summed = torch.zeros_like(r.total)
        for name in order:
            summed = summed + r.parts[name]
        assert torch.equal(summed, r.total)


@pytest.mark.parametrize("scale_rewards", ["none", "group"])
def test_a_group_without_a_finished_rollout_gives_no_signal(scale_rewards):
    rollouts, queries, negatives, finished = random_batch()
    finished[2] = False
    r = grace_reward(rollouts, queries, negatives, finished, RewardConfig())
    assert r.total[8:12].unique().numel() == 1
    lowest = r.total.view(6, 4)[[0, 1, 3, 4, 5]].min()
    torch.testing.assert_close(r.total[8], lowest - 1.0, rtol=0, atol=1e-5)
    advantage = advantages(r.total, group_of(r, 4), scale_rewards=scale_rewards)
    assert advantage[8:12].tolist() == [0.0] * 4
    assert r.counts == {"groups/all_truncated": 1.0}


def test_a_group_with_a_finished_rollout_is_not_counted_as_all_truncated():
    rollouts, queries, negatives, finished = random_batch()
    finished[1], finished[3, 0] = False, False
    r = grace_reward(rollouts, queries, negatives, finished, RewardConfig())
    assert r.counts == {"groups/all_truncated": 1.0}


@pytest.mark.parametrize("truncation", ["relative", "flat"])
def test_all_truncated(truncation):
    rollouts, queries, negatives, finished = random_batch()
    config = RewardConfig(truncation=truncation, truncation_penalty=2.0)
    r = grace_reward(rollouts, queries, negatives, torch.zeros_like(finished), config)
    assert r.total.tolist() == [-2.0] * 24
    assert r.counts == {"groups/all_truncated": 6.0}


@pytest.mark.parametrize(
    ("config", "pays"),
    [
        (RewardConfig(form="document", truncation="flat"), True),
        (RewardConfig(form="document", truncation="relative"), False),
    ],
    ids=["flat", "relative"],
)
def test_a_finished_reward_below_minus_one_makes_truncation_pay(config, pays):
    rollouts = torch.stack((at(100, 120), at(10, 20)))  # far from their queries
    finished = torch.tensor([[True, False], [True, True]])
    r = grace_reward(rollouts, at(0, 90), None, finished, config)
    assert r.total[0] < -1
    assert (advantages(r.total, torch.tensor([0, 0, 1, 1]))[1] > 0).item() is pays


def test_groups_of_the_same_text_do_not_repel():
    ids = torch.tensor([5, 5])
    r = grace_reward(ROLLOUTS, QUERIES, NEGATIVES, FINISHED, RewardConfig(), ids)
    assert r.parts["hard"].tolist() == [0.0] * 4
    assert not any(part.signbit()[part == 0].any() for part in r.parts.values())  # no -0 in logs


def test_a_group_of_one_has_no_consistency():
    r = grace_reward(ROLLOUTS[:, :1], QUERIES, None, FINISHED[:, :1], RewardConfig())
    assert r.parts["consistency"].tolist() == [0.0, 0.0]


def test_no_groups():
    r = grace_reward(ROLLOUTS[:0], QUERIES[:0], None, FINISHED[:0], RewardConfig())
    assert r.total.shape == (0,)
    assert all(part.shape == (0,) for part in r.parts.values())


def test_default_hard_weight_is_the_one_that_works():
    assert RewardConfig().hard_weight_for(supervised=True) == 0.2
    assert RewardConfig().hard_weight_for(supervised=False) == 1.0
    assert RewardConfig(form="released").hard_weight_for(supervised=False) == 0.2
    assert RewardConfig(hard_weight=0.0).hard_weight_for(supervised=False) == 0.0


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            0,
            r"rollout_emb must be finite, .* in 2 of 4 rows, \(group, rollout\) \(0, 1\), \(1, 0\)",
        ),
        (1, r"query_emb must be finite, .* in 2 of 2 rows, group 0, 1"),
        (2, r"negative_emb must be finite, .* in 2 of 2 rows, \(group, negative\) \(0, 0\), \(1"),
    ],
)
def test_non_finite_embeddings_are_named(which, message):
    tensors = [ROLLOUTS.clone(), QUERIES.clone(), NEGATIVES.clone()]
    rollouts, queries, negatives = tensors
    rows = tensors[which].view(-1, 2)
    rows[1 if which == 0 else 0, 0] = torch.nan
    rows[2 if which == 0 else 1, 1] = torch.inf
    with pytest.raises(ValueError, match=message):
        grace_reward(rollouts, queries, negatives, FINISHED, RewardConfig())


def test_infinity_alone_is_not_finite_and_eight_rows_are_named():
    rollouts, queries, _, finished = random_batch(groups=3, hidden=8)
    rollouts[:, 1:] = torch.inf
    with pytest.raises(ValueError, match=r"in 9 of 12 rows, .* \(2, 1\), \(2, 2\), \.\.\.$"):
        grace_reward(rollouts, queries, None, finished, RewardConfig())
    rollouts[2, 3] = 0.0
    with pytest.raises(ValueError, match=r"in 8 of 12 rows, .* \(2, 1\), \(2, 2\)$"):
        grace_reward(rollouts, queries, None, finished, RewardConfig())


@pytest.mark.wrong_types
def test_finished_must_fit():
    with pytest.raises(ValueError, match=r"finished must be bool \[2, 2\] .* \[2, 1\]"):
        grace_reward(ROLLOUTS, QUERIES, None, FINISHED[:, :1], RewardConfig())
    with pytest.raises(ValueError, match=r"finished must be bool .*got torch.float32"):
        grace_reward(ROLLOUTS, QUERIES, None, FINISHED.float(), RewardConfig())


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"form": "R1"}, "form must be one of"),
        ({"truncation": "none"}, "truncation must be one of"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be finite and > 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and > 0, got inf"),
        ({"negative_weight": -1.0}, "negative_weight must be finite and >= 0, got -1.0"),
        ({"consistency_weight": -0.1}, "consistency_weight must be finite and >= 0, got -0.1"),
        ({"hard_weight": math.inf}, "hard_weight must be finite"),
        ({"truncation_penalty": math.nan}, "truncation_penalty must be finite"),
        ({"form": "info_nce", "hard_weight": 0.2}, "info_nce' has no hard_weight"),
        ({"form": "info_nce", "negative_weight": 0.5}, "no negative_weight"),
    ],
)
def test_bad_config(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**kwargs)

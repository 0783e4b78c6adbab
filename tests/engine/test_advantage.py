"""Estimators against numbers worked out by hand, and the detector of rewards that cancel."""

import pytest
import torch

from tercet.engine.advantage import advantages, dead_parts, flat_groups, group_spread
from tercet.kernels.reference import contrastive_reward_ref

# Two groups of three, rows interleaved: group 7 earns 1, 2, 3 and group 4 earns 2, 2, 5.
REWARDS = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0, 5.0])
GROUPS = torch.tensor([7, 4, 7, 4, 7, 4])
EPS = 1e-4

GOLDEN = {
    ("grpo", "none"): [-1.0, -1.0, 0.0, -1.0, 1.0, 2.0],  # means 2 and 3
    ("grpo", "group"): [  # standard deviations 1 and sqrt(3)
        -1 / (1 + EPS),
        -1 / (3**0.5 + EPS),
        0.0,
        -1 / (3**0.5 + EPS),
        1 / (1 + EPS),
        2 / (3**0.5 + EPS),
    ],
    # batch mean 2.5, squared deviations 2.25 + 4 * 0.25 + 6.25 = 9.5, variance 9.5 / 5
    ("grpo", "batch"): [x / (1.9**0.5 + EPS) for x in (-1, -1, 0, -1, 1, 2)],
    ("rloo", "none"): [-1.5, -1.5, 0.0, -1.5, 1.5, 3.0],  # others: 2.5 3.5 2 3.5 1.5 2
    ("reinforce++", "none"): [x / (1.9**0.5 + EPS) for x in (-1.5, -0.5, -0.5, -0.5, 0.5, 2.5)],
    ("dapo", "none"): [-0.99990, -0.57732, 0.0, -0.57732, 0.99990, 1.15463],
}


@pytest.mark.parametrize(("estimator", "scale"), GOLDEN, ids=str)
def test_golden_numbers(estimator, scale):
    out = advantages(REWARDS, GROUPS, estimator=estimator, scale_rewards=scale)
    torch.testing.assert_close(out, torch.tensor(GOLDEN[estimator, scale]), rtol=1e-5, atol=1e-5)
    assert out.dtype == torch.float32


def test_remax_subtracts_the_greedy_reward():
    greedy = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    out = advantages(REWARDS, GROUPS, estimator="remax", baseline=greedy)
    assert out.tolist() == [-1.0, 1.0, 0.0, 1.0, 1.0, 4.0]


def test_grace_golden_advantages():
    """Group mean removed from the golden rewards of the GRACE paper's formula."""
    rewards = torch.tensor([7.45586, 8.64369, 4.75769, 3.16850])
    out = advantages(rewards, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(
        out, torch.tensor([-0.593915, 0.593915, 0.794595, -0.794595]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "dapo"])
def test_a_shared_constant_is_cancelled_exactly(estimator):
    rewards = torch.tensor([0.1] * 7 + [1e6 / 3] * 7)
    assert rewards[:7].sum() / 7 != rewards[0]  # in float32 it would not be
    out = advantages(rewards, torch.tensor([0] * 7 + [1] * 7), estimator=estimator)
    assert out.tolist() == [0.0] * 14


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "dapo"])
def test_group_of_one_is_refused(estimator):
    with pytest.raises(ValueError, match=r"every group needs >= 2 rollouts .* group of 1; raise"):
        advantages(torch.ones(3), torch.tensor([0, 0, 1]), estimator=estimator)


def test_group_of_one_is_fine_without_a_group_baseline():
    rewards, groups = torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
    out = advantages(rewards, groups, estimator="reinforce++")
    torch.testing.assert_close(out, torch.tensor([-1.0, 1.0]) / (2**0.5 + EPS))
    assert advantages(rewards, groups, estimator="remax", baseline=rewards).tolist() == [0.0, 0.0]
    assert advantages(rewards[:1], groups[:1], estimator="reinforce++").tolist() == [0.0]


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"estimator": "ppo"}, "estimator must be one of"),
        ({"scale_rewards": "std"}, "scale_rewards must be one of"),
        ({"estimator": "remax"}, "baseline must be given for 'remax'"),
        ({"baseline": REWARDS}, "baseline must be given for 'remax' and only"),
        ({"estimator": "remax", "baseline": REWARDS[:2]}, r"baseline must be \(6,\)"),
        (
            {"estimator": "dapo", "scale_rewards": "batch"},
            "'none' or 'group' under 'dapo', got 'batch'",
        ),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        advantages(REWARDS, GROUPS, **kwargs)


@pytest.mark.wrong_types
@pytest.mark.parametrize("shape", [(0,), (2, 3), (5,)], ids=str)
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match="must both be"):
        advantages(torch.ones(shape), GROUPS)


@pytest.mark.wrong_types
@pytest.mark.parametrize("shape", [(0,), (2, 3)], ids=str)
def test_bad_shapes_that_agree(shape):
    with pytest.raises(ValueError, match="must both be"):
        advantages(torch.ones(shape), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(("estimator", "scale"), [("dapo", "group"), ("reinforce++", "batch")])
def test_an_estimators_own_scale_may_be_named(estimator, scale):
    named = advantages(REWARDS, GROUPS, estimator=estimator, scale_rewards=scale)
    assert torch.equal(named, advantages(REWARDS, GROUPS, estimator=estimator))


def test_flat_groups_marks_every_row_of_them():
    rewards = torch.tensor([1.0, 0.5, 1.0, 0.5, 1.0, 0.6])
    assert flat_groups(rewards, GROUPS).tolist() == [True, False, True, False, True, False]


def test_group_spread_is_the_mean_of_group_deviations():
    assert group_spread(REWARDS, GROUPS) == pytest.approx((1 + 3**0.5) / 2)
    assert group_spread(torch.tensor([5.0, 9.0]), torch.tensor([0, 1])) == 0.0


def test_grace_query_side_terms_are_found_dead_and_document_side_ones_are_not():
    d, q, n = torch.randn(6, 4, 32), torch.randn(6, 32), torch.randn(6, 2, 32)
    groups = torch.arange(6).repeat_interleave(4)

    def parts(repulsion):
        r = contrastive_reward_ref(d, q, n, repulsion=repulsion)
        names = ("positive", "negative", "consistency", "hard")
        return {name: getattr(r, name).flatten() for name in names}

    assert dead_parts(parts("query"), groups) == ["negative", "hard"]
    assert dead_parts(parts("document"), groups) == []


def test_dead_parts_allows_rounding_but_not_a_single_live_group():
    groups = torch.tensor([0, 0, 1, 1])
    noise = torch.tensor([1.0, 1.0 + 1e-6, 3.0, 3.0])
    live = torch.tensor([1.0, 1.0, 3.0, 3.1])
    assert dead_parts({"noise": noise, "live": live}, groups) == ["noise"]
    assert dead_parts({"noise": noise}, groups, tol=1e-8) == []
    large, small = 1e4 * noise, 1e-6 * live  # the tolerance is relative to the part itself
    assert dead_parts({"large": large, "small": small}, groups) == ["large"]


def test_a_part_that_pays_nothing_is_not_dead():
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    weight_zero = torch.zeros(6)
    one_group_all_truncated = torch.tensor([-1.0, -1.0, 0, 0, 0, 0])
    assert dead_parts({"a": weight_zero, "b": one_group_all_truncated}, groups) == []
    assert dead_parts({"b": one_group_all_truncated - 1}, groups) == ["b"]


@pytest.mark.parametrize(("num_paid", "dead"), [(2, []), (3, ["a"]), (4, ["a"])])
def test_a_dead_part_is_paid_in_most_groups(num_paid, dead):
    part = torch.tensor([1.0] * 2 * num_paid + [0.0] * (8 - 2 * num_paid))
    assert dead_parts({"a": part}, torch.arange(4).repeat_interleave(2)) == dead


def test_dead_parts_needs_groups():
    assert dead_parts({"a": torch.ones(2)}, torch.tensor([0, 1])) == []

"""Rewards and backups through their binding, bit for bit against a plain Python oracle."""

import doctest
import math
import random
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tercet import (
    RewardConfig,
    RewardForm,
    _mcts,  # pyright: ignore[reportMissingModuleSource]
    rollout_reward,
    rollout_rewards,
)
from tercet._mcts import Aggregation, Channel  # pyright: ignore[reportMissingModuleSource]

ROOT = Path(__file__).parents[2]
AGGREGATIONS = ["sum", "mean", "max", "min", "product", "last"]
oracle = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("oracle.py"))))


def bits(*numbers: float) -> list[int]:
    return np.array(numbers, dtype=np.float64).view(np.int64).tolist()


def score(rng: random.Random) -> float:
    """Mostly a verdict, now and then a confidence."""
    return rng.choice([-1.0, 0.0, 1.0]) if rng.random() < 0.7 else rng.uniform(-1, 1)


def random_config(rng: random.Random) -> tuple[RewardConfig, dict]:
    released = rng.random() < 0.5
    beta, decay = (1.0, 1.0) if released else (rng.uniform(0, 3), rng.choice([0, 1, rng.random()]))
    truncated, add_start = score(rng), rng.random() < 0.5
    config = RewardConfig(
        form=RewardForm.released if released else RewardForm.paper,
        outcome_weight=beta,
        step_decay=decay,
        truncated_outcome=truncated,
        add_start_verdict=add_start,
    )
    form = "released" if released else "paper"
    return config, {
        "form": form, "beta": beta, "decay": decay, "truncated": truncated, "add_start": add_start
    }  # fmt: skip


def random_rollout(rng: random.Random) -> tuple[list[float], float | None, float]:
    verdicts = [score(rng) for _ in range(rng.choice([0, 1, 2, 3, 5, 9, 40]))]
    return verdicts, None if rng.random() < 0.2 else score(rng), score(rng)


def as_arrays(rollouts):
    flat = np.array([v for verdicts, _, _ in rollouts for v in verdicts], dtype=np.float64)
    offsets = np.cumsum([0, *(len(verdicts) for verdicts, _, _ in rollouts)], dtype=np.int64)
    outcomes = np.array([math.nan if outcome is None else outcome for _, outcome, _ in rollouts])
    return flat, offsets, outcomes, np.array([start for _, _, start in rollouts])


def test_twenty_thousand_rollouts_equal_the_oracle():
    rng = random.Random(0)
    for _ in range(100):
        config, words = random_config(rng)
        rollouts = [random_rollout(rng) for _ in range(200)]
        flat, offsets, outcomes, starts = as_arrays(rollouts)
        rewards = rollout_rewards(flat, offsets, outcomes, start_verdicts=starts, config=config)
        for ours, (verdicts, outcome, start) in zip(rewards, rollouts, strict=True):
            expected = oracle.rollout_reward(verdicts, outcome, start, **words)
            assert bits(*ours) == bits(*expected), (verdicts, outcome, start, words)
            one = rollout_reward(verdicts, outcome, start_verdict=start, config=config)
            assert bits(one.step, one.outcome, one.start, one.total) == bits(*expected)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_twenty_thousand_backups_equal_the_oracle(how):
    rng, aggregation = random.Random(1), getattr(Aggregation, how)
    for _ in range(3500):
        scores = [rng.choice([score(rng), rng.gauss(0, 3)]) for _ in range(rng.randint(1, 12))]
        gamma, distance = rng.choice([0.0, 0.9, 1.0, rng.random()]), rng.randint(0, 12)
        visits = [rng.choice([0, 0, rng.randint(0, 50)]) for _ in scores]
        held = plain = _mcts.identity(aggregation)
        assert bits(held) == bits(oracle.identity(how))
        for value in scores:
            held, plain = (
                _mcts.absorbed(held, value, aggregation),
                oracle.absorbed(plain, value, how),
            )
        ours = [
            held,
            _mcts.value_of(held, len(scores), aggregation),
            _mcts.path_return(scores, aggregation),
            _mcts.decayed(scores[0], gamma, distance),
            _mcts.mixed(scores[0], scores[-1], gamma),
            _mcts.visit_weighted_mean(scores, visits, 0.3),
        ]
        expected = [
            plain,
            oracle.value_of(plain, len(scores), how),
            oracle.path_return(scores, how),
            oracle.decayed(scores[0], gamma, distance),
            oracle.mixed(scores[0], scores[-1], gamma),
            oracle.visit_weighted_mean(scores, visits, 0.3),
        ]
        assert bits(*ours) == bits(*expected), (scores, gamma, distance, visits)


def test_channels_go_up_a_path_as_each_would_alone():
    rng = random.Random(2)
    for _ in range(300):
        hows = [rng.choice(AGGREGATIONS) for _ in range(rng.randint(0, 4))]
        gammas = [rng.choice([0.9, 1.0, rng.random()]) for _ in hows]
        channels = [
            Channel(getattr(Aggregation, how), gamma=gamma)
            for how, gamma in zip(hows, gammas, strict=True)
        ]
        start = values = [rng.gauss(0, 1) for _ in hows]
        for distance in range(6):
            held = [rng.gauss(0, 1) for _ in hows]
            after, values = _mcts.backup_node(held, values, channels)
            arrived = [oracle.decayed(v, g, distance) for v, g in zip(start, gammas, strict=True)]
            assert bits(*after) == bits(*map(oracle.absorbed, held, arrived, hows))


def test_rewards_are_fields_of_one_record():
    rewards = rollout_rewards(
        np.array([1.0, 1.0, -1.0]), np.array([0, 2, 3]), np.array([1.0, np.nan])
    )
    assert rewards.dtype.names == ("step", "outcome", "start", "total")
    np.testing.assert_array_equal(rewards["total"], [2.0, -1.0])
    assert len(rollout_rewards(np.zeros(0), np.zeros(1, np.int64), np.zeros(0))) == 0


def test_a_form_comes_with_its_published_settings():
    paper, released = RewardConfig(), RewardConfig(form=RewardForm.released)
    assert (paper.form, paper.truncated_outcome, paper.add_start_verdict) == (
        RewardForm.paper, 0.0, True,
    )  # fmt: skip
    assert (released.truncated_outcome, released.add_start_verdict) == (-1.0, False)
    changed = RewardConfig(form=RewardForm.released, truncated_outcome=0, add_start_verdict=True)
    assert (changed.truncated_outcome, changed.add_start_verdict) == (0.0, True)
    assert repr(RewardConfig(outcome_weight=0.5, step_decay=0.25)) == (
        "RewardConfig(form=RewardForm.paper, outcome_weight=0.5, step_decay=0.25, "
        "truncated_outcome=0.0, add_start_verdict=True)"
    )


def test_the_page_shows_what_the_code_computes():
    page = ROOT / "docs" / "search_core.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried >= 8
    assert failed == 0


ONE, OFFSETS = np.array([1.0]), np.array([0, 1])
NARROW: Any = ONE.astype(np.float32), OFFSETS.astype(np.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rollout_rewards(np.array([1]), OFFSETS, ONE), TypeError,
         "verdicts must be float64, got int64"),
        (lambda: rollout_rewards(ONE, NARROW[1], ONE), TypeError,
         "offsets must be int64, got int32"),
        (lambda: rollout_rewards(ONE, OFFSETS, NARROW[0]), TypeError,
         "outcomes must be float64, got float32"),
        (lambda: rollout_rewards(ONE, OFFSETS, ONE, start_verdicts=np.array([1])), TypeError,
         "start_verdicts must be float64, got int64"),
        (lambda: rollout_rewards(ONE[None], OFFSETS, ONE), ValueError,
         r"verdicts must be one-dimensional, got shape \(1, 1\)"),
        (lambda: rollout_rewards(ONE, np.array([0, 0, 1]), np.ones(4)[::2]), ValueError,
         r"outcomes must be contiguous.*; call numpy"),
        (lambda: rollout_rewards(ONE, np.array([0, 2]), ONE), ValueError,
         "offsets must run from 0 to 1, got 0 to 2"),
        (lambda: rollout_rewards(ONE, np.array([0, 2, 1]), np.ones(2)), ValueError,
         r"offsets\[2\] must be >= the one before, got 1 after 2"),
        (lambda: rollout_rewards(ONE, OFFSETS, np.ones(3)), ValueError,
         "outcomes and rollouts must have equal lengths, got 3 and 1"),
        (lambda: rollout_rewards(ONE * 2, OFFSETS, ONE), ValueError,
         r"rollout_rewards: verdicts\[0\] must be in \[-1, 1\], got 2"),
        (lambda: rollout_rewards(ONE, OFFSETS, -ONE * 1.5), ValueError,
         r"outcomes\[0\] must be in \[-1, 1\] or NaN, got -1.5"),
        (lambda: rollout_rewards(ONE, OFFSETS, ONE, start_verdicts=ONE * math.nan), ValueError,
         r"start_verdicts\[0\] must be in \[-1, 1\], got nan"),
        (lambda: rollout_reward([0.0, 1.1], 1.0), ValueError,
         r"rollout_reward: verdicts\[1\] must be in \[-1, 1\], got 1.1"),
        (lambda: rollout_reward([], math.nan), ValueError,
         r"outcome must be in \[-1, 1\], got nan"),
        (lambda: RewardConfig(outcome_weight=-1), ValueError,
         "RewardConfig: outcome_weight must be finite and >= 0, got -1"),
        (lambda: RewardConfig(form=RewardForm.released, step_decay=0.5), ValueError,
         "released form has weights of its own.*got 1 and 0.5"),
        (lambda: _mcts.value_of(0.0, 0, Aggregation.mean), ValueError,
         "value_of: returns must be >= 1, got 0"),
        (lambda: _mcts.backup_node([0.0], [math.inf], [Channel()]), ValueError,
         r"backup_node: values\[0\] must be finite, got inf"),
        (lambda: _mcts.decayed(1.0, 0.9, -1), TypeError, "incompatible function arguments"),
    ],
)  # fmt: skip
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()

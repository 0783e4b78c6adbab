"""Seeds of requests, greedy baselines, and how groups are dealt to mini-batches."""

import pytest

from tercet.engine.records import Completion, Request, Rollouts, SamplingParams
from tercet.engine.rollout import (
    deal_groups,
    groups_of,
    request_seed,
    split_greedy,
    with_greedy,
    with_seeds,
)


def request(group, *, role="rollout", seed=None, temperature=1.0) -> Request:
    params = SamplingParams(temperature=temperature, seed=seed)
    return Request(prompt_ids=[group + 1], params=params, group=group, role=role)


def completion(token) -> Completion:
    return Completion(ids=[token], logp=[-1.0], finished=True)


def test_seeds_depend_on_seed_step_and_place_alone():
    seeds = {request_seed(s, t, i) for s in range(5) for t in range(20) for i in range(20)}
    assert len(seeds) == 5 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 1, 2) == 8580478171319284319  # pinned: old runs can be repeated


def test_a_request_keeps_a_seed_of_its_own():
    out = with_seeds([request(0), request(0, seed=7), request(0)], 3, 4)
    assert [r.params.seed for r in out] == [request_seed(3, 4, 0), 7, request_seed(3, 4, 2)]


def test_greedy_baselines_are_added_once_per_group_and_put_in_place():
    requests = [
        request(0),
        request(0),
        request(0, role="query", temperature=0.5),
        request(1),
        request(1),
    ]
    asked = with_greedy(requests)
    assert asked[:5] == requests
    assert [(r.group, r.role, r.params.temperature) for r in asked[5:]] == [
        (0, "baseline", 0.0),
        (1, "baseline", 0.0),
    ]
    answers = [completion(token) for token in range(10, 17)]
    sampled, greedy = split_greedy(Rollouts(requests=asked, completions=answers))
    assert sampled.requests == greedy.requests == requests
    assert [c.ids[0] for c in sampled.completions] == [10, 11, 12, 13, 14]
    assert [c.ids[0] for c in greedy.completions] == [15, 15, 12, 16, 16]


def test_a_greedy_baseline_answers_the_rollouts_prompt():
    query = Request(prompt_ids=[9], params=SamplingParams(), group=0, role="query")
    assert with_greedy([query, request(0)])[-1].prompt_ids == request(0).prompt_ids


def test_rollouts_without_baselines_stay_as_they_are():
    rollouts = Rollouts(requests=[request(0)], completions=[completion(3)])
    assert split_greedy(rollouts) == (rollouts, rollouts)


def test_groups_of_the_rollout_rows():
    requests = [request(4), request(9, role="query"), request(2)]
    rollouts = Rollouts(requests=requests, completions=[completion(1)] * 3)
    assert groups_of(rollouts).tolist() == [4, 2]


@pytest.mark.parametrize(
    ("mini_batches", "expected"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6]]),
        (2, [[0, 1, 2, 3, 6], [4, 5]]),  # groups 5 and 3, and group 8; row 6 belongs to 5
        (3, [[0, 1, 6], [2, 3], [4, 5]]),
    ],
)
def test_groups_stay_whole_and_in_order(mini_batches, expected):
    assert deal_groups([5, 5, 3, 3, 8, 8, 5], mini_batches) == expected


def test_more_mini_batches_than_groups():
    with pytest.raises(
        ValueError, match="mini_batches must be at most the number of groups, got 4"
    ):
        deal_groups([0, 0, 1, 1, 2, 2], 4)

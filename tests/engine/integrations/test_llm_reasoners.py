"""Callbacks of llm-reasoners on Tercet's core; they derive from the library's if it is there."""

import importlib
import importlib.util
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tercet import tree_to_svg
from tercet.engine.integrations.llm_reasoners import MCTS

library = importlib.import_module("reasoners") if importlib.util.find_spec("reasoners") else None
WorldModel: Any = getattr(library, "WorldModel", object)
SearchConfig: Any = getattr(library, "SearchConfig", object)
TARGET = 11


class Numbers(WorldModel):
    """From 1 by doubling, adding three or subtracting one to a target; counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def init_state(self):
        return (1,)

    def step(self, state, action):
        self.calls[state, action] += 1
        last = state[-1]
        reached = {"double": 2 * last, "add": last + 3, "subtract": last - 1}[action]
        return (*state, reached), {"reached": reached}

    def is_terminal(self, state):
        return state[-1] == TARGET


class Steps(SearchConfig):
    """Fast reward: a guess from the action; reward: -1 a step, and 10 at the target."""

    def __init__(self, reward=None):
        super().__init__()
        self.given = []
        self.own_reward = reward

    def get_actions(self, state):
        assert len(state) <= 6  # never beyond the depth limit
        return [] if state[-1] > 40 else ["subtract", "add", "double"]

    def fast_reward(self, state, action):
        return {"double": 0.9, "add": 0.5, "subtract": 0.1}[action], {"guess": action}

    def reward(self, state, action, *, guess, reached):
        self.given.append((state, action, guess, reached))
        if self.own_reward is not None:
            return self.own_reward, {}
        return (9.0 if reached == TARGET else -1.0), {"reached": reached}


def test_finds_the_best_trace_in_the_shape_of_the_library():
    result = MCTS(n_iters=200, depth_limit=6, w_exp=3.0)(Numbers(), Steps())
    assert result.trace is not None
    states, actions = result.trace
    assert result.terminal_state == states[-1]
    assert actions == ["add", "double", "add"]
    assert states == [(1,), (1, 4), (1, 4, 8), (1, 4, 8, 11)]
    assert result.cum_reward == 7.0
    nodes = result.trace_of_nodes
    assert nodes is not None
    assert [node.state for node in nodes] == states
    assert [node.action for node in nodes[1:]] == actions
    assert [node.depth for node in nodes] == [0, 1, 2, 3]
    assert nodes[0] is result.tree_state
    assert nodes[-1].is_terminal
    assert [node.reward for node in nodes] == [0, -1, -1, 9]
    assert nodes[-1].reward_details == {"reached": TARGET}
    assert result[5:8] == (None, None, None)
    names = result._fields[:8]
    assert names == (
        "terminal_state", "cum_reward", "trace", "trace_of_nodes", "tree_state",
        "trace_in_each_iter", "tree_state_after_each_iter", "aggregated_result",
    )  # fmt: skip


def test_each_node_is_entered_once_and_callbacks_get_their_details():
    world, config = Numbers(), Steps()
    root = MCTS(n_iters=300, depth_limit=5, w_exp=30.0)(world, config).tree_state
    entered, stack = 0, [root]
    while stack:
        children = stack.pop().children
        entered += children is not None
        stack += children or []
    assert entered > 100
    assert world.calls.total() == len(config.given) == entered - 1
    for state, action, guess, reached in config.given:
        assert guess == action
        assert reached == world.step(state, action)[0][-1]


def test_nodes_have_the_numbers_of_the_search():
    result = MCTS(n_iters=60, depth_limit=4)(Numbers(), Steps())
    root, found = result.tree_state, result.search
    assert root.visits == 60
    assert found.values.tolist()[0] == root.Q
    children = {child.action: child for child in root.children or []}
    assert list(children) == ["subtract", "add", "double"]  # as get_actions named them
    assert sum(child.visits for child in children.values()) == 59
    assert [node.action for node in found.states[1:4]] == ["double", "add", "subtract"]
    unvisited = [node for node in found.states if not node.visits]
    assert unvisited
    assert all(node.fast_reward == node.Q for node in unvisited)
    labels = [node.action for node in found.states]
    assert "double" in tree_to_svg(found.columns, labels)


def test_a_value_is_the_cumulative_reward_of_its_rollout():
    result = MCTS(n_iters=1, depth_limit=6)(Numbers(), Steps())  # 1 2 4 8 16 32 64
    assert result.tree_state.Q == -6.0
    assert result.terminal_state is None
    assert result.trace is None
    assert result.trace_of_nodes is None
    assert result.cum_reward == -math.inf
    mean = MCTS(n_iters=1, depth_limit=6, cum_reward=np.mean)(Numbers(), Steps())
    assert mean.tree_state.Q == -1.0


def walk(node):
    """The nodes that were stepped into, while there is one below the other."""
    entered = [node]
    while below := [child for child in entered[-1].children if child.children is not None]:
        assert len(below) == 1
        entered += below
    return entered


def test_a_rollout_goes_where_it_is_told():
    last = MCTS(n_iters=1, depth_limit=3, simulate_strategy=lambda rewards: len(rewards) - 1)
    nodes = last(Numbers(), Steps()).tree_state
    assert [node.state for node in walk(nodes)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)]
    first = MCTS(n_iters=1, depth_limit=3, simulate_strategy=lambda _: 0)
    nodes = first(Numbers(), Steps()).tree_state
    assert [node.state for node in walk(nodes)] == [(1,), (1, 0), (1, 0, -1), (1, 0, -1, -2)]


def test_random_rollouts_repeat_with_their_seed():
    def entered(seed):
        world = Numbers()
        MCTS(n_iters=20, depth_limit=6, simulate_strategy="random", seed=seed)(world, Steps())
        return list(world.calls)

    assert entered(1) == entered(1)
    assert entered(1) != entered(2)


def test_the_most_visited_end_and_one_answer_from_the_tree():
    seen = []

    def aggregate(root):
        seen.append(root)
        return "answer"

    result = MCTS(
        n_iters=300, depth_limit=6, w_exp=30.0, output_strategy="max_visit", aggregator=aggregate
    )(Numbers(), Steps())
    ends = [node for node in result.search.states if node.is_terminal]
    assert len(ends) > 1
    assert result.trace_of_nodes is not None
    assert result.trace_of_nodes[-1].visits == max(node.visits for node in ends) > 1
    assert seen == [result.tree_state]
    assert result.aggregated_result == "answer"


def test_an_end_that_only_a_rollout_saw_counts_for_the_reward_and_not_for_visits():
    def toward(rewards):  # 1 -> 4 -> 8 -> 11
        return next(plan)

    plan = iter([1, 2, 1])
    result = MCTS(n_iters=1, depth_limit=6, simulate_strategy=toward)(Numbers(), Steps())
    assert result.terminal_state == (1, 4, 8, 11)
    plan = iter([1, 2, 1])
    mcts = MCTS(n_iters=1, simulate_strategy=toward, output_strategy="max_visit")
    assert mcts(Numbers(), Steps()).terminal_state is None


def test_of_equal_ends_the_one_of_the_first_actions_is_given():
    class Config(Steps):
        def get_actions(self, state):
            return ["double", "add", "subtract"] if len(state) < 3 else []

    class Flat(Numbers):
        def is_terminal(self, state):
            return len(state) == 3

    result = MCTS(n_iters=30, w_exp=30.0)(Flat(), Config(reward=1.0))
    assert sum(node.is_terminal for node in result.search.states) > 3
    assert result.trace is not None
    assert result.trace[1] == ["double", "double"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"uct_with_fast_reward": True}, "uct_with_fast_reward must be False"),
        ({"output_strategy": "follow_max"}, "max_reward or max_visit, got 'follow_max'"),
        ({"simulate_strategy": "sample"}, "max, random or a function .* got 'sample'"),
    ],
)
@pytest.mark.wrong_types
def test_what_it_cannot_honour_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        MCTS(**settings)


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        MCTS(n_iters=5)(Numbers(), Steps(reward=math.nan))

    class NoGuess(Steps):
        def fast_reward(self, state, action):
            return math.nan if action == "add" else 0.5, {"guess": action}

    with pytest.raises(ValueError, match="fast_reward must be a number, got nan for add"):
        MCTS(n_iters=5)(Numbers(), NoGuess())


def test_the_same_best_trace_as_exhaustive_search():
    def worth(text):
        return random.Random(text).random()

    class Walk(WorldModel):
        def init_state(self):
            return ""

        def step(self, state, action):
            return state + action, {}

        def is_terminal(self, state):
            return len(state) == 4

    class Config(SearchConfig):
        def get_actions(self, state):
            return ["a", "b", "c"]

        def fast_reward(self, state, action):
            return 0.0, {}

        def reward(self, state, action, **_):
            return worth(state + action), {}

    result = MCTS(n_iters=2000, w_exp=2.0)(Walk(), Config())
    texts = [""]
    for _ in range(4):
        texts = [text + action for text in texts for action in "abc"]
    totals = {text: sum(worth(text[: i + 1]) for i in range(4)) for text in texts}
    assert result.terminal_state == max(totals, key=totals.__getitem__)

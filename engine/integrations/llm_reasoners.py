"""MCTS for a WorldModel and a SearchConfig that were written for llm-reasoners.

`MCTS` stands where `reasoners.algorithm.MCTS` stood, called with both or given to `Reasoner`; the
library itself is not needed.  Departs from it:

- A rollout is an evaluation: its nodes are kept, so that nothing is asked twice, but count a visit
  only when the tree reaches them.  There, each iteration puts its whole rollout into the tree.
- What goes up is the cumulative reward of the whole path; there, of the part from each node on.
  With `sum` the children of a node differ by the same amount.  `Q` is the mean (their `calc_q`).
- Actions are tried in the order of their fast reward, as there with `uct_with_fast_reward=False`.
- At the depth limit `get_actions` is not called any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from tercet import SearchResult, search

State = TypeVar("State")
Action = TypeVar("Action")
StateIn = TypeVar("StateIn", contravariant=True)  # where only a protocol's arguments have it
ActionIn = TypeVar("ActionIn", contravariant=True)
Choice = Callable[[Sequence[float]], int]


@runtime_checkable
class WorldModel(Protocol[State, ActionIn]):
    """What a step leads to."""

    def init_state(self) -> State: ...
    def step(self, state: State, action: ActionIn) -> tuple[State, Mapping[str, Any]]: ...
    def is_terminal(self, state: State) -> bool: ...


@runtime_checkable
class SearchConfig(Protocol[StateIn, Action]):
    """Which steps there are, and what they are worth."""

    def get_actions(self, state: StateIn) -> Sequence[Action]: ...
    def fast_reward(self, state: StateIn, action: Action) -> tuple[float, Mapping[str, Any]]: ...
    def reward(
        self, state: StateIn, action: Action, **details: Any
    ) -> tuple[float, Mapping[str, Any]]: ...


@dataclass(eq=False, slots=True)
class MCTSNode(Generic[State, Action]):
    """A node under the names of llm-reasoners; no `state` and `children` until it is entered."""

    id: int
    action: Action | None
    parent: MCTSNode[State, Action] | None = field(repr=False)
    fast_reward: float = 0.0
    fast_reward_details: Mapping[str, Any] = field(default_factory=dict)
    state: State | None = None
    reward: float = 0.0  # of the step that led here
    reward_details: Mapping[str, Any] = field(default_factory=dict)
    is_terminal: bool = False
    children: list[MCTSNode[State, Action]] | None = field(default=None, repr=False)
    depth: int = 0
    visits: int = 0
    Q: float = 0.0  # mean cumulative reward; before any visit, the fast reward

    @property
    def path(self) -> list[MCTSNode[State, Action]]:
        """From the root to this node."""
        nodes: list[MCTSNode[State, Action]] = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[::-1]


class MCTSResult(NamedTuple):
    """Fields of llm-reasoners in its order, and the search behind them."""

    terminal_state: Any  # None, as both traces, where no terminal state was found
    cum_reward: float  # then -inf
    trace: tuple[list[Any], list[Any]] | None  # states, and the actions between them
    trace_of_nodes: list[MCTSNode[Any, Any]] | None
    tree_state: MCTSNode[Any, Any]  # the root
    trace_in_each_iter: None
    tree_state_after_each_iter: None
    aggregated_result: Hashable | None
    search: SearchResult[MCTSNode[Any, Any]]


class MCTS(Generic[State, Action]):
    """UCT over the actions of a search configuration.

    Args:
        w_exp: weight of exploration, `c_uct` of `Forest`.
        depth_limit: steps after which a path ends.
        n_iters: simulations.
        cum_reward: of the rewards of a path's steps.
        simulate_strategy: which child a rollout takes, by their fast rewards: the highest, any, or
            what a function says.
        output_strategy: the terminal state with the highest cumulative reward, or with most visits.
        uct_with_fast_reward: must be False; see above.
        aggregator: one answer from the whole tree, as `MCTSAggregation` of llm-reasoners gives it.
        seed: of random rollouts.

    Raises:
        ValueError: a setting that is not one of these.
    """

    def __init__(
        self,
        *,
        w_exp: float = 1.0,
        depth_limit: int = 5,
        n_iters: int = 10,
        cum_reward: Callable[[list[float]], float] = sum,
        simulate_strategy: Literal["max", "random"] | Choice = "max",
        output_strategy: Literal["max_reward", "max_visit"] = "max_reward",
        uct_with_fast_reward: bool = False,
        aggregator: Callable[[MCTSNode[State, Action]], Hashable | None] | None = None,
        seed: int = 0,
    ) -> None:
        if output_strategy not in ("max_reward", "max_visit"):
            raise ValueError(
                f"MCTS: output_strategy must be max_reward or max_visit, got {output_strategy!r}"
            )
        if uct_with_fast_reward:
            raise ValueError(
                "MCTS: uct_with_fast_reward must be False, got True; unvisited actions are tried "
                "in the order of their fast reward"
            )
        rng = np.random.default_rng(seed)
        strategies: dict[str, Choice] = {
            "max": lambda rewards: int(np.argmax(rewards)),
            "random": lambda rewards: int(rng.integers(len(rewards))),
        }
        if isinstance(simulate_strategy, str):
            if simulate_strategy not in strategies:
                raise ValueError(
                    "MCTS: simulate_strategy must be max, random or a function of the fast "
                    f"rewards, got {simulate_strategy!r}"
                )
            simulate_strategy = strategies[simulate_strategy]
        self.simulate_choice: Choice = simulate_strategy
        self.w_exp = w_exp
        self.depth_limit = depth_limit
        self.n_iters = n_iters
        self.cum_reward = cum_reward
        self.output_strategy = output_strategy
        self.aggregator = aggregator

    def __call__(
        self, world_model: WorldModel[State, Action], search_config: SearchConfig[State, Action]
    ) -> MCTSResult:
        """Searches.

        Raises:
            ValueError: a reward that is not finite, a fast one that is no number, or more than 64
                actions.
            Exception: any that a callback raises.
        """
        growth = _Growth(world_model, search_config, self.depth_limit)

        def expand(
            node: MCTSNode[State, Action],
        ) -> tuple[float, list[MCTSNode[State, Action]]]:
            children = growth.children(node)
            value = self._return_of(self._rollout(growth, node))
            return value, sorted(children, key=lambda child: -child.fast_reward)

        root: MCTSNode[State, Action] = MCTSNode(0, None, None)
        found = search(root, expand, simulations=self.n_iters, c_uct=self.w_exp)
        for node, visits, value in zip(found.states, found.visits, found.values, strict=True):
            if visits:
                node.visits, node.Q = int(visits), float(value)
        return self._result(root, found)

    def _rollout(
        self, growth: _Growth[State, Action], node: MCTSNode[State, Action]
    ) -> MCTSNode[State, Action]:
        """The node where a walk down by fast rewards ends."""
        while children := growth.children(node):
            node = children[self.simulate_choice([child.fast_reward for child in children])]
        return node

    def _return_of(self, node: MCTSNode[State, Action]) -> float:
        return float(self.cum_reward([step.reward for step in node.path[1:]]))

    def _result(
        self, root: MCTSNode[State, Action], found: SearchResult[MCTSNode[State, Action]]
    ) -> MCTSResult:
        ends = [node for node in _below(root) if node.is_terminal]
        if self.output_strategy == "max_visit":
            ends = [node for node in ends if node.visits]
            best = max(ends, key=lambda node: node.visits, default=None)
        else:
            best = max(ends, key=self._return_of, default=None)
        nodes = None if best is None else best.path
        trace = None
        if nodes is not None:
            trace = [node.state for node in nodes], [node.action for node in nodes[1:]]
        return MCTSResult(
            terminal_state=None if best is None else best.state,
            cum_reward=-math.inf if best is None else self._return_of(best),
            trace=trace,
            trace_of_nodes=nodes,
            tree_state=root,
            trace_in_each_iter=None,
            tree_state_after_each_iter=None,
            aggregated_result=None if self.aggregator is None else self.aggregator(root),
            search=found,
        )


class _Growth(Generic[State, Action]):
    """Steps into nodes and finds their children, each once."""

    def __init__(
        self,
        world_model: WorldModel[State, Action],
        search_config: SearchConfig[State, Action],
        depth_limit: int,
    ) -> None:
        self.world_model, self.search_config = world_model, search_config
        self.depth_limit = depth_limit
        self.next_id = 1

    def children(self, node: MCTSNode[State, Action]) -> list[MCTSNode[State, Action]]:
        """Of a node, which is entered; none where a path ends."""
        if node.children is None:
            state = self._enter(node)
            ended = node.is_terminal or node.depth >= self.depth_limit
            actions = [] if ended else self.search_config.get_actions(state)
            node.children = [self._child(node, state, action) for action in actions]
        return node.children

    def _enter(self, node: MCTSNode[State, Action]) -> State:
        if node.parent is None:
            node.state = state = self.world_model.init_state()
            return state
        before, action = cast("State", node.parent.state), cast("Action", node.action)
        state, aux = self.world_model.step(before, action)
        node.reward, node.reward_details = self.search_config.reward(
            before, action, **node.fast_reward_details, **aux
        )
        node.state, node.is_terminal = state, self.world_model.is_terminal(state)
        return state

    def _child(
        self, node: MCTSNode[State, Action], state: State, action: Action
    ) -> MCTSNode[State, Action]:
        fast_reward, details = self.search_config.fast_reward(state, action)
        if math.isnan(fast_reward):  # nothing can be ordered by it
            raise ValueError(f"MCTS: fast_reward must be a number, got {fast_reward} for {action}")
        child = MCTSNode(
            self.next_id, action, node, fast_reward, details, depth=node.depth + 1, Q=fast_reward
        )
        self.next_id += 1
        return child


def _below(root: MCTSNode[State, Action]) -> list[MCTSNode[State, Action]]:
    """All nodes that were entered, parents first, siblings in the order of their actions."""
    found, stack = [], [root]
    while stack:
        node = stack.pop()
        if node.children is not None:
            found.append(node)
            stack += reversed(node.children)
    return found

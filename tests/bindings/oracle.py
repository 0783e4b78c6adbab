"""The search core's numbers in plain Python: what the compiled ones must equal bit for bit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


def judged(verdicts: list[float], outcome: float | None, form: str) -> list[float]:
    """Verdicts that count: a finished rollout's last one is replaced by its outcome."""
    return verdicts if form == "paper" and outcome is None else verdicts[:-1]


def paper_parts(steps: list[float], outcome: float, beta: float, decay: float):
    total, weight = 0.0, 1.0
    for verdict in steps:
        total += weight * verdict
        weight *= decay
    return (total / len(steps) if steps else 0.0), beta * outcome


def released_parts(steps: list[float], outcome: float):
    n, total = len(steps), 0.0
    factor = 1 / max(n, 1)
    for i, verdict in enumerate(steps):
        total += factor * verdict * (n - i) / n
    return total, factor * outcome


def rollout_reward(verdicts, outcome, start_verdict, *, form, beta, decay, truncated, add_start):
    """(step, outcome, start, total)."""
    steps = judged(verdicts, outcome, form)
    final = truncated if outcome is None else outcome
    if form == "released":
        step, end = released_parts(steps, final)
    else:
        step, end = paper_parts(steps, final, beta, decay)
    start = start_verdict if add_start else 0.0
    return step, end, start, step + end + start


def identity(how: str) -> float:
    return {"max": -math.inf, "min": math.inf, "product": 1.0}.get(how, 0.0)


def absorbed(accumulated: float, value: float, how: str) -> float:
    return {
        "sum": accumulated + value,
        "mean": accumulated + value,
        "max": max(accumulated, value),
        "min": min(accumulated, value),
        "product": accumulated * value,
        "last": value,
    }[how]


def value_of(accumulated: float, returns: int, how: str) -> float:
    return accumulated / returns if how == "mean" else accumulated


def path_return(scores: list[float], how: str) -> float:
    accumulated = identity(how)
    for score in scores:
        accumulated = absorbed(accumulated, score, how)
    return value_of(accumulated, len(scores), how)


def decayed(value: float, gamma: float, distance: int) -> float:
    for _ in range(distance):
        value *= gamma
    return value


def mixed(value: float, simulated: float, alpha: float) -> float:
    return value * (1 - alpha) + simulated * alpha


def visit_weighted_mean(values: list[float], visits: list[int], own: float) -> float:
    total = 0.0
    for value, n in zip(values, visits, strict=True):
        total += value * n
    return total / sum(visits) if sum(visits) else own


# Search: a tree as the forest grows it, one ticket after the other.  `look(handle)` gives what an
# evaluation would find at a leaf, its value and the handles of its children; an end has none.


@dataclass
class PlainNode:
    handle: int
    parent: "PlainNode | None"
    children: "list[PlainNode]" = field(default_factory=list)
    total: float = 0.0
    visits: int = 0
    in_flight: int = 0
    pending: bool = False
    end_value: float | None = None

    def path(self) -> "list[PlainNode]":
        above = [] if self.parent is None else self.parent.path()
        return [*above, self]


@dataclass(frozen=True)
class PlainSearch:
    """UCT with visits on their way (WU-UCT), and the rule that makes arrival order irrelevant."""

    look: Callable[[int], tuple[float, list[int]]]
    simulations: int
    c_uct: float = math.sqrt(2)
    max_in_flight: int = 1
    visits_per_flight: int = 16

    def run(self, root_handle: int) -> list[PlainNode]:
        """All nodes in the order of creation."""
        nodes = [PlainNode(root_handle, None)]
        out: list[PlainNode] = []  # tickets, oldest first
        begun = committed = 0
        blocked = False
        while committed < self.simulations:
            cap = min(self.max_in_flight, 1 + committed // self.visits_per_flight)
            if begun < self.simulations and len(out) < cap and not blocked:
                leaf = self.descend(nodes[0])
                if leaf.pending:
                    blocked = True
                    continue
                begun += 1
                if leaf.end_value is not None:
                    for node in leaf.path():
                        node.visits += 1
                        node.total += leaf.end_value
                    committed += 1
                    continue
                leaf.pending = True
                for node in leaf.path():
                    node.in_flight += 1
                out.append(leaf)
            else:
                nodes += self.commit(out.pop(0))
                committed += 1
                blocked = False
        return nodes

    def descend(self, node: PlainNode) -> PlainNode:
        while node.children:
            log_parent = math.log(node.visits + node.in_flight)
            node = max(node.children, key=lambda child: self.score(child, log_parent))
        return node

    def score(self, child: PlainNode, log_parent: float) -> float:
        expected = child.visits + child.in_flight
        if expected == 0:
            return math.inf  # max keeps the first of equal ones
        mean = child.total / child.visits if child.visits else 0.0
        return mean + self.c_uct * math.sqrt(log_parent / expected)

    def commit(self, leaf: PlainNode) -> list[PlainNode]:
        value, handles = self.look(leaf.handle)
        leaf.pending = False
        leaf.children = [PlainNode(handle, leaf) for handle in handles]
        leaf.end_value = None if handles else value
        for node in leaf.path():
            node.in_flight -= 1
            node.visits += 1
            node.total += value
        return leaf.children

"""One tree of `tercet.Forest` in plain Python: what the compiled one must equal bit for bit.

Nothing here is fast.  Every operation is rounded on its own, sums run in index order from 0.0 (the
built-in `sum` compensates from Python 3.12 on), and where several are best the first is taken.
"""

import math
import runpy
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

_oracle = runpy.run_path(str(Path(__file__).with_name("oracle.py")))
rollout_reward, value_of = _oracle["rollout_reward"], _oracle["value_of"]
visit_weighted_mean = _oracle["visit_weighted_mean"]

SMALLEST = 2.2250738585072014e-308  # normal float64
LEAST_SCORE = -1e9  # of a root child under Gumbel: above -inf, so that a lone one can be chosen


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The fields of `tercet.RewardConfig`."""

    form: str = "paper"
    outcome_weight: float = 1.0
    step_decay: float = 1.0
    truncated_outcome: float = 0.0
    add_start_verdict: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keyword arguments of `tercet.Forest` that decide what a tree becomes."""

    rule: str = "uct"  # uct_released, puct, gumbel
    c_uct: float = math.sqrt(2)
    c_base: float = 19652.0
    c_init: float = 1.25
    first_play: str = "first"  # value, parent, prior
    first_play_value: float = 0.0
    min_max: str = "none"  # siblings, tree
    unfinished: str = "unobserved"  # virtual_loss
    virtual_loss: float = 1.0
    dual_target: bool = False
    dirichlet_alpha: float = 0.0  # 0: no noise
    dirichlet_fraction: float = 0.25
    gumbel_considered: int = 16
    gumbel_value_scale: float = 0.1
    gumbel_maxvisit_init: float = 50.0
    widening: float = 0.0  # k of k N^alpha children; 0: all at once
    widening_alpha: float = 0.5
    max_children: int = 64  # of a node
    solver: bool = False
    backup: str = "mean"  # sum, max, min, product, last, children
    gamma: float = 1.0
    channels: tuple[tuple[str, str, float], ...] = ()  # source, how, gamma
    tickets: str = "together"  # apart, lazy
    max_unverified: int = 16
    merge_duplicates: bool = False
    reward: Reward = Reward()
    stop_positives: int = 0
    stop_negatives: int = 0
    stop_correct: bool = False
    stop_converged: bool = False
    max_in_flight: int = 1
    visits_per_flight: int = 16
    max_attempts: int = 3
    failed_value: float = 0.0

    def __post_init__(self) -> None:
        refused = {
            "uct wants first_play='first'": self.rule == "uct" and self.first_play != "first",
            "virtual_loss wants backup='mean'": self.unfinished == "virtual_loss"
            and self.backup != "mean",
            "children wants gamma=1": self.backup == "children" and self.gamma != 1,
            "max_in_flight + max_unverified must be <= 255": self.tickets != "together"
            and self.max_in_flight + self.max_unverified > 255,
        }
        for why, holds in refused.items():
            if holds:
                raise ValueError(why)


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Of one tree; None is no bound.  The last four are what tellings say they cost."""

    evaluations: float | None = None
    nodes: float | None = None
    model_calls: float | None = None
    tokens: float | None = None
    tool_calls: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is told about a ticket; of an expand ticket only children and costs count."""

    value: float = 0.0
    handles: tuple[int, ...] = ()
    priors: tuple[float, ...] | None = None
    terminal: tuple[bool, ...] = ()  # of the children; empty: none is
    verdicts: tuple[float, ...] | None = None  # of a rollout, which then says the value
    outcome: float = math.nan  # nan: none, or a rollout cut off
    start_verdict: float = 0.0
    channel_values: tuple[float, ...] = ()  # one for each channel, unless a rollout says them
    cost: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    cancelled: bool = False
    fails: int = 0  # before it is told; max_attempts or more: given up


Look = Callable[[str, int, int], Found]  # kind, handle, tickets of this kind this node had before


@dataclass(eq=False)
class PlainNode:
    handle: int
    parent: "PlainNode | None" = None
    prior: float = 1.0  # a float32
    terminal: bool = False  # an end
    children: "list[PlainNode]" = field(default_factory=list)
    total: float = 0.0
    visits: int = 0
    in_flight: int = 0
    asked: bool = False  # an expansion or evaluation of it is out
    closed: bool = False  # nothing below it can change
    full: bool = False  # has all its children
    misses: int = 0  # tellings in a row that brought nothing new
    end_value: float = math.nan
    own: float = math.nan  # the first value told about it
    verdict: float = math.nan  # a float32
    channels: list[float] = field(default_factory=list)
    end_channels: tuple[float, ...] = ()
    own_channels: tuple[float, ...] = ()
    asks: dict[str, int] = field(default_factory=dict)  # tickets so far, by kind

    @property
    def expected(self) -> int:
        return self.visits + self.in_flight

    def path(self) -> "list[PlainNode]":
        """From this node up to the root."""
        nodes, node = [], self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes


# Numbers.


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def added(numbers: Iterable[float]) -> float:
    total = 0.0
    for x in numbers:
        total += x
    return total


def first_best(scores: Sequence[float]) -> int:
    """Of the highest; of the first where none is above -inf, nan included."""
    best, best_score = 0, -math.inf
    for i, score in enumerate(scores):
        if score > best_score:
            best, best_score = i, score
    return best


# Random numbers: Philox4x32-10 (Salmon et al. 2011), by counters alone.

GUMBEL, DIRICHLET = 1, 2  # streams
WORD, LONG = 2**32 - 1, 2**64 - 1


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & WORD, a >> 32 ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def mix64(x: int) -> int:
    """splitmix64's last steps."""
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & LONG
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & LONG
    return x ^ x >> 31


def tree_key(seed: int, root_handle: int) -> tuple[int, int]:
    key = mix64((seed + 0x9E3779B97F4A7C15 * ((root_handle & LONG) + 1)) & LONG)
    return key & WORD, key >> 32


def uniform(key: Sequence[int], *, draw: int, node: int, stream: int, visit: int = 0) -> float:
    w0, w1, _, _ = philox((draw, visit, node, stream), key)
    return (((w1 << 32 | w0) >> 11) + 0.5) * 2.0**-53


@lru_cache(maxsize=1024)
def gumbel(key: tuple[int, int], i: int) -> float:
    return -log(-log(uniform(key, draw=0, node=i, stream=GUMBEL)))


def gamma_noise(key: Sequence[int], i: int, alpha: float) -> float:
    """Gamma(alpha), by Marsaglia & Tsang 2000."""
    draws = (uniform(key, draw=k, node=i, stream=DIRICHLET) for k in range(2**32))
    d = (alpha if alpha >= 1 else alpha + 1) - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        u1, u2 = next(draws), next(draws)
        x = math.sqrt(-2 * log(u1)) * math.cos(6.283185307179586 * u2)
        t = 1 + c * x
        if t <= 0:
            continue
        v = (t * t) * t
        if log(next(draws)) < 0.5 * (x * x) + d - d * v + d * log(v):
            break
    return d * v if alpha >= 1 else d * v * math.pow(next(draws), 1 / alpha)


def dirichlet(key: Sequence[int], n: int, alpha: float) -> list[float]:
    noise = [gamma_noise(key, i, alpha) for i in range(n)]
    total = added(noise)
    return [g / total if total else 1 / n for g in noise]


# The choice of a child.


@lru_cache(maxsize=1024)
def considered_visits(most: int, simulations: int) -> tuple[int, ...]:
    """Visits of the children that Sequential Halving considers, simulation by simulation."""
    if most <= 1:
        return tuple(range(simulations))
    rounds = math.ceil(math.log2(most))
    sequence, visits, considered = [], [0] * most, most
    while len(sequence) < simulations:
        for _ in range(max(1, simulations // (rounds * considered))):
            sequence += visits[:considered]
            visits[:considered] = [v + 1 for v in visits[:considered]]
        considered = max(2, considered // 2)
    return tuple(sequence[:simulations])


@dataclass
class Chooser:
    """What the children of one node look like from the node, when a descent is at it."""

    tree: "PlainTree"
    node: PlainNode

    def __post_init__(self) -> None:
        self.settings, self.children = self.tree.settings, self.node.children
        self.before = self.node.expected - 1  # the descent itself is counted already
        self.limits = self.min_max()

    def choose(self) -> PlainNode | None:
        """None where all children are closed."""
        able = [i for i, child in enumerate(self.children) if not child.closed]
        if not able:
            return None
        if self.settings.rule == "gumbel":
            return self.children[self.by_gumbel(able)]
        if self.settings.first_play == "first":
            for i in able:
                if self.children[i].expected == 0:
                    return self.children[i]
        score = getattr(self, self.settings.rule)
        return self.children[able[first_best([score(self.children[i]) for i in able])]]

    # Values.

    def plain_value(self, node: PlainNode) -> float:
        return value_of(node.total, node.visits, self.settings.backup)

    def value(self, child: PlainNode) -> float:
        s = self.settings
        if s.unfinished == "virtual_loss" and child.expected > 0:
            return (child.total - s.virtual_loss * child.in_flight) / child.expected
        if child.visits > 0:
            return self.plain_value(child)
        match s.first_play:
            case "value":
                return s.first_play_value
            case "parent":
                return self.below_parent()
            case "prior":
                return child.prior
        return 0.0

    def below_parent(self) -> float:
        base = self.plain_value(self.node) if self.node.visits > 0 else 0.0
        mass = added(child.prior for child in self.children if child.expected > 0)
        return base - self.settings.first_play_value * math.sqrt(mass)

    def min_max(self) -> tuple[float, float]:
        """(inf, -inf) where nothing is seen yet."""
        if self.settings.min_max != "siblings":
            return self.tree.low, self.tree.high
        near = [node for node in (self.node, *self.children) if node.visits > 0]
        values = [self.plain_value(node) for node in near]
        return min(values, default=math.inf), max(values, default=-math.inf)

    def scaled(self, value: float) -> float:
        """Into [0, 1] for values seen; with the sign of the phase."""
        if self.settings.min_max != "none":
            low, high = self.limits
            value = (value - low) / (high - low) if low < high else 0.0
        return self.tree.sign * value

    # Scores.

    def uct(self, child: PlainNode) -> float:
        bonus = math.sqrt(log(self.before) / child.expected)
        return self.scaled(self.value(child)) + self.settings.c_uct * bonus

    def uct_released(self, child: PlainNode) -> float:
        bonus = math.sqrt(log(self.before + 1) / (child.expected + 1))
        return self.scaled(self.value(child)) + self.settings.c_uct * bonus

    def puct(self, child: PlainNode) -> float:
        s, root = self.settings, math.sqrt(max(self.before, 1))
        rate = log((self.before + s.c_base + 1.0) / s.c_base) + s.c_init
        return self.scaled(self.value(child)) + rate * child.prior * root / (1 + child.expected)

    # Gumbel (Danihelka et al. 2022), as mctx has it.

    def by_gumbel(self, able: list[int]) -> int:
        if self.node.parent is not None:
            scores = self.inner_scores()
            return able[first_best([scores[i] for i in able])]
        expected = [child.expected for child in self.children]
        table = considered_visits(
            min(self.settings.gumbel_considered, len(expected)), max(self.tree.simulations - 1, 1)
        )
        now = table[min(sum(expected), len(table) - 1)]
        considered = [i for i in able if expected[i] == now]
        if not considered:
            return min(able, key=lambda i: expected[i])
        scores = self.root_scores()
        return considered[first_best([scores[i] for i in considered])]

    def root_scores(self) -> list[float]:
        logits, noise = self.logits(), self.tree.noise(len(self.children))
        most = max(logits)
        scores = [
            g + (logit - most) + t
            for g, logit, t in zip(noise, logits, self.completed(), strict=True)
        ]
        return [score if score > LEAST_SCORE else LEAST_SCORE for score in scores]  # nan: the least

    def inner_scores(self) -> list[float]:
        expected = [child.expected for child in self.children]
        y = [logit + t for logit, t in zip(self.logits(), self.completed(), strict=True)]
        most = max(y)
        weights = [math.exp(each - most) for each in y]
        total, everyone = added(weights), sum(expected)
        return [w / total - e / (1 + everyone) for w, e in zip(weights, expected, strict=True)]

    def logits(self) -> list[float]:
        return [log(child.prior) for child in self.children]

    def completed(self) -> list[float]:
        """Scaled values of all children; those without visits have the mixed value."""
        s = self.settings
        mixed = self.mixed_value()
        values = [
            self.scaled(self.plain_value(child)) if child.visits > 0 else mixed
            for child in self.children
        ]
        low, high = min(values), max(values)
        scale = s.gumbel_maxvisit_init + max(child.visits for child in self.children)
        scale *= s.gumbel_value_scale
        return [scale * ((c - low) / max(high - low, 1e-8)) for c in values]

    def mixed_value(self) -> float:
        own = 0.0 if math.isnan(self.node.own) else self.node.own
        visited = [child for child in self.children if child.visits > 0]
        priors = [max(child.prior, SMALLEST) for child in visited]
        values = [self.scaled(self.plain_value(child)) for child in visited]
        mass, visits = added(priors), sum(child.visits for child in visited)
        weighted = added(p * x / mass for p, x in zip(priors, values, strict=True))
        return (self.scaled(own) + visits * weighted) / (visits + 1)


# Values on their way up.


def taken_in(held: float, visits: int, value: float, how: str) -> float:
    """By a node that had this many visits."""
    if how in ("sum", "mean"):
        return held + value
    if visits == 0 or how == "last":
        return value
    return {"max": max, "min": min, "product": lambda a, b: a * b}[how](held, value)


def children_mean(node: PlainNode, value: float) -> float:
    """By visits; the value where no child has any."""
    children = node.children
    return visit_weighted_mean([c.total for c in children], [c.visits for c in children], value)


def reward_parts(reward: Reward, found: Found) -> dict[str, float]:
    """Of a rollout, by the source of a channel."""
    step, outcome, start, total = rollout_reward(
        list(found.verdicts or ()),
        None if math.isnan(found.outcome) else found.outcome,
        found.start_verdict,
        form=reward.form,
        beta=reward.outcome_weight,
        decay=reward.step_decay,
        truncated=reward.truncated_outcome,
        add_start=reward.add_start_verdict,
    )
    return {"step": step, "outcome": outcome, "start": start, "total": total, "value": total}


# The search.


@dataclass(frozen=True)
class Ticket:
    number: int  # without the tree's
    kind: str  # evaluate, expand, verify
    node: PlainNode
    asks: bool  # made its node an asked one
    nth: int  # tickets of this kind that the node had before


@dataclass(eq=False)
class PlainTree:
    """Grows in `run`; `nodes` are then all nodes in the order of creation."""

    look: Look
    root_handle: int
    simulations: int
    settings: Settings = Settings()
    budgets: Budgets = Budgets()
    seed: int = 0
    nodes: list[PlainNode] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)  # all, in the order of issue
    pending: list[Ticket] = field(default_factory=list)  # simulations that are out
    expanding: list[Ticket] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=lambda: [0, 0])  # next of pending, of expanding
    blocked: bool = False
    stopped: str = ""
    low: float = math.inf  # plain values of all nodes, ever
    high: float = -math.inf
    begun: int = 0
    committed: int = 0
    evaluations: int = 0  # committed ones with a ticket
    positives: int = 0
    negatives: int = 0
    merged: int = 0
    costs: list[float] = field(default_factory=lambda: [0.0] * 4)

    def __post_init__(self) -> None:
        self.key = tree_key(self.seed, self.root_handle)
        self.root = self.new_node(self.root_handle, None)

    def new_node(self, handle: int, parent: PlainNode | None) -> PlainNode:
        node = PlainNode(handle, parent, channels=[0.0] * len(self.settings.channels))
        self.nodes.append(node)
        return node

    def noise(self, n: int) -> list[float]:
        return [gumbel(self.key, i) for i in range(n)]

    @property
    def sign(self) -> float:
        """-1 in the second phase, which looks for what is wrong."""
        enough = max(self.settings.stop_positives, 1)
        return -1.0 if self.settings.dual_target and self.positives >= enough else 1.0

    @property
    def spent(self) -> dict[str, float]:
        model_calls, tokens, tool_calls, seconds = self.costs
        return {
            "evaluations": self.evaluations,
            "nodes": len(self.nodes),
            "model_calls": model_calls,
            "tokens": tokens,
            "tool_calls": tool_calls,
            "seconds": seconds,
        }

    @property
    def finished(self) -> bool:
        over = bool(self.stopped) or self.begun == self.simulations
        return over and not self.pending and not self.expanding

    @property
    def reason(self) -> str:
        return self.stopped or ("simulations" if self.finished else "")

    def choice(self) -> int | None:
        """Which child of the root to take; None where it has none."""
        children = self.root.children
        if not children:
            return None
        chooser = Chooser(self, self.root)
        if self.settings.rule != "gumbel":
            most = max(child.visits for child in children)
            best = [i for i, child in enumerate(children) if child.visits == most]
            return max(best, key=lambda i: chooser.plain_value(children[i]) if most else 0.0)
        most = max(child.expected for child in children)
        best = [i for i, child in enumerate(children) if child.expected == most]
        scores = chooser.root_scores()
        return max(best, key=lambda i: scores[i])

    def run(self) -> "list[PlainNode]":
        while self.step():
            pass
        return self.nodes

    def step(self) -> bool:
        if self.may_issue():
            self.issue()
        elif self.expanding:
            self.commit(self.expanding.pop(0))
        elif self.pending:
            self.commit(self.pending.pop(0))
        else:
            return False
        return True

    def may_issue(self) -> bool:
        s = self.settings
        cap = min(s.max_in_flight, 1 + self.committed // s.visits_per_flight)
        most_pending = cap if s.tickets == "together" else s.max_unverified
        return (
            not self.stopped
            and not self.blocked
            and self.begun < self.simulations
            and len(self.expanding) < cap
            and len(self.pending) < most_pending
        )

    # Tickets.

    def issue(self) -> None:
        node, wider = self.descend()
        if wider:
            self.hand_out("expand", node)
        elif node.asked:
            self.depart(node, -1)
            self.blocked = True
        elif node.terminal:
            self.land_on_end(node)
        else:
            self.land_on_leaf(node)

    def descend(self) -> tuple[PlainNode, bool]:
        """Where it lands, and whether that node is to get more children."""
        node = self.root
        node.in_flight += 1
        while node.children:
            if self.wants_more(node):
                return node, True
            child = Chooser(self, node).choose()
            if child is None:  # it can still get others
                return node, not node.asked
            node = child
            node.in_flight += 1
        return node, False

    def can_widen(self, node: PlainNode) -> bool:
        s = self.settings
        return s.widening > 0 and not node.full and len(node.children) < s.max_children

    def wants_more(self, node: PlainNode) -> bool:
        s = self.settings
        enough = s.widening * math.pow(node.expected - 1, s.widening_alpha)
        return self.can_widen(node) and not node.asked and len(node.children) < enough

    def land_on_end(self, node: PlainNode) -> None:
        if not math.isnan(node.end_value):
            self.depart(node, -1)
            self.back_up(node, node.end_value, node.end_channels)
            self.begun += 1
            self.committed += 1
            self.look_around(node)
        elif node.in_flight > 1:  # the ticket that will say its value is out
            self.depart(node, -1)
            self.blocked = True
        else:
            together = self.settings.tickets == "together"
            self.hand_out("evaluate" if together else "verify", node)

    def land_on_leaf(self, node: PlainNode) -> None:
        seen = node.expected > 1  # beside this descent
        if self.settings.tickets == "together":
            self.hand_out("evaluate", node)
        elif self.settings.tickets == "lazy":
            self.hand_out("expand" if seen or node is self.root else "verify", node)
        else:
            self.hand_out("expand", node)
            if not seen:
                self.depart(node, 1)
                self.hand_out("verify", node)

    def hand_out(self, kind: str, node: PlainNode) -> None:
        """A ticket of the node, whose path has departed."""
        queue = self.expanding if kind == "expand" else self.pending
        grows = kind == "expand"
        nth = node.asks.get(kind, 0)
        ticket = Ticket(self.ordinals[grows] << 1 | grows, kind, node, kind != "verify", nth)
        self.ordinals[grows] += 1
        node.asks[kind] = nth + 1
        node.asked |= ticket.asks
        self.begun += not grows
        self.tickets.append(ticket)
        queue.append(ticket)

    def depart(self, node: PlainNode, step: int) -> None:
        for each in node.path():
            each.in_flight += step

    # Commits.

    def commit(self, ticket: Ticket) -> None:
        node, found = ticket.node, self.look(ticket.kind, ticket.node.handle, ticket.nth)
        self.blocked = False
        self.depart(node, -1)
        if ticket.asks:
            node.asked = False
        if found.fails >= self.settings.max_attempts:
            found = replace(self.given_up(), cost=found.cost)
        if found.cancelled:
            self.begun -= ticket.kind != "expand"
        elif ticket.kind == "expand":
            self.commit_expansion(node, found)
        else:
            self.commit_simulation(node, found, grows=ticket.kind == "evaluate")
        self.look_around(node, found.cost)

    def given_up(self) -> Found:
        value = self.settings.failed_value
        return Found(value=value, channel_values=(value,) * len(self.settings.channels))

    def commit_expansion(self, node: PlainNode, found: Found) -> None:
        had = bool(node.children)
        if self.add_children(node, found):
            node.misses = 0
            return
        if had:
            node.misses += 1
            node.full = not found.handles or node.misses >= self.settings.max_attempts
        elif self.settings.tickets == "lazy" and node is self.root:  # nothing ever says its value
            failed = self.given_up()
            self.make_end(node, failed.value, failed.channel_values)
        else:
            self.make_end(node, node.own, node.own_channels)

    def commit_simulation(self, node: PlainNode, found: Found, *, grows: bool) -> None:
        value, channels = self.worth(found)
        if math.isnan(node.own):
            node.own, node.own_channels = value, channels
        if found.verdicts is not None:
            node.verdict = float32(found.start_verdict)
        added_children = self.add_children(node, found) if grows else 0
        if node.terminal or (grows and not added_children):
            self.make_end(node, value, channels)
        self.back_up(node, value, channels)
        self.committed += 1
        self.evaluations += 1
        self.positives += found.outcome > 0
        self.negatives += found.outcome < 0

    def make_end(self, node: PlainNode, value: float, channels: tuple[float, ...]) -> None:
        """An end keeps the first value it gets."""
        node.terminal = True
        if math.isnan(node.end_value):
            node.end_value, node.end_channels = value, channels

    def worth(self, found: Found) -> tuple[float, tuple[float, ...]]:
        """The value, and what each channel takes in."""
        s, channels = self.settings, found.channel_values
        value = found.value
        if found.verdicts is not None:
            parts = reward_parts(s.reward, found)
            value = parts["total"]
            channels = tuple(parts[source] for source, _, _ in s.channels)
        if len(channels) != len(s.channels):
            raise ValueError(f"{len(s.channels)} channel values wanted, got {len(channels)}")
        if s.backup == "product" and abs(value) > 1:
            raise ValueError(f"product wants values in [-1, 1], got {value}")
        return value, channels

    # Children.

    def room(self, node: PlainNode) -> int:
        return 0 if node.terminal else self.settings.max_children - len(node.children)

    def add_children(self, node: PlainNode, found: Found) -> int:
        """How many came that it did not have."""
        if len(found.handles) > self.room(node):
            raise ValueError(f"{len(found.handles)} children, room for {self.room(node)}")
        had = len(node.children)
        for i, handle in enumerate(found.handles):
            prior = None if found.priors is None else float32(found.priors[i])
            self.add_child(node, handle, prior, bool(found.terminal) and found.terminal[i])
        fresh = node.children[had:]
        if found.priors is None:
            for child in fresh:
                child.prior = float32(1 / len(node.children))
        if node is self.root and had == 0 and self.settings.dirichlet_alpha > 0:
            self.add_noise(fresh)
        return len(fresh)

    def add_child(self, node: PlainNode, handle: int, prior: float | None, terminal: bool) -> None:
        twins = [child for child in node.children if child.handle == handle]
        if twins and self.settings.merge_duplicates:
            self.merged += 1
            if prior is not None:
                twins[0].prior = float32(twins[0].prior + prior)
            return
        child = self.new_node(handle, node)
        child.terminal = terminal
        if prior is not None:
            child.prior = prior
        node.children.append(child)

    def add_noise(self, children: list[PlainNode]) -> None:
        s = self.settings
        noise = dirichlet(self.key, len(children), s.dirichlet_alpha)
        for child, share in zip(children, noise, strict=True):
            kept = (1 - s.dirichlet_fraction) * child.prior
            child.prior = float32(kept + s.dirichlet_fraction * share)

    # After a value has come.

    def back_up(self, node: PlainNode, value: float, channels: Sequence[float]) -> None:
        for each in node.path():
            self.take_in(each, value, channels)
            value *= self.settings.gamma
            channels = [
                x * gamma for x, (_, _, gamma) in zip(channels, self.settings.channels, strict=True)
            ]

    def take_in(self, node: PlainNode, value: float, channels: Sequence[float]) -> None:
        s = self.settings
        for c, (_, how, _) in enumerate(s.channels):
            node.channels[c] = taken_in(node.channels[c], node.visits, channels[c], how)
        if s.backup == "children":
            node.total = children_mean(node, value)
        else:
            node.total = taken_in(node.total, node.visits, value, s.backup)
        node.visits += 1
        seen = value_of(node.total, node.visits, s.backup)
        self.low, self.high = min(self.low, seen), max(self.high, seen)

    def look_around(self, node: PlainNode, cost: Sequence[float] = (0.0,) * 4) -> None:
        """After every commit and every visit of an end: costs, stop rules, solver."""
        self.costs = [held + more for held, more in zip(self.costs, cost, strict=True)]
        self.stopped = self.stopped or self.stop_rule()
        if self.settings.solver:
            self.close(node)
        if self.root.closed:
            self.stopped = self.stopped or "closed"

    def stop_rule(self) -> str:
        s = self.settings
        if s.stop_correct and self.positives > 0:
            return "correct"
        wanted = s.stop_positives or s.stop_negatives
        if wanted and self.positives >= s.stop_positives and self.negatives >= s.stop_negatives:
            return "samples"
        bounds = vars(self.budgets)
        if any(bounds[name] is not None and x >= bounds[name] for name, x in self.spent.items()):
            return "budget"
        return "converged" if s.stop_converged and self.converged() else ""

    def converged(self) -> bool:
        """Whether what is left cannot change which child of the root has most visits."""
        visits = sorted((child.visits for child in self.root.children), reverse=True)
        return len(visits) >= 2 and visits[0] - visits[1] > self.simulations - self.committed

    def close(self, node: PlainNode) -> None:
        for each in node.path():
            if not self.is_decided(each):
                return
            each.closed = True

    def is_decided(self, node: PlainNode) -> bool:
        if not node.children:
            return node.terminal and not math.isnan(node.end_value)
        return not self.can_widen(node) and all(child.closed for child in node.children)

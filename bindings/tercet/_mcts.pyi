import os
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Rule: TypeAlias = Literal["uct", "uct_released", "puct", "gumbel"]
_FirstPlay: TypeAlias = Literal["first", "value", "parent", "prior"]
_MinMax: TypeAlias = Literal["none", "siblings", "tree"]
_Unfinished: TypeAlias = Literal["unobserved", "virtual_loss"]
_Backup: TypeAlias = Literal["mean", "sum", "max", "min", "product", "last", "children"]
_Source: TypeAlias = Literal["value", "step", "outcome", "start", "total"]
_How: TypeAlias = Literal["mean", "sum", "max", "min", "product", "last"]
_Tickets: TypeAlias = Literal["together", "apart", "lazy"]
_StopReason: TypeAlias = Literal[
    "", "simulations", "correct", "samples", "budget", "converged", "closed", "script"
]

class TicketError(ValueError):
    """A ticket that cannot be told; nothing was changed."""

    ticket: int
    tree: int

class UnknownTicketError(TicketError):
    """It was never issued."""

class RepeatedTicketError(TicketError):
    """It was told, cancelled, or reported as failed, before."""

class LateTicketError(TicketError):
    """Its tree was removed."""

class TicketKindError(TicketError):
    """It asks for something else than was told: children for a value, say."""

class SnapshotError(ValueError):
    """Bytes that are no snapshot of a forest, one of a newer version, cut off or altered."""

class TicketKind(IntEnum):
    """What a ticket asks for; equal to the numbers in `Leaves.kind`."""

    evaluate = 0
    """A value and children: `tell`."""
    expand = 1
    """Children alone: `tell_children`."""
    verify = 2
    """A value alone: `tell_values`, or `tell_verdicts` and `tell_outcome`."""

class Leaves:
    """A batch of leaves to look at, as columns of equal length, read-only."""

    @property
    def ticket(self) -> NDArray[np.uint64]:
        """The n-th of its tree and sort: tree << 32 | n << 1 | (kind == expand).

        There are two sorts: tickets to expand, and the others.
        """
    @property
    def tree(self) -> NDArray[np.uint32]: ...
    @property
    def node(self) -> NDArray[np.uint32]:
        """Name of the leaf inside its tree."""
    @property
    def kind(self) -> NDArray[np.uint8]:
        """As in `TicketKind`; all 0 where tickets are "together"."""
    @property
    def depth(self) -> NDArray[np.uint32]:
        """Of a root: 0."""
    @property
    def handle(self) -> NDArray[np.int64]: ...
    @property
    def attempt(self) -> NDArray[np.uint32]:
        """1, and one more after every failure."""
    def __len__(self) -> int: ...

class TreeColumns:
    """All nodes of a tree, the root first and parents before their children; read-only columns.

    The order is that of creation, except that children which came late (widening) stand behind
    their older siblings.
    """

    @property
    def node(self) -> NDArray[np.uint32]:
        """Name of the node in `Leaves.node`."""
    @property
    def parent(self) -> NDArray[np.int64]:
        """Position in these columns; -1 for the root."""
    @property
    def depth(self) -> NDArray[np.uint32]: ...
    @property
    def visits(self) -> NDArray[np.uint32]: ...
    @property
    def in_flight(self) -> NDArray[np.uint32]:
        """Tickets out at or below the node."""
    @property
    def total(self) -> NDArray[np.float64]:
        """What the backup made of the values: their sum, where it is "mean" or "sum"."""
    @property
    def value(self) -> NDArray[np.float64]:
        """Where the backup is "mean": total / visits, else total; NaN without visits."""
    @property
    def handle(self) -> NDArray[np.int64]: ...
    @property
    def terminal(self) -> NDArray[np.uint8]:
        """1 where the node is an end: told without children, or told to be terminal."""
    @property
    def closed(self) -> NDArray[np.uint8]:
        """1 where nothing below is left to find out; all 0 without solver."""
    @property
    def prior(self) -> NDArray[np.float32]:
        """With the noise of the root; NaN for the root, and where the settings read no priors."""
    @property
    def verdict(self) -> NDArray[np.float32]:
        """The start verdict told last with an outcome from this node; NaN: none."""
    @property
    def channels(self) -> NDArray[np.float64]:
        """[nodes, channels], what each channel's aggregation holds; a mean holds its sum."""
    def __len__(self) -> int: ...

class Cost:
    """What evaluations cost, as told; only what was committed counts."""

    @property
    def model_calls(self) -> float: ...
    @property
    def tokens(self) -> float: ...
    @property
    def tool_calls(self) -> float: ...
    @property
    def seconds(self) -> float: ...

class TreeStatus:
    """How far a tree has come."""

    @property
    def simulations(self) -> int:
        """Allowed."""
    @property
    def committed(self) -> int:
        """Of them; visits of an end included."""
    @property
    def in_flight(self) -> int:
        """Tickets that are not committed: handed out, to be handed out again, or waiting."""
    @property
    def positives(self) -> int:
        """Outcomes above 0."""
    @property
    def negatives(self) -> int:
        """Outcomes below 0."""
    @property
    def evaluations(self) -> int:
        """Values that came by a ticket."""
    @property
    def nodes(self) -> int: ...
    @property
    def spent(self) -> Cost: ...
    @property
    def stop_reason(self) -> _StopReason:
        """Why it issues no more tickets; "" while it may."""

class Counters:
    """What a forest has done so far."""

    @property
    def trees(self) -> int: ...
    @property
    def finished(self) -> int:
        """Trees that have nothing left to do: stopped or used up, and no ticket is out."""
    @property
    def simulations(self) -> int:
        """Values backed up."""
    @property
    def evaluations(self) -> int:
        """Simulations with a ticket; the others visited an end again."""
    @property
    def expansions(self) -> int:
        """Tickets to expand that were committed."""
    @property
    def in_flight(self) -> int:
        """Tickets that were handed out and are not told."""
    @property
    def waiting(self) -> int:
        """Results that were told and wait for older ones of their tree."""
    @property
    def failures(self) -> int: ...
    @property
    def given_up(self) -> int:
        """Tickets that failed `max_attempts` times."""
    @property
    def cancelled(self) -> int: ...
    @property
    def merged(self) -> int:
        """Children that were there already."""
    @property
    def positives(self) -> int:
        """Outcomes above 0, in all trees."""
    @property
    def negatives(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def bytes(self) -> int:
        """Of nodes, with what lies free."""
    @property
    def spent(self) -> Cost: ...

class Forest:
    """Many searches at once, behind ask and tell.

    `ask` hands out leaves of all trees, each with a ticket; `tell` and its siblings bring what was
    found out about them, at any time and in any order. The trees depend on what is told and on
    nothing else: not on the size of batches, the order of results or each other. A tree issues
    tickets while it may, and else commits its oldest one to expand, or its oldest other one. A
    budget of the whole forest is the exception: what it leaves to whom depends on the order.

    By default, children are chosen by UCT with the visits that are on their way (WU-UCT,
    arXiv:1810.11755), children nobody visits first, the first on ties. docs/search_core.md has the
    formulas; all settings are keyword arguments, and `settings` gives them back.

    Args:
        rule: "uct": Kocsis & Szepesvari 2006. "uct_released": as the code released with
            GroundedPRM, arXiv:2510.14942. "puct": Silver et al. 2017, with the growing rate of
            2018 (AlphaZero). "gumbel": Gumbel MuZero, Danihelka et al. 2022, whose root
            runs sequential halving (Karnin et al. 2013).
        c_uct: weight of exploration of the first two rules, >= 0.
        c_base: of "puct", > 0.
        c_init: of "puct", >= 0.
        first_play: value of a child without finished visits. "first": 0, and whoever has no visits
            at all is chosen before any score; "uct" knows no other. "value": `first_play_value`.
            "parent": the parent's, less first_play_value * sqrt(priors of the children begun).
            "prior": its prior. "gumbel" completes values in its own way.
        first_play_value: finite.
        min_max: maps values to [0, 1] by the bounds of "siblings" (and their parent) or of the
            "tree" (MuZero, Schrittwieser et al. 2020).
        unfinished: what a visit on its way is: "unobserved", counted without a value (WU-UCT), or a
            "virtual_loss", a finished one with the value -virtual_loss; with backup "mean" only.
        virtual_loss: >= 0.
        gumbel_considered: children of the root that are tried at most, >= 1.
        gumbel_value_scale: >= 0.
        gumbel_maxvisit_init: >= 0.
        dirichlet_alpha: of noise in the root's priors (AlphaZero), >= 0; 0: none. Only with
            settings that read priors.
        dirichlet_fraction: its share in them, in [0, 1].
        dual_target: looks for low values once there are `stop_positives` positive outcomes, at
            least one (released code of GroundedPRM).
        widening: k, >= 0; a node of N visits is asked for more children while it has fewer than
            k N^widening_alpha (progressive widening, Coulom 2007). 0: all come at once.
        widening_alpha: in [0, 1].
        max_children: of a node, 1 to 64; with widening each node has room for as many.
        solver: ends and nodes below which all is known are not visited again, and a tree that is
            known whole is stopped. From MCTS-Solver (Winands et al. 2008); proven values are not
            backed up, since nobody plays against the search.
        merge_duplicates: children of one node with one handle are one child; its priors are added.
        backup: what values become at a node. "children": its children's values weighted by visits
            (ReST-MCTS*, arXiv:2406.03816), a leaf's: its own. "product": values in [-1, 1].
        gamma: decay from a node to its parent, in [0, 1]; 1 for "children".
        channels: at most 8 more values of each node, each (source, how, gamma). Sources other
            than "value" are parts of a rollout's reward, see `tell_outcome`.
        reward: formula of rollouts told by verdicts and outcome (GroundedPRM).
        stop_positives: a tree stops when it has this many outcomes above 0 and
        stop_negatives: this many below 0; both 0: no such rule. GroundedPRM: 3 and 3.
        stop_correct: a tree stops at its first outcome above 0.
        stop_converged: a tree stops when the second child of its root cannot overtake the first.
        record: keeps where each descent lands, for `landings`.
        tickets: "together": one ticket asks for value and children. "apart": two tickets do.
            "lazy": a leaf is verified at its first visit and expanded at its second; the root is
            expanded at once.
        max_in_flight: most tickets that bring children out of one tree, 1 to 255. 1 and
            "together" is the sequential search.
        visits_per_flight: a tree of n visits may have 1 + n // visits_per_flight of these out.
        max_unverified: most tickets to verify of one tree, 1 to 255, and at most 255 together with
            `max_in_flight`; without meaning where tickets are "together".
        max_attempts: of a ticket whose evaluation fails.
        failed_value: value of a leaf that failed as often, in [-1e300, 1e300].
        max_bytes: bound on the memory of nodes.
        evaluations: a budget of all trees together, > 0: once reached, `ask` hands out nothing;
            trees are not finished by it. None: no limit. The same for the next five.
        nodes: of all trees.
        model_calls, tokens, tool_calls, seconds: of the costs told.

    Raises:
        TypeError: no such setting, or a value of another type.
        ValueError: a setting outside its range, an unknown choice (the message lists them), or
            settings at odds with each other.
        RuntimeError: by every method but `counters`, while another thread is in a call of this
            forest, and after memory ran out (MemoryError) in the middle of one.
    """

    def __init__(
        self,
        *,
        rule: _Rule = "uct",
        c_uct: float = 1.4142135623730951,
        c_base: float = 19652.0,
        c_init: float = 1.25,
        first_play: _FirstPlay = "first",
        first_play_value: float = 0.0,
        min_max: _MinMax = "none",
        unfinished: _Unfinished = "unobserved",
        virtual_loss: float = 1.0,
        gumbel_considered: int = 16,
        gumbel_value_scale: float = 0.1,
        gumbel_maxvisit_init: float = 50.0,
        dirichlet_alpha: float = 0.0,
        dirichlet_fraction: float = 0.25,
        dual_target: bool = False,
        widening: float = 0.0,
        widening_alpha: float = 0.5,
        max_children: int = 64,
        solver: bool = False,
        merge_duplicates: bool = False,
        backup: _Backup = "mean",
        gamma: float = 1.0,
        channels: Sequence[tuple[_Source, _How, float]] = (),
        reward: RewardConfig = ...,
        stop_positives: int = 0,
        stop_negatives: int = 0,
        stop_correct: bool = False,
        stop_converged: bool = False,
        record: bool = False,
        tickets: _Tickets = "together",
        max_in_flight: int = 1,
        visits_per_flight: int = 16,
        max_unverified: int = 16,
        max_attempts: int = 3,
        failed_value: float = 0.0,
        max_bytes: int = 8589934592,
        evaluations: float | None = None,
        nodes: float | None = None,
        model_calls: float | None = None,
        tokens: float | None = None,
        tool_calls: float | None = None,
        seconds: float | None = None,
    ) -> None: ...
    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments, all of them: `Forest(**forest.settings)` is another one."""

    def add_tree(
        self,
        root_handle: int,
        simulations: int,
        *,
        seed: int = 0,
        evaluations: float | None = None,
        nodes: float | None = None,
        model_calls: float | None = None,
        tokens: float | None = None,
        tool_calls: float | None = None,
        seconds: float | None = None,
    ) -> int:
        """A tree whose root has this handle and is visited `simulations` times; its number.

        Args:
            simulations: in [1, 2^24).
            seed: with the handle it decides the tree's random numbers, in [0, 2^64).
            evaluations: a budget of this tree, > 0: it stops when as much is spent. None: no
                limit. The same for the next five.
            nodes: of the tree.
            model_calls, tokens, tool_calls, seconds: of the costs told.

        Raises:
            TypeError: no such budget.
            ValueError: outside its range, or no room within max_bytes.
        """

    def add_tree_along(
        self,
        root_handle: int,
        simulations: int,
        landings: NDArray[np.uint32],
        *,
        seed: int = 0,
    ) -> int:
        """A tree whose descents land where those of another did; its number.

        The same leaves are asked about in the same order, whatever their values: a finished search
        can be told other values, or backed up in another way, without a model.

        Args:
            root_handle: as of the other tree.
            simulations: as many as the other tree was allowed.
            landings: [descents], what `landings` gave for it.
            seed: as of the other tree.

        The tree ends with its landings. Where one does not fit what is told, it stops, and its
        `stop_reason` is "script".

        Raises:
            ValueError: no landings, else as `add_tree`.
        """

    def remove_tree(self, tree: int) -> None:
        """Frees the nodes of a tree; its tickets become late ones.

        Raises:
            IndexError: no such tree.
        """

    def extend(self, tree: int, simulations: int) -> None:
        """Allows a tree more simulations; one that a rule has stopped stays stopped.

        Raises:
            IndexError: no such tree.
            ValueError: less than 1, or 2^24 and more with those it has.
        """

    def reroot(self, tree: int, node: int, simulations: int) -> None:
        """Goes on from a node as the root, with as many simulations more than its visits.

        The rest of the tree is freed, and nodes get new names. What the node has is kept: visits,
        values, channels, children. Outcomes, costs and evaluations of the tree still count. The
        new root gets noise by its own handle. A tree that was closed or converged goes on.

        Args:
            node: as in `TreeColumns.node`.

        Raises:
            IndexError: no such tree or node.
            RuntimeError: tickets of the tree are not committed.
            ValueError: simulations outside their range, or no room within max_bytes for the copy.
        """

    def reallocate(self) -> int:
        """Gives what stopped trees left unused to trees that used theirs up; how many simulations.

        Equal shares; the first ones get one more where it does not divide. 0 where there is nothing
        to give or nobody to get it.

        Raises:
            RuntimeError: a tree is not finished.
        """

    def ask(self, max_leaves: int) -> Leaves:
        """At most max_leaves leaves; none when all wait for `tell`, or are done.

        Where tickets are apart, a leaf that is expanded and verified counts twice.
        """

    def tell(
        self,
        tickets: NDArray[np.uint64],
        values: NDArray[np.float64],
        num_children: NDArray[np.uint32],
        handles: NDArray[np.int64],
        *,
        priors: NDArray[np.float32] | None = None,
        terminal: NDArray[np.bool_] | None = None,
        outcomes: NDArray[np.float64] | None = None,
        channels: NDArray[np.float64] | None = None,
        costs: NDArray[np.float64] | None = None,
    ) -> None:
        """What was found out about n leaves (`evaluate`); if anything is wrong, nothing changes.

        Args:
            tickets: [n]
            values: [n], in [-1e300, 1e300]; in [-1, 1] where the backup is "product".
            num_children: [n], 0 to `max_children`; a leaf without children is an end, which is
                visited again with its value but asked about no more. 0 for a leaf told to be
                terminal.
            handles: [sum of num_children], names of the children, those of the first leaf first.
            priors: as handles, finite and >= 0, as they are: nothing normalises them. None: equal
                ones. Only where the settings read them.
            terminal: as handles: which of them are ends, whose value is asked for once. None: no
                child is.
            outcomes: [n], in [-1, 1]: above 0 counts as positive, below 0 as negative; NaN: none.
            channels: [n, channels], in [-1e300, 1e300]; to be told if, and only if, there are any.
            costs: [n, 4], finite and >= 0: model calls, tokens, tool calls, seconds. Counted when
                the ticket is committed.

        All arrays are contiguous; none is copied, and no other thread may write to them in the
        meantime.

        Raises:
            TypeError: a dtype.
            ValueError: a shape or length, a value, too many children, priors that these settings do
                not read, or no room within max_bytes.
            TicketError: a ticket that was never issued, was told before, is of a removed tree or of
                another kind.
        """

    def tell_children(
        self,
        tickets: NDArray[np.uint64],
        num_children: NDArray[np.uint32],
        handles: NDArray[np.int64],
        *,
        priors: NDArray[np.float32] | None = None,
        terminal: NDArray[np.bool_] | None = None,
        costs: NDArray[np.float64] | None = None,
    ) -> None:
        """The children of n leaves (`expand`); see `tell`.

        Without children a leaf is an end, whose value is the one told for it; a lazy root, which
        has none, gets `failed_value`. A node that has children (widening) gets these as well, up
        to `max_children` in all; none that is new, and it is asked for no more.

        Raises:
            TypeError, ValueError, TicketError: as `tell`.
        """

    def tell_values(
        self,
        tickets: NDArray[np.uint64],
        values: NDArray[np.float64],
        *,
        outcomes: NDArray[np.float64] | None = None,
        channels: NDArray[np.float64] | None = None,
        costs: NDArray[np.float64] | None = None,
    ) -> None:
        """The values of n leaves (`verify`); see `tell`.

        Raises:
            TypeError, ValueError, TicketError: as `tell`.
        """

    def tell_verdicts(
        self,
        tickets: NDArray[np.uint64],
        steps: NDArray[np.uint32],
        verdicts: NDArray[np.float64],
    ) -> None:
        """Verdicts of steps of rollouts (`verify`), in any order and any portions.

        Args:
            tickets: [m]; one may come more than once.
            steps: [m], from 0, less than 4096 and than `num_steps` of its rollout.
            verdicts: [m], in [-1, 1]; 0: none.

        Raises:
            TypeError: a dtype.
            ValueError: a shape or length, a verdict or step outside its range, a step that has a
                verdict.
            TicketError: as `tell`.
        """

    def tell_outcome(
        self,
        tickets: NDArray[np.uint64],
        num_steps: NDArray[np.uint32],
        outcomes: NDArray[np.float64],
        *,
        start_verdicts: NDArray[np.float64] | None = None,
        costs: NDArray[np.float64] | None = None,
    ) -> None:
        """How n rollouts ended (`verify`), before, between or after their verdicts.

        Once there are verdicts of all `num_steps` steps, the last one included, the ticket is
        told: its value is the total of `rollout_reward` by the setting `reward`, each channel's the
        part that its source names, "value" the total.

        Args:
            num_steps: [n], to 4096, and more than any step that has a verdict.
            outcomes: [n], in [-1, 1]; NaN: cut off before an answer, counted as neither positive
                nor negative.
            start_verdicts: [n], in [-1, 1], of the leaves; None: 0, and no verdict is kept.
            costs: [n, 4], as in `tell`.

        Raises:
            TypeError: a dtype.
            ValueError: a shape or length, a value outside its range, a second outcome.
            TicketError: as `tell`.
        """

    def fail(
        self, tickets: NDArray[np.uint64], *, costs: NDArray[np.float64] | None = None
    ) -> None:
        """The evaluation of these failed: they are handed out again, `max_attempts` times in all.

        After that an evaluated leaf is an end with `failed_value`, a verified one gets this value,
        and one to be expanded no children.

        Args:
            costs: [n, 4], as in `tell`, of this attempt.

        Raises:
            TypeError, ValueError, TicketError: of any kind; as `tell`.
        """

    def cancel(
        self, tickets: NDArray[np.uint64], *, costs: NDArray[np.float64] | None = None
    ) -> None:
        """As if these had not been issued, when their turn comes; what they cost counts.

        Their leaves may be asked about again, by new tickets, and the simulations are not used up.

        Args:
            costs: [n, 4], as in `tell`.

        Raises:
            TypeError, ValueError, TicketError: of any kind; as `tell`.
        """

    def recall(self) -> int:
        """Has all tickets that are out handed out again, as the same attempt; how many there are.

        For after `load`, or when an evaluator died: nobody else works at them. A result that comes
        after all counts if it comes first.
        """

    def is_finished(self, tree: int) -> bool:
        """Whether the tree has nothing left to do and nothing out. IndexError: no such tree."""

    def status(self, tree: int) -> TreeStatus:
        """How far a tree has come. IndexError: no such tree."""

    def columns(self, tree: int) -> TreeColumns:
        """All nodes of a tree, as they are now. IndexError: no such tree."""

    def landings(self, tree: int) -> NDArray[np.uint32]:
        """Where its descents landed so far: node << 1, + 1 where they asked for more children.

        [descents]; empty unless the settings say `record`.

        Raises:
            IndexError: no such tree.
        """

    def choice(self, tree: int) -> int | None:
        """The child of the root to take, as in `TreeColumns.node`; None while there is none.

        The one with most visits, then the highest value, then the first. Under "gumbel": among
        those with most visits the one with the highest score of the root.

        Raises:
            IndexError: no such tree.
        """

    def counters(self) -> Counters:
        """What was done up to the last call that ended; for any thread at any time."""

    def to_bytes(self) -> bytes:
        """The whole state, with the tickets that are out; equal forests give equal bytes."""

    @staticmethod
    def from_bytes(data: bytes) -> Forest:
        """A forest as `to_bytes` gave it; what continues equals what was never interrupted.

        Raises:
            SnapshotError: damaged, cut off or of another version.
            ValueError: max_bytes of its settings does not allow its nodes.
        """

    def save(self, path: str | bytes | os.PathLike[str]) -> None:
        """Writes `to_bytes` to path + ".tmp" and renames: `path` is the old file or the new one.

        Raises:
            OSError: the file; nothing is left behind.
        """

    @staticmethod
    def load(path: str | bytes | os.PathLike[str]) -> Forest:
        """A forest as `save` wrote it.

        Raises:
            OSError: the file.
            SnapshotError: see `from_bytes`.
        """

class RewardForm:
    """Whose formula; see csrc/include/tercet/reward.hpp."""

    paper: RewardForm
    released: RewardForm

class RewardConfig:
    """Formula of a rollout's reward. Immutable.

    Args:
        form: `paper` or `released`.
        outcome_weight: beta >= 0 of the paper form; 1 in the released form, which has its own.
        step_decay: d_j = step_decay^(j-1) of the paper form, in [0, 1]; 1 in the released form.
        truncated_outcome: F of a rollout that was cut off, in [-1, 1]. None: as the form was
            published, 0 in the paper form and -1 in the released one.
        add_start_verdict: whether the start node's own verdict is backed up, too. None: as the form
            was published, true in the paper form and false in the released one.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        *,
        form: RewardForm = ...,
        outcome_weight: float = 1.0,
        step_decay: float = 1.0,
        truncated_outcome: float | None = None,
        add_start_verdict: bool | None = None,
    ) -> None: ...
    @property
    def form(self) -> RewardForm: ...
    @property
    def outcome_weight(self) -> float: ...
    @property
    def step_decay(self) -> float: ...
    @property
    def truncated_outcome(self) -> float: ...
    @property
    def add_start_verdict(self) -> bool: ...

class RolloutReward:
    """Parts of a rollout's reward, and `total` = (step + outcome) + start."""

    @property
    def step(self) -> float: ...
    @property
    def outcome(self) -> float: ...
    @property
    def start(self) -> float: ...
    @property
    def total(self) -> float: ...

def rollout_reward(
    verdicts: Sequence[float],
    outcome: float | None,
    *,
    start_verdict: float = 0.0,
    config: RewardConfig = ...,
) -> RolloutReward:
    """Reward of one rollout.

    Args:
        verdicts: of its steps in order, each in [-1, 1]; 0: none.
        outcome: in [-1, 1]; None: cut off before an answer.
        start_verdict: of the node it starts from.
        config: RewardConfig() by default.

    Raises:
        ValueError: a verdict or the outcome outside [-1, 1].
    """

def rollout_rewards(
    verdicts: NDArray[np.float64],
    offsets: NDArray[np.int64],
    outcomes: NDArray[np.float64],
    *,
    start_verdicts: NDArray[np.float64] | None = None,
    config: RewardConfig = ...,
) -> NDArray[np.void]:
    """Rewards of n rollouts, [n] with the float64 fields step, outcome, start, total.

    Args:
        verdicts: [total], those of rollout i at [offsets[i], offsets[i + 1]).
        offsets: [n + 1], from 0 to total.
        outcomes: [n]; NaN: cut off before an answer.
        start_verdicts: [n]; None: no start node has a verdict.
        config: RewardConfig() by default.

    Raises:
        TypeError: a dtype other than these.
        ValueError: an array that is not one-dimensional and contiguous, lengths or offsets that do
            not fit together, a verdict or outcome outside [-1, 1].
    """

class Aggregation:
    """How several numbers become one: step scores a return, returns the value of a node."""

    sum: Aggregation
    mean: Aggregation
    max: Aggregation
    min: Aggregation
    product: Aggregation
    last: Aggregation

class Channel:
    """One of several values that a node keeps at once; gamma in [0, 1] is its decay per level."""

    def __init__(self, how: Aggregation = ..., *, gamma: float = 1.0) -> None: ...
    @property
    def how(self) -> Aggregation: ...
    @property
    def gamma(self) -> float: ...

def identity(how: Aggregation) -> float:
    """What a node holds before its first return."""

def absorbed(accumulated: float, value: float, how: Aggregation) -> float:
    """What a node holds after one more return. ValueError: the value is not finite."""

def value_of(accumulated: float, returns: int, how: Aggregation) -> float:
    """Value of a node after `returns` returns. ValueError: there were none, and it is no sum."""

def path_return(scores: Sequence[float], how: Aggregation) -> float:
    """The scores of a path as one number. ValueError: no scores, or one that is not finite."""

def decayed(value: float, gamma: float, distance: int) -> float:
    """The value times gamma^distance, a repeated product. ValueError: gamma outside [0, 1]."""

def mixed(value: float, simulated: float, alpha: float) -> float:
    """(1 - alpha) * value + alpha * simulated. ValueError: alpha outside [0, 1]."""

def visit_weighted_mean(values: Sequence[float], visits: Sequence[int], own: float) -> float:
    """Mean of the children's values by visits; `own` while none was visited."""

def backup_node(
    accumulated: Sequence[float], values: Sequence[float], channels: Sequence[Channel]
) -> tuple[list[float], list[float]]:
    """One step of a backup: what the node then holds, and the values for its parent; [channels].

    Raises:
        ValueError: unequal lengths, a value that is not finite, a gamma outside [0, 1].
    """

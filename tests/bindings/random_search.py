"""Random small searches for `plain_search.py`, to compare the compiled forest with.

A world decides what is told about a ticket by its kind, its handle and how many tickets of that
kind its node had before, so that it does not matter who asks, and when.
"""

import math
import random
import runpy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("plain_search.py"))))

RULES = ("uct", "uct_released", "puct", "gumbel")
FIRST_PLAYS = ("first", "value", "parent", "prior")
BACKUPS = ("mean", "sum", "max", "min", "product", "last", "children")
HOWS = BACKUPS[:-1]  # of a channel
SOURCES = ("value", "step", "outcome", "start", "total")
GAMMAS = (0.0, 0.5, 0.9, 1.0)
OUTCOMES = (math.nan, -1.0, 0.0, 0.5, 1.0)
VALUES = (  # all of a world from one of these: many ties, and the extremes
    (0.5,),
    (0.0, 1.0),
    (-1.0, 0.0, 1.0),
    (0.0, -0.0, 5e-324),
    (0.1, 0.2, 0.3, 0.7),
    (-1e300, -1.0, 0.0, 1e-300, 1e300),
)
PRIORS = (  # likewise; empty: none are told
    (),
    (0.25,),
    (0.0, 0.5),
    (0.0,),
    (0.1, 0.2, 0.7),
    (1e-45, 1e-30, 1.0, 3.0),
)


def often(rng: random.Random, usual: Any, *others: Any) -> Any:
    """The usual one in half of the cases."""
    return usual if rng.random() < 0.5 else rng.choice(others)


def random_reward(rng: random.Random) -> Any:
    truncated, start = rng.choice((-1.0, 0.0, 0.3)), rng.random() < 0.5
    if rng.random() < 0.5:
        return plain.Reward(form="released", truncated_outcome=truncated, add_start_verdict=start)
    return plain.Reward(
        outcome_weight=rng.choice((0.0, 1.0, 2.5)),
        step_decay=rng.choice((0.0, 0.7, 1.0)),
        truncated_outcome=truncated,
        add_start_verdict=start,
    )


def random_choice_of_child(rng: random.Random) -> dict[str, Any]:
    rule = rng.choice(RULES)
    return {
        "rule": rule,
        "c_uct": often(rng, math.sqrt(2), 0.0, 0.3, 10.0),
        "c_base": often(rng, 19652.0, 1.0, 50.0),
        "c_init": often(rng, 1.25, 0.0, 5.0),
        "first_play": "first" if rule == "uct" else rng.choice(FIRST_PLAYS),
        "first_play_value": rng.choice((-1.0, 0.0, 0.2, 0.5, 1e3)),
        "min_max": often(rng, "none", "siblings", "tree"),
        "virtual_loss": rng.choice((0.0, 1.0, 3.5)),
        "dual_target": rng.random() < 0.3,
        "dirichlet_fraction": rng.choice((0.0, 0.25, 1.0)),
        "gumbel_considered": rng.choice((1, 2, 3, 4, 16)),
        "gumbel_value_scale": rng.choice((0.0, 0.1, 1.0)),
        "gumbel_maxvisit_init": rng.choice((0.0, 50.0)),
    }


def random_growth(rng: random.Random) -> dict[str, Any]:
    return {
        "widening": often(rng, 0.0, 0.3, 1.0, 2.0, 10.0),
        "widening_alpha": rng.choice((0.0, 0.25, 0.5, 1.0)),
        "max_children": rng.choice((1, 2, 3, 5, 64)),
        "solver": rng.random() < 0.4,
        "tickets": rng.choice(("together", "apart", "lazy")),
        "max_unverified": rng.choice((1, 2, 5, 16)),
        "merge_duplicates": rng.random() < 0.5,
        "max_in_flight": rng.choice((1, 2, 4, 16)),
        "visits_per_flight": rng.choice((1, 2, 16)),
        "max_attempts": rng.choice((1, 2, 3)),
        "failed_value": rng.choice((-1.0, 0.0, 0.25)),
    }


def random_backup(rng: random.Random) -> dict[str, Any]:
    backup = often(rng, *BACKUPS)
    return {
        "backup": backup,
        "gamma": 1.0 if backup == "children" else often(rng, 1.0, *GAMMAS[:-1]),
        "unfinished": often(rng, "unobserved", "virtual_loss")
        if backup == "mean"
        else "unobserved",
        "channels": tuple(
            (rng.choice(SOURCES), rng.choice(HOWS), rng.choice(GAMMAS))
            for _ in range(often(rng, 0, 1, 2, 3))
        ),
        "reward": random_reward(rng),
    }


def random_stops(rng: random.Random) -> dict[str, Any]:
    return {
        "stop_positives": often(rng, 0, 1, 2, 3),
        "stop_negatives": often(rng, 0, 1, 2, 3),
        "stop_correct": rng.random() < 0.1,
        "stop_converged": rng.random() < 0.2,
    }


def random_settings(rng: random.Random) -> Any:
    parts = (random_choice_of_child, random_growth, random_backup, random_stops)
    chosen = {name: x for part in parts for name, x in part(rng).items()}
    if reads_priors(chosen):
        chosen["dirichlet_alpha"] = often(rng, 0.0, 0.03, 0.3, 1.0, 10.0)
    return plain.Settings(**chosen)


def reads_priors(settings: dict[str, Any]) -> bool:
    """Only such searches may be told priors, or mix noise into them."""
    first_play = settings["first_play"]
    reduced = first_play == "parent" and settings["first_play_value"] != 0
    return settings["rule"] in ("puct", "gumbel") or first_play == "prior" or reduced


def random_budgets(rng: random.Random) -> Any:
    bounds = {
        "evaluations": (1, 10, 30),
        "nodes": (1, 10, 40),
        "model_calls": (1.0, 3.0, 20.0),
        "tokens": (17.0, 500.0),
        "tool_calls": (1.0, 10.0),
        "seconds": (0.3, 12.5),
    }
    return plain.Budgets(
        **{name: rng.choice(some) for name, some in bounds.items() if rng.random() < 0.07}
    )


@dataclass
class World:
    seed: int
    settings: Any
    looked: dict[tuple[str, int, int], Any] = field(default_factory=dict)

    def rng(self, *what: Any) -> random.Random:
        return random.Random(f"{self.seed} {what}")

    @cached_property
    def habits(self) -> SimpleNamespace:
        rng = self.rng("habits")
        return SimpleNamespace(
            values=rng.choice(VALUES),
            priors=rng.choice(PRIORS),
            most=rng.choice((1, 2, 4, 9)),
            names=rng.choice((1, 3, 10**6)),  # that the children of a node can have
            ends=rng.choice((0.0, 0.1, 0.3, 0.8)),
            flagged=rng.choice((0.0, 0.5, 1.0)),  # of the ends, told as such with their parent
            cancelled=rng.choice((0.0, 0.0, 0.2)),
            failing=rng.choice((0.0, 0.0, 0.3)),
            outcomes=often(rng, (math.nan,), OUTCOMES, (-1.0, 1.0)),
            rollouts=rng.choice((0.0, 0.7)),
            costs=rng.choice((0.0, 0.5)),
        )

    def look(self, kind: str, handle: int, nth: int) -> Any:
        key = kind, handle, nth
        if key not in self.looked:
            self.looked[key] = self.found(*key)
        return self.looked[key]

    def found(self, kind: str, handle: int, nth: int) -> Any:
        rng, habits = self.rng(kind, handle, nth), self.habits
        told = {
            "cancelled": rng.random() < habits.cancelled,
            "fails": rng.randint(1, 3) if rng.random() < habits.failing else 0,
            "cost": self.cost(rng),
        }
        if kind != "expand":
            told |= self.value(kind, rng)
        if kind != "verify":
            told |= self.children(kind, handle, nth)
        return plain.Found(**told)

    def cost(self, rng: random.Random) -> tuple[float, float, float, float]:
        if rng.random() >= self.habits.costs:
            return 0.0, 0.0, 0.0, 0.0
        return (
            float(rng.randint(0, 2)),
            rng.choice((0.0, 17.0, 100.0)),
            float(rng.randint(0, 1)),
            rng.choice((0.0, 0.1, 2.5)),
        )

    # Values.

    def value(self, kind: str, rng: random.Random) -> dict[str, Any]:
        outcome = rng.choice(self.habits.outcomes)
        if kind == "verify" and self.fits() and rng.random() < self.habits.rollouts:
            steps = tuple(rng.choice((-1.0, 0.0, 1.0, 0.3)) for _ in range(rng.randint(0, 4)))
            start = rng.choice((-1.0, 0.0, 1.0, 0.1))
            return {"verdicts": steps, "outcome": outcome, "start_verdict": start}
        return {
            "value": self.number(rng, self.settings.backup),
            "outcome": outcome,
            "channel_values": tuple(self.number(rng, how) for _, how, _ in self.settings.channels),
        }

    def number(self, rng: random.Random, how: str) -> float:
        x = rng.choice(self.habits.values)
        return max(-1.0, min(1.0, x)) if how == "product" else x

    def fits(self) -> bool:
        """Whether products take its reward, whatever it is."""
        s = self.settings
        small = {"step", "start"} | ({"outcome"} if s.reward.outcome_weight <= 1 else set())
        hows = [("total", s.backup), *((source, how) for source, how, _ in s.channels)]
        return all(source in small for source, how in hows if how == "product")

    # Children.

    def is_end(self, handle: int) -> bool:
        return self.rng("end", handle).random() < self.habits.ends

    def children(self, kind: str, handle: int, nth: int) -> dict[str, Any]:
        """None at an end; sometimes none where there are some already."""
        if self.is_end(handle):
            return {}
        rng, habits = self.rng("children", kind, handle, nth), self.habits
        had = self.told_before(kind, handle, nth)
        room = self.settings.max_children - had
        count = min(room, rng.randint(0 if had else 1, habits.most))
        handles = [self.name(handle, rng) for _ in range(count)]
        return {
            "handles": tuple(handles),
            "priors": tuple(rng.choice(habits.priors) for _ in handles) if habits.priors else None,
            "terminal": tuple(self.is_end(h) and rng.random() < habits.flagged for h in handles),
        }

    def name(self, parent: int, rng: random.Random) -> int:
        which = rng.randrange(self.habits.names)
        return self.rng("name", parent, which).getrandbits(64) - 2**63

    def told_before(self, kind: str, handle: int, nth: int) -> int:
        """Children that a node of this handle has when this ticket of it is told."""
        if kind == "evaluate":
            return 0
        first = "evaluate" if self.settings.tickets == "together" else "expand"
        earlier = [("expand", i) for i in range(nth)]
        if first == "evaluate":
            earlier.insert(0, (first, self.first_told(handle)))
        told = [self.look(kind, handle, i) for kind, i in earlier]
        handles = [h for found in told if not found.cancelled for h in found.handles]
        return len(set(handles) if self.settings.merge_duplicates else handles)

    def first_told(self, handle: int) -> int:
        nth = 0
        while self.look("evaluate", handle, nth).cancelled:
            nth += 1
        return nth


def random_search(rng: random.Random) -> Any:
    """A tree that has not run."""
    settings = random_settings(rng)
    world = World(rng.getrandbits(62), settings)
    return plain.PlainTree(
        world.look,
        root_handle=often(rng, 0, -1, -(2**63), 2**63 - 1),
        simulations=often(rng, rng.randint(1, 60), 1, 2, 5),
        settings=settings,
        budgets=random_budgets(rng),
        seed=often(rng, 0, 1, 2**64 - 1, rng.getrandbits(64)),
    )

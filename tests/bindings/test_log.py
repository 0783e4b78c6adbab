"""The log of a forest: replay, crashes, damage, strange files; and searches told anew from it."""

import random
import resource
import runpy
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tercet._log as log
from tercet import Forest, LogError, LoggedForest, RewardConfig, RewardForm, TicketError, rescore

HERE = Path(__file__).parent
rules = SimpleNamespace(**runpy.run_path(str(HERE / "test_forest_rules.py")))


def logged_search(path: Path, seed: int, budgets: bool = True) -> tuple[LoggedForest, Any]:
    """A random search that is driven to its end, and opened again at any time."""
    rng = random.Random(f"log {seed}")
    tree = rules.worlds.random_search(rng)
    if not budgets:
        tree.budgets = rules.worlds.plain.Budgets()
    forest = LoggedForest(path, **rules.forest_of(tree.settings).settings | {"record": True})
    worker = rules.Worker(forest, {rules.add(forest, tree): tree}, rng)
    while not worker.forest.is_finished(0):
        worker.take(worker.forest.ask(rng.randint(0, 6)))
        worker.answer()
        if rng.random() < 0.05:
            worker.forest = reopened(worker.forest, path)
    return worker.forest, tree


def reopened(forest: LoggedForest, path: Path) -> LoggedForest:
    before = forest.to_bytes()
    forest.close()
    again = LoggedForest(path)
    assert again.to_bytes() == before
    assert again.torn_bytes == 0
    return again


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_a_log_is_the_search_that_wrote_it(tmp_path, first):
    for seed in range(first, first + 50):
        path = tmp_path / f"{seed}.log"
        forest, tree = logged_search(path, seed)
        forest = reopened(forest, path)
        tree.run()
        rules.compared(forest, 0, tree)
        forest.close()


def tell(forest: Any, leaves: Any, value: float = 0.5) -> None:
    handles = np.repeat(leaves.handle * 10, 2) + np.tile([1, 2], len(leaves))
    counts = np.full(len(leaves), 2, np.uint32)
    forest.tell(leaves.ticket, np.full(len(leaves), value), counts, handles)


def small_log(path: Path, simulations: int = 4) -> list[tuple[int, bytes]]:
    """The length of the file and the forest after each call."""
    states = []
    with LoggedForest(path, c_uct=0.7, channels=[("total", "mean", 0.9)]) as forest:
        states.append((path.stat().st_size, forest.to_bytes()))
        forest.add_tree(1, simulations, seed=2**64 - 1, tokens=1e6)
        states.append((path.stat().st_size, forest.to_bytes()))
        while len(leaves := forest.ask(4)):
            states.append((path.stat().st_size, forest.to_bytes()))
            forest.tell(
                leaves.ticket,
                np.full(len(leaves), 0.5),
                np.full(len(leaves), 2, np.uint32),
                np.arange(2 * len(leaves)) + 10 * leaves.handle[0],
                terminal=np.zeros(2 * len(leaves), bool),
                channels=np.full((len(leaves), 1), 0.25),
                costs=np.full((len(leaves), 4), 1.0),
            )
            states.append((path.stat().st_size, forest.to_bytes()))
        states.append((path.stat().st_size, forest.to_bytes()))
    return states


def test_every_call_is_replayed(tmp_path):
    path = tmp_path / "a.log"
    forest = LoggedForest(path, max_in_flight=4, visits_per_flight=1, stop_correct=True)
    easy, hard, gone = (forest.add_tree(root, 12) for root in (1, 2, 3))
    forest.remove_tree(gone)
    forest = reopened(forest, path)
    leaves = forest.ask(2)
    forest.fail(leaves.ticket[:1], costs=np.ones((1, 4)))
    forest.cancel(leaves.ticket[1:])
    forest = reopened(forest, path)
    assert forest.counters().failures == 1
    assert len(forest.ask(9)) == 2
    forest = reopened(forest, path)
    assert forest.recall() == 2
    forest = reopened(forest, path)
    while len(leaves := forest.ask(9)):
        solved = np.where((leaves.tree == easy) & (leaves.depth == 2), 1.0, np.nan)
        children = np.repeat(leaves.handle * 10, 2) + np.tile([1, 2], len(leaves))
        counts = np.full(len(leaves), 2, np.uint32)
        forest.tell(leaves.ticket, np.ones(len(leaves)), counts, children, outcomes=solved)
    assert forest.reallocate() > 0
    forest = reopened(forest, path)
    while len(leaves := forest.ask(9)):
        tell(forest, leaves)
    landings, simulations = forest.landings(hard), forest.status(hard).simulations
    forest.add_tree_along(2, simulations, landings)
    forest.extend(hard, 3)
    forest = reopened(forest, path)
    while len(leaves := forest.ask(9)):
        tell(forest, leaves)
    choice = forest.choice(hard)
    assert choice is not None
    forest.reroot(hard, choice, 5)
    forest = reopened(forest, path)
    with open(path, "rb") as file:
        names = {name for _, name, _ in log.LogReader(file).calls()}
    assert set(log.CALLS) - names == {
        *("tell_children", "tell_values", "tell_verdicts", "tell_outcome")  # in random searches
    }


def test_every_method_of_a_forest_is_logged_or_looks_only():
    looks = {"settings", "is_finished", "status", "columns", "landings", "choice", "counters"}
    looks |= {"to_bytes", "save"}
    ours = {name for name in dir(LoggedForest) if not name.startswith("_")}
    theirs = {name for name in dir(Forest) if not name.startswith("_")}
    assert theirs - {"from_bytes", "load"} == set(log.CALLS) | looks
    assert ours - theirs == {"sync", "close"}
    assert theirs - ours == {"from_bytes", "load"}


def test_refused_calls_and_idle_questions_are_not_logged(tmp_path):
    path = tmp_path / "a.log"
    forest = LoggedForest(path)
    forest.add_tree(1, 3)
    leaves = forest.ask(1)
    size = path.stat().st_size
    with pytest.raises(TypeError):
        forest.ask("many")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="simulations"):
        forest.add_tree(1, 0)
    with pytest.raises(TicketError):
        tell(forest, Leaf(leaves))
    with pytest.raises(IndexError):
        forest.remove_tree(7)
    assert path.stat().st_size == size
    assert not len(forest.ask(4))
    size = path.stat().st_size
    for _ in range(5):
        assert not len(forest.ask(4))
    assert path.stat().st_size == size
    forest = reopened(forest, path)
    tell(forest, leaves)
    assert len(forest.ask(4)) == 1
    reopened(forest, path).close()


class Leaf:
    """A leaf that was never handed out."""

    def __init__(self, leaves: Any):
        self.ticket, self.handle = leaves.ticket + np.uint64(2), leaves.handle

    def __len__(self) -> int:
        return 1


# Crashes.


def test_a_record_that_is_torn_at_any_byte_is_cut_off(tmp_path):
    path, torn = tmp_path / "whole.log", tmp_path / "torn.log"
    states = small_log(path)
    whole = path.read_bytes()
    starts = [0, *(end for end, _ in states)]
    for i in (0, 1, 2, 3, len(states) - 1):  # the settings, a tree, a question, a telling
        start, end = starts[i], states[i][0]
        for cut in range(start, end):
            torn.write_bytes(whole[:cut])
            with LoggedForest(torn, c_uct=0.7, channels=[("total", "mean", 0.9)]) as forest:
                assert forest.to_bytes() == states[max(i - 1, 0)][1]
                assert forest.torn_bytes == cut - start
                assert torn.read_bytes() == whole[: max(start, starts[1])]
    for zeros in (1, 11, 12, 5000):
        torn.write_bytes(whole + bytes(zeros))
        with LoggedForest(torn) as forest:
            assert (forest.torn_bytes, torn.read_bytes()) == (zeros, whole)


ENDLESS = """
import sys
import numpy as np
from tercet import LoggedForest
forest = LoggedForest(sys.argv[1], max_in_flight=4, visits_per_flight=1)
while True:
    if not len(leaves := forest.ask(3)):
        forest.add_tree(1, 50)
        continue
    print(flush=True)
    handles = np.repeat(leaves.handle % 1000 * 10, 2) + np.tile([1, 2], len(leaves))
    counts = np.full(len(leaves), 2, np.uint32)
    forest.tell(leaves.ticket, leaves.handle % 7 / 7, counts, handles)
"""


def test_kill_9_while_appending_loses_no_call_that_returned(tmp_path):
    rng = random.Random(9)
    killed = []
    for i in range(20):
        path = tmp_path / f"{i}.log"
        command = [sys.executable, "-c", ENDLESS, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            asked = 0
            for _ in range(rng.randint(1, 600)):
                asked += len(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            asked += len(process.stdout.read())
        with LoggedForest(path) as forest, open(path, "rb") as file:
            names = [name for _, name, _ in log.LogReader(file).calls()]
            assert asked <= names.count("tell") + 1  # the last question may have no answer yet
            assert names.count("ask") >= asked
            killed.append(path.read_bytes())
            forest.recall()
            while len(leaves := forest.ask(3)):
                tell(forest, leaves)
        reopened(forest, path).close()
    longest = max(killed, key=len)
    assert all(longest.startswith(data) for data in killed)


def test_a_write_that_fails_leaves_the_call_before(tmp_path):
    path = tmp_path / "a.log"
    forest = LoggedForest(path)
    forest.add_tree(1, 9)
    leaves = forest.ask(1)
    before, size = forest.to_bytes(), path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tell(forest, leaves)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size + 20
    with pytest.raises(LogError, match="a call before was not written"):
        forest.ask(1)
    forest.close()
    with LoggedForest(path) as again:
        assert (again.torn_bytes, again.to_bytes()) == (20, before)
        tell(again, leaves)
        assert len(again.ask(1)) == 1


# Damage, and files of others.


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.log"
    states = small_log(path, simulations=2)
    whole = path.read_bytes()
    starts = [20, *(end for end, _ in states)]
    rng = random.Random(1)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(LogError) as raised:
            LoggedForest(path)
        assert raised.value.position == (
            (0 if at < 16 else 16) if at < 20 else max(x for x in starts if x <= at)
        )
        assert path.stat().st_size == len(whole)


def test_a_record_stands_only_where_it_was_written(tmp_path):
    path = tmp_path / "a.log"
    states = small_log(path)
    whole = path.read_bytes()
    ends = [end for end, _ in states]
    one, two, three = (whole[ends[i] : ends[i + 1]] for i in (1, 2, 3))
    for middle in (b"", one + one + two, two + one, one + three):
        path.write_bytes(whole[: ends[1]] + middle + whole[ends[3] :])
        with pytest.raises(LogError, match="is damaged"):
            LoggedForest(path)


def forged(path: Path, *payloads: bytes) -> None:
    data, crc = log.HEADER, 0
    for payload in payloads:
        length = struct.pack("<Q", len(payload))
        check = zlib.crc32(length, crc)
        crc = zlib.crc32(payload, check)
        data += length + struct.pack("<I", check) + payload + struct.pack("<I", crc)
    path.write_bytes(data)


def payloads_of(path: Path) -> list[bytes]:
    with open(path, "rb") as file:
        return [log.encoded(name, arguments) for _, name, arguments in log.LogReader(file).calls()]


def test_what_a_stranger_wrote_is_a_log_or_an_error(tmp_path):
    path = tmp_path / "a.log"
    small_log(path)
    whole, payloads = path.read_bytes(), payloads_of(path)
    forged(path, *payloads)
    assert path.read_bytes() == whole
    rng = random.Random(2)
    outcomes = {"log": 0, "error": 0}
    for _ in range(1500):
        strange = list(payloads)
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(strange))
            payload = bytearray(strange[i])
            for _ in range(rng.randint(0, 2)):
                payload[rng.randrange(len(payload))] = rng.choice(
                    (0, 1, 127, 255, rng.getrandbits(8))
                )
            at = rng.randrange(len(payload) + 1)
            strange[i] = rng.choice(
                (bytes(payload), bytes(payload[:at]), strange[rng.randrange(len(strange))])
            )
            strange[i] = strange[i] or b"\0"
        forged(path, *strange)
        try:
            LoggedForest(path).close()
            outcomes["log"] += 1
        except LogError:
            outcomes["error"] += 1
    assert outcomes["error"] > 1000
    assert outcomes["log"] > 10


def test_lengths_of_strangers_are_bounded(tmp_path):
    path = tmp_path / "a.log"
    small_log(path)
    settings = payloads_of(path)[0]
    tickets = bytes([log.NAMES.index("recall") - 1, log.ARRAY, 0])  # cancel, of uint64
    for arguments, match in (
        (tickets + struct.pack("<BQ", 1, 2**61) + b"\0", "longer than itself"),
        (tickets + struct.pack("<BQQ", 2, 2**63, 0) + b"\0", "impossible shape"),
        (tickets + struct.pack("<B", 255) + b"\0", "unknown sort"),
        (bytes([99]), "unknown call"),
        (settings, "settings belong first"),
        (b"", "longer than itself"),
        (bytes([log.NAMES.index("recall"), 0]), "bytes behind"),
    ):
        forged(path, settings, arguments)
        with pytest.raises(LogError, match=match):
            LoggedForest(path)
    for text in ("{}", "[" * 100_000, "1" * 5000, '{"reward": {"form": "x"}}', "null"):
        forged(path, log.encoded("settings", {"json": text}))
        with pytest.raises(LogError, match="settings that no forest has"):
            LoggedForest(path)
    forged(path, log.encoded("recall", {}))
    with pytest.raises(LogError, match="settings belong first"):
        LoggedForest(path)


def test_other_leaves_and_strange_truth_values_are_refused(tmp_path):
    path = tmp_path / "a.log"
    small_log(path)
    payloads = payloads_of(path)
    other = payloads[2][:-9] + (1).to_bytes(9, "little")  # the checksum of the leaves
    forged(path, *payloads[:2], other)
    with pytest.raises(LogError, match="hands out other leaves"):
        LoggedForest(path)
    shape = struct.pack("<BBBQ", log.ARRAY, log.DTYPES.index(np.dtype(bool)), 1, 2)
    assert payloads[3].count(shape + bytes(2)) == 1
    forged(path, *payloads[:3], payloads[3].replace(shape + bytes(2), shape + b"\0\2"))
    with pytest.raises(LogError, match="truth values"):
        LoggedForest(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.log"
    for data, match in (
        (b"PK\3\4", "no log of a forest"),
        (Forest().to_bytes(), "no log of a forest"),
        (log.HEADER[:16] + b"\2\0\0\0", "version 2"),
    ):
        path.write_bytes(data)
        with pytest.raises(LogError, match=match):
            LoggedForest(path)
        assert path.read_bytes() == data
    with pytest.raises(LogError, match="not a regular file"):
        LoggedForest(tmp_path)


def test_a_log_keeps_its_settings_and_has_one_writer(tmp_path):
    path = tmp_path / "a.log"
    with pytest.raises(ValueError, match="c_uct"):
        LoggedForest(path, c_uct=-1.0)
    with pytest.raises(ValueError, match="record must be True"):
        LoggedForest(path, record=False)
    assert not path.exists()
    forest = LoggedForest(path, rule="puct", first_play="value")
    with pytest.raises(LogError, match="somebody else"):
        LoggedForest(path)
    forest.close()
    with pytest.raises(LogError, match="other settings: gamma"):
        LoggedForest(path, first_play="value", gamma=0.5)
    with LoggedForest(path, first_play="value") as forest:
        forest.sync()
        assert forest.settings["rule"] == "puct"
    with pytest.raises(LogError, match="is closed"):
        forest.recall()


# Told anew.


def told_by_the_world(along: LoggedForest, tree: Any, settings: dict[str, Any]) -> Forest:
    """The tree once more, told by its world instead of its log."""
    forest = Forest(**settings)
    landings, simulations = along.landings(0), along.status(0).simulations
    forest.add_tree_along(tree.root_handle, simulations, landings, seed=tree.seed)
    return rules.drive(forest, {0: tree}, random.Random(1))


def shown(forest: Forest | LoggedForest) -> dict[str, bytes]:
    columns = forest.columns(0)
    names = [name for name in dir(columns) if not name.startswith("_")]
    return {name: getattr(columns, name).tobytes() for name in names}


def other_backup(settings: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    hows = {settings["backup"], *(how for _, how, _ in settings["channels"])}
    changed: dict[str, Any] = {"unfinished": "unobserved", "failed_value": 0.125}
    changed["backup"] = rng.choice(("mean", "sum", "max", "min", "last", "children"))
    changed["gamma"] = 1.0 if changed["backup"] == "children" else rng.choice((0.0, 0.7, 1.0))
    if "product" not in hows:
        changed["reward"] = rng.choice(
            (
                RewardConfig(form=RewardForm.released, add_start_verdict=True),
                RewardConfig(outcome_weight=0.25, step_decay=0.5, truncated_outcome=-0.5),
            )
        )
    changed["channels"] = [
        (source, how, rng.choice((0.5, 1.0))) for source, how, _ in settings["channels"]
    ]
    return changed


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_a_search_told_anew_is_one_that_is_told_the_same(tmp_path, first):
    for seed in range(first, first + 50):
        path = tmp_path / f"{seed}.log"
        forest, tree = logged_search(path, seed)
        with forest:
            same = rescore(path)
            assert shown(same.forest) == shown(forest), seed
            assert (same.trees, same.unknown, same.ended, same.torn_bytes) == ({0: 0}, 0, set(), 0)
            changed = other_backup(forest.settings, random.Random(seed))
            anew = rescore(path, **changed)
            wanted = told_by_the_world(forest, tree, anew.forest.settings)
            assert shown(anew.forest) == shown(wanted), seed
            assert anew.unknown == 0
            assert anew.answered == same.answered
            assert anew.forest.is_finished(0)


def other_choice(settings: Any, rng: random.Random) -> dict[str, Any]:
    """Of children; nothing that decides whether priors are read."""
    return {
        "c_uct": rng.choice((0.0, 0.1, 2.0)),
        "c_init": rng.choice((0.1, 3.0)),
        "min_max": rng.choice((settings.min_max, "siblings")),
        "gumbel_value_scale": rng.choice((0.3, 5.0)),
        "virtual_loss": rng.choice((settings.virtual_loss, 0.5)),
        "dual_target": rng.random() < 0.3,
        "solver": rng.random() < 0.5,
    }


def test_a_free_search_is_a_new_one_as_far_as_the_log_knows(tmp_path):
    known = unknown = others = 0
    for seed in range(300):
        path = tmp_path / f"{seed}.log"
        forest, tree = logged_search(path, seed)
        forest.close()
        same = rescore(path, along=False)
        assert same.unknown == 0, seed
        assert shown(same.forest) == shown(forest), seed
        changed = other_choice(tree.settings, random.Random(seed))
        other = rules.worlds.plain.PlainTree(
            tree.look,
            root_handle=tree.root_handle,
            simulations=tree.simulations,
            settings=replace(tree.settings, **changed),
            budgets=tree.budgets,
            seed=tree.seed,
        )
        fresh = Forest(**rules.forest_of(other.settings).settings | {"record": True})
        rules.add(fresh, other)
        fresh = rules.drive(fresh, {0: other}, random.Random(1))
        free = rescore(path, along=False, **changed)
        if free.unknown:
            unknown += 1
            assert (free.unknown, free.ended) == (1, {0})
            landings = free.forest.landings(0)
            assert landings.tolist() == fresh.landings(0)[: len(landings)].tolist(), seed
            assert free.forest.status(0).stop_reason != "simulations"
            assert free.forest.counters().in_flight == 0
        else:
            known += 1
            others += shown(fresh) != shown(same.forest)
            assert shown(free.forest) == shown(fresh), seed
    assert known > 100
    assert unknown > 10
    assert others > 20, others


def test_a_known_tree_under_another_gamma(tmp_path):
    with LoggedForest(tmp_path / "a.log") as forest:
        forest.add_tree(1, 3)
        for value in (0.5, 1.0, -1.0):
            tell(forest, forest.ask(1), value)
        anew = rescore(tmp_path / "a.log", gamma=0.5)  # while it is open
        assert forest.columns(0).total[:3].tolist() == [0.5, 1.0, -1.0]
        assert anew.forest.columns(0).total[:3].tolist() == [0.5 + 0.5 - 0.5, 1.0, -1.0]
        anew = rescore(tmp_path / "a.log", backup="max", gamma=0.25)
        assert anew.forest.columns(0).total[:3].tolist() == [0.5, 1.0, -1.0]


def rollouts(path: Path) -> LoggedForest:
    """A tree whose root has a reward of verdicts 1, -1, -1 and outcome 1, in two portions."""
    forest = LoggedForest(path, tickets="apart", channels=[("outcome", "sum", 1.0)])
    forest.add_tree(1, 1)
    leaves = forest.ask(4)
    to_expand = leaves.kind == 1
    none = np.zeros(0, np.int64)
    forest.tell_children(leaves.ticket[to_expand], np.zeros(1, np.uint32), none)
    ticket = leaves.ticket[~to_expand]
    forest.tell_verdicts(ticket, np.array([2], np.uint32), np.array([0.25]))
    forest.fail(ticket, costs=np.ones((1, 4)))  # and the verdict is gone
    forest.ask(4)
    forest.tell_verdicts(ticket, np.array([0], np.uint32), np.array([0.5]))
    forest.recall()
    forest.ask(4)
    forest.tell_verdicts(ticket, np.array([1], np.uint32), np.array([-1.0]))
    forest.tell_outcome(ticket, np.array([3], np.uint32), np.ones(1), costs=np.ones((1, 4)))
    steps = np.array([0, 2], np.uint32)
    forest.tell_verdicts(ticket.repeat(2), steps, np.array([1.0, -1.0]))
    return forest


def test_another_reward_counts(tmp_path):
    path = tmp_path / "a.log"
    rollouts(path).close()
    same = rescore(path)
    assert same.forest.columns(0).total.tolist() == [1.0]  # (1 - 1) / 2 + 1
    assert same.forest.status(0).spent.tokens == 2
    assert same.answered == 3
    anew = rescore(
        path,
        reward=RewardConfig(form=RewardForm.released),
        channels=[("step", "mean", 1.0), ("outcome", "mean", 1.0)],
    )
    assert anew.forest.columns(0).total.tolist() == [0.75]  # (1 - 1/2) / 2 + 1/2
    assert anew.forest.columns(0).channels.tolist() == [[0.25, 0.5]]


def test_values_of_channels_go_to_the_same_source(tmp_path):
    path = tmp_path / "a.log"
    sources = ("value", "step", "value")
    with LoggedForest(path, channels=[(source, "sum", 1.0) for source in sources]) as forest:
        forest.add_tree(1, 1)
        none = np.zeros(0, np.int64)
        channels = np.array([[1.0, 2.0, 3.0]])
        counts = np.zeros(1, np.uint32)
        forest.tell(forest.ask(1).ticket, np.zeros(1), counts, none, channels=channels)
    for wanted, held in (("step",), [2.0]), (("step", "value", "value"), [2.0, 1.0, 3.0]):
        anew = rescore(path, channels=[(source, "max", 0.5) for source in wanted])
        assert anew.forest.columns(0).channels.tolist() == [held]
    with pytest.raises(ValueError, match="channel 1 is of 'step'"):
        rescore(path, channels=[("step", "sum", 1.0), ("step", "mean", 1.0)])
    assert rescore(path, channels=()).forest.columns(0).channels.size == 0


def test_what_was_not_answered_ends_its_tree(tmp_path):
    path = tmp_path / "a.log"
    forest = LoggedForest(path)
    first, second = (forest.add_tree(root, 4) for root in (1, 2))
    tell(forest, forest.ask(2))
    leaves = forest.ask(2)
    assert leaves.tree.tolist() == [first, second]
    never = forest.add_tree(3, 4)
    forest.tell(leaves.ticket[:1], np.ones(1), np.zeros(1, np.uint32), np.zeros(0, np.int64))
    forest.remove_tree(first)
    forest.close()
    with open(path, "ab") as file:
        file.write(b"torn")
    for along in (True, False):
        found = rescore(path, along=along)
        assert found.trees == {first: 0, second: 1, never: 2}
        assert found.ended == ({second, never} if along else {first, second, never})
        assert (found.unknown, found.answered, found.torn_bytes) == (len(found.ended), 3, 4)
        assert [found.forest.status(i).committed for i in range(3)] == [2, 1, 0]
        assert found.forest.counters().in_flight == 0
    assert rescore(path, trees=[second]).trees == {second: 0}


def grown(path: Path, when: str) -> LoggedForest:
    forest = LoggedForest(path, max_in_flight=4, visits_per_flight=1)
    tree = forest.add_tree(1, 10)
    rng = random.Random(3)
    while len(leaves := forest.ask(rng.randint(1, 4))):
        committed = forest.status(tree).committed
        if when == "early" and committed >= 3:
            forest.extend(tree, 7)
            when = ""
        if when == "late" and committed + forest.status(tree).in_flight == 10:
            forest.extend(tree, 7)
            when = ""
        values = leaves.handle * 0x9E3779B97F4A7C % 97 / 97
        handles = np.repeat(leaves.handle * 3 % 99991, 3) + np.tile([1, 2, 3], len(leaves))
        forest.tell(leaves.ticket, values, np.full(len(leaves), 3, np.uint32), handles)
        if when == "finished" and forest.is_finished(tree):
            forest.extend(tree, 7)
            when = ""
    assert when == ""
    return forest


def test_trees_that_were_extended(tmp_path):
    for when in ("early", "finished"):
        path = tmp_path / f"{when}.log"
        forest = grown(path, when)
        forest.close()
        assert forest.status(0).committed == 17
        for along in (True, False):
            found = rescore(path, along=along)
            assert shown(found.forest) == shown(forest)
            assert found.unknown == 0
    with pytest.raises(ValueError, match="tree 0 was extended while it ran"):
        rescore(tmp_path / "early.log", along=False, stop_converged=True)
    grown(tmp_path / "late.log", "late").close()
    for along in (True, False):
        with pytest.raises(ValueError, match="tree 0 was extended when all its simulations"):
            rescore(tmp_path / "late.log", along=along)


def test_simulations_of_others_and_new_roots(tmp_path):
    path = tmp_path / "a.log"
    with LoggedForest(path, stop_correct=True) as forest:
        easy, hard = (forest.add_tree(root, 12) for root in (1, 2))

        def run() -> None:
            while len(leaves := forest.ask(9)):
                solved = np.where((leaves.tree == easy) & (leaves.depth == 2), 1.0, np.nan)
                children = np.repeat(leaves.handle * 10, 2) + np.tile([1, 2], len(leaves))
                counts = np.full(len(leaves), 2, np.uint32)
                values = leaves.handle % 7 / 7
                forest.tell(leaves.ticket, values, counts, children, outcomes=solved)

        run()
        assert forest.reallocate() > 0
        run()
        found = rescore(path, backup="max")
        for tree in (easy, hard):
            columns = found.forest.columns(found.trees[tree])
            assert columns.visits.tolist() == forest.columns(tree).visits.tolist()
        with pytest.raises(ValueError, match="tree 0 took part in reallocate"):
            rescore(path, along=False)
        choice = forest.choice(hard)
        assert choice is not None
        forest.reroot(hard, choice, 2)
        run()
        with pytest.raises(ValueError, match=r"tree 1 was re-rooted.*trees= leaves it out"):
            rescore(path)
        assert rescore(path, trees=[easy]).trees == {easy: 0}


def test_what_cannot_be_told_anew_is_refused(tmp_path):
    path = tmp_path / "a.log"
    with LoggedForest(path, nodes=1000.0) as forest:
        forest.add_tree(1, 3)
        while len(leaves := forest.ask(1)):
            tell(forest, leaves, 2.0)
    with pytest.raises(ValueError, match="c_uct, widening may change what is asked about"):
        rescore(path, c_uct=0.5, widening=1.0, gamma=0.5)
    assert rescore(path, c_uct=forest.settings["c_uct"]).unknown == 0
    with pytest.raises(ValueError, match=r"nodes bound all trees.*give nodes=None"):
        rescore(path, along=False)
    assert rescore(path, along=False, nodes=None).unknown == 0
    with pytest.raises(ValueError, match="where they are multiplied"):
        rescore(path, backup="product")
    with pytest.raises(ValueError, match="channel 0 is of 'step', of which nothing was told"):
        rescore(path, channels=[("step", "mean", 1.0)])
    with pytest.raises(TypeError, match="c_utc"):
        rescore(path, c_utc=1.0)
    with pytest.raises(IndexError, match="no tree 7"):
        rescore(path, trees=[7])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="ends before its settings"):
        rescore(path)

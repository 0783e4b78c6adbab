"""The log of a forest: replay, crashes, damage, strange files; and searches told anew from it."""

import random
import resource
import runpy
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tercet._log as log
from tercet import Forest, LogError, LoggedForest, TicketError

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

"""Snapshots of a forest: what continues equals what was never interrupted; damage is refused."""

import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet import Forest, SnapshotError

OPTIONS: dict[str, Any] = {"max_in_flight": 5, "visits_per_flight": 2, "max_attempts": 3}
HEADER = struct.Struct("<8sQQQ")


def look(handle):
    rng = random.Random(int(handle))
    return rng.random(), [rng.getrandbits(40) for _ in range(rng.choice([0, 1, 3, 3, 6]))]


class Driver:
    """Asks, tells and fails as its own random stream says, which a copy can continue."""

    def __init__(self, forest, seed):
        self.forest, self.rng, self.out = forest, random.Random(seed), []
        self.fails = 0.2

    def copy(self, forest):
        other = Driver(forest, 0)
        other.rng.setstate(self.rng.getstate())
        other.out = list(self.out)
        return other

    def step(self):
        leaves = self.forest.ask(self.rng.randint(0, 6))
        self.out += zip(leaves.ticket.tolist(), leaves.handle.tolist(), strict=True)
        self.rng.shuffle(self.out)
        if self.out and self.rng.random() < self.fails:
            self.forest.fail(np.array([self.out.pop()[0]], np.uint64))
        now = [self.out.pop() for _ in range(self.rng.randint(0, len(self.out)))]
        found = [look(handle) for _, handle in now]
        self.forest.tell(
            np.array([ticket for ticket, _ in now], np.uint64),
            np.array([value for value, _ in found], np.float64),
            np.array([len(children) for _, children in found], np.uint32),
            np.array([child for _, children in found for child in children], np.int64),
        )


def started(steps, seed=0):
    driver = Driver(Forest(**OPTIONS), seed)
    for root in range(6):
        driver.forest.add_tree(root, 150)
    for step in range(steps):
        driver.step()
        if step == 20:
            driver.forest.remove_tree(2)
            driver.out = [x for x in driver.out if x[0] >> 32 != 2]
    return driver


@pytest.mark.parametrize("steps", [0, 1, 7, 60, 300])
def test_what_continues_equals_what_was_never_interrupted(steps):
    whole = started(steps, seed=steps)
    data = whole.forest.to_bytes()
    again = Forest.from_bytes(data)
    assert again.to_bytes() == data  # wherever its nodes lie now
    part = whole.copy(again)
    for _ in range(200):
        whole.step()
        part.step()
        assert part.out == whole.out
    assert part.forest.to_bytes() == whole.forest.to_bytes()
    for name in ("simulations", "evaluations", "in_flight", "waiting", "failures", "given_up",
                 "nodes", "trees", "finished"):  # fmt: skip
        assert getattr(part.forest.counters(), name) == getattr(whole.forest.counters(), name)


@pytest.mark.parametrize("steps", [3, 60])
def test_tickets_that_were_out_are_recalled_after_a_restart(steps):
    """The tree in the end is that of a search that was never stopped."""
    whole = started(steps)
    while not whole.out:
        whole.step()
    again = Forest.from_bytes(whole.forest.to_bytes())
    out = again.counters().in_flight
    assert out == len(whole.out) > 0
    assert again.recall() == out
    assert (again.counters().in_flight, again.recall()) == (0, 0)
    restarted = Driver(again, seed=99)
    restarted.fails = whole.fails = 0.0
    for driver in (whole, restarted):
        while driver.forest.counters().finished < driver.forest.counters().trees:
            driver.step()
    for tree in (0, 1, 3, 4, 5):
        for name in ("parent", "visits", "total", "handle", "terminal"):
            ours, wanted = (getattr(d.forest.columns(tree), name) for d in (restarted, whole))
            assert ours.tolist() == wanted.tolist(), name


def test_a_recalled_ticket_keeps_its_attempt():
    forest = Forest(max_attempts=3)
    forest.add_tree(7, 5)
    assert forest.ask(1).attempt.tolist() == [1]
    assert forest.recall() == 1
    leaves = forest.ask(1)
    assert (leaves.handle.tolist(), leaves.attempt.tolist()) == ([7], [1])
    forest.fail(leaves.ticket)
    assert forest.recall() == 0
    assert forest.ask(1).attempt.tolist() == [2]


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "forest"
    driver = started(50)
    driver.forest.save(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["forest"]
    assert path.read_bytes() == driver.forest.to_bytes()
    assert Forest.load(str(path)).to_bytes() == path.read_bytes()
    with pytest.raises(FileNotFoundError) as caught:
        Forest.load(str(tmp_path / "none"))
    assert caught.value.filename == str(tmp_path / "none")
    with pytest.raises(OSError, match="Is a directory") as caught:
        driver.forest.save(str(tmp_path))
    assert not tmp_path.with_suffix(".tmp").exists()
    if Path("/dev/full").exists():
        (tmp_path / "full.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            driver.forest.save(str(tmp_path / "full"))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["forest"]


def test_paths_are_those_of_open(tmp_path):
    forest = started(3).forest
    for path in (tmp_path / "a", str(tmp_path / "b"), os.fsencode(tmp_path) + b"/\xff"):
        forest.save(path)
        assert Forest.load(path).to_bytes() == forest.to_bytes()
    with pytest.raises(FileNotFoundError) as caught:
        Forest.load(str(tmp_path / "\udcfe"))
    assert caught.value.filename == str(tmp_path / "\udcfe")
    precious = (tmp_path / "a").read_bytes()
    with pytest.raises(TypeError):
        started(9).forest.save(str(tmp_path / "a\0b"))
    assert (tmp_path / "a").read_bytes() == precious


def test_what_lies_in_the_way_of_the_temporary_file_stays(tmp_path):
    (tmp_path / "forest.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        started(3).forest.save(tmp_path / "forest")
    assert (tmp_path / "forest.tmp").is_dir()


def resealed(payload):
    """A snapshot with a good checksum around any bytes."""

    def stir(total, word):
        total = (total ^ word) * 0xFF51AFD7ED558CCD % 2**64
        return total ^ total >> 32

    sums, total = [1, 2, 3, 4], len(payload)
    for words in struct.iter_unpack("<4Q", payload + bytes(-len(payload) % 32)):
        sums = list(map(stir, sums, words))
    for lane in sums:
        total = stir(total, lane)
    return HEADER.pack(b"tercetF\n", 2, len(payload), total) + payload


def test_the_format_is_as_documented():
    data = started(30).forest.to_bytes()
    assert resealed(data[HEADER.size :]) == data


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda d: b"", "does not begin as one: 0 bytes"),
        (lambda d: b"x" + d[1:], "does not begin as one"),
        (lambda d: d[:8] + b"\x03" + d[9:], "has version 3; this build reads version 2"),
        (lambda d: d[:-1], r"is cut off or too long: 2135 bytes of 2136"),
        (lambda d: d + b"\0", "is cut off or too long"),
        (lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:], "is damaged: its checksum differs"),
        (lambda d: resealed(d[32:-8]), "is damaged: it ends too early|a list is too long"),
        (lambda d: resealed(d[32:] + bytes(8)), "is damaged: something follows its end"),
        (lambda d: resealed(d[32:33] + struct.pack("<d", -1) + d[41:]), "a setting is out of its"),
    ],
)
def test_damage_is_refused(damage, match):
    data = started(0).forest.to_bytes()
    with pytest.raises(SnapshotError, match=match):
        Forest.from_bytes(damage(data))


def test_no_altered_byte_crashes():
    """With a good checksum each is refused, or makes a forest that still runs."""
    data = started(40).forest.to_bytes()[HEADER.size :]
    rng, refused, ran = random.Random(0), 0, 0
    for _ in range(500):
        at = rng.randrange(len(data))
        altered = bytearray(data)
        altered[at] = rng.randrange(256)
        try:
            forest = Forest.from_bytes(resealed(bytes(altered)))
        except (SnapshotError, ValueError):
            refused += 1
            continue
        ran += 1
        for _ in range(3):
            leaves = forest.ask(50)
            n = len(leaves)
            forest.tell(leaves.ticket, np.zeros(n), np.full(n, 2, np.uint32), np.arange(2 * n))
        forest.to_bytes()
    assert refused > 100
    assert ran > 50


KILLED = """
import sys
from tercet import Forest
path = sys.argv[1]
forest = Forest()
for root in range(300):
    forest.add_tree(root, 64)
print("ready", flush=True)
while True:
    forest.save(path)
"""


def test_kill_leaves_a_whole_snapshot(tmp_path):
    path = tmp_path / "forest"
    rng = random.Random(0)
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        while not path.exists():
            time.sleep(0.001)
        time.sleep(rng.random() / 50)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert Forest.load(str(path)).counters().trees == 300

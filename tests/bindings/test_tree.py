"""The compiled tree through its binding, node for node against a plain Python one."""

import math
import random

import numpy as np
import pytest

from tercet import Tree


class PlainTree:
    """UCT over Python lists: the oracle."""

    def __init__(self, c_uct: float) -> None:
        self.c_uct = c_uct
        self.parent, self.children, self.visits, self.value = [0], [[]], [0], [0.0]

    def expand(self, node: int, k: int) -> int:
        first = len(self.parent)
        self.children[node] = list(range(first, first + k))
        for _ in range(k):
            self.parent.append(node)
            self.children.append([])
            self.visits.append(0)
            self.value.append(0.0)
        return first

    def score(self, child: int) -> float:
        n = self.visits[child]
        if n == 0:
            return math.inf
        parent_visits = self.visits[self.parent[child]]
        return self.value[child] / n + self.c_uct * math.sqrt(math.log(parent_visits) / n)

    def select_leaf(self) -> int:
        node = 0
        while self.children[node]:
            node = max(self.children[node], key=self.score)  # max keeps the first on ties
        return node

    def backup(self, leaf: int, value: float) -> None:
        node = leaf
        while True:
            self.visits[node] += 1
            self.value[node] += value
            if node == 0:
                return
            node = self.parent[node]


@pytest.mark.parametrize("c_uct", [0.0, 1.4, 10.0])
def test_grows_the_same_tree_as_the_oracle(c_uct):
    rng = random.Random(0)
    ours, oracle = Tree(c_uct=c_uct), PlainTree(c_uct)
    for _ in range(2000):
        leaf = oracle.select_leaf()
        assert ours.select_leaf() == leaf
        if oracle.visits[leaf] > 0 or leaf == 0:
            k = rng.randint(1, 5)
            assert ours.expand(leaf, k) == oracle.expand(leaf, k)
            leaf = oracle.select_leaf()
            assert ours.select_leaf() == leaf
        value = rng.uniform(-1, 1)
        ours.backup(leaf, value)
        oracle.backup(leaf, value)
    np.testing.assert_array_equal(ours.visits(), oracle.visits)
    np.testing.assert_array_equal(ours.total_values(), oracle.value)
    for node in range(len(ours)):
        assert list(ours.children(node)) == oracle.children[node]
        assert ours.parent(node) == oracle.parent[node]


def test_statistics_are_copies():
    tree = Tree(c_uct=1.0)
    before = tree.visits()
    tree.backup(0, 1.0)
    assert before[0] == 0
    assert tree.visits()[0] == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: Tree(c_uct=-1.0), ValueError, r"c_uct must be finite and >= 0, got -1"),
        (lambda t: t.expand(0, 0), ValueError, "num_children must be >= 1, got 0"),
        (lambda t: t.expand(9, 1), IndexError, "node must be < 1, got 9"),
        (lambda t: t.select_child(0), RuntimeError, "has no children; call expand first"),
        (lambda t: t.backup(0, math.nan), ValueError, "value must be finite"),
        (lambda t: t.expand(-1, 1), TypeError, "incompatible function arguments"),
    ],
)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call(Tree(c_uct=1.0))

"""The oracle of the forest: against published vectors, closed forms and searches done by hand."""

import math
import random
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__)
cases = runpy.run_path(str(HERE.with_name("random_search.py")))
plain, random_search, random_settings = (
    cases[name] for name in ("plain", "random_search", "random_settings")
)
PlainSearch = runpy.run_path(str(HERE.with_name("oracle.py")))["PlainSearch"]
Found, PlainTree, Settings = plain.Found, plain.PlainTree, plain.Settings
NAN = math.nan


# Random numbers.


PHILOX = """
00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""  # counter, key, words: Random123's kat_vectors


@pytest.mark.parametrize("vector", PHILOX.split("\n")[1:-1])
def test_philox_gives_the_published_words(vector):
    numbers = [int(word, 16) for word in vector.split()]
    assert plain.philox(numbers[:4], numbers[4:6]) == numbers[6:]


def test_the_key_of_a_tree_is_a_number_of_splitmix64():
    whole = lambda low, high: high << 32 | low  # noqa: E731
    # The first numbers of splitmix64 seeded with 0; the third is the first again, from seed and
    # handle together.
    assert whole(*plain.tree_key(0, 0)) == 0xE220A8397B1DCDAF
    assert whole(*plain.tree_key(0, 1)) == 0x6E789E6AA1B965F4
    assert whole(*plain.tree_key(0x9E3779B97F4A7C15, -1)) == 0xE220A8397B1DCDAF


def test_uniform_takes_53_bits_of_the_first_two_words():
    key, counter = (5, 6), (3, 0, 7, 2)  # draw, visit, node, stream
    w0, w1, _, _ = plain.philox(counter, key)
    u = plain.uniform(key, draw=3, node=7, stream=2)
    assert u == ((w1 * 2**32 + w0) // 2**11 + 0.5) / 2**53
    assert plain.uniform(key, draw=3, node=7, stream=2, visit=1) != u


def test_gumbel_noise_has_the_moments_of_gumbel():
    draws = np.array([plain.gumbel((1, 2), i) for i in range(4000)])
    assert draws.mean() == pytest.approx(0.5772, abs=0.06)
    assert draws.var() == pytest.approx(math.pi**2 / 6, rel=0.1)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_gamma_noise_has_the_moments_of_gamma(alpha):
    draws = np.array([plain.gamma_noise((3, 4), i, alpha) for i in range(2500)])
    assert (draws > 0).all()
    assert draws.mean() == pytest.approx(alpha, rel=0.08)
    assert draws.var() == pytest.approx(alpha, rel=0.2)


def test_gamma_noise_is_a_cubed_normal_where_the_first_try_counts():
    d, first = 4.0 - 1 / 3, 0
    for i in range(50):
        u = [plain.uniform((3, 4), draw=k, node=i, stream=2) for k in range(2)]
        normal = math.sqrt(-2 * math.log(u[0])) * math.cos(2 * math.pi * u[1])
        cube = d * (1 + normal / (3 * math.sqrt(d))) ** 3
        first += plain.gamma_noise((3, 4), i, 4.0) == pytest.approx(cube, rel=1e-12)
    assert first >= 45  # more than 99 of 100 are accepted


def test_dirichlet_noise_sums_to_one_and_is_even_where_all_vanish():
    noise = plain.dirichlet((1, 1), 5, 0.3)
    assert sum(noise) == pytest.approx(1)
    assert len(set(noise)) == 5
    assert plain.dirichlet((1, 1), 4, 1e-9) == [0.25] * 4  # every gamma is 0.0


# Sequential Halving.


@pytest.mark.parametrize(
    ("most", "simulations", "visits"),
    [
        (1, 4, [0, 1, 2, 3]),
        (2, 5, [0, 0, 1, 1, 2]),
        (3, 7, [0] * 3 + [1, 1, 2, 2]),
        (4, 10, [0] * 4 + [1, 1, 2, 2, 3, 3]),
        (4, 16, [0] * 4 + [1] * 4 + [2, 2, 3, 3, 4, 4, 5, 5]),
        (5, 20, [0] * 5 + [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8]),
        (16, 3, [0, 0, 0]),
        (8, 24, [0] * 8 + [1] * 4 + [2] * 4 + [3, 3, 4, 4, 5, 5, 6, 6]),
    ],
)
def test_sequential_halving_considers(most, simulations, visits):
    assert list(plain.considered_visits(most, simulations)) == visits


# The choice of a child, on nodes made by hand.


def family(children, *, total=0.0, visits=0, in_flight=0, own=NAN, inner=False, **more):
    """A node with children of (total, visits, in flight, prior), a descent being at the node."""
    simulations = more.pop("simulations", 100)
    positives = more.pop("positives", 0)
    settings = Settings(**more)
    tree = PlainTree(lambda *_: Found(), 7, simulations, settings, positives=positives)
    node = tree.new_node(8, tree.root) if inner else tree.root
    node.total, node.visits, node.in_flight, node.own = total, visits, in_flight + 1, own
    for child_total, child_visits, child_in_flight, prior in children:
        child = tree.new_node(9, node)
        child.total, child.visits, child.in_flight = child_total, child_visits, child_in_flight
        child.prior = plain.float32(prior)
        node.children.append(child)
    return plain.Chooser(tree, node)


def chosen(chooser) -> int | None:
    child = chooser.choose()
    return None if child is None else chooser.children.index(child)


FAMILY: dict[str, Any] = {
    "children": [(1.5, 3, 0, 0.5), (0.5, 2, 1, 0.25), (0.0, 0, 2, 0.25)],
    "total": 2.5,
    "visits": 6,
    "in_flight": 3,
}


def test_uct_is_the_mean_and_a_bonus_with_visits_on_their_way():
    chooser = family(**FAMILY, c_uct=0.5)
    scores = [chooser.uct(child) for child in chooser.children]
    assert scores == [
        0.5 + 0.5 * math.sqrt(math.log(9) / 3),
        0.25 + 0.5 * math.sqrt(math.log(9) / 3),
        0.0 + 0.5 * math.sqrt(math.log(9) / 2),
    ]


def test_released_uct_adds_one_to_both_counts():
    chooser = family(**FAMILY, rule="uct_released", c_uct=2.0)
    assert [chooser.uct_released(child) for child in chooser.children] == [
        0.5 + 2.0 * math.sqrt(math.log(10) / 4),
        0.25 + 2.0 * math.sqrt(math.log(10) / 4),
        0.0 + 2.0 * math.sqrt(math.log(10) / 3),
    ]


def test_puct_weighs_its_bonus_by_priors():
    chooser = family(**FAMILY, rule="puct", c_base=10.0, c_init=0.5)
    rate = math.log(20 / 10) + 0.5
    assert [chooser.puct(child) for child in chooser.children] == [
        0.5 + rate * 0.5 * 3.0 / 4,
        0.25 + rate * 0.25 * 3.0 / 4,
        0.0 + rate * 0.25 * 3.0 / 3,
    ]


def test_puct_of_a_node_nobody_visited_counts_it_once():
    chooser = family([(0.0, 0, 0, 0.5)], rule="puct", c_base=1.0, c_init=0.0)
    assert chooser.puct(chooser.children[0]) == math.log(2) * 0.5


@pytest.mark.parametrize(
    ("more", "value"),
    [
        ({"first_play": "first"}, 0.0),
        ({"first_play": "value", "first_play_value": 0.7}, 0.7),
        ({"first_play": "parent", "first_play_value": 0.5}, 2.5 / 6 - 0.5 * math.sqrt(1.0)),
        ({"first_play": "prior"}, 0.25),
        ({"first_play": "first", "unfinished": "virtual_loss", "virtual_loss": 3.0}, -3.0),
    ],
)
def test_first_play_is_the_value_of_a_child_nobody_has_visited(more, value):
    chooser = family(**FAMILY, rule="puct", **more)
    assert chooser.value(chooser.children[2]) == value


def test_first_play_below_the_parent_counts_only_the_priors_of_those_begun():
    chooser = family(
        [(0.0, 0, 0, 0.5), (0.0, 0, 1, 0.25), (1.0, 1, 0, 0.0625)],
        total=3.0, visits=4, rule="puct", first_play="parent", first_play_value=1.0,
    )  # fmt: skip
    assert chooser.value(chooser.children[0]) == 0.75 - math.sqrt(0.3125)
    chooser.node.visits = 0
    assert chooser.value(chooser.children[0]) == -math.sqrt(0.3125)


def test_virtual_loss_counts_visits_on_their_way_as_losses():
    chooser = family(**FAMILY, unfinished="virtual_loss", virtual_loss=2.0)
    assert [chooser.value(child) for child in chooser.children] == [0.5, (0.5 - 2.0) / 3, -2.0]


def test_min_max_scales_by_parent_and_siblings():
    chooser = family(**FAMILY, min_max="siblings")  # means: 0.5, 0.25; the parent's 0.4166
    assert [chooser.scaled(x) for x in (0.25, 0.375, 0.5, 0.75)] == [0.0, 0.5, 1.0, 2.0]
    chooser.node.total = 6.0
    assert plain.Chooser(chooser.tree, chooser.node).scaled(0.625) == 0.5
    assert family([(0.0, 0, 0, 1.0)], min_max="siblings").scaled(0.7) == 0.0


def test_min_max_of_the_tree_has_seen_every_mean():
    values = iter([0.5, -1.0, 1.0])
    tree = PlainTree(
        lambda *_: Found(value=next(values), handles=(1,)), 0, 3, Settings(min_max="tree")
    )
    tree.run()  # root: 0.5, -0.25, 1/6; the others: -1, 0, and 1
    assert (tree.low, tree.high) == (-1.0, 1.0)
    assert plain.Chooser(tree, tree.root).scaled(0.5) == 0.75


def test_the_second_phase_turns_values_around():
    for positives, sign in [(1, 1.0), (2, -1.0)]:
        chooser = family(
            **FAMILY, dual_target=True, stop_positives=2, positives=positives, c_uct=0.0
        )
        assert chooser.uct(chooser.children[0]) == sign * 0.5
        assert chosen(chooser) == {1.0: 0, -1.0: 2}[sign]
    assert family(**FAMILY, dual_target=True, positives=1).tree.sign == -1.0
    assert family(**FAMILY, dual_target=True).tree.sign == 1.0
    assert family(**FAMILY, stop_positives=2, positives=2).tree.sign == 1.0


def test_children_without_visits_are_first_and_closed_ones_never_chosen():
    chooser = family([(9.0, 1, 0, 0.5), (0.0, 0, 0, 0.1), (0.0, 0, 0, 0.9)], visits=1, rule="puct")
    first, second, third = chooser.children
    assert chosen(chooser) == 1
    second.closed = True
    assert chosen(chooser) == 2
    third.closed = True
    assert chosen(chooser) == 0
    first.closed = True
    assert chosen(chooser) is None
    # Where first play says otherwise, a score decides.
    assert chosen(family([(9.0, 1, 0, 0.5), (0.0, 0, 0, 0.1)], visits=1, rule="puct",
                         first_play="value")) == 0  # fmt: skip


def test_the_first_of_equal_scores_is_chosen():
    assert chosen(family([(1.0, 2, 0, 0.5)] * 3, visits=6)) == 0
    assert chosen(family([(0.5, 2, 0, 0.5), *[(1.0, 2, 0, 0.5)] * 2], visits=6)) == 1
    assert plain.first_best([NAN, -math.inf, NAN]) == 0
    assert plain.first_best([NAN, -1e308]) == 1


# Gumbel: an independent transcription of mctx's formulas.


def completed_by_mix_value(values, visits, priors, raw, *, scale, init, lows_and_highs=True):
    """qtransform_completed_by_mix_value, of float arrays."""
    probs = np.maximum(np.finfo(np.float64).tiny, priors / priors.sum())
    seen = visits > 0
    weighted = np.where(seen, probs * values, 0).sum() / (probs[seen].sum() if seen.any() else 1.0)
    mixed = (raw + visits.sum() * weighted) / (visits.sum() + 1)
    completed = np.where(seen, values, mixed)
    spread = max(completed.max() - completed.min(), 1e-8)
    return (init + visits.max()) * scale * (completed - completed.min()) / spread


def random_family(rng, **more):
    n = rng.integers(1, 9)
    visits = rng.integers(0, 6, n) * (rng.random(n) < 0.7)
    values, priors = rng.choice([-0.5, 0.1, 0.25, 0.9], n), rng.dirichlet(np.ones(n))
    raw = rng.choice([-1.0, 0.3])
    children = [(v * int(k), int(k), 0, p) for v, k, p in zip(values, visits, priors, strict=True)]
    chooser = family(children, visits=int(visits.sum()) + 1, own=raw, rule="gumbel", **more)
    return chooser, values, visits, priors, raw


@pytest.mark.parametrize("inner", [False, True])
def test_gumbel_scores_are_those_of_mctx(inner):
    rng = np.random.default_rng(0)
    for _ in range(300):
        scale, init = rng.choice([0.1, 1.0]), rng.choice([0.0, 50.0])
        chooser, values, visits, priors, raw = random_family(
            rng, inner=inner, gumbel_value_scale=scale, gumbel_maxvisit_init=init
        )
        completed = completed_by_mix_value(values, visits, priors, raw, scale=scale, init=init)
        logits = np.log(priors)
        if inner:
            weights = np.exp(logits + completed - (logits + completed).max())
            wanted = weights / weights.sum() - visits / (1 + visits.sum())
            assert chooser.inner_scores() == pytest.approx(wanted, abs=1e-6)
            assert wanted[chosen(chooser)] == pytest.approx(wanted.max(), abs=1e-6)
        else:
            noise = [plain.gumbel(chooser.tree.key, i) for i in range(len(visits))]
            wanted = noise + logits - logits.max() + completed
            assert chooser.root_scores() == pytest.approx(wanted, abs=1e-5)


def test_gumbel_at_the_root_visits_what_sequential_halving_considers():
    """With all values equal it comes down to noise and priors: a known ranking."""
    look = scripted({("evaluate", 0): Found(handles=tuple(range(1, 9)), priors=(0.125,) * 8)})
    tree = PlainTree(look, 0, 25, Settings(rule="gumbel", gumbel_considered=4), seed=3)
    tree.run()
    noise = [plain.gumbel(tree.key, i) for i in range(8)]
    ranks = sorted(range(8), key=lambda i: -noise[i])
    visits = [child.visits for child in tree.root.children]
    # Of 24: 4 three times, then 2 of them, six times each.
    assert [visits[i] for i in ranks] == [9, 9, 3, 3, 0, 0, 0, 0]
    assert tree.choice() == ranks[0]


def test_gumbel_without_a_considered_child_takes_the_least_visited_open_one():
    chooser = family([(0.0, n, 0, 0.25) for n in (9, 8, 8, 1)], rule="gumbel")
    chooser.children[3].closed = True
    assert plain.considered_visits(4, 99)[26] == 6
    assert chosen(chooser) == 1


def test_gumbel_follows_the_table_of_all_simulations_but_the_roots_own():
    visits = (2, 2, 1, 1)
    assert plain.considered_visits(4, 15)[6] == 2
    assert plain.considered_visits(4, 17)[6] == 1
    children = [(0.0, n, 0, 0.25) for n in visits]
    assert chosen(family(children, rule="gumbel", simulations=16)) in (0, 1)
    assert chosen(family(children, rule="gumbel", simulations=18)) in (2, 3)
    # Past its end the last entry stays: here 0, which no child has.
    assert chosen(family(children, rule="gumbel", simulations=3)) == 2


def test_gumbel_scores_of_impossible_children_are_the_least():
    assert family([(0.0, 0, 0, 0.0)] * 2, rule="gumbel").root_scores() == [-1e9, -1e9]
    scores = family([(0.0, 0, 0, 0.0), (0.0, 0, 0, 1.0)], rule="gumbel").root_scores()
    assert scores[0] == -1e9 < scores[1]
    inner = family([(0.0, 0, 0, 0.0)] * 2, rule="gumbel", inner=True)
    assert all(math.isnan(score) for score in inner.inner_scores())
    assert chosen(inner) == 0


def test_the_value_of_the_node_itself_is_scaled_too():
    children = [(0.0, 1, 0, 0.5), (2.0, 1, 0, 0.25), (0.0, 0, 0, 0.25)]
    chooser = family(children, total=4.0, visits=3, own=1.0, rule="gumbel", min_max="siblings")
    assert chooser.mixed_value() == pytest.approx((0.5 + 2 * (0.25 * 1.0 / 0.75)) / 3)
    chooser.node.own = NAN  # as 0.0
    assert chooser.mixed_value() == pytest.approx((0.0 + 2 * (0.25 * 1.0 / 0.75)) / 3)


# Whole searches.


def scripted(script, **fields):
    """Tells, by kind and handle; a list: one after the other."""

    def look(kind, handle, nth):
        found = script.get((kind, handle), Found(**fields))
        return found[min(nth, len(found) - 1)] if isinstance(found, list) else found

    return look


def grown(look, simulations=10, root_handle=0, seed=0, budgets=None, **settings):
    tree = PlainTree(
        look, root_handle, simulations, Settings(**settings), budgets or plain.Budgets(), seed
    )
    tree.run()
    return tree


def issued(tree):
    return [(ticket.kind, ticket.node.handle) for ticket in tree.tickets]


def by_handle(tree):
    return {node.handle: node for node in tree.nodes}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"c_uct": 0.0},
        {"c_uct": 10.0, "max_in_flight": 4, "visits_per_flight": 1},
        {"max_in_flight": 3, "visits_per_flight": 5},
        {"max_in_flight": 255, "visits_per_flight": 2},
    ],
    ids=str,
)
def test_default_settings_are_the_plain_search(options):
    for seed in range(60):
        rng = random.Random(seed)
        found = {}

        def look(handle, rng=rng, found=found):
            if handle not in found:
                count = 0 if rng.random() < 0.2 else rng.randint(1, 5)
                value = rng.choice([0.0, 1.0, rng.uniform(-1e6, 1e6)])
                found[handle] = value, [rng.getrandbits(60) for _ in range(count)]
            return found[handle]

        simulations, root = rng.randint(1, 120), rng.getrandbits(60)
        wanted = PlainSearch(look, simulations, **options).run(root)

        def told(kind, handle, nth, look=look):
            value, handles = look(handle)
            return Found(value=value, handles=tuple(handles))

        nodes = grown(told, simulations, root, **options).nodes
        fields = lambda node, end: (  # noqa: E731
            node.handle, node.parent and node.parent.handle, node.total, node.visits,
            node.in_flight, [child.handle for child in node.children], end,
        )  # fmt: skip
        assert [fields(n, n.end_value if n.terminal else None) for n in nodes] == [
            fields(n, n.end_value) for n in wanted
        ]


def test_apart_a_leaf_is_expanded_and_verified_at_once():
    look = scripted(
        {
            ("expand", 0): Found(handles=(1, 2)),
            ("verify", 0): Found(value=0.25),
            ("verify", 1): Found(value=1.0),
            ("verify", 2): Found(value=-1.0),
        }
    )
    tree = grown(look, 4, tickets="apart", max_in_flight=4, visits_per_flight=1)
    # One expansion may be out at first; the children come before anybody knows a value.
    assert issued(tree) == [
        ("expand", 0), ("verify", 0), ("expand", 1), ("verify", 1), ("expand", 2), ("verify", 2),
    ]  # fmt: skip
    assert [t.number for t in tree.tickets] == [1, 0, 3, 2, 5, 4]
    nodes = by_handle(tree)
    # 1 and 2 were told without children: ends, the first of which is visited once more.
    assert [(n.visits, n.total, n.own, n.end_value) for n in nodes.values()][1:] == [
        (2, 2.0, 1.0, 1.0), (1, -1.0, -1.0, -1.0),
    ]  # fmt: skip
    assert math.isnan(nodes[0].end_value)
    assert (nodes[0].visits, nodes[0].total, nodes[0].own) == (4, 1.25, 0.25)
    assert tree.evaluations == 3


def test_apart_an_end_has_no_value_before_its_verification():
    tree = PlainTree(scripted({}, value=0.5), 0, 3, Settings(tickets="apart", max_unverified=8))
    assert tree.step()
    assert (tree.root.in_flight, tree.root.asked, tree.begun) == (2, True, 1)
    assert tree.step()
    assert not tree.blocked  # the cap of expansions holds: the expansion is committed
    assert (tree.root.terminal, tree.root.asked, tree.root.in_flight) == (True, False, 1)
    assert math.isnan(tree.root.end_value)
    assert tree.step()
    assert (tree.blocked, tree.begun, tree.root.in_flight) == (True, 1, 1)
    tree.run()
    assert (tree.root.end_value, tree.root.visits, tree.root.total) == (0.5, 3, 1.5)
    assert issued(tree) == [("expand", 0), ("verify", 0)]


def test_lazy_expands_what_is_visited_twice():
    look = scripted(
        {("expand", 0): Found(handles=(1, 2)), ("expand", 1): Found(handles=(3,))}, value=0.5
    )
    tree = grown(look, 4, tickets="lazy", max_unverified=2)
    assert issued(tree) == [
        ("expand", 0),  # the root is never verified
        ("verify", 1), ("verify", 2),  # two are out; 1 is committed, then
        ("expand", 1),  # visited again
        ("verify", 3), ("expand", 2),
    ]  # fmt: skip
    nodes = by_handle(tree)
    assert math.isnan(nodes[0].own)
    assert {handle: node.visits for handle, node in nodes.items()} == {0: 4, 1: 2, 2: 2, 3: 1}
    assert nodes[2].end_value == 0.5
    assert tree.committed == 4


def test_a_lazy_root_without_children_fails():
    tree = grown(scripted({}), 5, tickets="lazy", failed_value=-2.0)
    assert issued(tree) == [("expand", 0)]
    assert (tree.root.end_value, tree.root.total, tree.committed) == (-2.0, -10.0, 5)


def test_no_more_may_be_unverified_than_allowed():
    children = {("expand", 0): Found(handles=tuple(range(1, 9)))}
    for most in (1, 3):
        tree = PlainTree(
            scripted(children), 0, 8, Settings(tickets="lazy", max_unverified=most, max_in_flight=4)
        )
        out = []
        while tree.step():
            out.append(len(tree.pending))
        assert max(out) == most


@pytest.mark.parametrize("tickets", ["together", "apart", "lazy"])
def test_children_told_as_ends_are_looked_at_once(tickets):
    grows = "evaluate" if tickets == "together" else "expand"
    look = scripted({(grows, 0): Found(handles=(1,), terminal=(True,), value=0.0)}, value=0.5)
    tree = grown(look, 6, tickets=tickets)
    of_child = [kind for kind, handle in issued(tree) if handle == 1]
    assert of_child == ["evaluate" if tickets == "together" else "verify"]
    child = tree.nodes[1]
    assert (child.terminal, child.end_value, child.own) == (True, 0.5, 0.5)
    assert child.total == 0.5 * child.visits
    with pytest.raises(ValueError, match="room for 0"):
        grown(scripted({("evaluate", 0): Found(handles=(1,), terminal=(True,))}, handles=(5,)))


CANCELLED = Found(cancelled=True, cost=(1.0, 10.0, 0.0, 0.5), outcome=1.0, value=9.0, handles=(7,))


@pytest.mark.parametrize(("tickets", "kind"), [("together", "evaluate"), ("lazy", "expand")])
def test_cancelled_tickets_count_only_what_they_cost(tickets, kind):
    told = Found(handles=(1, 2), value=0.5)
    tree, clean = (
        grown(scripted({(kind, 0): found}, value=1.0), 4, tickets=tickets)
        for found in ([CANCELLED, told], told)
    )
    assert issued(tree) == [(kind, 0), *issued(clean)]
    assert [ticket.nth for ticket in tree.tickets[:2]] == [0, 1]
    fields = lambda tree: [(n.handle, n.visits, n.total, n.in_flight) for n in tree.nodes]  # noqa: E731
    assert fields(tree) == fields(clean)
    assert (tree.positives, tree.committed, tuple(tree.costs)) == (0, 4, CANCELLED.cost)


def test_apart_either_ticket_can_be_cancelled():
    expansion = [CANCELLED, Found(handles=(1, 2))]
    tree = grown(
        scripted({("expand", 0): expansion, ("verify", 0): CANCELLED}, value=1.0),
        4, tickets="apart",
    )  # fmt: skip
    assert issued(tree) == [
        ("expand", 0), ("verify", 0),
        ("expand", 0),  # alone: the verification is out still
        ("expand", 1), ("verify", 1), ("expand", 2), ("verify", 2),
    ]  # fmt: skip
    assert math.isnan(tree.root.own)  # with children it is never verified again
    assert (tree.root.visits, tree.committed) == (4, 4)
    assert sum(child.visits for child in tree.root.children) == 4
    assert tree.costs == [2 * x for x in CANCELLED.cost]


def test_a_ticket_is_given_up_after_max_attempts():
    bad = Found(fails=2, value=9.0, handles=(7,), outcome=1.0, cost=(1.0, 2.0, 3.0, 4.0))
    root = Found(handles=(1, 2), value=0.5)
    for attempts, value in [(2, -0.25), (3, 9.0)]:
        tree = grown(
            scripted({("evaluate", 0): root, ("evaluate", 1): bad}), 3,
            max_attempts=attempts, failed_value=-0.25,
        )  # fmt: skip
        node = tree.nodes[1]
        assert node.own == node.total == value
        assert node.terminal == (attempts == 2)
        assert tree.positives == (attempts == 3)
        assert tree.costs == [1.0, 2.0, 3.0, 4.0]


def test_widening_asks_for_children_as_visits_grow():
    children = [Found(handles=(1,)), Found(handles=(2, 3)), Found(handles=(4, 5))]
    look = scripted({("evaluate", 0): children[0], ("expand", 0): children[1:]}, value=0.5)
    tree = PlainTree(look, 0, 40, Settings(widening=1.0, widening_alpha=0.5, max_children=5))
    counts = []
    while tree.step():
        if not tree.root.asked:
            counts.append((tree.root.expected, len(tree.root.children)))
    # N visits want sqrt(N) children, rounded up: more than 1 from N = 2, more than 3 from N = 10.
    assert max(n for n, k in counts if k == 1) == 2
    assert max(n for n, k in counts if k == 3) == 10
    assert [node.handle for node in tree.root.children] == [1, 2, 3, 4, 5]
    assert not tree.root.full
    assert tree.committed == 40


@pytest.mark.parametrize(
    ("empty", "asked"),  # a child that is there may be proposed again by chance: three times
    [(Found(), 1), (Found(handles=(1,)), 3), (Found(handles=(2,), fails=3), 1)],
)
def test_widening_is_over_when_nothing_new_comes(empty, asked):
    look = scripted(
        {("evaluate", 0): Found(handles=(1,)), ("expand", 0): empty}, handles=(1,), value=0.5
    )
    tree = grown(look, 30, widening=2.0, merge_duplicates=True)
    assert tree.root.full
    assert issued(tree).count(("expand", 0)) == asked
    assert len(tree.root.children) == 1


def test_more_children_than_there_is_room_for_are_refused():
    grown(scripted({}, handles=(1, 2)), 3, widening=1.0, max_children=2)
    with pytest.raises(ValueError, match="3 children, room for 2"):
        grown(scripted({}, handles=(1, 2, 3)), 3, max_children=2)
    with pytest.raises(ValueError, match="3 children, room for 2"):
        grown(scripted({}, handles=(1, 2, 3)), 3, widening=1.0, max_children=2)
    first = {("evaluate", 0): Found(handles=(1, 2))}
    with pytest.raises(ValueError, match="2 children, room for 1"):
        grown(scripted(first, handles=(1, 2)), 20, widening=2.0, max_children=3)
    with pytest.raises(ValueError, match="65 children, room for 64"):
        grown(scripted({}, handles=(1,) * 65), 3)


def test_duplicates_are_merged_with_their_priors():
    told = Found(handles=(4, 5, 4, 4), priors=(0.1, 0.4, 0.3, 0.2), terminal=(True, 0, 0, 0))
    look = scripted({("evaluate", 0): told})
    tree = grown(look, 1, merge_duplicates=True)
    first, second = tree.root.children
    as_float32 = np.float32(0.1) + np.float32(0.3) + np.float32(0.2)
    assert (first.handle, first.prior, first.terminal) == (4, float(as_float32), True)
    assert (second.handle, second.prior, second.terminal) == (5, float(np.float32(0.4)), 0)
    assert tree.merged == 2
    assert [node.handle for node in grown(look, 1).nodes] == [0, 4, 5, 4, 4]


def test_priors_not_told_are_even_among_the_children_that_are_left():
    look = scripted({("evaluate", 0): Found(handles=(4, 5, 4, 6))})
    thirds = [child.prior for child in grown(look, 1, merge_duplicates=True).root.children]
    assert thirds == [float(np.float32(1 / 3))] * 3
    assert [child.prior for child in grown(look, 1).root.children] == [0.25] * 4


def test_noise_is_mixed_into_the_first_children_of_the_root():
    look = scripted({}, handles=(1, 2), priors=(0.75, 0.25))
    tree = grown(look, 3, seed=9, dirichlet_alpha=0.5, dirichlet_fraction=0.25)
    noise = plain.dirichlet(plain.tree_key(9, 0), 2, 0.5)
    assert [child.prior for child in tree.root.children] == [
        float(np.float32(0.75 * p + 0.25 * x)) for p, x in zip((0.75, 0.25), noise, strict=True)
    ]
    assert [child.prior for child in tree.root.children[0].children] == [0.75, 0.25]
    assert grown(look, 3, seed=9).root.children[0].prior == 0.75


# Values on their way up.

PATH = {
    ("evaluate", 0): Found(value=0.5, handles=(1,)),
    ("evaluate", 1): Found(value=-0.25, handles=(2,)),
    ("evaluate", 2): Found(value=0.75),
}


@pytest.mark.parametrize(
    ("backup", "totals"),
    [
        ("mean", [0.5 - 0.125 + 2 * 0.1875, -0.25 + 2 * 0.375, 1.5]),
        ("sum", [0.5 - 0.125 + 2 * 0.1875, -0.25 + 2 * 0.375, 1.5]),
        ("max", [0.5, 0.375, 0.75]),
        ("min", [-0.125, -0.25, 0.75]),
        ("product", [0.5 * -0.125 * 0.1875**2, -0.25 * 0.375**2, 0.75**2]),
        ("last", [0.1875, 0.375, 0.75]),
    ],
)
def test_backups_along_a_path(backup, totals):
    """The end is visited twice; a value loses half of itself at each step up."""
    tree = grown(scripted(PATH), 4, backup=backup, gamma=0.5)
    assert [node.total for node in tree.nodes] == totals
    assert [node.visits for node in tree.nodes] == [4, 3, 2]
    if backup not in ("mean", "sum"):
        assert plain.Chooser(tree, tree.root).plain_value(tree.root) == totals[0]


def test_the_value_of_a_node_can_be_that_of_its_children():
    script = {
        ("evaluate", 0): Found(value=9.0, handles=(1, 2)),
        ("evaluate", 1): Found(value=1.0, handles=(3,)),
        ("evaluate", 2): Found(value=-1.0),
        ("evaluate", 3): Found(value=4.0),
    }
    tree = grown(scripted(script), 4, backup="children")
    assert [(n.handle, n.visits, n.total) for n in tree.nodes] == [
        (0, 4, (2 * 4.0 - 1.0) / 3), (1, 2, 4.0), (2, 1, -1.0), (3, 1, 4.0),
    ]  # fmt: skip


def test_channels_have_their_own_values_and_gammas():
    channels = (("value", "sum", 1.0), ("value", "max", 0.5), ("total", "last", 0.0))
    script = {
        ("evaluate", 0): Found(value=0.0, handles=(1,), channel_values=(1.0, -2.0, 3.0)),
        ("evaluate", 1): Found(value=0.0, channel_values=(2.0, -1.0, 5.0)),
    }
    tree = grown(scripted(script), 3, channels=channels)  # the end is visited twice
    assert [node.channels for node in tree.nodes] == [[5.0, -0.5, 0.0], [4.0, -1.0, 5.0]]
    assert tree.root.total == 0.0
    with pytest.raises(ValueError, match="1 channel values wanted, got 0"):
        grown(scripted({}), channels=channels[:1])


def test_a_rollout_says_the_value_and_its_parts():
    rollout = Found(verdicts=(1.0, -1.0, -1.0), outcome=1.0, start_verdict=0.1)
    sources = ("step", "outcome", "start", "total", "value")
    tree = grown(
        scripted({("verify", 0): rollout}), 1, tickets="apart",
        channels=tuple((source, "sum", 1.0) for source in sources),
    )  # fmt: skip
    assert tree.root.channels == [0.0, 1.0, 0.1, 1.1, 1.1]
    assert (tree.root.total, tree.root.own, tree.positives) == (1.1, 1.1, 1)
    assert tree.root.verdict == float(np.float32(0.1))
    cut = Found(verdicts=(1.0, -1.0), start_verdict=0.5)
    reward = plain.Reward(truncated_outcome=-1.0, add_start_verdict=False, outcome_weight=2.0)
    tree = grown(scripted({("verify", 0): cut}), 1, tickets="apart", reward=reward)
    assert (tree.root.total, tree.positives, tree.negatives) == (-2.0, 0, 0)
    assert math.isnan(grown(scripted({}), 1).root.verdict)


def test_products_want_values_of_at_most_one():
    with pytest.raises(ValueError, match=r"product wants values in \[-1, 1\], got 1.5"):
        grown(scripted({}, value=1.5), backup="product")


# Solver.


def test_the_solver_closes_what_cannot_change():
    script = {
        ("evaluate", 0): Found(handles=(1, 2)),
        ("evaluate", 1): Found(value=1.0, handles=(3, 4)),
        ("evaluate", 2): Found(value=-1.0, handles=(5,)),
    }
    tree = PlainTree(scripted(script), 0, 50, Settings(solver=True, c_uct=0.0))
    closed = []
    while tree.step():
        closed.append({node.handle for node in tree.nodes if node.closed})
    assert closed[-3:-1] == [{1, 3, 4}] * 2
    assert closed[-1] == {0, 1, 2, 3, 4, 5}
    assert (tree.reason, tree.committed) == ("closed", 6)  # nothing is visited twice
    assert grown(scripted(script), 50).committed == 50


def test_a_node_that_can_get_more_children_is_not_closed():
    # The only child is an end, so that the root has no open child: it asks for another at once.
    script = {("evaluate", 0): Found(handles=(1,)), ("expand", 0): [Found(handles=(2,)), Found()]}
    tree = grown(scripted(script), 50, solver=True, widening=1.0, widening_alpha=0.0)
    assert issued(tree) == [
        ("evaluate", 0), ("evaluate", 1), ("expand", 0), ("evaluate", 2), ("expand", 0),
    ]  # fmt: skip
    assert tree.root.full
    assert tree.root.closed
    assert tree.reason == "closed"


# Stop rules.

EVERYONE = {"handles": (1, 2), "value": 0.5}


def outcomes(*told):
    """One after the other, whoever is asked about."""
    rest = iter(told)
    return lambda *_: Found(**EVERYONE, outcome=next(rest, NAN))


@pytest.mark.parametrize(
    ("settings", "told", "reason", "committed"),
    [
        ({}, [1.0, 1.0], "simulations", 30),
        ({"stop_correct": True}, [0.0, -1.0, 0.5, NAN], "correct", 3),
        ({"stop_positives": 2}, [1.0, -1.0, -1.0, 1.0, 1.0], "samples", 4),
        ({"stop_negatives": 2}, [1.0, -1.0, -1.0, 1.0, 1.0], "samples", 3),
        ({"stop_positives": 1, "stop_negatives": 1}, [-1.0, 0.0, NAN, 0.1], "samples", 4),
        ({"stop_positives": 1, "stop_correct": True}, [1.0], "correct", 1),
        ({"stop_negatives": 1}, [0.0, NAN, -0.5], "samples", 3),
    ],
)
def test_a_tree_stops_by_outcomes(settings, told, reason, committed):
    tree = grown(outcomes(*told), 30, **settings)
    assert (tree.reason, tree.committed) == (reason, committed)


@pytest.mark.parametrize(
    ("budget", "committed"),
    [
        ({"evaluations": 7}, 7),
        ({"evaluations": 0}, 1),
        ({"nodes": 9}, 4),
        ({"nodes": 10}, 5),
        ({"model_calls": 3.0}, 3),
        ({"tokens": 35.0}, 4),
        ({"tool_calls": 1.0}, 2),
        ({"seconds": 3.0, "tokens": 1000}, 12),
    ],
)
def test_a_tree_stops_when_a_budget_is_spent(budget, committed):
    look = scripted({}, **EVERYONE, cost=(1.0, 10.0, 0.5, 0.25))
    tree = grown(look, 30, budgets=plain.Budgets(**budget))
    assert (tree.reason, tree.committed) == ("budget", committed)


def test_a_tree_is_not_finished_while_a_ticket_is_out():
    tree = PlainTree(scripted({}), 0, 1)
    assert [(tree.step(), tree.begun, tree.finished, tree.reason) for _ in range(3)] == [
        (True, 1, False, ""), (True, 1, True, "simulations"), (False, 1, True, "simulations"),
    ]  # fmt: skip


def test_what_is_out_when_a_tree_stops_is_still_committed():
    settings = {"max_in_flight": 4, "visits_per_flight": 1, "stop_correct": True}
    tree = grown(outcomes(NAN, NAN, 1.0, -1.0, NAN), 30, **settings)
    assert tree.reason == "correct"
    assert tree.committed == len(tree.tickets) > 3
    assert tree.negatives == 1


def test_a_tree_stops_when_the_rest_cannot_change_the_first():
    script = {("evaluate", 0): Found(handles=(1, 2)), ("evaluate", 1): Found(value=100.0)}
    tree = grown(scripted(script), 20, stop_converged=True)
    first, second = (child.visits for child in tree.root.children)
    assert tree.reason == "converged"
    assert first - second == 20 - tree.committed + 1
    alone = grown(scripted({("evaluate", 0): Found(handles=(1,))}), 20, stop_converged=True)
    assert (alone.reason, alone.committed) == ("simulations", 20)


def test_outcomes_of_ends_count_once():
    tree = grown(scripted({}, outcome=-1.0), 9)
    assert (tree.negatives, tree.committed, tree.evaluations) == (1, 9, 1)


# The choice that a finished tree stands for.


def test_the_choice_is_the_most_visited_then_the_best_then_the_first():
    choice = lambda *children, **more: family(list(children), **more).tree.choice()  # noqa: E731
    assert choice() is None
    assert choice((9.0, 1, 0, 0.1), (0.0, 2, 0, 0.1)) == 1
    assert choice((0.0, 2, 9, 0.1), (1.0, 2, 0, 0.1), (1.0, 2, 0, 0.1)) == 1
    assert choice((0.0, 0, 0, 0.1), (0.0, 0, 0, 0.9)) == 0
    # Gumbel: visits on their way count, and its scores decide between equals.
    chooser = family([(0.0, 3, 0, 0.1), (0.0, 2, 1, 0.9), (9.0, 2, 0, 0.5)], rule="gumbel")
    scores = chooser.root_scores()
    assert chooser.tree.choice() == max((0, 1), key=lambda i: scores[i])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rule": "uct", "first_play": "value"}, "uct wants first_play"),
        ({"unfinished": "virtual_loss", "backup": "sum"}, "virtual_loss wants backup"),
        ({"backup": "children", "gamma": 0.9}, "children wants gamma"),
        ({"tickets": "lazy", "max_in_flight": 250, "max_unverified": 6}, "must be <= 255"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Settings(**settings)


# Random searches.


def test_random_searches_keep_their_books():
    for seed in range(600):
        tree = random_search(random.Random(seed))
        nodes, s = tree.run(), tree.settings
        assert tree.finished
        assert tree.root.visits == tree.committed <= tree.begun <= tree.simulations
        assert len({id(node) for node in nodes}) == len(nodes)
        for node in nodes:
            assert (node.in_flight, node.asked) == (0, False)
            below = sum(child.visits for child in node.children)
            if node.children:  # visited itself at most once, before they were
                assert node.visits - below in ((1,) if s.tickets == "together" else (0, 1))
                assert math.isnan(node.end_value)
            assert math.isfinite(node.total)
            assert all(math.isfinite(x) for x in node.channels)
            if node.closed and node.children:
                assert all(child.closed for child in node.children)
        seen = [t for t in tree.tickets if t.kind != "expand"]
        assert tree.evaluations <= len(seen)


def test_random_settings_have_every_value():
    rng = random.Random(0)
    drawn = [vars(random_settings(rng)) for _ in range(1500)]
    for name in ("rule", "first_play", "min_max", "unfinished", "backup", "tickets"):
        counts = Counter(settings[name] for settings in drawn)
        words = {"rule": 4, "first_play": 4, "min_max": 3, "backup": 7, "tickets": 3}
        assert len(counts) == words.get(name, 2)
        assert min(counts.values()) >= 40, name
    assert all(len({str(settings[name]) for settings in drawn}) > 1 for name in drawn[0])
    channels = {channel[:2] for settings in drawn for channel in settings["channels"]}
    assert len(channels) == 5 * 6  # every source, in every way
    assert {settings["reward"].form for settings in drawn} == {"paper", "released"}


def test_random_searches_come_everywhere():
    seen = Counter()
    for seed in range(900):
        tree = random_search(random.Random(seed))
        nodes = tree.run()
        attempts = tree.settings.max_attempts
        told = [tree.look(t.kind, t.node.handle, t.nth) for t in tree.tickets]
        seen.update({tree.reason, *(ticket.kind for ticket in tree.tickets)})
        seen.update(
            name
            for name, holds in {
                "merged": tree.merged > 0,
                "full": any(node.full for node in nodes),
                "widened": any(
                    t.kind == "expand" and t.node.children and t.nth for t in tree.tickets
                ),
                "flagged": any(any(found.terminal) for found in told),
                "closed above ends": any(node.closed and node.children for node in nodes),
                "second phase": tree.sign < 0,
                "cancelled": any(found.cancelled for found in told),
                "given up": any(found.fails >= attempts for found in told),
                "told late": any(0 < found.fails < attempts for found in told),
                "rollout": any(found.verdicts is not None for found in told),
                "several out": any(node.parent and node.visits > 9 for node in nodes),
                "costs": any(tree.costs),
                "end again": tree.committed > tree.evaluations,
            }.items()
            if holds
        )
    wanted = {
        "correct", "samples", "budget", "converged", "closed", "simulations", "evaluate", "expand",
        "verify", "merged", "full", "widened", "flagged", "closed above ends", "second phase",
        "cancelled", "given up", "told late", "rollout", "several out", "costs", "end again",
    }  # fmt: skip
    assert {name for name, n in seen.items() if n >= 15} == wanted, seen

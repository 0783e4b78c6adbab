"""The workload of bench/search.py in searches from the registry: CPU seconds of one tree.

They call Python for every state, so looking at a state (a hash, well under a microsecond of several
dozen) is in their times, which it is not in ours.
"""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

import time
from collections.abc import Callable

MASK = 0xFFFFFFFF
CHILDREN, DEPTH, C_UCT = 4, 12, 2**0.5


def mixed(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


class State:
    """A hash and its depth, in the words of the three libraries."""

    __slots__ = ("depth", "hash")

    def __init__(self, hash_: int = 1, depth: int = 0) -> None:
        self.hash, self.depth = hash_, depth

    def value(self) -> float:
        return (mixed(self.hash) >> 8) / 2**24

    def child(self, i: int) -> "State":
        return State(mixed(self.hash + (i + 1) * 0x9E3779B9 & MASK), self.depth + 1)

    # mcts
    def isTerminal(self) -> bool:
        return self.depth >= DEPTH

    def getPossibleActions(self) -> range:
        return range(CHILDREN)

    takeAction = child

    def getReward(self) -> float:
        return self.value()

    # OpenSpiel
    is_terminal = isTerminal

    def clone(self) -> "State":
        return State(self.hash, self.depth)

    def apply_action(self, i: int) -> None:
        after = self.child(i)
        self.hash, self.depth = after.hash, after.depth

    def current_player(self) -> int:
        return 0

    def is_chance_node(self) -> bool:
        return False

    def returns(self) -> list[float]:
        return [self.value()]


def mcts(simulations: int) -> float:
    from mcts import mcts as Search

    search = Search(iterationLimit=simulations, explorationConstant=1.0, rolloutPolicy=State.value)
    return _timed(lambda: search.search(State()))  # its formula has sqrt(2) in it


def open_spiel(simulations: int) -> float:
    import numpy as np
    import pyspiel
    from open_spiel.python.algorithms.mcts import MCTSBot

    class Evaluator:
        def evaluate(self, state: State) -> list[float]:
            return state.returns()

        def prior(self, state: State) -> list[tuple[int, float]]:
            return [(i, 1 / CHILDREN) for i in range(CHILDREN)]

    game = pyspiel.load_game("tic_tac_toe")  # asked for its type only
    random = np.random.RandomState(0)
    bot = MCTSBot(game, C_UCT, simulations, Evaluator(), solve=False, random_state=random)
    return _timed(lambda: bot.mcts_search(State()))


def treequest(simulations: int) -> float:
    from treequest import StandardMCTS

    search = StandardMCTS(samples_per_action=CHILDREN, exploration_weight=C_UCT)

    def run() -> None:
        state = search.init_tree()
        for number in range(simulations):
            state, trial = search.ask(state, ["step"])
            parent = state.tree.get_node(trial.node_to_expand).state
            after = (parent or State()).child(number % CHILDREN)
            state = search.tell(state, trial.trial_id, (after, after.value()))

    return _timed(run)


def _timed(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


PEERS = {  # name: function, distribution
    "mcts": (mcts, "mcts"),
    "open_spiel, Python bot": (open_spiel, "open_spiel"),
    "treequest": (treequest, "treequest"),
}

"""info_nce and similarity_stats over the ranks of a group against one process with all rows; gloo.

This file runs itself once per rank.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tercet.kernels import info_nce, similarity_stats

SIZES, POOLS, HIDDEN, OWN = (3, 6), (2, 1), 5, 2
CASES = list(
    itertools.product([False, True], ["mean", "sum", "none"], [None, "pool", "own"], [False, True])
)

STATS = list(itertools.product([None, "pool", "own"], [False, True]))


def problem(kind: str | None, everything: bool) -> tuple[list[Any], dict[str, Any], torch.Tensor]:
    """All ranks' embeddings, what belongs to rows, and an upstream gradient per row."""
    torch.manual_seed(1)
    rows, m = sum(SIZES), sum(POOLS)
    q, k = torch.randn(2, rows, HIDDEN)
    n = None
    if kind is not None:
        n = torch.randn((m, HIDDEN) if kind == "pool" else (rows, OWN, HIDDEN))
    options: dict[str, Any] = {}
    if everything:
        options = {"ids": torch.randint(0, 5, (rows,)), "weight": torch.rand(rows)}
        if n is not None:
            options["negative_ids"] = torch.randint(0, 5, n.shape[:-1])
    return [q, k, n], options, torch.rand(rows)


def share(x: Any, sizes: tuple[int, ...], rank: int) -> Any:
    return None if x is None else x.split(list(sizes))[rank]


def step(inputs, dy, **options) -> list[torch.Tensor]:
    """Loss and gradients of embeddings, temperature and weight."""
    names = [name for name in ("temperature", "weight") if name in options]
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    extra = {name: options[name].clone().requires_grad_() for name in names}
    loss = info_nce(*leaves, **options | extra)
    given = [x for x in (*leaves, *extra.values()) if x is not None]
    return [loss.detach(), *torch.autograd.grad((loss * dy).sum(), given)]


def of_rank(kind: str | None, everything: bool, rank: int | None):
    """The problem's part on one rank, or (None) all of it."""
    inputs, options, dy = problem(kind, everything)
    if rank is None:
        return inputs, options, dy
    pool = POOLS if kind == "pool" else SIZES
    inputs = [share(x, sizes, rank) for x, sizes in zip(inputs, (SIZES, SIZES, pool), strict=True)]
    for name, sizes in (("ids", SIZES), ("weight", SIZES), ("negative_ids", pool)):
        if name in options:
            options[name] = share(options[name], sizes, rank)
    return inputs, options, share(dy, SIZES, rank)


def call(case, rank: int | None, group=None) -> list[torch.Tensor]:
    """A case on one rank, or (None) on all rows at once."""
    symmetric, reduction, kind, everything = case
    inputs, options, dy = of_rank(kind, everything, rank)
    options["temperature"] = torch.tensor(0.3)
    dy = dy if reduction == "none" else torch.tensor(1.0)
    margin = 0.4 if everything else None
    return step(
        inputs, dy, symmetric=symmetric, reduction=reduction, group=group,
        false_negative_margin=margin, **options,
    )  # fmt: skip


def describe(kind: str | None, everything: bool, rank: int | None, group=None) -> list[Any]:
    inputs, options, _ = of_rank(kind, everything, rank)
    options.pop("weight", None)
    return list(similarity_stats(*inputs, **options, group=group))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-P", __file__, str(folder)]
    running = [
        subprocess.Popen([*command, str(r)], stderr=subprocess.PIPE, text=True) for r in (0, 1)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_together_are_one_process(case, ranks):
    _, reduction, kind, everything = case
    whole = call(case, None)
    losses, *grads = zip(*(found[CASES.index(case)] for found in ranks), strict=True)
    scale = 0.5 if reduction == "mean" else 1.0  # data parallelism takes the mean over ranks
    together = torch.cat(losses) if reduction == "none" else sum(losses) * scale
    torch.testing.assert_close(together, whole[0])
    names = ["q", "k", *([] if kind is None else ["n"]), "temperature", *["weight"] * everything]
    for name, expected, parts in zip(names, whole[1:], grads, strict=True):
        found = sum(parts) if name == "temperature" else torch.cat(parts)
        torch.testing.assert_close(found * scale, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", STATS, ids=str)
def test_stats_of_ranks_together_are_one_process(case, ranks):
    whole = describe(*case, None)
    number = len(CASES) + STATS.index(case)
    together = [torch.cat(parts) for parts in zip(*(found[number] for found in ranks), strict=True)]
    torch.testing.assert_close(together, whole)


def test_keys_of_one_text_on_every_rank_have_no_loss(ranks):
    loss, *grads = ranks[0][-2]
    assert loss == 0
    assert not any(x.any() for x in grads)


def test_a_rank_without_rows(ranks):
    (loss, dq, dk), (none, no_dq, no_dk) = (found[-1] for found in ranks)
    torch.manual_seed(2)
    q, k = torch.randn(2, 4, HIDDEN)
    expected = step([q, k, None], torch.tensor(1.0), symmetric=True)
    for ours, alone in zip((loss, dq, dk), expected, strict=True):
        torch.testing.assert_close(ours * 0.5, alone)  # "mean": two ranks share the four rows
    assert none == 0
    assert no_dq.shape == no_dk.shape == (0, HIDDEN)


def _main(folder: Path, rank: int) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    group = dist.group.WORLD
    found = [call(case, rank, group) for case in CASES]
    found += [describe(*case, rank, group) for case in STATS]
    one = torch.tensor(1.0)
    x, ids = torch.randn(2, HIDDEN), torch.zeros(2, dtype=torch.int64)
    found.append(step([x, x + 1, None], one, ids=ids, symmetric=True, group=group))
    torch.manual_seed(2)
    q, k = torch.randn(2, 4, HIDDEN)[:, : 4 * (1 - rank)]
    found.append(step([q, k, None], one, symmetric=True, group=group))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))

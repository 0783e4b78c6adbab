"""The search core's numbers in plain Python: what the compiled ones must equal bit for bit."""

import math


def judged(verdicts: list[float], outcome: float | None, form: str) -> list[float]:
    """Verdicts that count: a finished rollout's last one is replaced by its outcome."""
    return verdicts if form == "paper" and outcome is None else verdicts[:-1]


def paper_parts(steps: list[float], outcome: float, beta: float, decay: float):
    total, weight = 0.0, 1.0
    for verdict in steps:
        total += weight * verdict
        weight *= decay
    return (total / len(steps) if steps else 0.0), beta * outcome


def released_parts(steps: list[float], outcome: float):
    n, total = len(steps), 0.0
    factor = 1 / max(n, 1)
    for i, verdict in enumerate(steps):
        total += factor * verdict * (n - i) / n
    return total, factor * outcome


def rollout_reward(verdicts, outcome, start_verdict, *, form, beta, decay, truncated, add_start):
    """(step, outcome, start, total)."""
    steps = judged(verdicts, outcome, form)
    final = truncated if outcome is None else outcome
    if form == "released":
        step, end = released_parts(steps, final)
    else:
        step, end = paper_parts(steps, final, beta, decay)
    start = start_verdict if add_start else 0.0
    return step, end, start, step + end + start


def identity(how: str) -> float:
    return {"max": -math.inf, "min": math.inf, "product": 1.0}.get(how, 0.0)


def absorbed(accumulated: float, value: float, how: str) -> float:
    return {
        "sum": accumulated + value,
        "mean": accumulated + value,
        "max": max(accumulated, value),
        "min": min(accumulated, value),
        "product": accumulated * value,
        "last": value,
    }[how]


def value_of(accumulated: float, returns: int, how: str) -> float:
    return accumulated / returns if how == "mean" else accumulated


def path_return(scores: list[float], how: str) -> float:
    accumulated = identity(how)
    for score in scores:
        accumulated = absorbed(accumulated, score, how)
    return value_of(accumulated, len(scores), how)


def decayed(value: float, gamma: float, distance: int) -> float:
    for _ in range(distance):
        value *= gamma
    return value


def mixed(value: float, simulated: float, alpha: float) -> float:
    return value * (1 - alpha) + simulated * alpha


def visit_weighted_mean(values: list[float], visits: list[int], own: float) -> float:
    total = 0.0
    for value, n in zip(values, visits, strict=True):
        total += value * n
    return total / sum(visits) if sum(visits) else own

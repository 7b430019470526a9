"""What a comparison's results say: gains, ratios to the best rival, ranks, times to reach it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from shortft.compare.jobs import Workshop, read_result
from shortft.methods.catalog import METHODS

Runs = Sequence[dict[str, Any]]
Results = dict[tuple[str, str], list[dict[str, Any]]]  # by reward and method, one per seed
PLAIN_CHAIN = " on the plain chain"


def collect(workshop: Workshop) -> Results:
    """Every finished run's result; a tuned shortcut's by the plain chain is a line of its own."""
    results: Results = {}
    for job in workshop.jobs():
        if job.search or not job.done:
            continue
        result = read_result(job)
        # A score on the way that was not a number says nothing.
        result["curve"] = [point for point in result["curve"] if point[1] is not None]
        results.setdefault((job.reward, job.method), []).append(result)
        if "plain_chain" in result:
            plain = {**result, **result["plain_chain"], "curve": []}
            results.setdefault((job.reward, job.method + PLAIN_CHAIN), []).append(plain)
    return results


def gain(result: dict[str, Any]) -> float:
    """How much the reward on held-out prompts rose."""
    return float(result["reward"]["after"] - result["reward"]["before"])


def median_gain(runs: Runs) -> float:
    return median(map(gain, runs))


def names_shown(methods: Sequence[str]) -> dict[str, str]:
    """Competitors' names for pictures: without their own learning rates, where that is enough.

    Tables have the rates in a column of their own.
    """
    plain = {method: _without_rate(method) for method in methods}
    counted = list(plain.values())
    return {m: m if counted.count(short) > 1 else short for m, short in plain.items()}


def _without_rate(method: str) -> str:
    bare = method.removesuffix(PLAIN_CHAIN)
    name, _, options = bare.partition(":")
    kept = ",".join(o for o in options.split(",") if not o.strip().startswith("learning_rate="))
    return (f"{name}:{kept}" if kept else name) + method[len(bare) :]


def is_rival(method: str) -> bool:
    """Everything that is neither ShortFT, or a variant of it, nor a method of our own."""
    name = method.partition(":")[0]
    own = name in METHODS and METHODS[name].ours
    return not (name.startswith("shortft") or own)


def tuning_the_base(results: Results) -> Results:
    """Without what tunes a few-step model instead: it makes another model."""
    return {pair: runs for pair, runs in results.items() if "plain_chain" not in runs[0]}


def by_gain(results: Results, reward: str) -> list[str]:
    """The methods that ran for a reward, the largest median gain first: a method's rank."""
    methods = [method for r, method in results if r == reward]
    return sorted(methods, key=lambda method: -median_gain(results[reward, method]))


def best_rival(results: Results, reward: str) -> tuple[str, Runs] | None:
    """The rival with the largest median gain."""
    for method in by_gain(results, reward):
        if is_rival(method):
            return method, results[reward, method]
    return None


def gain_ratio(results: Results, reward: str, method: str) -> float | None:
    """Median gain over the best rival's; None without a rival that gained anything."""
    rival = best_rival(results, reward)
    if rival is None or median_gain(rival[1]) <= 0:
        return None
    return median_gain(results[reward, method]) / median_gain(rival[1])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of all seeds with the probability of `sureness`.

    Its ends are two of the values: the range, less as many at either end as leaves 95 %. It is
    the interval of the sign test, which assumes nothing of how the values are distributed.
    """
    cut = _cut(len(values))
    ordered = sorted(values)
    return ordered[cut], ordered[len(ordered) - 1 - cut]


def sureness(count: int) -> float:
    """The probability that the interval of so many values holds the median of all."""
    return _coverage(count, _cut(count))


def _cut(count: int) -> int:
    return max((n for n in range(1, count // 2) if _coverage(count, n) >= 0.95), default=0)


def _coverage(count: int, cut: int) -> float:
    """Fair coins: the median lies outside if at most `cut` values lie on one side of it."""
    return 1 - 2 * sum(math.comb(count, below) for below in range(cut + 1)) / 2**count


def pairs_ahead(runs: Runs, others: Runs) -> int:
    """In how many pairs, of a run of each, the first gains more."""
    return sum(gain(run) > gain(other) for run in runs for other in others)


def mean_gain_ratio(results: Results, rewards: Sequence[str], method: str) -> float | None:
    """The mean over all rewards; None if the method did not run for one of them, or no rival."""
    if any((reward, method) not in results for reward in rewards):
        return None
    ratios = [gain_ratio(results, reward, method) for reward in rewards]
    known = [ratio for ratio in ratios if ratio is not None]
    return mean(known) if len(known) == len(ratios) else None


def looked_at(runs: Runs) -> Runs:
    """Those with evaluations on the way."""
    return [run for run in runs if run["curve"]]


def curve(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of training and the median over seeds, all looked at, of the reward on the way.

    Seeds are brought onto the first one's times by linear interpolation.
    """
    times = np.array([point[0] for point in runs[0]["curve"]])
    values = [
        np.interp(times, [p[0] for p in run["curve"]], [p[1] for p in run["curve"]]) for run in runs
    ]
    return times, np.median(values, axis=0)


def final_reward_of_best_rival(results: Results, reward: str) -> float | None:
    """Where the curve of the best rival ends; a rival without a curve is passed over."""
    for method in by_gain(results, reward):
        runs = looked_at(results[reward, method])
        if is_rival(method) and runs:
            return float(curve(runs)[1][-1])
    return None


def seconds_to_reach(runs: Runs, level: float) -> float | None:
    """When the median curve first is at a level, by linear interpolation; None if never."""
    runs = looked_at(runs)
    if not runs:
        return None
    times, values = curve(runs)
    for i, value in enumerate(values):
        if value >= level:
            if i == 0:
                return float(times[0])
            share = (level - values[i - 1]) / (value - values[i - 1])
            return float(times[i - 1] + share * (times[i] - times[i - 1]))
    return None


def held_out(runs: Runs) -> float | None:
    """The median held-out score; None where none was measured."""
    scores = [run["held_out"]["after"] for run in runs if "held_out" in run]
    return median(scores) if scores else None


def front(results: Results, reward: str) -> list[str]:
    """The methods than which no other has both a larger gain and a larger held-out score.

    By medians over seeds, the largest gain first; none where no held-out score was measured.
    """
    found: list[str] = []
    best = -math.inf
    for method in by_gain(results, reward):
        score = held_out(results[reward, method])
        if score is not None and score > best:
            best = score
            found.append(method)
    return found

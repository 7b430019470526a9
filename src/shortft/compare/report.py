"""The report of a comparison: its tables, as Markdown and CSV; `charts` draws."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from shortft.compare.charts import draw_grid, draw_methods
from shortft.compare.figures import (
    PLAIN_CHAIN,
    Results,
    best_rival,
    by_gain,
    collect,
    final_reward_of_best_rival,
    front,
    gain,
    gain_ratio,
    interval,
    is_rival,
    looked_at,
    mean_gain_ratio,
    median_gain,
    names_shown,
    pairs_ahead,
    seconds_to_reach,
    sureness,
    tuning_the_base,
)
from shortft.compare.jobs import Workshop, slug
from shortft.drawing.files import write_atomic
from shortft.drawing.progress import memory_text
from shortft.redact import without_secrets

HEADER = (
    "rank",
    "method",
    "reward, before → after",
    "gain",
    "gain / best rival's",
    "in its own unit, before → after",
    "held-out scorer, before → after",
    "diversity, change",
    "s per update",
    "updates",
    "peak memory",
    "reaches the best rival's final reward in",
    "learning rate",
)


def write_report(workshop: Workshop, command: str = "") -> list[Path]:
    """Write results.md, results.csv, and curves and a grid per reward; returns their paths.

    Args:
        command: what the user typed; it stands in the report.
    """
    results = collect(workshop)
    root, spec = workshop.root, workshop.comparison
    paths: list[Path | None] = [
        write_atomic(root / "results.md", markdown(workshop, results, command).encode()),
        write_atomic(root / "results.csv", table_csv(results).encode()),
    ]
    for reward in spec.rewards:
        name = slug(reward)
        if not any(r == reward for r, _ in results):
            continue
        paths.append(draw_methods(results, reward, root / f"curves-{name}.png"))
        paths.append(draw_grid(workshop, reward, root / f"grid-{name}.png"))
    return [path for path in paths if path]


def spread(values: Sequence[float], form: str) -> str:
    """Median and interval over seeds, such as ``0.25 (0.24 to 0.26)``."""
    ends = interval(values)
    low, middle, high = (format(v, form) for v in (ends[0], median(values), ends[1]))
    return middle if low == high else f"{middle} ({low} to {high})"


def ratio_text(ratio: float | None) -> str:
    return "not defined" if ratio is None else f"{ratio:.2f}"


def reached_text(results: Results, reward: str, method: str) -> str:
    """When a method reaches the best rival's final reward, and as a share of its training."""
    if best_rival(results, reward) is None:
        return "no rival ran"
    runs, level = results[reward, method], final_reward_of_best_rival(results, reward)
    if level is None or not looked_at(runs):
        return "not measured"
    when = seconds_to_reach(runs, level)
    if when is None:
        return "not reached"
    whole = median([run["training_seconds"] for run in runs])
    return f"{when:.0f} s ({100 * when / whole:.0f} %)"


def row(results: Results, reward: str, method: str) -> tuple[str, ...]:
    """One line of a reward's table."""
    runs = results[reward, method]
    own = [
        f"{first['name']} {'↑' if first['higher_is_better'] else '↓'}: {first['before']:.4g} → "
        + spread([run["reports"][part]["after"] for run in runs], ".4g")
        for part, first in runs[0]["reports"].items()
    ]
    held_out = [run["held_out"]["after"] for run in runs if "held_out" in run]
    variety = [
        100 * (run["diversity"]["after"] / run["diversity"]["before"] - 1)
        for run in runs
        if "diversity" in run
    ]
    before = median([run["reward"]["before"] for run in runs])
    return (
        str(1 + by_gain(results, reward).index(method)),
        method,
        f"{before:.3f} → {spread([run['reward']['after'] for run in runs], '.3f')}",
        spread([gain(run) for run in runs], "+.4f"),
        ratio_text(gain_ratio(results, reward, method)),
        "<br>".join(own),
        f"{runs[0]['held_out']['before']:.3f} → {spread(held_out, '.3f')}" if held_out else "none",
        f"{spread(variety, '+.0f')} %" if variety else "none",
        spread([run["seconds_per_update"] for run in runs], ".2f"),
        spread([run["updates"] for run in runs], ".0f"),
        memory_text(median([run["peak_memory_bytes"] for run in runs])),
        reached_text(results, reward, method),
        spread([run["learning_rate"] for run in runs], "g"),
    )


def markdown(workshop: Workshop, results: Results, command: str = "") -> str:
    """The whole report as Markdown."""
    spec = workshop.comparison
    seeds = max(map(len, results.values()), default=0)  # fewer than wanted in a report on the way
    clock = "CPU time" if workshop.base.clock == "cpu" else "wall-clock time"
    lines = [
        "# Methods at equal training time",
        "",
        f"{seeds} seed(s), {spec.minutes:g} minutes of training each ({clock}; sampling, "
        "evaluation and loading not counted), the same LoRA rank, optimizer and batch but for what "
        f"a name says; measured on {len(workshop.held_out_prompts())} held-out prompts × "
        f"{spec.noises} noises, by the plain chain; a tuned shortcut by its own as well.",
        "",
    ]
    if seeds > 1:
        lines[-1:] = [
            "",
            "Medians with an interval over seeds (of fewer than nine their range), which holds "
            f"the median of all seeds with probability {sureness(seeds):.0%}.",
            "",
        ]
    known = any(r in spec.rates.get(m, {}) for r in spec.rewards for m in spec.methods)
    if known:
        lines += ["Learning rates that were known for method and reward were taken untried.", ""]
    if spec.searched:
        which = "Others" if known else "Learning rates"
        rates = ", ".join(f"{rate:g}" for rate in spec.search)
        trained_for = f"on {spec.search_reward}" if spec.search_reward else "and reward"
        further = f", and up to {spec.search_further} beyond an edge" if spec.search_further else ""
        lines += [
            f"{which}: {rates}{further}, each tried for {spec.search_minutes:g} minutes per "
            f"method {trained_for}, on other prompts and with another seed; the best by reward was "
            "taken.",
            "",
        ]
    rewards = [reward for reward in spec.rewards if any(r == reward for r, _ in results)]
    if len(rewards) > 1:
        lines += [*overall(results, rewards), ""]
    for reward in rewards:
        methods = by_gain(results, reward)
        lines += [f"## {reward}", "", _line(HEADER), _line(["---"] * len(HEADER))]
        lines += [_line(row(results, reward, m)) for m in methods]
        lines += ["", *verdict(results, reward), *kept(results, reward)]
        lines += [*at_the_edge(workshop, results, reward), ""]
        warnings = [
            f"- {m}, seed {run['seed']}: {warning}"
            for m in methods
            for run in results[reward, m]
            for warning in run["warnings"]
        ]
        lines += [*warnings, ""] if warnings else []
    return "\n".join([*lines, *how_made(results, command)])


def how_made(results: Results, command: str) -> list[str]:
    """The command, and the versions and machines of the runs."""
    lines = ["## How this was made", ""]
    if command:
        lines += ["```sh", without_secrets(command), "```", ""]
    every = [  # a run's second line, on the plain chain, is no run of its own
        run for (_, m), runs in results.items() if not m.endswith(PLAIN_CHAIN) for run in runs
    ]
    makers = Counter(run.get("made_by", "not recorded") for run in every)
    lines += [f"- {count} runs: {maker}." for maker, count in makers.most_common()]
    return [*lines, ""]


def overall(results: Results, rewards: Sequence[str]) -> list[str]:
    """Every method's gain in units of the best rival's; again among those that tune the base."""
    lines = ["## All rewards", "", "Median gain / the best rival's (rank).", ""]
    lines += ratios(results, rewards)
    of_base = tuning_the_base(results)
    if of_base != results and any(best_rival(of_base, reward) for reward in rewards):
        lines += ["", "The same among those that tune the base model.", ""]
        lines += ratios(of_base, rewards)
    return lines


def ratios(results: Results, rewards: Sequence[str]) -> list[str]:
    """A table of gains in units of the best rival's, per reward and in the mean."""
    methods = list(dict.fromkeys(method for _, method in results))
    means = {method: mean_gain_ratio(results, rewards, method) for method in methods}
    methods.sort(key=lambda method: (means[method] is None, -(means[method] or 0)))
    head = ["method", "mean", *rewards]
    lines = [_line(head), _line(["---"] * len(head))]
    for method in methods:
        cells = [method, ratio_text(means[method])]
        for reward in rewards:
            if (reward, method) not in results:
                cells.append("did not run")
                continue
            rank = 1 + by_gain(results, reward).index(method)
            cells.append(f"{ratio_text(gain_ratio(results, reward, method))} ({rank})")
        lines.append(_line(cells))
    return lines


def verdict(results: Results, reward: str) -> list[str]:
    """How the best that is no rival, others that lead, and shortft stand against the best rival.

    Where that one tunes a few-step model, also against the best one that tunes the base.
    """
    of_base = tuning_the_base(results)
    lines = against(results, reward, "the best rival")
    if best_rival(results, reward) != best_rival(of_base, reward):
        lines += against(of_base, reward, "the best rival that tunes the base")
    return lines


def against(results: Results, reward: str, which: str) -> list[str]:
    """A line for each method that is told of; `which` says what the best rival is the best of."""
    rival = best_rival(results, reward)
    own = [m for m in by_gain(results, reward) if not is_rival(m)]
    if rival is None:
        return []
    lines = []
    names = names_shown(by_gain(results, reward))
    level = median_gain(rival[1])
    told = [m for m in own if names[m] == "shortft" or median_gain(results[reward, m]) > level]
    for method in dict.fromkeys([*own[:1], *told]):
        runs = results[reward, method]
        gains, others = ([gain(run) for run in each] for each in (runs, rival[1]))
        apart = interval(gains)[0] > interval(others)[1]
        ahead = median_gain(runs) > level
        intervals = "are apart" if apart else "overlap" if ahead else "say it lost"
        pairs = f"{pairs_ahead(runs, rival[1])} of {len(runs) * len(rival[1])} pairs"
        lines.append(
            f"- {method} against {which}, {rival[0]}: gain ratio "
            f"{ratio_text(gain_ratio(results, reward, method))}; intervals over seeds {intervals}, "
            f"ahead in {pairs}; its final reward: {reached_text(results, reward, method)}."
        )
    return lines


def kept(results: Results, reward: str) -> list[str]:
    """Which gains are not bought with more of the held-out score than another's."""
    names = front(results, reward)
    if not names:
        return []
    return [
        "- Nothing here has both more reward and more of the held-out score than: "
        f"{', '.join(names)}."
    ]


def at_the_edge(workshop: Workshop, results: Results, reward: str) -> list[str]:
    """Methods whose best learning rate is the lowest or highest tried: others may be better."""
    spec, found = workshop.comparison, []
    for method in by_gain(results, reward):
        if (reward, method) in spec.without_rate and spec.searched:  # and no second line of one
            rate = results[reward, method][0]["learning_rate"]
            tried = workshop.rates(spec.search_reward or reward, method)
            if rate in (tried[0], tried[-1]):
                found.append(f"{method} ({rate:g})")
    if not found:
        return []
    names = ", ".join(found)
    return [f"- Rates at the edge of those tried, so that a wider search may do more: {names}."]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_csv(results: Results) -> str:
    """One line per run, plain numbers; intervals are over prompts."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = ["reward", "method", "seed", "learning_rate", "before", "after", "change_low"]
    names += ["change_high", "held_out_before"]
    names += ["held_out_after", "diversity_before", "diversity_after", "updates"]
    names += ["training_seconds", "peak_memory_bytes", "skipped"]
    writer.writerow(names)
    for (reward, method), runs in results.items():
        for run in runs:
            cells = [reward, method, run["seed"], run["learning_rate"]]
            cells += [run["reward"]["before"], run["reward"]["after"]]
            cells += run["reward"]["change_interval"]
            for figure in ("held_out", "diversity"):
                cells += [run.get(figure, {}).get(when, "") for when in ("before", "after")]
            rest = ("updates", "training_seconds", "peak_memory_bytes", "skipped")
            writer.writerow([*cells, *(run[name] for name in rest)])
    return out.getvalue()

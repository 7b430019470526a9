"""The documentation names what the code has."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import pytest
import typer

from shortft.cli import app
from shortft.compare.figures import PLAIN_CHAIN, is_rival, names_shown
from shortft.compare.spec import RATES, REWARDS
from shortft.methods.catalog import METHODS, VARIANTS

ROOT = Path(__file__).parent.parent
# Columns with the rewards and held-out scores that the files of results have.
SCORES = re.compile(r"(?!mirror|kB|CLIP cosine, 0\.\d{3} ).*→")


def test_methods_page_lists_every_method_option_and_variant():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    names = [*METHODS, *VARIANTS, *(o for m in METHODS.values() for o in m.options)]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_command_line_page_tells_every_option():
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        (name, tuple(o for o in [*p.opts, *p.secondary_opts] if o.startswith("--")))
        for name, command in commands.items()
        for p in command.params
    }
    untold = [
        (name, spelled)
        for name, spelled in sorted(options)
        if spelled and not any(re.search(rf"{re.escape(o)}(?![\w-])", text) for o in spelled)
    ]
    assert len(options) > 100
    assert untold == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_outside_the_site_lead_somewhere(page: str):
    """Those within docs/ are checked by `make docs`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]+)(?:#([^)]*))?\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
        if anchor and target.endswith(".md"):
            headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, (target, anchor)


@pytest.mark.parametrize(("page", "least"), [("comparisons", 480), ("earlier-comparisons", 780)])
def test_figures_of_comparisons_are_those_of_the_runs(page: str, least: int):
    """Each score in a table on a method is, rounded, a run's or a median of runs linked there."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    checked, wrong = 0, []
    for section in re.split(r"\n(?=## )", text):
        runs = scores_of_methods(re.findall(r"results/[\w-]+\.csv", section))
        for method, column, figure in figures_in_tables(section) if runs else ():
            checked += 1
            most = 0.5000001 * 10 ** -len(figure.partition(".")[2])
            if not any(abs(float(figure) - score) <= most for score in runs.get(method, ())):
                wrong.append((method, column, figure))
    assert wrong == []
    assert checked > least


def test_the_full_comparison_ran_at_its_rates():
    expected = [
        (reward, method, seed, rate)
        for method, rates in RATES.items()
        for reward, rate in rates.items()
        for seed in range(3)
    ]
    runs = [run for run in runs_of("full") if not run["method"].endswith(PLAIN_CHAIN)]
    assert sorted(
        (run["reward"], run["method"], int(run["seed"]), float(run["learning_rate"]))
        for run in runs
    ) == sorted(expected)


def test_gains_at_a_glance_are_those_of_the_runs():
    """Ratios to the best rival that tunes the base; bold where all of ours gain more than any."""
    # Of `jumps` on compressibility, which ran twice with nine seeds, the first.
    gains = gains_of("nine-seeds-again", "full", "nine-seeds")
    rows = ratios_at_a_glance()
    for (name, seeds), cells in rows.items():
        for reward, cell in zip(REWARDS, cells, strict=True):
            if not cell:
                continue
            rivals = [
                runs
                for (r, method, count), runs in gains.items()
                if (r, count) == (reward, seeds)
                and is_rival(method)
                and not method.startswith("tune_shortcut")
            ]
            own = gains[reward, name, seeds]
            ratio = median(own) / max(map(median, rivals))
            text = f"{ratio:.2f}" if ratio > 0 else "below 0"
            above_all = not is_rival(name) and min(own) > max(map(max, rivals))
            assert cell == (f"**{text}**" if above_all else text), (name, reward)
    assert {name for name, _ in rows} == {method for _, method, _ in gains}


def test_the_ratios_of_readme_are_those_at_a_glance():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"(?m)^\|((?: \d\.\d\d \|){4})$", readme)
    rows = ratios_at_a_glance()
    best_known = [
        nine or three for nine, three in zip(rows["jumps", 9], rows["jumps", 3], strict=True)
    ]
    assert row.strip(" |").split(" | ") == [cell.strip("*") for cell in best_known]


def ratios_at_a_glance() -> dict[tuple[str, int], list[str]]:
    """The cells of each row of the first table of comparisons, by the method and its seeds."""
    page = (ROOT / "docs" / "comparisons.md").read_text(encoding="utf-8")
    table = page[page.index("| method | text alignment |") :].partition("\n\n")[0]
    rows = {}
    for line in table.splitlines()[2:]:
        head, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        name, more = re.fullmatch(r"`([^`]+)`(.*)", head).groups()
        seeds = 9 if "nine seeds" in more else 3
        plain = PLAIN_CHAIN if more.startswith(PLAIN_CHAIN) else ""
        rows[name + plain, seeds] = cells
    return rows


def runs_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / "results" / f"{name}.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def gains_of(*names: str) -> dict[tuple[str, str, int], list[float]]:
    """Gains of all seeds by reward, method without its rate, and number of seeds."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for name in names:
        gains: dict[tuple[str, str], list[float]] = {}
        for run in runs_of(name):
            method = names_shown([run["method"]])[run["method"]]
            gain = float(run["after"]) - float(run["before"])
            gains.setdefault((run["reward"], method), []).append(gain)
        found.update({(*pair, len(seeds)): seeds for pair, seeds in gains.items()})
    return found


def scores_of_methods(files: Sequence[str]) -> dict[str, set[float]]:
    """Scores of runs and medians of the first n seeds, by the method, without its rate."""
    found: dict[str, set[float]] = {}
    groups: dict[tuple[str, ...], list[float]] = {}
    for file in sorted(set(files)):
        with (ROOT / "docs" / file).open(encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                own = [row.get(key) or "" for key in ("prompts", "num_steps", "minutes", "reward")]
                for score in ("after", "held_out_after"):
                    if row.get(score):
                        group = (row["method"], file, score, *own)
                        groups.setdefault(group, []).append(float(row[score]))
    for (method, *_), scores in groups.items():
        medians = {median(scores[:n]) for n in range(1, len(scores) + 1)}
        found.setdefault(names_shown([method])[method], set()).update(medians, scores)
    return found


def figures_in_tables(section: str) -> Iterator[tuple[str, str, str]]:
    """Method, heading and figure of each score with three or four digits."""
    heads: list[str] = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        method = re.match(r"`([^`]+)`( on the plain chain)?", cells[0])
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = cells
        elif method:
            for head, cell in zip(heads, cells, strict=True):
                for figure in re.findall(r"(?<![\w.+-])-?0\.\d{3,4}(?!\d)", cell):
                    if SCORES.match(head):
                        yield "".join(part or "" for part in method.groups()), head, figure

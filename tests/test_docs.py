"""The documentation names what the code has."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import pytest

from shortft.compare.figures import names_shown
from shortft.compare.spec import RATES
from shortft.methods.catalog import METHODS, VARIANTS

ROOT = Path(__file__).parent.parent
# Columns with the rewards and held-out scores that the files of results have.
SCORES = re.compile(r"(?!mirror|kB|CLIP cosine, 0\.\d{3} ).*→")


def test_methods_page_lists_every_method_option_and_variant():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    names = [*METHODS, *VARIANTS, *(o for m in METHODS.values() for o in m.options)]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (ROOT / "docs" / target).exists(), target


def test_figures_of_comparisons_are_those_of_the_runs():
    """Each score in a table on a method is, rounded, a run's or a median of runs linked there."""
    page = (ROOT / "docs" / "comparisons.md").read_text(encoding="utf-8")
    checked, wrong = 0, []
    for section in re.split(r"\n(?=## )", page):
        runs = scores_of_methods(re.findall(r"results/[\w-]+\.csv", section))
        for method, column, figure in figures_in_tables(section) if runs else ():
            checked += 1
            most = 0.5000001 * 10 ** -len(figure.partition(".")[2])
            if not any(abs(float(figure) - score) <= most for score in runs.get(method, ())):
                wrong.append((method, column, figure))
    assert wrong == []
    assert checked > 700


@pytest.mark.parametrize("of", ["text", "symmetry", "compressibility", "mix"])
def test_rates_of_the_full_comparison_are_those_of_the_runs(of: str):
    file = ROOT / "docs" / "results" / f"every-method-{of}.csv"
    with file.open(encoding="utf-8") as lines:
        runs = [run for run in csv.DictReader(lines) if run["prompts"] == "held-out"]
    assert len(runs) >= 27
    for run in runs:
        (name,) = names_shown([run["method"]]).values()
        assert RATES[name][run["reward"]] == float(run["learning_rate"])


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

"""A plan as text: one row per segment, one column per timestep, one glyph per network call.

Every colour has a glyph of its own, so that the picture reads without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from shortft.plans import Plan, Step

BASE, JUMP, PINNED, CACHED, RAIL, HEAD = "·", "S", "P", "-", "─", "▶"
TRAINS, FULL, PARTIAL = "▲", "═", "~"
STYLE = {"base": "dim", "shortcut": "bold cyan", "policy": "magenta", "train": "bold magenta"}
GRADIENT = "bold green"
CHAIN_WIDTH = 46


def plan_text(
    plan: Plan,
    timesteps: Sequence[float],
    segments: Sequence[Sequence[int]] = (),
    title: str | None = None,
    legend: bool = True,
) -> RenderableType:
    """The chain of one stage as a rich renderable at most 80 columns wide.

    `timesteps`: those of the N points, first to last; `segments`: point indices per segment (the
    whole chain without). Print it with a rich Console.
    """
    steps, times = plan.steps, [float(t) for t in timesteps]
    widest = max((len(s) for s in segments), default=len(times)) or 1
    # Without segments the two columns to the left are narrower, so that 50 steps fit one row.
    room = CHAIN_WIDTH if len(segments) > 1 else CHAIN_WIDTH + 6
    cell = max(1, min(4, room // widest))
    table = Table.grid(padding=(0, 2, 0, 0))
    heads = ["segment", "timesteps", "chain", "calls", "with gradient"]
    for name in heads:
        table.add_column(justify="left" if name == "chain" else "right", no_wrap=True)
    table.add_row("segment" if len(segments) > 1 else "", *heads[1:4], "grad", style="bold")
    for label, points in stretches(segments, len(times), room // cell):
        begun = [i for i, step in enumerate(steps) if step.start in points]
        if not begun and steps[-1].stop <= points[0]:
            continue
        chain, gradient = _draw(plan, points, cell)
        carrying = sum(plan.grad_mask[i] for i in begun)
        when = f"{timestep_text(times[points[0]])} → {timestep_text(times[points[-1]])}"
        with_gradient = Text(str(carrying), style=GRADIENT if carrying else "dim")
        calls = sum(steps[i].net != "cached" for i in begun)
        table.add_row(label, when, chain, str(calls), with_gradient)
        if gradient.plain.strip():
            table.add_row("", "", gradient, "", "")
    head = Text.assemble((f"{title}: " if title else "", "bold"), calls_text(plan))
    parts: list[RenderableType] = [head, table]
    if plan.reward_at == "x0":
        parts.append(Text("the reward looks at the x0 prediction of the last call", style="dim"))
    pinned = any(s.pin for s in steps if s.net == "shortcut")
    cached = any(s.net == "cached" for s in steps)
    leaps = any(s.net == "policy" and s.stop > s.start + 1 for s in steps)
    carrying = any(s.net == "shortcut" and s.adapters for s in steps)
    return Group(*parts, legend_text(pinned, cached, leaps, carrying)) if legend else Group(*parts)


def legend_text(
    pinned: bool = False, cached: bool = False, leaps: bool = False, carrying: bool = False
) -> RenderableType:
    """What the glyphs mean."""
    text = Text.assemble(
        (BASE, STYLE["base"]),
        " base   ",
        ("1 2 …", STYLE["policy"]),
        " with that many stacked LoRAs   ",
        (f"{JUMP}{RAIL}{HEAD}", STYLE["shortcut"]),
        " shortcut jump\n",
        (TRAINS, GRADIENT),
        " trains its LoRAs   ",
        (FULL, GRADIENT),
        " gradient flows back through the call   ",
        (PARTIAL, GRADIENT),
        " part of it",
    )
    if leaps:
        text.append("\n").append(f"1{RAIL}{HEAD}", STYLE["policy"]).append(" jump of the policy")
    if carrying:
        text.append("\n").append(f"{JUMP}1{RAIL}{HEAD}", STYLE["shortcut"])
        text.append(" shortcut jump with that many stacked LoRAs")
    if pinned:
        text.append("\n").append(PINNED, STYLE["shortcut"])
        text.append(" shortcut jump that keeps the rollout's values, for its gradient only")
    if cached:
        text.append("\n").append(CACHED, STYLE["base"])
        text.append(" taken from the rollout, no call")
    return text


def _glyph(step: Step) -> tuple[str, str]:
    if step.net == "shortcut" and not step.adapters:
        return PINNED if step.pin else JUMP, STYLE["shortcut"]
    if step.net in ("base", "cached"):
        return BASE if step.net == "base" else CACHED, STYLE["base"]
    count = str(step.adapters) if step.adapters < 10 else "+"
    return count, STYLE["train" if step.trains else "policy"]


def _draw(plan: Plan, points: range, cell: int) -> tuple[Text, Text]:
    """The chain's line and the gradient's line below it, `cell` columns per point."""
    width = cell * len(points)
    chain: list[tuple[str, str]] = [(" ", "")] * width
    below: list[tuple[str, str]] = [(" ", "")] * width

    def put(line: list[tuple[str, str]], at: int, glyph: str, style: str) -> None:
        if 0 <= at < width:
            line[at] = (glyph, style)

    for step, carries in zip(plan.steps, plan.grad_mask, strict=True):
        first, last = (step.start - points[0]) * cell, (step.stop - points[0]) * cell
        glyph, style = _glyph(step)
        rail = STYLE["shortcut"] if step.net == "shortcut" else "dim"
        long = step.stop - step.start > 1
        for at in range(first + 1, last):
            put(chain, at, RAIL, rail)
        if long:
            put(chain, last - 1, HEAD, rail)
        put(chain, first, glyph, style)
        if step.net == "shortcut" and step.adapters and last - first > 2:
            put(chain, first, JUMP, STYLE["shortcut"])
            put(chain, first + 1, glyph, style)
        if carries:
            through = FULL if step.input_grad >= 1 else PARTIAL if step.input_grad > 0 else " "
            for at in range(first, last):
                put(below, at, through, GRADIENT)
            if step.trains:
                put(below, first, TRAINS, GRADIENT)
    return Text.assemble(*chain), Text.assemble(*below)


def stretches(
    segments: Sequence[Sequence[int]], points: int, width: int
) -> list[tuple[str, range]]:
    """(label, point indices) of each text row: the segments, cut where wider than `width`."""
    parts = [list(segment) for segment in segments if len(segment)] or [list(range(points))]
    rows = []
    for number, part in enumerate(parts, start=1):
        for low in range(part[0], part[-1] + 1, width):
            label = f"{number}" if low == part[0] and len(parts) > 1 else ""
            rows.append((label, range(low, min(low + width, part[-1] + 1))))
    return rows


def timestep_text(timestep: float) -> str:
    """981, or 0.25 for schedules that count from 1 to 0."""
    return f"{timestep:.0f}" if timestep == round(timestep) or timestep >= 1 else f"{timestep:.2f}"


def calls_text(plan: Plan) -> str:
    """18 network calls, 7 with gradient."""
    return f"{plan.calls} network calls, {plan.grad_calls} with gradient"

"""`shortft train --dry-run`: everything that can be told and checked before the first slow step."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from shortft.checkpoint import any_in
from shortft.config import Config
from shortft.drawing.plan_text import plan_text
from shortft.drawing.progress import clock_text, memory_text
from shortft.errors import UserError
from shortft.inputs import read_prompts
from shortft.launcher import check_split, processes
from shortft.methods import METHODS
from shortft.out_of_memory import savings
from shortft.precision import emulated, settled
from shortft.preflight import machine
from shortft.preflight.estimate import GB, Estimate, estimate, run_seconds
from shortft.preflight.files import problems
from shortft.preflight.places import assumed_pipeline, configurations, needed
from shortft.redact import without_login
from shortft.rewards.registry import REWARDS
from shortft.schedule import segments
from shortft.shortcuts import check_fits


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: it is.
        found: in words.
        problem: the error message, or None where it is fine.
    """

    what: str
    found: str
    problem: str | None = None


def dry_run(config: Config, *, resume: bool = False) -> None:
    """Draw the chain, estimate memory and time, check what the run needs; loads no model.

    Raises:
        UserError: the first thing that would stop the run.
    """
    console = Console(stderr=True, width=80)  # the configuration alone goes to standard output
    check_split(config, processes())
    config = settled(config)
    device = machine.devices()[0]
    folder = configurations(config.pipeline or config.model)
    checks = [*check_places(config), check_prompts(config), check_output(config, resume=resume)]
    found: Estimate | None = None
    if folder is None:
        text = (
            "not estimated: nothing here tells the model's size; with its base's id for --model "
            "it is"
        )
        checks.append(Check("memory", text))
    else:
        speed = machine.measure_speed(device.kind, config.precision)
        found = estimate(config, folder, gpu=device.kind == "cuda", speed=speed)
        checks += [check_memory(config, found, device), check_disk(config, found)]
        draw(console, config, found)
    own = sorted(config.scorers - REWARDS.keys())
    if own and found is not None:
        checks.append(Check("memory", f"not counted: networks of {', '.join(own)}"))
    slow = emulated(config)
    if slow:
        checks.append(Check("warning", slow))
    show(console, checks)
    for check in checks:
        if check.problem is not None:
            raise UserError(check.problem)
    console.print("Nothing stands in the way.", highlight=False)


def check_places(config: Config) -> list[Check]:
    """The model, decoder, shortcut and rewards: whole on this machine, or to be downloaded."""
    checks = []
    if METHODS[config.method].uses_segments:
        check_fits(config.model, config.shortcut, config.segments)
    elif config.shortcut not in ("auto", "none"):
        text = f"{config.shortcut}, not used: --method {config.method} makes no jumps by one"
        checks.append(Check("shortcut", text))
    published = assumed_pipeline(config)
    if published is not None:
        text = f"{published}, as diffusers takes the file; --pipeline names another one"
        if published.endswith("stable-diffusion-2-1"):
            text += "; this one predicts v at 768 pixels, models of 2-base need their own"
        checks.append(Check("pipeline", text))
    wrong = {role: str(error) for role, error in problems(config)}
    places = needed(config)
    away = hub_problem() if any(place.download_gb for place in places) else None
    for place in places:
        text, problem = f"{place.name}, on this machine", wrong.get(place.role)
        if place.download_gb:
            text = f"{place.name}, to be downloaded, about {place.download_gb:.2g} GB"
            if away is not None:
                problem = f"{place.name} ({place.role}): not in the hub's cache, and {away}"
        checks.append(Check(place.role, text, problem))
    missing = download_bytes(config)
    if missing:
        free = machine.free_disk(machine.hub_cache())
        amount = f"{missing / GB:.3g} GB"
        text = f"{amount} to download, {memory_text(free)} free in {machine.hub_cache()}"
        full = (
            f"{machine.hub_cache()}: {memory_text(free)} free, but downloads take about {amount}; "
            "free some space, or set HF_HOME to another disk"
        )
        checks.append(Check("downloads", text, full if free < missing else None))
    return checks


def download_bytes(config: Config) -> int:
    """What is still to be downloaded, about."""
    return int(sum(place.download_gb for place in needed(config)) * GB)


def hub_problem() -> str | None:
    """Why nothing can be downloaded, and what to do; None where it can."""
    from huggingface_hub import constants

    if machine.hub_is_off():
        return "HF_HUB_OFFLINE forbids downloads; unset it, or give a local copy"
    if not machine.hub_answers():
        host = without_login(constants.ENDPOINT)
        return f"{host} does not answer; check the network, or give a local copy"
    return None


def check_prompts(config: Config) -> Check:
    from shortft.assets import prompts_for

    if config.prompts is None:
        return Check("prompts", f"{len(prompts_for(config.model, 'train'))} that ship")
    return Check("prompts", f"{len(read_prompts(config.prompts))} in {config.prompts}")


def check_output(config: Config, *, resume: bool) -> Check:
    root = config.output_dir
    if any_in(root / "checkpoints") == resume:
        return Check("output", f"{root}" + (", holds the run to continue" if resume else ""))
    if resume:
        return Check("output", str(root), f"--output-dir {root}: holds no run to --resume")
    return Check(
        "output",
        f"{root}, holds a run",
        f"--output-dir {root}: holds a run; pass --resume to continue it, or name another one",
    )


def check_memory(config: Config, found: Estimate, device: machine.Device) -> Check:
    text = (
        f"about {memory_text(found.peak)} of {memory_text(device.total)} ({device.name}), "
        f"{config.precision}"
    )
    free = device.free()
    if free is not None:
        text += f"; {memory_text(free)} free now"
    if found.peak <= device.total:
        if free is None or found.peak <= free:
            return Check("memory", text)
        return Check(
            "memory",
            text,
            f"--model {config.model}: the run takes about {memory_text(found.peak)}, of "
            f"{device.name} {memory_text(free)} are free; end what else runs there "
            f"(nvidia-smi lists it), or {advice(config)}",
        )
    largest = max(found.parts, key=lambda name: found.parts[name])
    return Check(
        "memory",
        text,
        f"--model {config.model}: the run takes about {memory_text(found.peak)}, {device.name} has "
        f"{memory_text(device.total)}; most of it is {largest} "
        f"({memory_text(found.parts[largest])}): {advice(config)}",
    )


def advice(config: Config) -> str:
    """What saves most and is not in use yet."""
    ways = savings(config)
    return "try " + ", ".join(ways) if ways else "take a smaller --rank or --resolution"


def check_disk(config: Config, found: Estimate) -> Check:
    """Checkpoints and adapters, with the downloads where they go to the same disk."""
    needed_bytes, what = found.disk, "checkpoints and adapters"
    downloads = download_bytes(config)
    if downloads and machine.same_disk(machine.hub_cache(), config.output_dir):
        needed_bytes += downloads
        what += " with the downloads"
    free = machine.free_disk(config.output_dir)
    text = f"{what} take {memory_text(needed_bytes)}, {memory_text(free)} free"
    if free >= needed_bytes:
        return Check("disk", text)
    return Check(
        "disk",
        text,
        f"--output-dir {config.output_dir}: {memory_text(free)} free, but the run's {what} take "
        f"{memory_text(needed_bytes)}; free some space, lower --keep-checkpoints, or name another "
        "directory",
    )


def draw(console: Console, config: Config, found: Estimate) -> None:
    """The chain of every stage with its estimate, and the memory by what it is for."""
    times = found.schedule.timesteps.tolist()
    method = METHODS[config.method]
    parts = segments(found.schedule, config.segments) if method.uses_segments else ()
    for number, plan in enumerate(found.stages, start=1):
        name = f"stage {number}" if method.by_segment else f"{config.method}, update 0"
        console.print(plan_text(plan, times, parts, name, legend=number == len(found.stages)))
        held = found.cost.activation_bytes(plan, recompute=config.recompute)
        seconds = found.cost.seconds(plan, recompute=config.recompute) * config.accumulation
        note = f"roughly {seconds:.2g} s per update, {memory_text(held)} of activations\n"
        console.print(note, style="dim", highlight=False)
    if config.updates is not None:
        training, grids = run_seconds(config, found)
        limit = "" if config.minutes is None else f" or {config.minutes:g} minutes"
        note = f"roughly {clock_text(training)} for {config.updates} updates{limit}, "
        note += f"{clock_text(grids)} for the pictures of its grids\n"
        console.print(note, style="dim", highlight=False)
    table = Table("memory", "about", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name, size in found.parts.items():
        if size:
            table.add_row(name, memory_text(size))
    table.add_row("in all, with a fifth and 1 GB on top", memory_text(found.peak), style="bold")
    console.print(table, highlight=False)
    console.print(
        "Counted on an empty copy of the networks; the time from one matrix product on this "
        "machine, so it may be off by several times. `shortft plan` measures with the real "
        "model.\n",
        style="dim",
        highlight=False,
    )


def show(console: Console, checks: list[Check]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for check in checks:
        mark = "[green]ok[/]" if check.problem is None else "[bold red]no[/]"
        table.add_row(mark, check.what, check.found)
    console.print(table, highlight=False)

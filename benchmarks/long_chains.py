"""What longer chains cost: every method's update on chains of 25 to 1000 base steps.

    python benchmarks/long_chains.py
    python benchmarks/long_chains.py --steps 25,50,100,200,1000 --train-minutes 3

Per method and length, on the embedded model with a batch of 2: network calls of an update, those
with gradient, CPU seconds (one thread), the peak of the process's memory above what it holds
before, and the norm of the reward's gradient (of one sample) with respect to the earliest latents
that carry any. Every measurement runs in a process of its own. Calls with
gradient are run again in the backward pass where there are more than 16 of them. With
--train-minutes each pair is also trained for so much CPU time, and the table has the reward of 8
prompts by the true chain before and after.

ShortFT jumps by the embedded shortcut on every length: it was made for 50 steps, but its jumps
start and end within one step of where it learned to (`shortft check --num-steps 200` measures it).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from shortft.drawing.files import write_atomic

METHODS = (
    "thinned",
    "shortft",
    "shortft_first_by_shortcut",
    "shortft_segments",
    "jumps",
    "tune_shortcut",
    "draft_k",
    "draft_lv",
    "alignprop",
    "drtune",
    "refl",
    "leapalign",
    "flowbp_sparse",
    "flowbp_bridge",
    "flowbp_lagrange",
    "full",
)
STEPS = (25, 50, 100, 200, 1000)
# The longest chains are left to some methods, and full backpropagation to short ones: --all.
FULL_UP_TO, ALL_UP_TO = 100, 200
LONGEST = ("jumps", "thinned", "shortft", "tune_shortcut", "draft_k", "flowbp_bridge")
RECOMPUTE_ABOVE = 16
COLUMNS = {
    "method": "method",
    "steps": "steps",
    "stage": "stage",
    "calls": "calls",
    "grad_calls": "with gradient",
    "seconds": "CPU s per update",
    "megabytes": "peak MB",
    "recompute": "recomputed",
    "norm": "‖gradient‖ at the first latents",
    "before": "reward before",
    "after": "reward after",
}


def child(name: str, steps: Sequence[int], options: argparse.Namespace) -> None:
    """Measure one method, each length in a fork; prints one line of JSON per length and stage.

    A fork has what was imported, and a peak of memory that is its own.
    """
    import torch

    from shortft.memory import peak_memory_bytes
    from shortft.methods.catalog import variant_settings
    from shortft.trainer import Trainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for length in steps:
            forked = os.fork()
            if forked:
                if os.waitpid(forked, 0)[1]:
                    raise SystemExit(f"{name}, {length} steps: failed")
                continue
            settings = {
                "reward": options.reward,
                "num_steps": length,
                "rank": 16,
                "batch_size": options.batch,
                "sample_prompts": 8,
                "merge": True,
                "learning_rate": 1.5e-3,
                "clock": "cpu",
                "minutes": options.train_minutes or 1,
                "tensorboard": False,
                "output_dir": scratch,
                **variant_settings(name, 4),
            }
            trainer = Trainer(config(settings))
            last = trainer.stages if length <= ALL_UP_TO else 1  # it is the whole chain
            held = peak_memory_bytes()
            for stage in sorted({1, last}, reverse=True):  # the last takes less memory
                found = measure(trainer, stage, options.updates)
                found["megabytes"] = (peak_memory_bytes() - held) / 2**20
                print(json.dumps({"method": name, "steps": length, **found}), flush=True)
            if options.train_minutes:
                before = score(trainer)
                while trainer.spent() < 1:
                    trainer.update()
                found = {"before": before, "after": score(trainer)}
                print(json.dumps({"method": name, "steps": length, **found}), flush=True)
            os._exit(0)


def config(settings: dict[str, Any]) -> Any:
    from shortft.config import load_config

    return load_config(None, settings)


def score(trainer: Any) -> float:
    """Mean reward of pictures of fixed prompts by the method's inference chain."""
    import torch

    prompts, images = trainer.pictures()
    with torch.no_grad():
        return float(trainer.score(trainer.reward, images.to(trainer.family.device), prompts))


def measure(trainer: Any, stage: int, updates: int) -> dict[str, Any]:
    """Forward and backward passes of the first updates; the first one alone warms up."""
    rows = []
    for number in range(updates + 1):
        plan = trainer.plan(number, stage)
        began = time.process_time()
        norm = one_pass(trainer, plan, trainer.batches(number)[0])
        seconds = time.process_time() - began
        rows.append((plan, seconds, norm))
        if number == 0 and seconds > 4:
            break  # long enough to need no warm-up
    timed = rows[1:] or rows
    extra = trainer.schedule.num_steps if timed[0][0].needs_rollout else 0
    return {
        "stage": stage,
        "calls": median(plan.calls for plan, *_ in timed) + extra,
        "grad_calls": median(plan.grad_calls for plan, *_ in timed),
        "seconds": median(seconds for _, seconds, _ in timed),
        "recompute": any(plan.grad_calls > RECOMPUTE_ABOVE for plan, *_ in timed),
        "norm": median(norm for *_, norm in timed),
    }


def one_pass(trainer: Any, plan: Any, batch: Any) -> float:
    """What `train_step` does up to the gradient; the norm at the earliest latents that have one."""
    import functools

    from torch import Tensor

    from shortft.chain import run_chain
    from shortft.step import leap_weight, noise_of_copy, states_of

    family, nets, schedule = trainer.family, trainer.nets, trainer.schedule
    nets.train_only(plan.trainable)
    trainer.optimizer.zero_grad(set_to_none=True)
    cond, noise = family.encode(batch.prompts), family.noise(batch.seeds)
    rollout = None
    if plan.needs_rollout:
        rollout = states_of(trainer.inference, nets, noise, cond, schedule)
    elif plan.grad_mask[0]:
        noise.requires_grad_()
    seen: list[Tensor] = []

    def observe(_: int, latents: Tensor) -> None:
        if latents.requires_grad and not seen:
            latents.retain_grad()
            seen.append(latents)

    leaps: list[Tensor] = []
    ends = run_chain(
        plan,
        nets,
        noise,
        cond,
        schedule,
        recompute=plan.grad_calls > RECOMPUTE_ABOVE,
        rollout=rollout,
        fresh_noise=functools.partial(noise_of_copy, family, batch.seeds),
        observe=observe,
        observe_leap=leaps.append,
    )
    scores = trainer.reward(family.decode(ends), batch.prompts * (1 + plan.renoise))
    (scores * leap_weight(leaps, plan.leap_tau)).mean().backward()
    if not seen or seen[0].grad is None:
        return float("nan")  # ReFL: the reward looks at the x0 prediction of its only call
    return len(batch.prompts) * float(seen[0].grad.flatten(1).norm(dim=1).mean())


def run(name: str, steps: Sequence[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one method in a process of its own."""
    most = FULL_UP_TO if name == "full" else max(steps) if name in LONGEST else ALL_UP_TO
    skipped = [] if options.all else [n for n in steps if n > most]
    if skipped:
        why = "every call forward, again, and backward" if name == "full" else "as slow as draft_k"
        print(f"{name}: {', '.join(map(str, skipped))} steps left out ({why}); --all runs them")
    wanted = [n for n in steps if n not in skipped]
    command = [sys.executable, __file__, "--child", name, "--steps", ",".join(map(str, wanted))]
    command += ["--batch", str(options.batch), "--updates", str(options.updates)]
    if not wanted:
        return []
    command += ["--reward", options.reward, "--train-minutes", str(options.train_minutes)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            rows.setdefault((row["steps"], row.get("stage", 1)), {}).update(row)
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:]
        print(f"{name}: stopped after {len(rows)} measurements ({' '.join(words)})")
    return list(rows.values())


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if value == value else "none"
    return str(value)


def chart(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from shortft.drawing.lines import Line, Panel, draw_lines

    def panel(key: str, of: Callable[[dict[str, Any]], float], log: str = "xy") -> Panel:
        lines = []
        for name in dict.fromkeys(row["method"] for row in rows):
            points = [(r["steps"], of(r)) for r in rows if r["method"] == name and r["stage"] == 1]
            points = [(x, y) for x, y in points if y == y and y > 0]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Line(name, x, y, strong=name in ("shortft", "thinned")))
        return Panel(lines, "steps of the base chain", COLUMNS[key], "stage 1", log=log)

    keys = ("seconds", "megabytes", "norm")
    draw_lines(path, *(panel(key, lambda row, key=key: row[key]) for key in keys))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=" ".join(METHODS), help="names or variants, blanks")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)))
    parser.add_argument("--reward", default="clip:1,symmetry:3")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--updates", type=int, default=1, help="timed, after one that warms up")
    parser.add_argument("--train-minutes", type=float, default=0.0)
    parser.add_argument(
        "--all", action="store_true", help="full backpropagation of long chains too"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/long-chains"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = sorted(int(n) for n in options.steps.split(","))
    if options.child:
        child(options.child, steps, options)
        return 0
    names = [n for n in COLUMNS if options.train_minutes or n not in ("before", "after")]
    lines = [" | ".join(["", *(COLUMNS[n] for n in names), ""]).strip(), "|---" * len(names) + "|"]
    print("\n".join(lines), flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.methods.split():
        for row in run(name, steps, options):
            rows.append(row)
            cells = [shown(row.get(n, "")) for n in names]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    write_atomic(options.output_dir / "long_chains.md", ("\n".join(lines) + "\n").encode())
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(options.output_dir / "long_chains.csv", out.getvalue().encode())
    chart(options.output_dir / "long_chains.png", rows)
    print(options.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())

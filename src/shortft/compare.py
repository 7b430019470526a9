"""`shortft compare`: methods × rewards × seeds at equal training time, on the same prompts.

Every run is an ordinary `shortft train` in a process of its own. A run is a folder; what is done
is never done again, so that a comparison can be interrupted, continued, and shared by several
processes that were started with the same command.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortft.assets import prompts_for
from shortft.comparison import Comparison
from shortft.config import Config, load_config, to_yaml
from shortft.drawing.files import write_atomic
from shortft.errors import UserError
from shortft.inputs import read_prompts
from shortft.methods.catalog import METHODS, has_own_rate, variant_settings
from shortft.precision import settled

if TYPE_CHECKING:
    from shortft.evaluate import Pictures

SEARCH_SEED = 1000
# What every run brings itself, whatever the base says.
OWN = {"method", "method_options", "reward", "seed", "minutes", "updates", "output_dir"}
OWN |= {"sample_every", "sample_times", "sample_prompts", "sample_noises"}
RESULT, CLAIM, LOG = "result.json", ".claim", "train.log"


@dataclass(frozen=True)
class Job:
    """One training run of a comparison, in a folder of its own."""

    folder: Path
    reward: str
    method: str
    seed: int
    learning_rate: float
    minutes: float
    search: bool

    @property
    def done(self) -> bool:
        return (self.folder / RESULT).exists()


class Workshop:
    """A comparison's folder: its prompts, its runs, and what is still to do."""

    def __init__(self, root: Path, comparison: Comparison, base: Config) -> None:
        self.root, self.comparison, self.kept = root, comparison, root / "compare.json"
        # Runs and pictures of one folder are of one number format, on whichever machine.
        self.base = settled(base, self._found().get("base", {}).get("precision"))
        self.configs = {  # every mistake is told before any run
            (reward, method): self._config(reward, method)
            for reward in dict.fromkeys((*comparison.rewards, *comparison.searched_rewards))
            for method in comparison.methods
        }

    def prepare(self) -> None:
        """Write the prompts and what is compared, or check that the folder's runs fit it.

        Methods, rewards and seeds may be others than before, since every run stands for itself.

        Raises:
            UserError: if it holds a comparison with other settings.
        """
        wanted = json.loads(json.dumps(asdict(self.comparison)))
        own = OWN.copy()
        if self.comparison.search or all(map(has_own_rate, self.comparison.methods)):
            own.add("learning_rate")
        wanted["base"] = self.base.model_dump(mode="json", exclude=own)
        found = self._found()
        if found:
            # A setting that is younger than the folder had its default value there.
            then = {**Config().model_dump(mode="json"), **found.get("base", {})}
            before = {**found, **{name: then[name] for name in wanted["base"]}}
            now = {**wanted, **wanted["base"]}
            free = ("methods", "rewards", "seeds", "base")
            for name in (n for n in now if n not in free and before.get(n) != now[n]):
                raise UserError(
                    f"--output-dir {self.root}: holds a comparison with another {name} "
                    f"({_brief(before.get(name))}, not {_brief(now[name])}); use the same "
                    "settings, or another folder"
                )
        listed = (
            read_prompts(self.base.prompts)
            if self.base.prompts
            else prompts_for(self.base.model, "train")
        )
        # Every tenth training prompt is kept for the learning-rate search, the same in all runs.
        self._write_prompts("validation", listed[::10])
        self._write_prompts("train", [p for i, p in enumerate(listed) if i % 10])
        held_out = self.held_out_prompts()
        self._write_prompts("held_out", held_out)
        write_atomic(self.kept, (json.dumps(wanted, indent=2) + "\n").encode())

    def _found(self) -> dict[str, Any]:
        """What the folder holds a comparison of; nothing where it holds none."""
        if not self.kept.exists():
            return {}
        found: dict[str, Any] = json.loads(self.kept.read_text(encoding="utf-8"))
        return found

    def held_out_prompts(self) -> list[str]:
        """Evenly spaced prompts of the model's held-out list, which no run trains on."""
        listed = (
            read_prompts(self.base.sample_from)
            if self.base.sample_from
            else prompts_for(self.base.model, "held_out")
        )
        count = min(self.comparison.num_prompts, len(listed))
        return [listed[i * len(listed) // count] for i in range(count)]

    def jobs(self) -> Iterator[Job]:
        """Every run, trials first; runs whose learning rate is not known yet are left out."""
        spec = self.comparison
        yield from self.trials()
        for seed in range(spec.seeds):
            for reward in spec.rewards:
                for method in spec.methods:
                    rate = self.learning_rate(reward, method)
                    if rate is not None:
                        place = self.root / "runs" / slug(reward) / slug(method)
                        folder = place / f"seed-{seed}"
                        yield Job(folder, reward, method, seed, rate, spec.minutes, search=False)

    def trials(self) -> Iterator[Job]:
        """The learning-rate search: runs on other prompts and with another seed."""
        for reward in self.comparison.searched_rewards:
            for method in self.comparison.searched_methods:
                for rate in self.rates(reward, method):
                    yield self._trial(reward, method, rate)

    def learning_rate(self, reward: str, method: str) -> float | None:
        """The method's own; or the search's best, None before it has ended; or the base's."""
        search = self.comparison.search
        if has_own_rate(method):
            return self.configs[reward, method].learning_rate
        if len(search) < 2:
            return search[0] if search else self.base.learning_rate
        reward = self.comparison.search_reward or reward
        trials = [self._trial(reward, method, rate) for rate in self.rates(reward, method)]
        return _best(trials) if all(trial.done for trial in trials) else None

    def _trial(self, reward: str, method: str, rate: float) -> Job:
        folder = self.root / "search" / slug(reward) / slug(method) / f"lr-{rate:g}"
        minutes = self.comparison.search_minutes
        return Job(folder, reward, method, SEARCH_SEED, rate, minutes, search=True)

    def rates(self, reward: str, method: str) -> list[float]:
        """The rates to try: the given ones, and beyond an edge while the best lies there."""
        rates = sorted(self.comparison.search)
        for _ in range(self.comparison.search_further):
            trials = [self._trial(reward, method, rate) for rate in rates]
            if not all(trial.done for trial in trials):
                break
            best = _best(trials)
            if best == rates[-1]:
                rates.append(_rounded(best * best / rates[-2]))
            elif best == rates[0]:
                rates.insert(0, _rounded(best * best / rates[1]))
            else:
                break
        return rates

    def finished(self) -> bool:
        spec = self.comparison
        runs = [job for job in self.jobs() if not job.search]
        expected = len(spec.methods) * len(spec.rewards) * spec.seeds
        return len(runs) == expected and all(job.done for job in runs)

    def config(self, job: Job) -> Config:
        """The complete configuration of a run."""
        shown = "validation" if job.search else "held_out"
        change = {
            "seed": job.seed,
            "learning_rate": job.learning_rate,
            "minutes": job.minutes,
            "updates": None,
            "output_dir": str(job.folder),
            "prompts": str(self.root / "prompts" / "train.txt"),
            "sample_from": str(self.root / "prompts" / f"{shown}.txt"),
            "sample_every": 0,
            "sample_times": 0 if job.search else self.comparison.looks,
            "sample_prompts": min(24, self.comparison.num_prompts),
            "sample_noises": 1,
        }
        settings = self.configs[job.reward, job.method].model_dump(mode="json")
        return load_config(None, {**settings, **change})

    def _config(self, reward: str, method: str) -> Config:
        settings = self.base.model_dump(mode="json")
        settings.pop("method_options")
        settings |= {"reward": reward, **variant_settings(method, self.base.segments)}
        return load_config(None, settings)

    def _write_prompts(self, name: str, prompts: Sequence[str]) -> None:
        write_atomic(self.root / "prompts" / f"{name}.txt", ("\n".join(prompts) + "\n").encode())


def run_all(
    workshop: Workshop,
    evaluate_run: Callable[[Job, Config], dict[str, Any]],
    report: Callable[[str], None],
) -> None:
    """Do what is left of a comparison, together with other processes at it."""
    waited = False
    while not workshop.finished():
        jobs = list(workshop.jobs())
        left = [job for job in jobs if not job.done]
        for job in left:
            if claim(job.folder):
                waited = False
                try:
                    if not job.done:
                        kind = "trial" if job.search else f"seed {job.seed}"
                        report(
                            f"{job.reward}, {job.method}, {kind}, learning rate "
                            f"{job.learning_rate:g}: {len(left)} runs left"
                        )
                        run_job(workshop.config(job), job, evaluate_run)
                finally:
                    (job.folder / CLAIM).unlink(missing_ok=True)
                break
        else:
            if not waited:
                report(f"waiting for {len(left)} runs of other processes")
                waited = True
            time.sleep(2)


def run_job(
    config: Config, job: Job, evaluate_run: Callable[[Job, Config], dict[str, Any]]
) -> None:
    """Train in a process of its own (its memory is measured), then evaluate.

    Raises:
        UserError: if the training failed; its last words are given.
    """
    settings = job.folder / "run.yaml"
    write_atomic(settings, to_yaml(config).encode())
    command = [sys.executable, "-m", "shortft", "train", str(settings), "--auto-resume"]
    with (job.folder / LOG).open("a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        text = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        words = text.splitlines()[-1] if text else ""
        if job.search and "updates in a row" in words:  # a rate too high to train with: the worst
            failed = {"failed": words, "reward": {"before": None, "after": None}}
            write_atomic(job.folder / RESULT, (json.dumps(failed, indent=2) + "\n").encode())
            return
        raise UserError(f"{job.folder}: training failed ({words}); see {LOG} there")
    result = {
        **evaluate_run(job, config),
        "reward_spec": job.reward,
        "method": job.method,
        "seed": job.seed,  # of the training; the evaluation has its own
        "learning_rate": job.learning_rate,
    }
    write_atomic(job.folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())


def claim(folder: Path) -> bool:
    """Take a run for this process; False if another living process has it.

    A claim of a process that is gone from this machine is taken over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = f"{socket.gethostname()} {os.getpid()}"
    for _ in range(2):
        try:
            with (folder / CLAIM).open("x") as file:
                file.write(own)
            return True
        except FileExistsError:
            try:
                host, pid = (folder / CLAIM).read_text().split()
            except (OSError, ValueError):
                return False  # being written or being removed
            if host != socket.gethostname() or _alive(int(pid)):
                return False
            (folder / CLAIM).unlink(missing_ok=True)
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _best(trials: Sequence[Job]) -> float:
    """The rate of the trial with the largest reward; one that failed has none."""

    def reward(trial: Job) -> float:
        found = read_result(trial)["reward"]["after"]
        return -math.inf if found is None else float(found)

    return max(trials, key=reward).learning_rate


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def read_result(job: Job) -> dict[str, Any]:
    return dict(json.loads((job.folder / RESULT).read_text(encoding="utf-8")))


def slug(spec: str) -> str:
    """A reward or a method with options as a folder name: letters, digits, ``-_.+~=``, 100 at most.

    Where that name could be another spec's too, or is none, a hash of the spec follows.
    """
    name = spec.replace(":", "-").replace(",", "_")
    plain = re.sub(r"[^\w.+~=-]", "-", name, flags=re.ASCII)
    # Own files may be named like specs: clip-1_own.py:f is not clip:1,own.py:f.
    unclear = ".py" in spec and re.search(r"[-_]", spec)
    if re.match(r"\w", name) and plain == name and len(name) <= 100 and not unclear:
        return name
    digest = hashlib.sha256(spec.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{plain[:80]}-{digest}".lstrip(".-")


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def evaluator(workshop: Workshop) -> Callable[[Job, Config], dict[str, Any]]:
    """What measures a finished run; the base model's pictures are made once."""
    from shortft.doctor import versions
    from shortft.drawing.curves import read_metrics
    from shortft.evaluate import base_pictures, evaluate
    from shortft.families import load_family
    from shortft.preflight import machine
    from shortft.rewards import make_reward

    base = workshop.base
    spec = workshop.comparison
    family = load_family(
        base.model,
        pipeline=base.pipeline,
        precision=base.precision,
        resolution=base.resolution,
    )
    before: dict[bool, Any] = {}

    def evaluate_run(job: Job, config: Config) -> dict[str, Any]:
        prompts = read_prompts(config.sample_from) if config.sample_from else []
        prompts = prompts[: spec.num_prompts]
        seed = SEARCH_SEED if job.search else 0
        if job.search not in before:
            before[job.search] = base_pictures(
                family,
                prompts,
                seeds=spec.noises,
                num_steps=config.num_steps,
                guidance_scale=config.guidance_scale,
                seed=seed,
            )

        def measured(*, plain_chain: bool) -> tuple[dict[str, Any], Pictures]:
            return evaluate(
                family,
                job.folder / "adapter",
                make_reward(job.reward, config.reward_model, family.device),
                prompts,
                seeds=spec.noises,
                num_steps=config.num_steps,
                seed=seed,
                before=before[job.search],
                plain_chain=plain_chain,
            )

        figures, pictures = measured(plain_chain=False)
        if METHODS[config.method].few_step and not job.search:
            figures["plain_chain"] = measured(plain_chain=True)[0]
        rows = read_metrics(job.folder / "metrics.jsonl")
        seconds = [row["seconds"] for row in rows.updates]
        if not job.search:
            from safetensors.torch import save_file

            shown = {"before": pictures.before[:: spec.noises][:8].contiguous()}
            shown["after"] = pictures.after[:: spec.noises][:8].contiguous()
            save_file(shown, job.folder / "pictures.safetensors")
        return {
            **figures,
            "updates": len(seconds),
            "training_seconds": sum(seconds),
            "seconds_per_update": sum(seconds) / max(1, len(seconds)),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows.updates),
            "skipped": sum(bool(row["skipped"]) for row in rows.updates),
            "curve": [[row["at_seconds"], row["eval_reward"]] for row in rows.evaluations],
            "made_by": f"{versions()}; {machine.in_words()}",
        }

    return evaluate_run


def compare_command(
    output_dir: Path,
    comparison: Comparison,
    base: Config,
    *,
    report_only: bool = False,
    command: str = "",
) -> None:
    """`shortft compare`: run what is left, then write the report.

    Args:
        command: what the user typed, for the report.

    Raises:
        UserError: if a run fails, or if nothing is done yet and only the report is wanted.
    """
    from rich.console import Console

    from shortft.compare_report import write_report

    console = Console()
    workshop = Workshop(output_dir, comparison, base)
    workshop.prepare()
    if report_only:
        if not any(job.done and not job.search for job in workshop.jobs()):
            raise UserError(f"--report-only: no run in {output_dir} is done yet")
        for path in write_report(workshop, command):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(
        f"{len(comparison.methods)} methods × {len(comparison.rewards)} rewards × "
        f"{comparison.seeds} seeds: {comparison.runs()} runs and {comparison.trials()} trials of "
        f"learning rates, {comparison.cost_minutes():.0f} minutes of training in all; loading and "
        "evaluation come on top",
        highlight=False,
    )
    run_all(
        workshop,
        evaluator(workshop),
        lambda text: console.print(text, markup=False, highlight=False),
    )
    for path in write_report(workshop, command):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)

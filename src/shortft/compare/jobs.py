"""What a comparison consists of: its runs and trials, each in a folder with settings of its own."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shortft.assets import prompts_for
from shortft.compare.spec import Comparison
from shortft.config import Config, load_config
from shortft.drawing.files import write_atomic
from shortft.errors import UserError
from shortft.fingerprint import fingerprint, held_out_print
from shortft.inputs import read_prompts
from shortft.methods.catalog import METHODS, has_own_rate, variant_settings
from shortft.paths import is_file
from shortft.precision import settled
from shortft.shortcuts import check_fits
from shortft.weights_file import sha256

SEARCH_SEED = 1000
# What every run brings itself, whatever the base says.
OWN = {"method", "method_options", "reward", "seed", "minutes", "updates", "output_dir"}
OWN |= {"sample_every", "sample_times", "sample_prompts", "sample_noises"}
RESULT = "result.json"


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
        if base.guard == "stop" and (not comparison.looks or comparison.trials()):
            raise UserError(
                "--guard stop: needs evaluations on the way; give --looks 1 or more and no search "
                "(its trials have none), or --guard warn"
            )
        # Runs and pictures of one folder are of one number format, on whichever machine.
        self.base = settled(base, self._found().get("base", {}).get("precision"))
        self.configs = {  # every mistake is told before any run
            (reward, method): self._config(reward, method)
            for reward in dict.fromkeys((*comparison.rewards, *(r for r, _ in comparison.searched)))
            for method in comparison.methods
        }

    def prepare(self) -> None:
        """Write the prompts and what is compared, or check that the folder's runs fit it.

        Methods, rewards and seeds may be others than before, since every run stands for itself.

        Raises:
            UserError: if it holds a comparison with other settings, prompts or models.
        """
        wanted = json.loads(json.dumps(asdict(self.comparison)))
        own = OWN.copy()
        if self.comparison.search or not self.comparison.without_rate:
            own.add("learning_rate")
        wanted["base"] = self.base.model_dump(mode="json", exclude=own)
        listed = (
            read_prompts(self.base.prompts)
            if self.base.prompts
            else prompts_for(self.base.model, "train")
        )
        held_out = self.held_out_prompts()
        rewards = {reward: config for (reward, _), config in self.configs.items()}
        wanted["inputs"] = {
            reward: fingerprint(config, [*listed, *held_out], None)
            for reward, config in rewards.items()
        }
        if self.base.held_out:
            wanted["inputs"]["the held-out scorer"] = held_out_print(self.base)
        files = {str(config.shortcut) for config in self.configs.values()}
        wanted["inputs"] |= {file: sha256(Path(file)) for file in sorted(files) if is_file(file)}
        found = self._found()
        if found:
            # A setting that is younger than the folder had its default value there.
            then = {**Config().model_dump(mode="json"), **found.get("base", {})}
            if "learning_rate" not in found.get("base", {}):  # no run took it
                del then["learning_rate"]
            before = {"rates": {}, **found, **{n: then[n] for n in wanted["base"] if n in then}}
            now = {**wanted, **wanted["base"]}
            free = {"methods", "rewards", "seeds", "base", "inputs"}
            free |= wanted["base"].keys() - then.keys()
            for name in (n for n in now if n not in free and before.get(n) != now[n]):
                raise UserError(
                    f"--output-dir {self.root}: holds a comparison with another {name} "
                    f"({_brief(before.get(name))}, not {_brief(now[name])}); use the same "
                    "settings, or another folder"
                )
            inputs = found.get("inputs", {})
            for name in (n for n, now in wanted["inputs"].items() if inputs.get(n, now) != now):
                raise UserError(
                    f"--output-dir {self.root}: {name}, the prompts or a local model changed since "
                    "its first runs; restore them, or use another folder"
                )
            wanted["inputs"] = {**inputs, **wanted["inputs"]}
            if "learning_rate" in then:  # of earlier runs, if of none now
                wanted["base"].setdefault("learning_rate", then["learning_rate"])
        # Every tenth training prompt is kept for the learning-rate search, the same in all runs.
        self._write_prompts("validation", listed[::10])
        self._write_prompts("train", [p for i, p in enumerate(listed) if i % 10])
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
        for reward, method in self.comparison.searched:
            for rate in self.rates(reward, method):
                yield self._trial(reward, method, rate)

    def learning_rate(self, reward: str, method: str) -> float | None:
        """The method's own, or known; the search's best, None before it has ended; the base's."""
        search = self.comparison.search
        if has_own_rate(method):
            return self.configs[reward, method].learning_rate
        known = self.comparison.known_rate(reward, method)
        if known is not None:
            return known
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
        config = load_config(None, settings)
        if METHODS[config.method].uses_segments:
            check_fits(config.model, config.shortcut, config.segments)
        return config

    def _write_prompts(self, name: str, prompts: Sequence[str]) -> None:
        write_atomic(self.root / "prompts" / f"{name}.txt", ("\n".join(prompts) + "\n").encode())


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

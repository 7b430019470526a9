"""`shortft compare`: what is run, what is kept, and what the report says."""

from __future__ import annotations

import csv
import dataclasses
import gc
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shortft import __version__
from shortft.assets import EMBEDDED, asset
from shortft.cli import main
from shortft.compare import charts, figures, report
from shortft.compare import runs as compare_runs
from shortft.compare.command import compare_command
from shortft.compare.evaluation import evaluator
from shortft.compare.jobs import RESULT, Job, Workshop, read_result, slug
from shortft.compare.runs import CLAIM
from shortft.compare.spec import BUDGETS, Comparison, comparison_from
from shortft.config import Config, load_config
from shortft.errors import NotFinite, Stopped, UserError
from shortft.families import load_family
from shortft.families.pipeline import PipelineFamily
from shortft.interrupts import Interrupts
from shortft.preflight import machine
from test_adapter import make_adapter

PROMPTS = [f"thing {i}" for i in range(30)]
SPEC = Comparison(
    ("shortft", "draft_k", "refl"),
    ("symmetry",),
    seeds=2,
    minutes=0.5,
    search=(1e-3, 1e-2),
    num_prompts=6,
)


@pytest.fixture
def base(model: Path, tmp_path: Path) -> Config:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "held_out.txt").write_text("\n".join(f"unseen {i}" for i in range(12)))
    return load_config(
        None,
        {
            "model": str(model),
            "shortcut": "none",
            "prompts": str(tmp_path / "prompts.txt"),
            "sample_from": str(tmp_path / "held_out.txt"),
            "num_steps": 8,
            "rank": 2,
            "batch_size": 2,
            "output_dir": str(tmp_path / "out"),
        },
    )


GAIN = {"shortft": 0.3, "draft_k": 0.1, "refl": 0.2}


def pretended(job: Job, config: Config) -> dict[str, Any]:
    """A result whose reward depends on the method, the seed and the learning rate."""
    gain = GAIN[job.method.partition(":")[0]]
    after = 0.5 + gain + 0.01 * job.seed - abs(job.learning_rate - 1e-2)
    if not job.search:
        pictures = torch.rand(4, 3, 16, 16)
        save_file({"before": pictures, "after": 1 - pictures}, job.folder / "pictures.safetensors")
    return {
        "reward": {"name": "r", "before": 0.5, "after": after, "change_interval": [0.0, 1.0]},
        "held_out": {"name": "h", "before": 0.5, "after": 0.6},
        "diversity": {"name": "d", "before": 0.2, "after": 0.1},
        "reports": {
            "symmetry": {"name": "e", "before": 1.0, "after": 0.5, "higher_is_better": False}
        },
        "warnings": [],
        "updates": 10,
        "training_seconds": 30.0,
        "seconds_per_update": 3.0,
        "peak_memory_bytes": 10**9,
        "skipped": 0,
        "curve": [[0.0, 0.5], [15.0, 0.5 + gain / 2], [30.0, 0.5 + gain]],
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Runs that only evaluate; returns the jobs in the order in which they were run."""
    order: list[Job] = []

    def run(config: Config, job: Job, evaluate_run: Any, claim: int | None) -> None:
        order.append(job)
        result = {
            "method": job.method,
            "seed": job.seed,
            "learning_rate": job.learning_rate,
            **evaluate_run(job, config),
        }
        (job.folder / RESULT).write_text(json.dumps(result))

    monkeypatch.setattr(compare_runs, "run_job", run)
    return order


def workshop(base: Config, spec: Comparison = SPEC, name: str = "") -> Workshop:
    made = Workshop(base.output_dir / name, spec, base)
    made.prepare()
    return made


def test_search_first_then_every_method_reward_and_seed_with_the_best_rate(base, trained):
    shop = workshop(base)
    compare_runs.run_all(shop, pretended, lambda _: None)
    assert shop.finished()
    trials, runs = trained[:6], trained[6:]
    assert all(job.search and job.minutes == SPEC.search_minutes for job in trials)
    assert {(j.method, j.learning_rate) for j in trials} == {
        (m, rate) for m in SPEC.methods for rate in SPEC.search
    }
    assert {(j.method, j.seed) for j in runs} == {(m, s) for m in SPEC.methods for s in (0, 1)}
    assert {j.learning_rate for j in runs} == {1e-2}
    # Nothing is done twice.
    trained.clear()
    compare_runs.run_all(shop, pretended, lambda _: None)
    assert trained == []
    (runs[0].folder / RESULT).unlink()
    compare_runs.run_all(shop, pretended, lambda _: None)
    assert trained == [runs[0]]


def test_no_prompt_serves_two_ends(base):
    shop = workshop(base)
    lists = {
        name: (shop.root / "prompts" / f"{name}.txt").read_text().splitlines()
        for name in ("train", "validation", "held_out")
    }
    assert sorted(lists["train"] + lists["validation"]) == sorted(PROMPTS)
    assert len(lists["validation"]) == 3
    assert len(lists["held_out"]) == 6
    assert not set(lists["held_out"]) & set(PROMPTS)
    known = workshop(base, dataclasses.replace(SPEC, search=(1e-3,)), "known")
    for place, searched in ((shop, True), (known, False)):
        jobs = list(place.trials() if searched else place.jobs())
        assert len(jobs) == 6
        for job in jobs:
            config = place.config(job)
            shown = config.sample_from.read_text().splitlines()
            assert shown == lists["validation" if searched else "held_out"]
            assert config.prompts.read_text().splitlines() == lists["train"]


def test_runs_differ_in_method_seed_and_rate_only(base):
    shop = workshop(base, Comparison(("shortft", "draft_5"), ("symmetry",), seeds=1, minutes=0.5))
    one, two = (shop.config(job).model_dump() for job in shop.jobs())
    differing = {name for name in one if one[name] != two[name]}
    assert differing == {"method", "method_options", "output_dir"}
    assert one["minutes"] == 0.5
    assert one["updates"] is None


def test_other_settings_in_the_same_folder_are_refused(base):
    workshop(base)
    with pytest.raises(UserError, match=r"another minutes \(0.5, not 0.7\)"):
        workshop(base, Comparison(**{**vars(SPEC), "minutes": 0.7}))
    with pytest.raises(UserError, match=r"another rank \(2, not 3\)"):
        Workshop(base.output_dir, SPEC, base.model_copy(update={"rank": 3})).prepare()


def test_a_folder_keeps_its_number_format_on_other_machines(
    base: Config, monkeypatch: pytest.MonkeyPatch
):
    """What began in one format goes on in it, given as auto or named by an older recipe."""
    auto = base.model_copy(update={"precision": "auto"})
    for first, then in ((False, True), (True, False)):
        root = base.output_dir / str(first)
        for knows in (first, then):
            cpu = machine.Device("cpu", "CPU, 2 cores", 2**34, bf16=knows)
            monkeypatch.setattr(machine, "devices", lambda cpu=cpu: [cpu])
            shop = Workshop(root, SPEC, auto)
            shop.prepare()
            expected = "bf16" if first else "fp32"
            assert shop.base.precision == expected
            assert all(shop.config(job).precision == expected for job in shop.jobs())


def test_what_runs_bring_themselves_may_change_in_the_base(base):
    """As it does where a recipe gets another method or rate."""
    other = {"method": "thinned", "method_options": {"calls": 3}, "minutes": 9.0, "updates": 7}
    rate = {**other, "learning_rate": 0.5}
    shared = Comparison(("refl",), ("symmetry",), seeds=1, minutes=0.5)
    own = dataclasses.replace(shared, methods=("refl:learning_rate=1e-3",))
    for name, spec in (("search", SPEC), ("own", own), ("shared", shared)):
        Workshop(base.output_dir / name, spec, base).prepare()
        Workshop(base.output_dir / name, spec, base.model_copy(update=other)).prepare()
        again = Workshop(base.output_dir / name, spec, base.model_copy(update=rate))
        if name != "shared":
            again.prepare()
            continue
        with pytest.raises(UserError, match="another learning_rate"):
            again.prepare()


def test_a_setting_that_is_younger_than_the_folder_had_its_default(base):
    workshop(base)
    kept = base.output_dir / "compare.json"
    held = json.loads(kept.read_text())
    del held["base"]["shard"]
    kept.write_text(json.dumps(held))
    workshop(base)
    kept.write_text(json.dumps(held))
    with pytest.raises(UserError, match="another shard"):
        Workshop(base.output_dir, SPEC, base.model_copy(update={"shard": True})).prepare()


def test_a_comparison_may_grow(base, trained):
    compare_runs.run_all(workshop(base), pretended, lambda _: None)
    trained.clear()
    grown = Comparison(**{**vars(SPEC), "methods": (*SPEC.methods, "drtune"), "seeds": 3})
    compare_runs.run_all(
        workshop(base, grown), lambda j, c: pretended(as_refl(j), c), lambda _: None
    )
    runs = {(job.method, job.seed) for job in trained if not job.search}
    old = {(method, 2) for method in SPEC.methods}
    assert runs == old | {("drtune", seed) for seed in range(3)}
    assert {job.method for job in trained if job.search} == {"drtune"}


def as_refl(job: Job) -> Job:
    return dataclasses.replace(job, method="refl")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("clip:1,symmetry:3", "clip-1_symmetry-3"),
        ("clip:1,compressibility:0.16", "clip-1_compressibility-0.16"),
        ("clip+pickscore:1.2~0.5", "clip+pickscore-1.2~0.5"),
        ("draft_k:k=3", "draft_k-k=3"),
        ("own.py:f", "own.py-f"),
    ],
)
def test_plain_specs_are_folders_as_they_stand(spec: str, name: str):
    assert slug(spec) == name


def test_every_spec_has_a_folder_of_its_own_inside_the_output(base, tmp_path: Path):
    specs = [
        "/abs/own.py:f", "-abs-own.py:f", "../own.py:f", "../../own.py:f", "..\\own.py:f", ".",
        "..", "...", "", "a\0b", "~/own.py:f", "ü.py:f", "ö.py:f", "\udcff.py:f",
        f"{'x' * 300}.py:f", f"{'x' * 300}.py:g", "clip:1,own.py:f", "clip-1_own.py:f",
        "own.py:f,clip", "own.py:f_clip",
    ]  # fmt: skip
    names = [slug(spec) for spec in specs]
    assert len(set(names)) == len(specs)
    for name in names:
        assert re.fullmatch(r"[\w+~=][\w.+~=-]{0,99}", name, re.ASCII), name
    own = tmp_path / "elsewhere" / "own.py"
    own.parent.mkdir()
    own.write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    spec = dataclasses.replace(SPEC, rewards=(f"{own}:f",))
    root = base.output_dir
    for job in workshop(base, spec).trials():
        assert job.folder.resolve().is_relative_to(root.resolve())


def test_a_run_is_left_alone_while_its_process_or_its_training_lives(base):
    shop = workshop(base, Comparison(("refl",), ("symmetry",), 1, num_prompts=6))
    (job,) = shop.jobs()
    announced: list[Job] = []

    def tried() -> bool:
        return compare_runs.run_if_free(shop, job, pretended, announced.append)

    holder = (
        "import subprocess, sys; from pathlib import Path; from shortft.lock import locked\n"
        "with locked(Path(sys.argv[1])) as claim:\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=(claim,))\n"
        "    print(child.pid, flush=True); child.wait()"
    )
    job.folder.mkdir(parents=True)
    command = [sys.executable, "-c", holder, str(job.folder / CLAIM)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        training = int(process.stdout.readline())
        assert not tried()
        process.kill()
        process.wait()
        assert not tried()  # its training goes on
        os.kill(training, signal.SIGKILL)
    (job.folder / RESULT).write_text("{}")  # done by then
    while not tried():
        time.sleep(0.01)  # until the kernel has buried it
    assert not announced
    (job.folder / CLAIM).write_text("")  # a file alone claims nothing
    assert tried()


def test_a_comparison_grows_by_methods_that_bring_no_rate_or_do(base):
    plain, rated = ("refl",), ("draft_k:learning_rate=1e-2",)
    for first, second in ((plain, rated), (rated, plain)):
        here = base.model_copy(update={"output_dir": base.output_dir / first[0].replace(":", "-")})
        for methods in (first, first + second, second, first):
            workshop(here, Comparison(methods, ("symmetry",), 1, num_prompts=6))
        other = here.model_copy(update={"learning_rate": 0.5})
        with pytest.raises(UserError, match="another learning_rate"):
            workshop(other, Comparison(plain, ("symmetry",), 1, num_prompts=6))


def test_a_comparison_of_other_prompts_or_another_own_reward_is_refused(base, tmp_path: Path):
    own = tmp_path / "own.py"
    own.write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    reward = f"{own}:bright"
    spec = Comparison(("refl",), ("symmetry",), 1, num_prompts=6)
    workshop(base, spec)
    both = dataclasses.replace(spec, rewards=("symmetry", reward))
    workshop(base, both)
    own.write_text("def bright(images, prompts):\n    return -images.mean((1, 2, 3))\n")
    workshop(base, spec)
    with pytest.raises(UserError, match=r"own.py:bright, the prompts or a local model changed"):
        workshop(base, both)
    watched = base.model_copy(update={"held_out": reward, "output_dir": tmp_path / "watched"})
    workshop(watched, spec)
    own.write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3)) / 2\n")
    with pytest.raises(UserError, match=r"the held-out scorer, the prompts or a local model"):
        workshop(watched, spec)
    lora = tmp_path / "few.safetensors"
    lora.symlink_to(asset("shortcut", "unguided.safetensors"))
    jumps = dataclasses.replace(spec, methods=("refl", f"jumps:shortcut={lora}"))
    workshop(base, jumps)
    lora.unlink()
    lora.symlink_to(asset("shortcut", "shortcut.safetensors"))
    with pytest.raises(UserError, match=r"few.safetensors, the prompts or a local model changed"):
        workshop(base, jumps)
    for file in (base.sample_from, base.prompts):
        before = Path(file).read_text()
        Path(file).write_text(before.replace("0", "4711"))
        with pytest.raises(UserError, match=r"symmetry, the prompts or a local model changed"):
            workshop(base, spec)
        assert "4711" not in (base.output_dir / "prompts" / "held_out.txt").read_text()
        Path(file).write_text(before)
    workshop(base, spec)


def test_a_score_that_is_not_finite_ends_a_run_by_name_and_a_trial_as_the_worst(
    base, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(compare_runs, "_training", lambda *_: 0)
    shop = workshop(base, Comparison(("refl",), ("symmetry",), 1, search=(1e-3, 1e-2)))

    def blank(job: Job, config: Config) -> dict[str, Any]:
        if not job.search or job.learning_rate > 1e-3:
            raise NotFinite("reward symmetry: its score of 'x' is nan", tuned=True)
        return pretended(job, config)

    with pytest.raises(UserError, match=r"refl.seed-0: reward symmetry: its score"):
        compare_runs.run_all(shop, blank, lambda _: None)
    assert "nan" in read_result(next(t for t in shop.trials() if t.learning_rate > 1e-3))["failed"]
    assert shop.learning_rate("symmetry", "refl") == 1e-3


def test_a_reward_that_fails_at_an_evaluation_leaves_its_traceback_with_the_run(base, monkeypatch):
    monkeypatch.setattr(compare_runs, "_training", lambda *_: 0)
    shop = workshop(base, Comparison(("refl",), ("symmetry",), 1, num_prompts=6))

    def fails(job: Job, config: Config) -> dict[str, Any]:
        raise UserError("--reward symmetry: raised KeyError") from KeyError("why")

    with pytest.raises(UserError, match=r"refl.seed-0: --reward symmetry: raised KeyError"):
        compare_runs.run_all(shop, fails, lambda _: None)
    (job,) = shop.jobs()
    assert "why" in (job.folder / "error.txt").read_text()


def test_an_evaluation_leaves_no_model_where_the_runs_need_the_memory(base, monkeypatch):
    """As on a GPU; in main memory the model stays, with the same figures."""
    shop = workshop(base, Comparison(("refl",), ("symmetry",), 1, num_prompts=3))
    (job,) = shop.jobs()
    make_adapter(job.folder / "adapter")
    row = {"update": 1, "seconds": 1.0, "peak_memory_bytes": 1, "skipped": False}
    (job.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    loaded: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []
    decode = PipelineFamily.decode

    def load(*args: Any, **options: Any) -> Any:
        family: Any = load_family(*args, **options)
        loaded.append((weakref.ref(family.denoiser), weakref.ref(family._text.text_encoder)))
        return family

    def alone(self: Any, latents: torch.Tensor) -> torch.Tensor:
        gc.collect()
        assert loaded[-1][0]() is not None
        assert (loaded[-1][1]() is None) != keeps
        return decode(self, latents)

    monkeypatch.setattr("shortft.families.load_family", load)
    monkeypatch.setattr(PipelineFamily, "decode", alone)
    found = []
    for keeps in (True, False):
        measure = evaluator(shop, keeps=keeps)
        found += [measure(job, shop.config(job)) for _ in range(2)]
        assert (loaded[-1][0]() is None) != keeps
    assert len(loaded) == 3
    for figures_of in found[1:]:
        assert figures_of["reward"]["after"] == pytest.approx(found[0]["reward"]["after"])
        assert figures_of["reward"]["before"] == pytest.approx(found[0]["reward"]["before"])

    assert "held_out" not in found[0]
    config = shop.config(job).model_copy(update={"held_out": "compressibility"})
    assert evaluator(shop, keeps=False)(job, config)["held_out"]["name"] == "compressibility"

    def blank(*args: Any, **options: Any) -> None:
        raise NotFinite("nan", tuned=True)

    monkeypatch.setattr("shortft.evaluate.evaluate", blank)
    with pytest.raises(NotFinite) as caught:
        evaluator(shop, keeps=False)(job, shop.config(job))
    assert caught.value.tuned
    assert loaded[-1][0]() is None  # also while the error is told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_comparison_asks_its_training_to_end(number, tmp_path: Path):
    child = (
        "import os, signal, sys, time\n"
        "def end(*_):\n    print('checkpoint'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"os.kill(os.getppid(), {int(number)})\ntime.sleep(60)"
    )
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(Stopped) as stop,
        Interrupts(immediate=True),
    ):
        compare_runs._training([sys.executable, "-c", child], log, ())
    assert stop.value.signal == number
    assert (tmp_path / "log").read_text() == "checkpoint\n"


def test_report(base, trained):
    shop = workshop(base)
    compare_runs.run_all(shop, pretended, lambda _: None)
    paths = report.write_report(shop)
    assert all(path.stat().st_size for path in paths)
    text = (shop.root / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| 1 ", "| 2 ", "| 3 "))]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [dict(zip(report.HEADER, line, strict=True)) for line in cells]
    assert [row["method"] for row in rows] == ["shortft", "refl", "draft_k"]  # by gain
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    # Gains over two seeds: 0.30 and 0.31, 0.20 and 0.21, 0.10 and 0.11.
    assert rows[0]["gain"] == "+0.3050 (+0.3000 to +0.3100)"
    assert [row["gain / best rival's"] for row in rows] == ["1.49", "1.00", "0.51"]
    # The best rival's curve ends at 0.7; ours is at 0.65 after 15 s and at 0.8 after 30 s.
    reached = [row["reaches the best rival's final reward in"] for row in rows]
    assert reached == ["20 s (67 %)", "30 s (100 %)", "not reached"]
    assert rows[0]["held-out scorer, before → after"] == "0.500 → 0.600"
    assert rows[0]["diversity, change"] == "-50 %"
    assert rows[0]["in its own unit, before → after"] == "e ↓: 1 → 0.5"
    assert (
        "the best rival, refl: gain ratio 1.49; intervals over seeds are apart, ahead in 4 of 4"
        in text
    )
    assert "holds the median of all seeds with probability 50%" in text
    assert "more of the held-out score than: shortft." in text
    assert "- 6 runs: not recorded." in text  # of a folder older than this line
    table = list(csv.DictReader((shop.root / "results.csv").open()))
    assert len(table) == 6
    assert {row["learning_rate"] for row in table} == {"0.01"}


def test_the_report_tells_how_it_was_made_without_secrets():
    runs = [{"made_by": "torch 1; a CPU"}, {"made_by": "torch 1; a CPU"}, {"made_by": "torch 2"}]
    command = "shortft compare --pipeline https://me:password@host/model"
    told = report.how_made({("clip", "refl"): runs}, command)
    assert told[2:5] == ["```sh", "shortft compare --pipeline https://host/model", "```"]
    assert told[6:8] == ["- 2 runs: torch 1; a CPU.", "- 1 runs: torch 2."]


def results_of(gains: dict[str, dict[str, list[float]]]) -> figures.Results:
    """Results from gains by reward, method and seed; curves rise evenly over 100 s."""
    return {
        (reward, method): [
            {
                "reward": {"before": 2.0, "after": 2.0 + gain},
                "curve": [[0.0, 2.0], [100.0, 2.0 + gain]],
                "training_seconds": 100.0,
            }
            for gain in seeds
        ]
        for reward, methods in gains.items()
        for method, seeds in methods.items()
    }


def test_pictures_leave_out_rates_where_names_stay_apart():
    methods = (
        "refl",
        "draft_k:learning_rate=6e-3",
        "thinned:calls=4,learning_rate=2e-3,late=2",
        "alignprop:learning_rate=6e-3,longest=0.5",
        "tune_shortcut:learning_rate=6e-3",
        "tune_shortcut:learning_rate=6e-3 on the plain chain",
        "drtune:learning_rate=1e-3",
        "drtune:learning_rate=2e-3",
    )
    shown = ["refl", "draft_k", "thinned:calls=4,late=2", "alignprop:longest=0.5"]
    shown += ["tune_shortcut", "tune_shortcut on the plain chain", *methods[6:]]
    assert list(figures.names_shown(methods).values()) == shown


def test_figures_over_several_rewards_are_those_computed_by_hand():
    results = results_of(
        {
            "clip": {"shortft": [0.5, 0.1, 0.3], "draft_k": [0.2, 0.1, 0.9], "refl": [0.1] * 3},
            "symmetry": {"shortft": [4, 6, 5], "draft_k": [1, 1, 1], "refl": [2, 1, 9]},
        }
    )
    assert figures.by_gain(results, "clip") == ["shortft", "draft_k", "refl"]
    assert figures.by_gain(results, "symmetry") == ["shortft", "refl", "draft_k"]
    # Medians: 0.3 over 0.2, and 5 over 2; DRaFT-K 1, and 1 over 2; ReFL 0.1 over 0.2, and 1.
    for method, ratios in {"shortft": (1.5, 2.5), "draft_k": (1, 0.5), "refl": (0.5, 1)}.items():
        found = [figures.gain_ratio(results, r, method) for r in ("clip", "symmetry")]
        assert found == pytest.approx(ratios)
        mean = figures.mean_gain_ratio(results, ("clip", "symmetry"), method)
        assert mean == pytest.approx(sum(ratios) / 2)
    # The rival's median curve ends at 2.2; ours rises by 0.3 in 100 s.
    level = figures.final_reward_of_best_rival(results, "clip")
    assert level == pytest.approx(2.2)
    ours = results["clip", "shortft"]
    assert figures.seconds_to_reach(ours, level) == pytest.approx(100 * 0.2 / 0.3)
    text = "\n".join(report.overall(results, ["clip", "symmetry"]))
    assert "| shortft | 2.00 | 1.50 (1) | 2.50 (1) |" in text
    assert "| refl | 0.75 | 0.50 (3) | 1.00 (2) |" in text
    verdict = report.verdict(results, "clip")[0]
    assert "draft_k: gain ratio 1.50; intervals over seeds overlap, ahead in 4 of 9" in verdict
    assert verdict.endswith("its final reward: 67 s (67 %).")


def test_every_method_of_ours_that_leads_is_told_and_shortft_always():
    gains = {"thinned": [0.5], "jumps": [0.4], "refl": [0.3], "thinned:calls=4": [0.2]}
    results = results_of({"clip": {**gains, "shortft": [0.1]}})
    told = [line.split(" against ")[0] for line in report.verdict(results, "clip")]
    assert told == ["- thinned", "- jumps", "- shortft"]
    results = results_of({"clip": {**gains, "refl": [1.0]}})
    assert [line[:11] for line in report.verdict(results, "clip")] == ["- thinned a"]


def test_what_tunes_the_base_is_also_compared_among_itself():
    """A tuned few-step model is another model: ours may lose to it and lead the others."""
    tuned = {"tune_shortcut": [0.75], "tune_shortcut on the plain chain": [0.5]}
    results = results_of({"clip": {"jumps": [0.6], "refl": [0.4], **tuned, "shortft": [0.3]}})
    for method in tuned:
        results["clip", method][0]["plain_chain"] = {}
    told = [line.partition("; ")[0] for line in report.verdict(results, "clip")]
    assert told == [
        "- jumps against the best rival, tune_shortcut: gain ratio 0.80",
        "- shortft against the best rival, tune_shortcut: gain ratio 0.40",
        "- jumps against the best rival that tunes the base, refl: gain ratio 1.50",
        "- shortft against the best rival that tunes the base, refl: gain ratio 0.75",
    ]
    first, _, second = "\n".join(report.overall(results, ["clip"])).partition("tune the base")
    assert "| jumps | 0.80 | 0.80 (2) |" in first
    assert "| jumps | 1.50 | 1.50 (1) |" in second
    assert "| tune_shortcut |" in first
    assert "tune_shortcut" not in second
    alone = {pair: runs for pair, runs in results.items() if pair[1] != "refl"}
    assert len(report.verdict(alone, "clip")) == 2
    assert "tune the base" not in "\n".join(report.overall(alone, ["clip"]))


@pytest.mark.parametrize(
    ("count", "ends", "sure"), [(3, (0, 2), 0.75), (8, (0, 7), 0.992), (9, (1, 7), 0.961)]
)
def test_the_interval_holds_the_median_as_often_as_it_says(count, ends, sure):
    """Counted over all ways in which so many seeds may lie below or above the median of all."""
    shuffled = [(5 * n) % count if count % 5 else n for n in range(count)]
    assert figures.interval(shuffled) == ends
    below = [sum(sides) for sides in itertools.product((0, 1), repeat=count)]
    # The lower end lies below the median, and the upper one above it.
    held = [ends[0] < number < ends[1] + 1 for number in below]
    assert figures.sureness(count) == pytest.approx(sum(held) / len(held))
    assert figures.sureness(count) == pytest.approx(sure, abs=1e-3)


def test_one_seed_far_off_among_nine_does_not_join_what_lies_apart():
    ours, theirs = [0.3] * 8, [0.2] * 8
    found = results_of({"clip": {"shortft": [*ours, 0.1], "refl": [*theirs, 0.5]}})
    assert "intervals over seeds are apart, ahead in 64 of 81" in report.verdict(found, "clip")[0]
    found = results_of({"clip": {"shortft": [*ours[1:], 0.1, 0.1], "refl": [*theirs, 0.5]}})
    assert "intervals over seeds overlap" in report.verdict(found, "clip")[0]


def test_trials_are_as_long_as_runs_unless_told():
    searched: dict[str, Any] = {"methods": ("refl",), "search": ("1e-3", "1e-2")}
    assert comparison_from("laptop", minutes=2.0, **searched).search_minutes == 2
    assert comparison_from("laptop", minutes=2.0, search_minutes=1.0).search_minutes == 1
    assert comparison_from("full").search_minutes == comparison_from("full").minutes


def tried(order: list[Job], method: str) -> list[float]:
    return [job.learning_rate for job in order if job.search and job.method == method]


def test_rates_at_the_edge_of_the_search_are_told(base, trained):
    methods = ("shortft", "refl")
    spec = Comparison(methods, ("symmetry",), seeds=1, search=(1e-3, 1e-2), num_prompts=6)
    shop = workshop(base, spec)
    compare_runs.run_all(shop, pretended, lambda _: None)
    (line,) = report.at_the_edge(shop, figures.collect(shop), "symmetry")
    assert line.endswith("may do more: shortft (0.01), refl (0.01).")
    spec = Comparison(methods, ("symmetry",), seeds=1, search=(1e-3, 1e-2, 1e-1), num_prompts=6)
    shop = workshop(base.model_copy(update={"output_dir": base.output_dir / "wide"}), spec)
    compare_runs.run_all(shop, pretended, lambda _: None)
    assert report.at_the_edge(shop, figures.collect(shop), "symmetry") == []
    shop = Workshop(base.output_dir, Comparison(methods, ("symmetry",)), base)  # without a search
    assert report.at_the_edge(shop, figures.collect(shop), "symmetry") == []


@pytest.mark.parametrize(
    ("search", "further", "rates", "best"),
    [
        ((1e-4, 1e-3), 1, [1e-4, 1e-3, 1e-2], 1e-2),  # the limit ends it
        ((1e-4, 1e-3), 3, [1e-4, 1e-3, 1e-2, 1e-1], 1e-2),  # the best is passed: 1e-1 is worse
        ((1e-1, 5e-2), 2, [1e-1, 5e-2, 2.5e-2, 1.25e-2], 1.25e-2),  # downwards
        ((1e-3, 1e-2, 1e-1), 2, [1e-3, 1e-2, 1e-1], 1e-2),  # inside from the start
    ],
)
def test_a_search_goes_on_beyond_its_edge(base, trained, search, further, rates, best):
    spec = Comparison(
        ("shortft", "refl"), ("symmetry",), 1, search=search, search_further=further, num_prompts=6
    )
    shop = workshop(base, spec)
    assert shop.learning_rate("symmetry", "refl") is None
    compare_runs.run_all(shop, pretended, lambda _: None)
    for method in spec.methods:
        assert sorted(tried(trained, method)) == sorted(rates)
        assert shop.learning_rate("symmetry", method) == best
    assert all(job.learning_rate == best for job in trained if not job.search)


def test_one_reward_may_find_the_rates_of_all(base, trained):
    rewards = ("symmetry", "compressibility")
    spec = Comparison(
        ("shortft", "refl"),
        rewards,
        1,
        search=(1e-3, 1e-2),
        search_reward="incompressibility",
        num_prompts=6,
    )
    compare_runs.run_all(workshop(base, spec), pretended, lambda _: None)
    trials = [job for job in trained if job.search]
    assert {job.reward for job in trials} == {"incompressibility"}
    assert len(trials) == spec.trials() == 4
    runs = [job for job in trained if not job.search]
    assert {job.reward for job in runs} == set(rewards)
    assert {job.learning_rate for job in runs} == {1e-2}


def test_a_method_may_bring_its_own_rate(base, trained):
    """It is not searched, and the others are."""
    methods = ("refl:learning_rate=3e-3", "refl", "draft_k:k=2,learning_rate=0.2")
    spec = Comparison(methods, ("symmetry",), 1, search=(1e-3, 1e-2), num_prompts=6)
    shop = workshop(base, spec)
    compare_runs.run_all(shop, pretended, lambda _: None)
    trials = [job for job in trained if job.search]
    assert {job.method for job in trials} == {"refl"}
    assert len(trials) == spec.trials() == 2
    runs = {job.method: job for job in trained if not job.search}
    rates = {method: job.learning_rate for method, job in runs.items()}
    assert rates == dict(zip(methods, (3e-3, 1e-2, 0.2), strict=True))
    assert shop.config(runs[methods[2]]).learning_rate == 0.2
    assert shop.config(runs[methods[2]]).method_options == {"k": 2}


def test_known_rates_are_taken_untried(base, trained):
    """Of one reward, while another's is searched."""
    rewards = ("symmetry", "compressibility")
    spec = Comparison(
        ("refl", "draft_k"),
        rewards,
        1,
        rates={"refl": {"symmetry": 3e-3}, "draft_k": dict.fromkeys(rewards, 0.2)},
        search=(1e-3, 1e-2),
        num_prompts=6,
    )
    shop = workshop(base, spec)
    assert shop.learning_rate("symmetry", "refl") == 3e-3  # not None: nothing to wait for
    assert shop.learning_rate("compressibility", "refl") is None
    compare_runs.run_all(shop, pretended, lambda _: None)
    trials = [job for job in trained if job.search]
    assert {(job.reward, job.method) for job in trials} == {("compressibility", "refl")}
    assert len(trials) == spec.trials() == 2
    runs = {(job.reward, job.method): job.learning_rate for job in trained if not job.search}
    assert runs == {
        ("symmetry", "refl"): 3e-3,
        ("symmetry", "draft_k"): 0.2,
        ("compressibility", "refl"): 1e-2,
        ("compressibility", "draft_k"): 0.2,
    }
    text = report.markdown(shop, figures.collect(shop))
    assert "known for method and reward were taken untried.\n\nOthers: 0.001, 0.01" in text
    assert report.at_the_edge(shop, figures.collect(shop), "symmetry") == []
    assert "refl (0.01)" in report.at_the_edge(shop, figures.collect(shop), "compressibility")[0]
    # Runs at other rates are not mixed with these.
    others = dataclasses.replace(spec, rates={"refl": {"symmetry": 1e-3}})
    with pytest.raises(UserError, match="another rates"):
        workshop(base, others)


def test_a_recomputed_competitor_has_the_rate_of_its_method(base):
    full = comparison_from(
        "full", methods=("full:recompute=true", "thinned:recompute=true,calls=4")
    )
    assert {method for _, method in full.without_rate} == {"thinned:recompute=true,calls=4"}
    shop = workshop(base, dataclasses.replace(full, seeds=1, num_prompts=6))
    assert shop.learning_rate("clip", "full:recompute=true") == 6e-3


def test_a_folder_from_before_known_rates_goes_on(base):
    kept = workshop(base).kept
    found = json.loads(kept.read_text())
    assert found.pop("rates") == {}
    kept.write_text(json.dumps(found))
    workshop(base)


def test_what_the_full_budget_knows_and_what_it_searches():
    full = comparison_from("full")
    assert full.without_rate == ()
    assert full.trials() == 0
    assert full.runs() == len(full.methods) * len(full.rewards) * full.seeds
    more = comparison_from("full", methods=("jumps", "draft_k:k=2"), rewards=("clip", "symmetry"))
    # Rates of all rewards are found on one; jumps' is known on the text's alone.
    assert more.without_rate == (
        ("clip", "draft_k:k=2"),
        ("symmetry", "jumps"),
        ("symmetry", "draft_k:k=2"),
    )
    assert more.searched == (
        ("clip:1,symmetry:3", "draft_k:k=2"),
        ("clip:1,symmetry:3", "jumps"),
    )
    found = comparison_from("full", search=("1e-3", "2e-3"))
    assert found.rates == {}
    assert found.searched == tuple((full.search_reward, m) for m in found.methods)
    one = comparison_from("full", search=("1e-3",))  # the same for all, untried
    assert (one.trials(), one.search_further, one.search_reward) == (0, 0, "")


def test_a_method_may_bring_settings_of_its_own(base, trained):
    """It is searched like any other, and trained with them; the others are not."""
    methods = ("refl:batch_size=6,guidance_grad=positive,recompute=true", "refl")
    spec = Comparison(methods, ("symmetry",), 1, search=(1e-3, 1e-2), num_prompts=6)
    shop = workshop(base, spec)
    compare_runs.run_all(shop, pretended, lambda _: None)
    assert {job.method for job in trained if job.search} == set(methods)
    configs = {job.method: shop.config(job) for job in trained}
    names = ("batch_size", "guidance_grad", "recompute")
    found = [[getattr(configs[method], name) for name in names] for method in methods]
    assert found == [[6, "positive", True], [base.batch_size, "both", False]]
    assert base.batch_size != 6


@pytest.mark.parametrize(
    ("setting", "option"),
    [
        ("batch_size=0", "--batch-size"),
        ("batch_size=half", "--batch-size"),
        ("guidance_grad=most", "--guidance-grad"),
        ("recompute=maybe", "--recompute"),
        ("shortcut=missing.safetensors", "missing.safetensors"),
        ("rank=64", "rank"),
    ],
)
def test_wrong_settings_of_its_own_are_told_at_once(base, setting, option):
    with pytest.raises(UserError, match=option):
        workshop(base, Comparison((f"shortft:{setting}",), ("symmetry",), 1))


@pytest.mark.parametrize("rate", ["0", "-1", "much"])
def test_a_wrong_rate_of_its_own_is_told_at_once(base, rate):
    with pytest.raises(UserError, match="learning-rate"):
        workshop(base, Comparison((f"refl:learning_rate={rate}",), ("symmetry",), 1))


def test_a_rate_that_cannot_train_is_the_worst_and_ends_nothing(base, monkeypatch):
    words = "error: --reward symmetry: 10 updates in a row had a reward that is not finite"

    def train(command: list[str], log: Any, descriptors: tuple[int, ...]) -> int:
        rate = load_config(Path(command[4])).learning_rate
        assert command[5:] == ["--auto-resume"]
        log.write(words if rate > 1e-2 else "")
        return 2 if rate > 1e-2 else 0

    monkeypatch.setattr(compare_runs, "_training", train)
    methods, search = ("shortft", "refl"), (1e-3, 1e-2, 1e-1)
    shop = workshop(base, Comparison(methods, ("symmetry",), 1, search=search, num_prompts=6))
    compare_runs.run_all(shop, pretended, lambda _: None)
    assert shop.learning_rate("symmetry", "refl") == 1e-2
    (failed,) = [t for t in shop.trials() if t.method == "refl" and t.learning_rate == 1e-1]
    assert "10 updates in a row" in read_result(failed)["failed"]
    job = next(job for job in shop.jobs() if not job.search)
    with pytest.raises(UserError, match="training failed"):
        compare_runs.run_job(
            shop.config(dataclasses.replace(job, learning_rate=1.0)), job, pretended
        )


def test_a_training_that_ran_out_of_memory_says_what_a_comparison_can_do(base, monkeypatch):
    shop = workshop(base, Comparison(("refl",), ("symmetry",), 1, num_prompts=6))

    def train(command: list[str], log: Any, descriptors: tuple[int, ...]) -> int:
        log.write("error: --batch-size 2: out of memory with 2 pictures at once; go on by --resume")
        return 2

    monkeypatch.setattr(compare_runs, "_training", train)
    with pytest.raises(UserError, match="out of memory; as refl:recompute=true it") as told:
        compare_runs.run_all(shop, pretended, lambda _: None)
    assert "--resume" not in str(told.value)
    shop = workshop(base, Comparison(("refl:recompute=true",), ("symmetry",), 1, num_prompts=6))
    with pytest.raises(UserError, match="out of memory with 2 pictures at once"):
        compare_runs.run_all(shop, pretended, lambda _: None)


def test_looks_that_are_no_numbers_are_left_out_of_curves(base, monkeypatch):
    """The log has null for them; a seed without any is passed over."""
    methods = ("shortft", "draft_k", "refl")
    shop = workshop(base, Comparison(methods, ("symmetry",), 2, num_prompts=6))

    def unsure(job: Job, config: Config) -> dict[str, Any]:
        result = pretended(job, config)
        values = [None, None] if job.method == "refl" or job.seed else [None, 0.9]
        return {**result, "curve": [[1.0, 0.2], *zip((2.0, 3.0), values, strict=True)][job.seed :]}

    monkeypatch.setattr(compare_runs, "_training", lambda *_: 0)
    compare_runs.run_all(shop, unsure, lambda _: None)
    results = figures.collect(shop)
    times, values = figures.curve(figures.looked_at(results["symmetry", "draft_k"]))
    assert (times.tolist(), values.tolist()) == ([1, 3], [0.2, 0.9])
    assert figures.seconds_to_reach(results["symmetry", "draft_k"], 0.9) == 3
    assert "reaches" in report.markdown(shop, results)
    assert report.write_report(shop)


@pytest.mark.parametrize(("method", "joint"), [("refl", ":"), ("draft_k:k=2", ",")])
def test_a_training_that_the_system_killed_says_what_takes_less(base, monkeypatch, method, joint):
    shop = workshop(base, Comparison((method,), ("symmetry",), 1, num_prompts=6))
    dies = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    train = compare_runs._training
    monkeypatch.setattr(compare_runs, "_training", lambda _, log, rest: train(dies, log, rest))
    with pytest.raises(UserError, match=f"runs out; as {method}{joint}recompute=true it takes"):
        compare_runs.run_all(shop, pretended, lambda _: None)


def scored(gains: dict[str, list[tuple[float, float]]]) -> figures.Results:
    """Results of one reward from (reward, held-out score) of every seed, from (1, 0.8)."""
    return {
        ("clip", method): [
            {
                "reward": {"before": 1.0, "after": after},
                "held_out": {"before": 0.8, "after": held_out},
                "curve": [],
            }
            for after, held_out in seeds
        ]
        for method, seeds in gains.items()
    }


def test_the_front_holds_what_nothing_beats_in_both():
    results = scored(
        {
            "refl": [(2.0, 0.5), (2.2, 0.6), (2.1, 0.1)],
            "draft_k": [(1.5, 0.4)],  # refl has more of both
            "alignprop": [(1.4, 0.7)],
            "shortft": [(1.2, 0.81)],
            "drtune": [(1.2, 0.75)],  # as much reward as shortft, less of the other
        }
    )
    assert figures.front(results, "clip") == ["refl", "alignprop", "shortft"]
    (line,) = report.kept(results, "clip")
    assert line.endswith("than: refl, alignprop, shortft.")
    unscored = {key: [{"reward": run["reward"]} for run in runs] for key, runs in results.items()}
    assert report.kept(unscored, "clip") == []


def test_the_chart_shows_what_gains_are_paid_with(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("shortft.compare.charts.draw_lines", lambda path, *panels: panels)
    results = scored({"refl": [(2.0, 0.5), (3.0, 0.7), (4.0, 0.6)], "draft_k": [(1.5, 0.4)]})
    (panel,) = charts.draw_methods(results, "clip", tmp_path / "chart.png")
    ends = {line.label: (list(line.x), list(line.y)) for line in panel.lines}
    assert ends == {"base": ([0.8], [1.0]), "refl": ([0.6], [3.0]), "draft_k": ([0.4], [1.5])}
    assert ([0.6, 0.7], [3.0, 3.0]) in list(panel.lines[1].thin)  # from the median to a seed
    for run in results["clip", "refl"]:
        run["curve"] = [[0.0, 1.0], [10.0, run["reward"]["after"]]]
    times, ends = charts.draw_methods(results, "clip", tmp_path / "chart.png")
    assert [line.label for line in times.lines] == ["refl"]
    assert times.x_label == "seconds of training"
    assert ends.x_label == "held-out scorer"


def test_our_own_methods_are_no_rivals():
    own = {"thinned:calls=4": [3.0], "jumps:shortcut=guided": [2.8], "shortft_segments": [2.5]}
    gains = {**own, "refl": [2.0]}
    results = results_of({"clip": gains})
    assert figures.best_rival(results, "clip")[0] == "refl"
    said = report.verdict(results, "clip")
    assert said[0].startswith("- thinned:calls=4 against the best rival, refl: gain ratio 1.50")
    assert [line.split(" against ")[0][2:] for line in said] == list(own)


def test_ratios_that_mean_nothing_are_not_given():
    results = results_of(
        {"clip": {"shortft": [0.2], "refl": [-0.1]}, "symmetry": {"shortft": [1.0]}}
    )
    assert figures.gain_ratio(results, "clip", "shortft") is None  # it lost
    assert figures.gain_ratio(results, "symmetry", "shortft") is None  # none ran
    text = "\n".join(report.overall(results, ["clip", "symmetry"]))
    assert "| refl | not defined | not defined (2) | did not run |" in text
    assert report.reached_text(results, "symmetry", "shortft") == "no rival ran"


def test_a_method_may_carry_options(base):
    methods = ("draft_k", "draft_k:k=3", "shortft:jump=ddim,pin=true", "shortft_everywhere:tail=4")
    shop = workshop(base, Comparison(methods, ("symmetry",)))
    configs = [shop.config(job) for job in shop.jobs() if job.seed == 0]
    assert [config.method_options.get("k") for config in configs] == [1, 3, None, None]
    assert configs[2].method_options["jump"] == "ddim"
    assert configs[2].method_options["pin"] is True
    assert configs[3].method_options["tail"] == 4
    assert configs[3].method_options["loras"] == "segment"  # the variant's own
    assert not configs[3].timestep_lora
    assert len({config.output_dir for config in configs}) == 4
    with pytest.raises(UserError, match="--method-options j: unknown to draft_k"):
        workshop(base, Comparison(("draft_k:j=3",), ("symmetry",)))
    with pytest.raises(UserError, match="--methods draft: unknown"):
        workshop(base, Comparison(("draft:k=3",), ("symmetry",)))


@pytest.mark.parametrize("budget", sorted(BUDGETS))
def test_budgets_name_what_there_is(base, budget: str):
    spec = BUDGETS[budget]
    embedded = base.model_copy(update={"model": EMBEDDED, "shortcut": "auto"})
    shop = Workshop(base.output_dir, spec, embedded)
    assert len(shop.configs) == len(spec.methods) * len(spec.rewards)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "huge"}, "--budget huge: unknown; choose one of laptop, full"),
        ({"budget": "laptop", "seeds": 0}, "--seeds 0: must be above 0"),
        ({"budget": "laptop", "looks": -1}, "--looks -1: must be 0 or more"),
        ({"budget": "laptop", "noises": 1}, "give 2 or more"),
        ({"budget": "laptop", "search": ("x",)}, "--search x: give learning rates"),
        ({"budget": "laptop", "search": ("1e-3", "1e-2")}, "give --methods without any"),
        ({"budget": "laptop", "search": ("-1",)}, "lie above 0"),
        ({"budget": "full", "search_further": -1}, "--search-further -1: must be 0 or more"),
        ({"budget": "laptop", "search_reward": "clip"}, "there is no search"),
    ],
)
def test_mistakes(given: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        comparison_from(**given)
    assert message in str(caught.value)


def test_unknown_methods_are_told_before_anything_is_written(base, capsys, monkeypatch):
    code = main(["compare", "--methods", "draft", "--output-dir", str(base.output_dir)])
    assert code == 2
    assert "--methods draft: unknown; did you mean" in capsys.readouterr().err
    assert not base.output_dir.exists()

    def started(*_: object, **__: object) -> None:
        pytest.fail("a comparison started")

    monkeypatch.setattr("shortft.compare.command.compare_command", started)
    assert main(["compare", "--seed", "1"]) == 2
    assert "give --seeds" in capsys.readouterr().err
    assert main(["compare", "--learning-rate", "1e-3", "--output-dir", str(base.output_dir)]) == 2
    assert "--learning-rate 0.001: every method brings a rate" in capsys.readouterr().err
    full = ["compare", "--budget", "full", "--output-dir", str(base.output_dir)]
    for more in ([], ["--search", "1e-3 2e-3"]):
        assert main([*full, *more, "--learning-rate", "1e-3"]) == 2
        assert "known or searched; --search 0.001, one alone" in capsys.readouterr().err
    assert not base.output_dir.exists()


@pytest.mark.parametrize("budget", sorted(BUDGETS))
def test_other_models_get_nothing_that_was_chosen_on_the_embedded_one(budget: str, base: Config):
    """Neither shortcuts and rates of competitors, nor rewards, nor the time of a run."""
    plain = ("jumps", "shortft", "draft_k", "alignprop")
    if budget == "full":
        plain = ("jumps", "thinned:calls=4,late=2", "thinned", "shortft", "shortft_segments")
        plain += ("tune_shortcut", "draft_k", "draft_lv", "alignprop", "refl", "drtune")
        plain += ("leapalign", "flowbp_sparse", "flowbp_bridge", "flowbp_lagrange", "full")
    own = base.model_copy(update={"reward": "symmetry", "learning_rate": 1e-4})
    with pytest.raises(UserError, match="--minutes: not given"):
        comparison_from(budget, own)
    found = comparison_from(budget, own, minutes=30.0)
    assert (found.methods, found.rewards, found.minutes) == (plain, ("symmetry",), 30)
    assert found.search_minutes == 30
    assert found.rates == {}
    searched = budget == "full"
    assert found.search == ((3.3e-5, 1e-4, 3e-4) if searched else ())
    odd = own.model_copy(update={"learning_rate": 1.25e-4})
    assert (1.25e-4 in comparison_from(budget, odd, minutes=30.0).search) == searched
    assert found.searched == (tuple(("symmetry", m) for m in plain) if searched else ())
    named = {"methods": ("shortft:shortcut=unguided",), "rewards": ("compressibility", "clip")}
    found = comparison_from(budget, own, minutes=30.0, **named)
    assert (found.methods, found.rewards) == tuple(named.values())
    assert found.search_reward == ("symmetry" if searched else "")  # whatever rewards are added
    embedded = comparison_from(budget, load_config(None, {"model": "emoji"}))
    assert embedded == comparison_from(budget) == BUDGETS[budget]


def test_a_comparison_of_another_model_starts_from_its_configuration(
    base: Config, model: Path, monkeypatch, capsys, tmp_path: Path
):
    """Not from the embedded model's recipe; and its minutes are said somewhere."""
    started: list[tuple[Comparison, Config]] = []

    def start(_: Path, chosen: Comparison, config: Config, **__: object) -> None:
        started.append((chosen, config))

    monkeypatch.setattr("shortft.compare.command.compare_command", start)
    command = ["compare", "--model", str(model), "--shortcut", "none"]
    assert main(command) == 2
    assert "error: --minutes: not given" in capsys.readouterr().err
    assert main([*command, "--minutes", "7"]) == 0
    plain = load_config(None, {"model": str(model), "shortcut": "none"})
    assert started[-1][0].minutes == 7
    assert started[-1][1].learning_rate == plain.learning_rate
    assert started[-1][0].rewards == (plain.reward,)
    # Where it is the middle of a search, a rate is no mistake.
    full = [*command, "--minutes", "7", "--budget", "full", "--learning-rate", "2e-4"]
    assert main(full) == 0
    assert started[-1][0].search == (6.7e-5, 2e-4, 6e-4)
    assert main([*full, "--search", "1e-3 2e-3"]) == 2
    assert "--learning-rate 0.0002" in capsys.readouterr().err
    own = tmp_path / "own.yaml"
    text = f"model: {model}\nshortcut: none\nreward: symmetry\n"
    own.write_text(text)
    assert main(["compare", str(own)]) == 2  # 4 minutes, as `train` takes, is nobody's choice
    assert "error: --minutes: not given" in capsys.readouterr().err
    for line in (f"model: {model}\nshortcut: none\n", "model: emoji\n"):
        own.write_text(f"{line}reward: symmetry\nminutes: 9\n")
        assert main(["compare", str(own)]) == 0
        assert (started[-1][0].minutes, started[-1][0].rewards) == (9, ("symmetry",))
    for command in (["compare"], ["compare", "emoji"]):  # the embedded model: a laptop's
        assert main(command) == 0
        assert started[-1][0] == BUDGETS["laptop"]


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--updates", "--minutes"),
        ("--sample-every", "--looks"),
        ("--sample-times", "--looks"),
        ("--sample-prompts", "--num-prompts"),
        ("--sample-noises", "--noises"),
    ],
)
def test_what_a_comparison_decides_itself_is_refused(option: str, remedy: str, capsys):
    assert main(["compare", option, "3"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {option} 3: a comparison ")
    assert f"give {remedy}" in told


def test_the_laptop_budget_fits_a_laptop():
    assert BUDGETS["laptop"].cost_minutes() <= 20  # evaluation comes on top, within 30


def test_end_to_end_on_a_tiny_model(base, tmp_path: Path, capsys):
    config = tmp_path / "base.yaml"
    from shortft.config import to_yaml

    config.write_text(to_yaml(base.model_copy(update={"shortcut": "plain"})))
    out = tmp_path / "real"
    command = ["compare", str(config), "--methods", "shortft tune_shortcut", "--seeds", "1"]
    command += ["--rewards", "symmetry", "--minutes", "0.02", "--looks", "2"]
    command += ["--num-prompts", "4", "--clock", "cpu"]
    assert main([*command, "--output-dir", str(out)]) == 0
    assert "results.md" in capsys.readouterr().out
    found = {}
    for method in ("shortft", "tune_shortcut"):
        result = json.loads((out / "runs" / "symmetry" / method / "seed-0" / RESULT).read_text())
        assert result["updates"] > 0
        assert result["reward"]["before"] < 0
        assert result["curve"][0][0] == 0
        assert result["curve"][-1][0] >= 0.02 * 60
        found[method] = result
    assert "plain_chain" not in found["shortft"]
    few, plain = found["tune_shortcut"], found["tune_shortcut"]["plain_chain"]
    assert few["reward"]["before"] == plain["reward"]["before"]
    assert few["reward"]["after"] != plain["reward"]["after"]
    text = (out / "results.md").read_text()
    assert "| tune_shortcut on the plain chain |" in text
    assert "CPU time" in text
    assert f"shortft {shlex.join([*command, '--output-dir', str(out)])}\n" in text
    assert f"- 2 runs: shortft {__version__}, " in text
    assert f"torch {importlib.metadata.version('torch')}" in text
    assert {p.suffix for p in out.iterdir() if p.is_file()} == {".md", ".csv", ".png", ".json"}
    assert main([*command, "--output-dir", str(out), "--report-only"]) == 0


def test_without_looks_only_the_end_is_measured(base, tmp_path: Path):
    out = tmp_path / "unseen"
    spec = Comparison(
        ("jumps", "refl"), ("symmetry",), seeds=1, minutes=0.01, looks=0, num_prompts=2
    )
    compare_command(out, spec, base)
    results = figures.collect(Workshop(out, spec, base))
    for runs in results.values():
        assert runs[0]["curve"] == []
        assert runs[0]["reward"]["after"] != runs[0]["reward"]["before"]
    folder = next((out / "runs").rglob("metrics.jsonl")).parent
    assert not list((folder / "samples").glob("*"))
    assert report.reached_text(results, "symmetry", "jumps") == "not measured"
    # Nothing was scored but the reward, at the end alone: no chart, but the grid.
    assert {p.suffix for p in out.iterdir() if p.is_file()} == {".md", ".csv", ".png", ".json"}
    assert [p.name for p in out.glob("*.png")] == ["grid-symmetry.png"]


@pytest.mark.parametrize("change", [{"looks": 0}, {"search": (1e-3, 1e-2)}])
def test_a_guard_that_stops_needs_looks(change, base, tmp_path: Path):
    spec = dataclasses.replace(BUDGETS["laptop"], methods=("refl",), **change)
    with pytest.raises(UserError, match="--guard stop: needs evaluations on the way"):
        Workshop(tmp_path, spec, base.model_copy(update={"guard": "stop"}))


@pytest.mark.parametrize(
    ("shortcut", "message"),
    [("auto", "--shortcut auto: no shortcut ships for"), ("hyper-sd15-8", "--segments 4: ")],
)
def test_a_shortcut_that_a_method_lacks_is_told_before_any_run(
    shortcut: str, message: str, base, tmp_path: Path
):
    other = base.model_copy(update={"shortcut": shortcut})
    with pytest.raises(UserError, match=message):
        Workshop(tmp_path, Comparison(("draft_k", "shortft"), ("symmetry",)), other)
    Workshop(tmp_path, Comparison(("draft_k", "refl"), ("symmetry",)), other)
    Workshop(tmp_path, Comparison(("draft_k", "shortft:shortcut=none"), ("symmetry",)), other)

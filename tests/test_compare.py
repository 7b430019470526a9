"""`shortft compare`: what is run, what is kept, and what the report says."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shortft import compare, compare_report
from shortft.cli import main
from shortft.compare import CLAIM, RESULT, Comparison, Job, Workshop, claim, comparison_from
from shortft.config import Config, load_config
from shortft.errors import UserError
from tiny import save_tiny

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
def base(tmp_path: Path) -> Config:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "held_out.txt").write_text("\n".join(f"unseen {i}" for i in range(12)))
    return load_config(
        None,
        {
            "model": str(save_tiny(tmp_path / "model")),
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
    after = 0.5 + GAIN[job.method] + 0.01 * job.seed - abs(job.learning_rate - 1e-2)
    if not job.search:
        pictures = torch.rand(4, 3, 16, 16)
        save_file({"before": pictures, "after": 1 - pictures}, job.folder / "pictures.safetensors")
    return {
        "reward": {"name": "r", "before": 0.5, "after": after},
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
        "curve": [[0.0, 0.5], [15.0, 0.5 + GAIN[job.method] / 2], [30.0, 0.5 + GAIN[job.method]]],
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Runs that only evaluate; returns the jobs in the order in which they were run."""
    order: list[Job] = []

    def run(config: Config, job: Job, evaluate_run: Any) -> None:
        order.append(job)
        result = {
            "method": job.method,
            "seed": job.seed,
            "learning_rate": job.learning_rate,
            **evaluate_run(job, config),
        }
        (job.folder / RESULT).write_text(json.dumps(result))

    monkeypatch.setattr(compare, "run_job", run)
    return order


def workshop(base: Config, spec: Comparison = SPEC) -> Workshop:
    made = Workshop(base.output_dir, spec, base)
    made.prepare()
    return made


def test_search_first_then_every_method_reward_and_seed_with_the_best_rate(base, trained):
    shop = workshop(base)
    compare.run_all(shop, pretended, lambda _: None)
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
    compare.run_all(shop, pretended, lambda _: None)
    assert trained == []
    (runs[0].folder / RESULT).unlink()
    compare.run_all(shop, pretended, lambda _: None)
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


def test_runs_differ_in_method_seed_and_rate_only(base):
    shop = workshop(base, Comparison(("shortft", "draft_5"), ("symmetry",), seeds=1, minutes=0.5))
    one, two = (shop.config(job).model_dump() for job in shop.jobs())
    differing = {name for name in one if one[name] != two[name]}
    assert differing == {"method", "method_options", "output_dir"}
    assert one["minutes"] == 0.5
    assert one["updates"] is None


def test_another_comparison_in_the_same_folder_is_refused(base):
    workshop(base)
    with pytest.raises(UserError, match=r"another seeds \(2, not 3\)"):
        workshop(base, Comparison(**{**vars(SPEC), "seeds": 3}))
    with pytest.raises(UserError, match="another base"):
        Workshop(base.output_dir, SPEC, base.model_copy(update={"rank": 3})).prepare()


def test_a_claim_holds_while_its_process_lives(tmp_path: Path):
    folder = tmp_path / "job"
    assert claim(folder)
    assert not claim(folder)  # ours, and we live
    (folder / CLAIM).unlink()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    import socket

    (folder / CLAIM).write_text(f"{socket.gethostname()} {pid}")
    assert claim(folder)  # its process is gone
    (folder / CLAIM).write_text("elsewhere 1")
    assert not claim(folder)  # another machine: not ours to judge


def test_report(base, trained):
    shop = workshop(base)
    compare.run_all(shop, pretended, lambda _: None)
    paths = compare_report.write_report(shop)
    assert all(path.stat().st_size for path in paths)
    text = (shop.root / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| shortft", "| refl", "| dr"))]
    assert [line.split()[1] for line in lines] == ["shortft", "refl", "draft_k"]  # by gain
    # The best rival's curve ends at 0.7; ours is at 0.65 after 15 s and at 0.8 after 30 s.
    assert "| 20 s |" in lines[0]
    assert "| not reached |" in lines[2]
    assert "+0.3050 (+0.3000 to +0.3100)" in lines[0]
    assert "the best rival, refl: gain ratio 1.49; ranges over seeds are apart" in text
    table = list(csv.DictReader((shop.root / "results.csv").open()))
    assert len(table) == 6
    assert {row["learning_rate"] for row in table} == {"0.01"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": "huge"}, "--budget huge: unknown; choose one of laptop, full"),
        ({"budget": "laptop", "seeds": 0}, "--seeds 0: must be above 0"),
        ({"budget": "laptop", "noises": 1}, "give 2 or more"),
        ({"budget": "laptop", "search": ("x",)}, "--search x: give learning rates"),
        ({"budget": "laptop", "search": ("-1",)}, "lie above 0"),
    ],
)
def test_mistakes(given: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        comparison_from(**given)
    assert message in str(caught.value)


def test_unknown_methods_are_told_before_anything_is_written(base, capsys):
    code = main(["compare", "--methods", "draft", "--output-dir", str(base.output_dir)])
    assert code == 2
    assert "--methods draft: unknown; did you mean" in capsys.readouterr().err
    assert not base.output_dir.exists()
    assert main(["compare", "--seed", "1"]) == 2
    assert "give --seeds" in capsys.readouterr().err


def test_the_laptop_budget_fits_a_laptop():
    assert compare.BUDGETS["laptop"].cost_minutes() <= 20  # evaluation comes on top, within 30


def test_end_to_end_on_a_tiny_model(base, tmp_path: Path, capsys):
    config = tmp_path / "base.yaml"
    from shortft.config import to_yaml

    config.write_text(to_yaml(base))
    out = tmp_path / "real"
    command = ["compare", str(config), "--methods", "shortft draft_k", "--rewards", "symmetry"]
    command += ["--seeds", "1", "--minutes", "0.02", "--looks", "2", "--num-prompts", "4"]
    assert main([*command, "--output-dir", str(out)]) == 0
    assert "results.md" in capsys.readouterr().out
    for method in ("shortft", "draft_k"):
        result = json.loads((out / "runs" / "symmetry" / method / "seed-0" / RESULT).read_text())
        assert result["updates"] > 0
        assert result["reward"]["before"] < 0
        assert result["curve"][0][0] == 0
        assert result["curve"][-1][0] >= 0.02 * 60
    assert {p.suffix for p in out.iterdir() if p.is_file()} == {".md", ".csv", ".png", ".json"}
    assert main([*command, "--output-dir", str(out), "--report-only"]) == 0

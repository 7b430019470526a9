"""The guard trips on a reward that is hacked, and on nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from shortft.checkpoint import load_latest
from shortft.config import Config
from shortft.drawing import curves
from shortft.drawing.progress import TrainProgress
from shortft.errors import UserError
from shortft.guard import Guard, Look
from shortft.kept import keep, restore
from shortft.metrics import diversity
from shortft.metrics_log import MetricsLog
from shortft.train import train
from shortft.trainer import Trainer
from shortft.variety import thumbnails
from shortft.watch import decide
from test_train import weights


def looks(*scores: tuple[float, float | None]) -> list[tuple[bool, bool]]:
    guard = Guard(0.1)
    found = [guard.see(Look(i, reward, held_out)) for i, (reward, held_out) in enumerate(scores)]
    return [(best, alarm is not None) for best, alarm in found]


def test_it_trips_when_the_held_out_scorer_falls_while_the_reward_rises():
    assert looks((1.0, 0.5), (2.0, 0.46), (3.0, 0.44)) == [
        (True, False),
        (True, False),
        (False, True),
    ]


def test_it_is_silent_when_both_fall_both_rise_or_nothing_is_held_out():
    assert looks((1.0, 0.5), (0.5, 0.1)) == [(True, False), (False, False)]
    assert looks((1.0, 0.5), (2.0, 0.6)) == [(True, False), (True, False)]
    assert looks((1.0, None), (2.0, None)) == [(True, False), (True, False)]


def test_negative_scores_may_lose_a_share_of_their_size():
    assert looks((1.0, -0.5), (2.0, -0.54), (2.5, -0.56)) == [
        (True, False),
        (True, False),
        (False, True),
    ]


def test_the_best_is_chosen_by_the_criterion_within_the_limit():
    for by, expected in (("reward", 2), ("held_out", 1)):
        guard = Guard(0.1, by)
        for i, (reward, held_out) in enumerate([(1.0, 0.5), (2.0, 0.6), (3.0, 0.46), (9.0, 0.1)]):
            guard.see(Look(i, reward, held_out))
        assert guard.best is not None
        assert guard.best.update == expected


@pytest.mark.parametrize("option", ["best_by held_out", "guard stop"])
def test_what_needs_a_held_out_scorer_says_so(settings, option: str):
    name, value = option.split()
    said = f"--{name.replace('_', '-')} {value}: .* name one by --held-out"
    with pytest.raises(UserError, match=said):
        Trainer(Config(**settings, **{name: value}))


def test_a_guard_needs_evaluations(settings):
    with pytest.raises(UserError, match="--guard stop: needs evaluations; give --sample-every"):
        Config(**{**settings, "guard": "stop", "sample_every": 0})


HACKED = {"sample_every": 2, "guard": "stop", "guard_drop": 0.1, "held_out": "compressibility"}


Script = tuple[list[float], list[float]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Script:
    """What evaluations are to find: rewards, and held-out scores."""
    scores: Script = ([], [])
    monkeypatch.setattr(
        Trainer,
        "score",
        lambda self, scorer, images, prompts: scores[scorer is self.held_out].pop(0),
    )
    return scores


def test_a_hacked_run_stops_and_goes_back_to_the_best(
    settings, told: Script, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[tuple[int, str]] = []
    flag = curves._flag
    monkeypatch.setattr(
        curves,
        "_flag",
        lambda axis, update, label, *look: (
            drawn.append((update, label.strip())),
            flag(axis, update, label, *look),
        ),
    )
    config = Config(**{**settings, **HACKED})
    told[0][:], told[1][:] = [0.0, 1.0, 2.0, 3.0], [1.0, 0.95, 0.92, 0.5]
    train(config)
    log = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").open()]
    evaluations = [row for row in log if "eval_reward" in row]
    assert [row["update"] for row in evaluations] == [0, 2, 4, 6]
    assert "being hacked" in evaluations[-1]["guard"]
    assert {"eval_contrast", "eval_saturated", "eval_diversity"} < set(evaluations[-1])
    assert [row.get("best") for row in evaluations] == [True, True, True, None]
    kept, best = weights(config.output_dir / "adapter"), weights(config.output_dir / "best")
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert [row["update"] for row in log if "reward" in row][-1] == 6
    assert (config.output_dir / "curves.png").stat().st_size > 10_000
    assert drawn[-2:] == [(4, "best"), (6, "guard")]  # in the picture too
    # A queue that starts the command once more does not train past the decision.
    (config.output_dir / "adapter" / "lora_1.safetensors").unlink()
    train(config, auto_resume=True)
    again = weights(config.output_dir / "adapter")
    assert all(torch.equal(again[name], best[name]) for name in best)
    assert len((config.output_dir / "metrics.jsonl").read_text().splitlines()) == len(log)


def test_a_run_that_is_hacked_at_once_goes_back_to_the_start(settings, told: Script):
    told[0][:], told[1][:] = [0.0, 1.0], [1.0, 0.5]
    adapter = train(Config(**{**settings, **HACKED}))
    assert all(not value.any() for name, value in weights(adapter).items() if "lora_B" in name)


def test_warn_goes_on(settings, told: Script):
    config = Config(**{**settings, **HACKED, "sample_every": 4, "guard": "warn"})
    told[0][:], told[1][:] = [0.0, 1.0, 2.0], [1.0, 0.5, 0.4]
    train(config)
    log = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").open()]
    assert [row["update"] for row in log if "reward" in row][-1] == 8
    assert ["guard" in row for row in log if "eval_reward" in row] == [False, True, True]


def test_what_a_resumed_run_remembers_of_its_evaluations(settings, tmp_path: Path):
    """All, unless they were by another measure; that it was stopped only where that is asked."""
    config = Config(**{**settings, **HACKED})
    trainer = Trainer(config)
    first, best = Look(0, 1.0, 0.5), Look(2, 2.0, 0.6)
    trainer.guard.restore({"first": asdict(first), "best": asdict(best)})
    trainer.tripped = True
    trainer.best = {n: trainer.nets.state_of(n) for n in trainer.numbers}
    keep(trainer, 0)
    saved, _ = load_latest(config.output_dir / "checkpoints")

    def remembered(**change: object) -> tuple[bool, ...]:
        trainer.config = config.model_copy(update=change)
        trainer.guard, trainer.best, trainer.tripped = Guard(0.1), None, False
        restore(trainer, saved, allow_change=True)
        seen = trainer.guard.first == first and trainer.guard.best == best
        assert seen == (trainer.best is not None)
        assert seen == (trainer.guard.first is not None)
        return seen, trainer.tripped

    assert remembered() == (True, True)
    assert remembered(updates=9, learning_rate=1e-4, sample_every=1) == (True, True)
    for guard in ("warn", "off"):
        assert remembered(guard=guard) == (True, False)
    for change in (
        {"reward": "compressibility"},
        {"held_out": "symmetry"},
        {"seed": 1},
        {"precision": "bf16"},
        {"reward_model": "clip=elsewhere"},
        {"decoder": "elsewhere"},
        {"sample_prompts": 1},
        {"sample_noises": 3},
        {"num_steps": 16},
        {"guidance_scale": 3.0},
    ):
        assert remembered(**change) == (False, False), change
    for name, other in (("sample_prompts", ["rocket"]), ("inputs", "another model's")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, name, other)
            assert remembered() == (False, False), name
    assert remembered() == (True, True)

    # What a few-step model's LoRA is drawn by is its own guidance too.
    for placement, seen in (("few_step", False), ("stacked", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "placement", placement)
            patch.setattr(trainer, "jumps_by", ["file", 2.0, 1.0])
            assert remembered() == (seen, seen)

    log, alarming = MetricsLog(tmp_path / "log", 0, enabled=True), Look(4, 9.0, 0.1)
    for guard in ("off", "warn", "stop"):
        assert remembered(guard=guard)[0]
        row: dict[str, object] = {}
        decide(trainer, log, TrainProgress(8, enabled=False), alarming, row)
        assert row.keys() == (set() if guard == "off" else {"guard"})
        assert trainer.tripped == (guard == "stop")
        assert trainer.guard.best == best


def test_a_held_out_scorer_of_ones_own_that_changed_is_another_measure(settings, tmp_path: Path):
    """What counts is the file that was loaded, not what lies there when a checkpoint is written."""
    own = tmp_path / "watch.py"
    first = "def f(images, prompts):\n    return images.mean((1, 2, 3))\n"
    own.write_text(first)
    config = Config(**{**settings, **HACKED, "held_out": f"{own}:f", "updates": 2})
    trainer = Trainer(config)
    own.unlink()
    look = Look(0, 1.0, 0.5)
    trainer.guard.restore({"first": asdict(look), "best": asdict(look)})
    keep(trainer, 0)
    saved, _ = load_latest(config.output_dir / "checkpoints")
    for text, seen in ((first, True), (first.replace("return", "return -"), False)):
        own.write_text(text)
        other = Trainer(config)
        restore(other, saved)
        assert (other.guard.first == look) == seen


def test_the_best_adapter_belongs_to_the_run_that_goes_on(settings, told: Script, monkeypatch):
    """Killed after an evaluation that no checkpoint knows, a run forgets what it saw there."""
    change = {"sample_every": 3, "checkpoint_every": 4, "updates": 5}
    config = Config(**{**settings, **HACKED, **change})
    told[0][:], told[1][:] = [0.0, 1.0], [1.0, 1.0]
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt  # nothing is saved, as by kill -9

        patch.setattr("shortft.kept.keep", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    lost = weights(config.output_dir / "best")
    assert any(value.any() for name, value in lost.items() if "lora_B" in name)  # of update 3
    told[0][:], told[1][:] = [0.0, 1.0, 2.0], [1.0, 0.1, 0.1]
    adapter = train(config)
    for folder in (adapter, config.output_dir / "best"):
        values = weights(folder)
        assert all(not value.any() for name, value in values.items() if "lora_B" in name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_teaches_the_guard_nothing(bad: float):
    guard = Guard(0.1)
    assert guard.see(Look(0, bad, 1.0)) == (False, None)
    assert guard.see(Look(1, 0.0, 1.0))[0]
    assert guard.see(Look(2, 1.0, bad)) == (False, None)
    assert guard.see(Look(3, 1.0, 0.5))[1] is not None  # still awake
    assert guard.best == Look(1, 0.0, 1.0)


def test_a_run_goes_on_after_an_evaluation_that_is_not_finite(settings, told: Script):
    nan = float("nan")
    config = Config(**{**settings, **HACKED, "guard": "warn", "updates": 4})
    told[0][:], told[1][:] = [nan, nan, 1.0], [nan, 1.0, 1.0]
    train(config)
    told[0][:], told[1][:] = [2.0, nan], [1.0, nan]
    train(config.model_copy(update={"updates": 8}), resume=True)
    log = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").open()]
    assert [row["eval_reward"] for row in log if "eval_reward" in row] == [None, None, 1, 2, None]


def test_thumbnails_tell_alike_from_different():
    same = torch.rand(1, 3, 32, 32).expand(2, -1, -1, -1)
    assert float(diversity(same, thumbnails)) == pytest.approx(0, abs=1e-6)
    assert float(diversity(torch.stack([same[0], 1 - same[0]]), thumbnails)) == pytest.approx(2)

"""Training runs on a tiny model: resume, several processes, what is written, bad input."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from shortft.adapter import load_into
from shortft.checkpoint import load_latest
from shortft.config import Config
from shortft.errors import UserError
from shortft.kept import keep, restore, write_adapter
from shortft.methods.catalog import METHODS, VARIANTS, variant_settings
from shortft.out_of_memory import advice, savings
from shortft.plans import stage_bounds
from shortft.sampling import load_tuned
from shortft.seeds import sample_seed
from shortft.train import FREE, train
from shortft.trainer import CLOCKS, MAX_SKIPPED, Trainer


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.stem}/{key}": value
        for path in sorted(directory.glob("lora_*.safetensors"))
        for key, value in load_file(path).items()
    }


def everything(root: Path) -> dict[str, object]:
    """What decides a run's future and what it ends with; its log without times and memory."""
    newest = max((root / "checkpoints").glob("update-*"))
    folders = [folder for folder in (newest, root / "adapter", root / "best") if folder.exists()]
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    state = json.loads((newest / "state.json").read_text())
    state = {k: v for k, v in state.items() if k not in ("config", "seconds", "log_bytes")}
    clock = ("seconds", "at_seconds", "peak_memory_bytes")
    return {
        "files": {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files},
        "state": state,
        "log": [
            {k: v for k, v in json.loads(line).items() if k not in clock}
            for line in (root / "metrics.jsonl").read_text().splitlines()
        ],
        "pictures": {file.name: file.read_bytes() for file in sorted(root.glob("samples/*"))},
    }


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": parameter.detach().clone()
        for number in range(1, trainer.nets.loras + 1)
        for name, parameter in trainer.nets.parameters_of(number).items()
    }


class Harmed:
    """A reward whose scores something was done to."""

    def __init__(self, part, harm) -> None:
        self.part, self.harm, self.name = part, harm, part.name

    def __call__(self, images, prompts):
        return self.harm(self.part(images, prompts))


def rows(directory: Path) -> list[dict]:
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in log if "eval_reward" not in row]


def test_a_run_writes_everything(settings):
    config = Config(**{**settings, "sample_every": 2, "tensorboard": True})
    before = random.getstate(), torch.get_rng_state()
    adapter = train(config)
    assert random.getstate() == before[0]  # the caller's own random numbers go on
    assert torch.equal(torch.get_rng_state(), before[1])
    log = rows(config.output_dir)
    assert [row["update"] for row in log] == list(range(1, 9))
    assert [row["stage"] for row in log] == [1, 1, 2, 2, 3, 3, 4, 4]
    info = json.loads((adapter / "adapter.json").read_text())
    assert info["timesteps"] == [876, 751, 501, 251, 1]
    assert info["stacked"] == [1, 1, 2, 3, 4]
    samples = sorted(p.name for p in (config.output_dir / "samples").iterdir())
    assert samples == [f"update-{n:06d}.png" for n in range(0, 9, 2)]
    assert list((config.output_dir / "tensorboard").rglob("events*"))
    assert (config.output_dir / "config.yaml").exists()


def test_a_gradient_that_is_not_finite_changes_nothing(settings):
    trainer = Trainer(Config(**settings))
    trainer.update()
    trained = [p for n in range(1, 5) for p in trainer.nets.parameters_of(n).values()]
    before = [p.detach().clone() for p in trained]
    moments = [s["exp_avg"].clone() for s in trainer.optimizer.state.values()]

    (part, weight) = trainer.reward.parts[0]
    harms = {
        "reward": lambda scores: scores * float("nan"),
        "infinite reward": lambda scores: scores.detach() * float("inf") + scores,
        "gradient": lambda scores: scores + 0 * (scores - scores.detach()).sqrt(),
    }
    for what, harm in harms.items():
        trainer.reward.parts = ((Harmed(part, harm), weight),)
        _, outcome = trainer.update()
        assert outcome.skipped, what
        assert all(torch.equal(a, b) for a, b in zip(trained, before, strict=True)), what
        after = [s["exp_avg"] for s in trainer.optimizer.state.values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True)), what
    assert trainer.counters.skipped == 3
    trainer.check_progress()
    trainer.counters.skipped = MAX_SKIPPED
    with pytest.raises(UserError, match="not finite"):
        trainer.check_progress()
    trainer.reward.parts = ((part, weight),)
    assert not trainer.update()[1].skipped
    assert trainer.counters.skipped == 0


SOMETIMES = """
calls = 0

def sometimes(images, prompts):
    global calls
    calls += 1
    scores = images.mean(dim=(1, 2, 3))
    return scores * float("nan") if calls == 2 else scores
"""


def test_an_update_that_is_skipped_is_counted_and_told(settings, tmp_path: Path, capsys):
    (tmp_path / "sometimes.py").write_text(SOMETIMES)
    change = {"reward": f"{tmp_path / 'sometimes.py'}:sometimes", "updates": 4, "sample_every": 0}
    change["progress"] = True
    config = Config(**{**settings, **change})
    train(config)
    assert [row["skipped"] for row in rows(config.output_dir)] == [False, True, False, False]
    told = "update 2: reward or gradient not finite, nothing changed"
    printed = "".join(capsys.readouterr())
    assert [line for line in printed.splitlines() if "not finite" in line] == [told]


def test_out_of_memory_is_advice_or_smaller_parts_of_the_same_updates(settings, tmp_path: Path):
    whole = Config(**{**settings, "updates": 4, "output_dir": tmp_path / "whole"})
    train(whole)

    def narrow(**change) -> Trainer:
        trainer = Trainer(Config(**{**settings, "updates": 4, **change}))
        decode = trainer.family.decode

        def small_only(latents):
            if len(latents) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(latents)

        trainer.family.decode = small_only  # type: ignore[method-assign]
        return trainer

    trainer = narrow()
    before = weights_of(trainer)
    with pytest.raises(
        UserError, match=r"out of memory with 4 pictures.*--resume with --recompute"
    ):
        trainer.update()
    with pytest.raises(UserError, match="--accumulation 4"):
        trainer.update()
    assert all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())
    trainer = narrow(split_on_out_of_memory=True)
    for _ in range(4):  # one per stage
        trainer.update()
    assert trainer.splits == 4
    write_adapter(trainer)
    one = weights(whole.output_dir / "adapter")
    two = weights(trainer.config.output_dir / "adapter")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    keep(trainer, 0)  # the parts stay, so that a resume rounds sums in the same order
    saved, _ = load_latest(trainer.config.output_dir / "checkpoints")
    for split, splits in ((True, 4), (False, 1)):
        resumed = narrow(split_on_out_of_memory=split)
        restore(resumed, saved)
        assert resumed.splits == splits


def test_a_run_whose_chain_was_cut_otherwise_is_not_resumed(settings):
    config = Config(**{**settings, "updates": 1})
    train(config)
    saved, _ = load_latest(config.output_dir / "checkpoints")
    assert saved.state["cut_by"] == "time"
    restore(Trainer(config), saved)
    del saved.state["cut_by"]  # older
    restore(Trainer(config), saved)
    saved.state["cut_by"] = "span"
    with pytest.raises(UserError, match="cut into segments by span, and would now be by time"):
        restore(Trainer(config), saved)


def test_a_run_whose_jumps_ran_otherwise_is_not_resumed(settings):
    config = Config(**{**settings, "method": "jumps", "shortcut": "plain", "updates": 1})
    train(config)
    saved, _ = load_latest(config.output_dir / "checkpoints")
    restore(Trainer(config), saved)
    other = Trainer(config.model_copy(update={"shortcut": "none"}))
    with pytest.raises(UserError, match="by --shortcut plain, and would now be by --shortcut none"):
        restore(other, saved)
    restore(other, saved, allow_change=True)
    saved.state["jumps_by"] = ["file", 5.0, 0.125]  # the same file, run otherwise
    with pytest.raises(UserError, match=r"a few-step LoRA with guidance 5\.0 and scale 0\.125"):
        restore(Trainer(config), saved)
    del saved.state["jumps_by"]  # older
    restore(other, saved)


def test_what_saves_memory_is_what_a_resume_allows(settings, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("shortft.out_of_memory.devices", lambda: [SimpleNamespace(bf16=True)])
    config = Config(**settings).model_copy(update={"merge": True, "reward": "pickscore"})
    ways = savings(config)
    assert {"--recompute", "--no-merge"} < ways.keys()
    assert {"--optimizer adamw8bit", "--reward-device offload"} < ways.keys()
    told = advice(config, 2)
    for option in ways:
        free = option.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_") in FREE
        assert f"{option}{'' if free else ' --allow-change'} (" in told


def test_no_advice_is_given_that_would_not_help(settings):
    config = Config(**settings)
    assert "--accumulation 4" in savings(config)
    assert "--accumulation 4" not in savings(config, 1)  # split on the way to single pictures


def test_a_lack_of_memory_while_a_checkpoint_is_read_is_told_as_that(settings, monkeypatch):
    config = Config(**{**settings, "updates": 1})
    train(config)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("shortft.kept.set_state", full)
    with pytest.raises(UserError, match="out of memory with 4 pictures at once"):
        train(config.model_copy(update={"updates": 2}), resume=True)


def test_a_run_within_its_models_directory_goes_on(settings, tmp_path: Path):
    model = shutil.copytree(settings["model"], tmp_path / "own-model")
    options = {"model": str(model), "output_dir": model / "runs" / "train", "updates": 1}
    config = Config(**{**settings, **options})
    train(config)
    (model / "README.md").write_text("a note")
    train(config.model_copy(update={"updates": 2}), resume=True)
    (model / "scheduler" / "more.json").write_text("{}")
    with pytest.raises(UserError, match="or a local model changed"):
        train(config.model_copy(update={"updates": 3}), resume=True)


def test_a_run_goes_on_with_another_optimizer(settings):
    """From the same weights, with moments that start anew."""
    config = Config(**{**settings, "updates": 1, "sample_every": 0})
    train(config)
    other = config.model_copy(update={"optimizer": "adamw8bit", "updates": 2})
    with pytest.raises(UserError, match="--optimizer adamw8bit: the run to resume has adamw;"):
        train(other, resume=True)
    saved, _ = load_latest(config.output_dir / "checkpoints")
    trainer = Trainer(other)
    restore(trainer, saved, allow_change=True)
    for number in trainer.numbers:
        state = trainer.nets.state_of(number)
        assert all(torch.equal(state[k], v) for k, v in saved.tensors[f"lora_{number}"].items())
        assert saved.tensors[f"optimizer_{number}"]
    assert not trainer.optimizer.state
    train(other, resume=True, allow_change=True)
    train(config.model_copy(update={"updates": 3}), resume=True, allow_change=True)
    log = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    assert sum("grad_norm" in line for line in log) == 3


def test_a_changed_setting_is_shown_and_needs_leave(settings):
    config = Config(**{**settings, "updates": 4})
    train(config)
    other = config.model_copy(update={"learning_rate": 5e-3, "updates": 6})
    with pytest.raises(
        UserError, match=r"--learning-rate 0.005: the run to resume has 0.01.*--allow"
    ):
        train(other, resume=True)
    train(other, resume=True, allow_change=True)
    assert [row["update"] for row in rows(config.output_dir)] == [1, 2, 3, 4, 5, 6]
    wider = other.model_copy(update={"rank": 3})
    with pytest.raises(UserError, match="--rank 3"):
        train(wider, resume=True, allow_change=True)


def test_a_disk_without_room_is_told_before_the_run(settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    said = r"--output-dir .* free, but the run's checkpoints and adapters take"
    with pytest.raises(UserError, match=said):
        train(Config(**settings))


def test_a_failing_reward_keeps_what_was_done_and_the_traceback(settings):
    config = Config(**{**settings, "checkpoint_every": 0, "sample_every": 0})
    import shortft.step

    original, calls = shortft.step.judge, [0]

    def fails_later(reward, images, prompts, *, seconds):
        calls[0] += 1
        if calls[0] > 3:
            reward.parts = ((Harmed(reward.parts[0][0], lambda scores: scores[7]), 1.0),)
        return original(reward, images, prompts, seconds=seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortft.step, "judge", fails_later)
        with pytest.raises(UserError, match="--reward symmetry: raised IndexError"):
            train(config)
    assert "IndexError" in (config.output_dir / "error.txt").read_text()
    train(config, resume=True)
    assert [row["update"] for row in rows(config.output_dir)] == list(range(1, 9))


def test_noise_and_prompts_do_not_depend_on_the_split(settings):
    whole = Trainer(Config(**settings)).batches(3)
    split = Trainer(Config(**{**settings, "accumulation": 2})).batches(3)
    assert whole[0].prompts == [p for b in split for p in b.prompts]
    assert whole[0].seeds == [s for b in split for s in b.seeds]
    assert len(set(whole[0].seeds)) == 4


def test_every_prompt_once_per_epoch(settings):
    trainer = Trainer(Config(**settings))
    seen = [p for update in range(3) for b in trainer.batches(update) for p in b.prompts]
    assert all(sorted(seen[i : i + 3]) == sorted(trainer.prompts) for i in range(0, 12, 3))


def test_bf16_trains(settings):
    config = Config(**{**settings, "precision": "bf16", "updates": 4, "sample_every": 0})
    adapter = train(config)
    assert all(value.dtype == torch.float32 for value in weights(adapter).values())
    assert all(row["grad_norm"] > 0 for row in rows(config.output_dir))


def test_stage_shares_decide_when_stages_end(settings):
    config = Config(**{**settings, "stage_shares": (0.5, 0.25, 0.25, 0.0)})
    assert stage_bounds(config.stage_shares, 4) == [0.5, 0.75, 1.0, 1.0]
    train(config)
    assert [row["stage"] for row in rows(config.output_dir)] == [1] * 4 + [2] * 2 + [3] * 2


def test_mistakes_are_told_before_anything_is_written(settings, tmp_path: Path):
    for change, message in (
        ({"segments": 7, "num_steps": 7}, "segments"),
        ({"shortcut": "auto"}, "shortcut"),
        ({"model": str(tmp_path)}, "model"),
    ):
        with pytest.raises(UserError, match=message):
            train(Config(**{**settings, **change}))
        assert not (tmp_path / "run").exists()


def test_an_existing_run_is_neither_overwritten_nor_changed(settings):
    config = Config(**{**settings, "updates": 2, "sample_every": 0})
    train(config)
    with pytest.raises(UserError, match="--resume"):
        train(config)
    with pytest.raises(UserError, match="--rank 3"):
        train(config.model_copy(update={"rank": 3}), resume=True)
    with pytest.raises(UserError, match="no usable checkpoint"):
        train(config.model_copy(update={"output_dir": config.output_dir / "no"}), resume=True)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "shortft"])
def test_every_method_trains_one_lora_that_acts_at_every_step(settings, method: str):
    config = Config(**{**settings, "method": method, "updates": 2, "sample_every": 0})
    trainer = Trainer(config)
    start = {name: p.detach().clone() for name, p in trainer.nets.parameters_of(1).items()}
    base = [p.detach().clone() for p in trainer.family.denoiser.parameters()]
    for _ in range(2):
        stage, outcome = trainer.update()
        assert stage == 1
        assert not outcome.skipped
        assert outcome.grad_norm > 0
    moved = trainer.nets.parameters_of(1)
    assert any(not torch.equal(moved[name], value) for name, value in start.items())
    now = trainer.family.denoiser.parameters()
    assert all(torch.equal(a, b) for a, b in zip(base, now, strict=True))
    info = json.loads((write_adapter(trainer) / "adapter.json").read_text())
    few = method == "tune_shortcut"
    assert (info["loras"], info["placement"]) == (1, "few_step" if few else "everywhere")
    assert len(info["timesteps"]) == (4 if few else 8)
    if method == "leapalign":
        # Random plans are functions of (seed, update): the same for a second process or a resume.
        assert trainer.plan(3, 1) == Trainer(config).plan(3, 1)


def test_a_tuned_shortcut_is_sampled_by_its_own_chain_or_the_bases(settings):
    out = settings["output_dir"]
    config = Config(**{**settings, "method": "tune_shortcut", "sample_every": 0})
    adapter = train(config)
    trainer = Trainer(config)
    load_into(trainer.nets, adapter)
    prompts, own = trainer.pictures()
    seeds = [sample_seed(config.seed, 3, i) for i in range(len(prompts))]

    def drawn(**options: bool) -> tuple[int, torch.Tensor]:
        sampler = load_tuned(trainer.family, adapter, None, None, **options)
        return sampler.plan.calls, sampler.draw(prompts, seeds)

    calls, again = drawn()
    assert calls == 4
    torch.testing.assert_close(again, own)
    calls, plain = drawn(plain_chain=True)
    assert calls == 8
    assert (plain - own).abs().max() > 1e-2
    with pytest.raises(UserError, match="--shortcut none: --method tune_shortcut tunes"):
        Config(**{**settings, "method": "tune_shortcut", "shortcut": "none"})
    moved = json.loads((out / "adapter" / "adapter.json").read_text())
    moved["config"]["shortcut"] = "gone.safetensors"
    (out / "adapter" / "adapter.json").write_text(json.dumps(moved))
    with pytest.raises(UserError, match=r"gone.safetensors: no such file"):
        drawn()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_trains(settings, variant: str):
    change = variant_settings(variant, 4)
    if "k" in (change.get("method_options") or {}):
        assert variant == "draft_5"
    config = Config(**{**settings, **change, "updates": 1, "sample_every": 0})
    outcome = Trainer(config).update()[1]
    assert outcome.grad_norm > 0
    assert not outcome.skipped


def test_options_that_do_not_fit_the_chain_are_told_before_the_run(settings):
    config = Config(**{**settings, "method": "draft_k", "method_options": {"k": 9}})
    with pytest.raises(UserError, match="--method draft_k, --num-steps 8: k = 9"):
        Trainer(config)


def test_pictures_are_scored_a_micro_batch_at_a_time(settings):
    trainer = Trainer(Config(**{**settings, "accumulation": 2}))
    [(part, weight)] = trainer.reward.parts
    sizes: list[int] = []

    def seen(scores: torch.Tensor) -> torch.Tensor:
        sizes.append(len(scores))
        return scores

    images, prompts = torch.rand(5, 3, 16, 16), ["red apple"] * 5
    trainer.reward.parts = ((Harmed(part, seen), weight),)
    mean = trainer.score(trainer.reward, images, prompts)
    assert sizes == [2, 2, 1]
    assert mean == pytest.approx(float(weight * part(images, prompts).mean()), rel=1e-5)


def test_recomputation_and_accumulation_hold_for_re_noised_copies(settings, tmp_path: Path):
    found = []
    for change in ({}, {"recompute": True}, {"accumulation": 2}):
        out = {"output_dir": tmp_path / str(len(found)), "method": "draft_lv", "updates": 2}
        train(Config(**{**settings, **out, **change, "sample_every": 0}))
        found.append(weights(tmp_path / str(len(found)) / "adapter"))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_pictures_at_equal_parts_of_the_budget_from_other_prompts(settings, tmp_path: Path):
    shown = tmp_path / "shown.txt"
    shown.write_text("guitar\n")
    looks = {"sample_every": 0, "sample_times": 2, "sample_from": shown, "sample_prompts": 1}
    config = Config(**{**settings, **looks})
    train(config)
    log = [json.loads(row) for row in (config.output_dir / "metrics.jsonl").open()]
    seen = [(r["update"], r["at_seconds"] > 0) for r in log if "eval_reward" in r]
    assert seen == [(0, False), (4, True), (8, True)]


def test_a_resumed_run_has_the_minutes_that_are_left(settings, monkeypatch: pytest.MonkeyPatch):
    """Every update takes half of them."""
    monkeypatch.setitem(CLOCKS, "wall", itertools.count(0, 60).__next__)
    change = {"updates": None, "minutes": 2, "num_steps": 4, "batch_size": 1}
    config = Config(**{**settings, **change})
    trainer = Trainer(config)
    trainer.update()
    keep(trainer, 0)
    saved, _ = load_latest(config.output_dir / "checkpoints")
    resumed = Trainer(config)
    restore(resumed, saved)
    assert (trainer.spent(), resumed.spent()) == (0.5, 0.5)
    assert resumed.update()[0] == 3  # of four stages
    assert resumed.spent() == 1
    assert resumed.counters.seconds == 120


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_only_the_wall_clock_counts_waiting(settings, clock: str):
    trainer = Trainer(Config(**{**settings, "clock": clock, "sample_every": 0}))
    began = time.process_time()
    trainer.update(commit=lambda: time.sleep(1))
    worked = time.process_time() - began
    assert (trainer.counters.seconds > worked) == (clock == "wall")
    assert trainer.counters.seconds > 0


def test_the_learning_rate_falls_at_the_end(settings):
    trainer = Trainer(Config(**{**settings, "learning_rate_decay": 0.5, "sample_every": 0}))
    rates = []
    for _ in range(8):
        trainer.update()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2] * 5 + [0.75e-2, 0.5e-2, 0.25e-2])


def test_reward_models_in_half_precision_where_they_are_told(settings):
    """On this machine the device is the only one."""
    settings |= {"reward": "clip", "reward_precision": "bf16", "reward_device": "cpu"}
    trainer = Trainer(Config(**settings))
    weights = trainer.reward.parts[0][0].model.parameters()
    assert {(p.dtype, p.device.type) for p in weights} == {(torch.bfloat16, "cpu")}
    assert trainer.reward.device == "cpu"
    _, outcome = trainer.update()
    assert not outcome.skipped

"""sample, evaluate, plan and demo on tiny runs: what they write, and how they fail."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from shortft import sampling
from shortft.cli import main
from shortft.config import Config
from shortft.families.pipeline import PipelineFamily, UNetFamily
from shortft.rewards.places import with_inherited
from shortft.train import train
from tiny import save_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a list of prompts and an adapter trained for 8 steps."""
    root = tmp_path_factory.mktemp("run")
    save_tiny(root / "model")
    (root / "prompts.txt").write_text("red apple\npanda face\n")
    train(
        Config(
            model=str(root / "model"),
            prompts=root / "prompts.txt",
            shortcut="none",
            reward="symmetry",
            num_steps=8,
            rank=2,
            batch_size=2,
            updates=4,
            learning_rate=1e-2,
            sample_every=0,
            progress=False,
            tensorboard=False,
            output_dir=root / "train",
        )
    )
    return root


def test_a_local_base_model_is_never_taken_for_one_of_the_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "train" / "adapter", adapter)
    info = json.loads((adapter / "adapter.json").read_text())
    info["base_model"], info["local"] = "runs/merged", ["runs/merged"]
    (adapter / "adapter.json").write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--adapter", str(adapter), "--prompt", "x", "--num-steps", "4"]
    assert main(command) == 2
    assert "base model runs/merged is not here; give --model" in capsys.readouterr().err
    shutil.copytree(run / "model", tmp_path / "runs" / "merged")
    assert main(command) == 0


def test_models_of_rewards_are_the_adapters_where_the_rewards_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """What nothing needs is not looked for, and the emoji's scorer on other models is told."""
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "train" / "adapter", adapter)
    info = json.loads((adapter / "adapter.json").read_text())
    info["config"] |= {"reward": "clip", "reward_model": f"{tmp_path}/gone"}
    (adapter / "adapter.json").write_text(json.dumps(info))
    command = ["evaluate", "--adapter", str(adapter), "--prompts", str(run / "prompts.txt")]
    command += ["--seeds", "2", "--num-steps", "4", "--output-dir", str(tmp_path / "out")]
    assert main(command) == 2
    assert f"{tmp_path}/gone" in capsys.readouterr().err
    assert main([*command, "--reward", "symmetry"]) == 0
    assert "nothing but emoji" not in capsys.readouterr().out
    assert main([*command, "--reward", "clip"]) == 0
    assert "nothing but emoji" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("given", "inherited", "expected"),
    [
        (None, None, None),
        ("pickscore=a/b", None, "pickscore=a/b"),
        (None, "c/d", "c/d"),
        (None, "hpsv2=c/d,clip=e/f", "e/f"),
        ("pickscore=a/b", "pickscore=x/y,clip=e/f", "pickscore=a/b,clip=e/f"),
        ("clip=a/b", "c/d", "clip=a/b"),
        ("pickscore=a/b", "hpsv2=c/d", "pickscore=a/b"),
    ],
)
def test_given_places_go_before_inherited_ones(given, inherited, expected):
    assert with_inherited(given, {"clip", "pickscore"}, inherited) == expected


def test_prompts_may_come_from_a_pipe(run: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        pool.submit((tmp_path / "pipe").write_text, "red apple\npanda face\n")
        options = ["--model", str(run / "model"), "--prompts", str(tmp_path / "pipe")]
        options += ["--num-steps", "4", "--output-dir", str(tmp_path / "out")]
        assert main(["sample", *options]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_what_is_not_given_is_the_adapters_own(run: Path, tmp_path: Path):
    """Base model, reward and held-out scorer, of `sample` and `evaluate`."""
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "train" / "adapter", adapter)
    info = json.loads((adapter / "adapter.json").read_text())
    info["config"]["held_out"] = "compressibility"
    (adapter / "adapter.json").write_text(json.dumps(info))
    plain = ["--adapter", str(adapter), "--prompts", str(run / "prompts.txt")]
    told = []
    given = ["--model", str(run / "model"), "--reward", "symmetry", "--held-out", "compressibility"]
    for more in ([], given):
        command = ["evaluate", *plain, "--seeds", "2", "--output-dir", str(tmp_path / "e"), *more]
        assert main(command) == 0
        told.append(json.loads((tmp_path / "e" / "evaluation.json").read_text()))
    assert told[0] == told[1]
    assert told[0]["reward"]["name"] == "symmetry"
    for name, more in (("a", []), ("b", given[:2])):
        assert main(["sample", *plain, "--output-dir", str(tmp_path / name), *more]) == 0
    for own, same in zip(*(sorted((tmp_path / n).iterdir()) for n in "ab"), strict=True):
        assert own.read_bytes() == same.read_bytes()


def test_sample(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--model", str(run / "model"), "--prompts", str(run / "prompts.txt")]
    adapter = ["--adapter", str(run / "train" / "adapter")]
    assert main(["sample", *options, "--num-steps", "8", "--output-dir", str(tmp_path / "a")]) == 0
    # Without --num-steps an adapter's own number is taken.
    assert main(["sample", *options, *adapter, "--output-dir", str(tmp_path / "b")]) == 0
    base, tuned = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert [p.name for p in base] == ["0000_red-apple_seed0.png", "0001_panda-face_seed1.png"]
    assert [p.name for p in tuned] == [p.name for p in base]
    with Image.open(tuned[0]) as picture:
        assert picture.size == (16, 16)
        assert picture.text["prompt"] == "red apple"  # type: ignore[attr-defined]
    # Strength 0 is the base.
    zero = tmp_path / "c"
    steps = ["--strength", "0", "--output-dir", str(zero)]
    assert main(["sample", *options, *adapter, *steps, "--guidance-scale", "7.5"]) == 0
    assert [p.read_bytes() for p in sorted(zero.iterdir())] == [p.read_bytes() for p in base]


def test_pictures_are_kept_as_they_are_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    prompts = ["red apple", "panda face", "rocket"]
    options = ["--model", str(run / "model"), "--num-steps", "2", "--seed", "5"]
    for prompt in prompts:
        options += ["--prompt", prompt]
    assert main(["sample", *options, "--output-dir", str(tmp_path / "all")]) == 0
    whole = sorted((tmp_path / "all").iterdir())
    options += ["--batch-size", "1"]
    assert main(["sample", *options, "--output-dir", str(tmp_path / "each")]) == 0
    each = sorted((tmp_path / "each").iterdir())
    assert [p.name for p in each] == [p.name for p in whole]
    decode = PipelineFamily.decode
    left = [None, None]

    def run_out(self: Any, latents: Tensor) -> Tensor:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        return decode(self, latents)

    monkeypatch.setattr(PipelineFamily, "decode", run_out)
    assert main(["sample", *options, "--output-dir", str(tmp_path / "cut")]) == 2
    assert "No space left on device; mend it" in capsys.readouterr().err
    cut = sorted((tmp_path / "cut").iterdir())
    assert [(p.name, p.read_bytes()) for p in cut] == [(p.name, p.read_bytes()) for p in each[:2]]


def test_evaluate(run: Path, tmp_path: Path):
    code = main(
        [
            "evaluate",
            "--model",
            str(run / "model"),
            "--adapter",
            str(run / "train" / "adapter"),
            "--prompts",
            str(run / "prompts.txt"),
            "--reward",
            "symmetry",
            "--seeds",
            "2",
            "--output-dir",
            str(tmp_path),
        ]
    )
    assert code == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["prompts"] == 2
    assert figures["num_steps"] == 8
    reward, report = figures["reward"], figures["reports"]["symmetry"]
    assert reward["before"] == pytest.approx(-report["before"], rel=1e-4)
    low, high = reward["change_interval"]
    assert low <= reward["after"] - reward["before"] <= high
    assert (tmp_path / "before_after.png").exists()


@pytest.mark.parametrize("command", ["sample", "evaluate", "check", "export", "shortcut"])
def test_few_pictures_at_once_and_no_text_encoders(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    """What networks and decoder are given, while no text encoder is left in memory."""
    decoded, predicted, formats = [], [], set()
    encoders: list[weakref.ref[Any]] = []
    decode, predict, ahead = PipelineFamily.decode, UNetFamily.predict, PipelineFamily.encode_ahead

    def count_decoded(self: Any, latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        formats.add(self.dtype)
        if len(decoded) == 1:
            gc.collect()
        assert encoders
        assert all(encoder() is None for encoder in encoders)
        return decode(self, latents)

    def count_predicted(self: Any, net: Any, latents: Tensor, *rest: Any) -> Tensor:
        predicted.append(len(latents))
        return predict(self, net, latents, *rest)

    def watch(self: Any, prompts: Any) -> None:
        encoders.append(weakref.ref(self._text.text_encoder))
        ahead(self, prompts)

    monkeypatch.setattr(PipelineFamily, "decode", count_decoded)
    monkeypatch.setattr(UNetFamily, "predict", count_predicted)
    monkeypatch.setattr(PipelineFamily, "encode_ahead", watch)
    monkeypatch.setattr(sampling, "DECODED_AT_ONCE", 2 * 16 * 16)
    (tmp_path / "prompts.txt").write_text("".join(f"{i} apples\n" for i in range(24)))
    options = ["--model", str(run / "model"), "--prompts", str(tmp_path / "prompts.txt")]
    options += ["--precision", "bf16", "--batch-size", "3"]
    if command == "check":
        lora = run / "train" / "adapter" / "lora_1.safetensors"
        options += ["--shortcut", str(lora), "--num-prompts", "4", "--num-steps", "8"]
    elif command == "shortcut":
        options += ["--output", str(tmp_path / "s.safetensors"), "--minutes", "0.03"]
        options += ["--trajectories", "8", "--rank", "2", "--num-steps", "8"]
    else:
        options += ["--adapter", str(run / "train" / "adapter")]
        options += ["--output-dir", str(tmp_path / "out")]
    if command == "evaluate":
        options += ["--reward", "symmetry", "--seeds", "2", "--num-prompts", "3"]
    if command == "export":
        options += ["--num-prompts", "3"]
    assert main([command, *options]) in ((0, 1) if command == "check" else (0,))
    assert max(decoded) == 2
    assert max(predicted) == (6 if command == "shortcut" else 3)  # its chains carry no gradient
    assert formats == {torch.bfloat16}


def test_plan(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    png = tmp_path / "plan.png"
    options = ["--model", str(run / "model"), "--prompts", str(run / "prompts.txt")]
    options += ["--shortcut", "none", "--reward", "symmetry", "--rank", "2"]
    assert main(["plan", *options, "--png", str(png)]) == 0
    told = capsys.readouterr().out
    for calls, gradient in ((18, 7), (29, 5), (39, 3), (50, 1)):
        assert f"{calls} network calls, {gradient} with gradient" in told
    with Image.open(png) as picture:
        assert picture.width > 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--prompt", "x", "--adapter", "{run}/model"], "adapter.json"),
        (["sample", "--prompt", "x", "--adapter", "{run}/train/adapter", "--num-steps", "3"], "3"),
        (
            ["sample", "--prompt", "x", "--model", "emoji", "--adapter", "{run}/train/adapter"],
            "does not fit emoji",
        ),
        (
            ["sample", "--prompt", "x", "--adapter", "{tmp}/moved"],
            "model {tmp}/gone is not here",
        ),
        (
            ["evaluate", "--adapter", "{tmp}/moved", "--reward", "clip"],
            "here; give --model",
        ),
        (["evaluate", "--adapter", "{tmp}/moved"], "code runs only where it is named"),
        (
            [
                "plan",
                "--model",
                "{run}/model",
                "--shortcut",
                "none",
                "--num-steps",
                "8",
                "--reward",
                "{tmp}/own.py:f",
                "--output-dir",
                "{tmp}/planned",
            ],
            "own.py:f: raised KeyError: 'mood'",
        ),
        (["check", "--segments", "60"], "--segments 60"),
        (["shortcut", "--segments", "60", "--output", "{tmp}/s.safetensors"], "--segments 60"),
        (["shortcut", "--output", "{run}/prompts.txt/s.safetensors"], "--output"),
        (["plan", "--png", "{run}/prompts.txt/p.png"], "--png"),
        (["check", "--output", "{run}/prompts.txt/c.json"], "--output"),
        (["sample", "--prompt", "x", "--model", "{sdxl}"], "StableDiffusionXLPipeline"),
        (["demo", "--output-dir", "{run}/train"], "no demo"),
        (["demo", "--reward", "nonsense", "--output-dir", "{tmp}/demo"], "nonsense"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, arguments, message):
    other = tmp_path / "sdxl"
    other.mkdir()
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1"}
    (other / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "own.py").write_text("def f(images, prompts):\n    raise KeyError('mood')\n")
    shutil.copytree(run / "train" / "adapter", tmp_path / "moved")
    info = json.loads((tmp_path / "moved" / "adapter.json").read_text())
    info["base_model"], info["config"]["reward"] = f"{tmp_path}/gone", "own.py:f"
    (tmp_path / "moved" / "adapter.json").write_text(json.dumps(info))
    filled = [a.format(run=run, tmp=tmp_path, sdxl=other) for a in arguments]
    assert main(filled) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert "\n" not in told
    assert message.replace("{tmp}", str(tmp_path)) in told
    assert (run / "train" / "adapter" / "adapter.json").exists()


def test_a_demo_clears_only_an_earlier_demo(tmp_path: Path):
    from shortft.demo import MARKER, clear_earlier_demo
    from shortft.errors import UserError

    folder = tmp_path / "demo"
    clear_earlier_demo(folder)
    assert (folder / MARKER).exists()
    (folder / "checkpoints").mkdir()
    (folder / "mine.txt").write_text("keep")
    clear_earlier_demo(folder)
    assert sorted(p.name for p in folder.iterdir()) == [MARKER, "mine.txt"]
    real = tmp_path / "real"
    (real / "checkpoints").mkdir(parents=True)
    (real / "config.yaml").touch()
    with pytest.raises(UserError, match="no demo"):
        clear_earlier_demo(real)
    assert (real / "checkpoints").exists()

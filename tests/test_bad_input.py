"""Wrong and damaged input: one clear line, exit code 2, before slow work, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortft.evaluate
import shortft.export
import shortft.families
import shortft.trainer
from shortft.adapter import AdapterInfo, lora_file, save_adapter
from shortft.cli import main
from shortft.config import load_config
from shortft.errors import UserError
from shortft.families.base import Guidance
from shortft.inputs import read_prompts
from shortft.networks import SHORTCUT, ModelNetworks, add_lora, lora_state, view
from shortft.preflight.dry_run import dry_run
from test_lora_files import FAMILIES
from tiny import tiny_family

Told = Callable[..., str]


@pytest.fixture
def told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Told:
    """Runs a command that must fail; its one line, and nothing else on either stream."""
    # Libraries log to what was standard error when they were imported: let them write to this one.
    for library in ("diffusers", "transformers", "huggingface_hub"):
        for handler in logging.getLogger(library).handlers:
            if type(handler) is logging.StreamHandler:  # not one of pytest
                monkeypatch.setattr(handler, "stream", sys.stderr)

    def run(*arguments: object) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        shown = capfd.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        assert len(shown.err.replace(str(tmp_path), "")) < 600
        return shown.err

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is the first slow step: here it is a failure."""

    def loads(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded before the mistake was told")

    modules = (shortft.families, shortft.trainer, shortft.export, shortft.evaluate)
    for module in modules:
        monkeypatch.setattr(module, "load_family", loads)


def adapter_of(family: Any, folder: Path, base_model: str = "tiny") -> Path:
    nets = ModelNetworks(family, guidance=Guidance(), loras=1, rank=2)
    config = {"reward": "symmetry"}
    info = AdapterInfo(base_model, 1, 2, 4, "shared", 8, [1], [1], 1.0, config)
    save_adapter(nets, info, folder)
    return folder


def lora_of(family: Any, path: Path) -> Path:
    """A few-step LoRA of a family."""
    module = view(family.denoiser)
    generator = torch.Generator().manual_seed(0)
    add_lora(module, SHORTCUT, rank=2, targets=family.shortcut_targets, generator=generator)
    family.save_lora(lora_state(module, SHORTCUT), path)
    return path


def train(model: object, out: Path, *options: object) -> tuple[object, ...]:
    given = (
        "--model",
        model,
        "--reward",
        "symmetry",
        "--num-steps",
        8,
        "--rank",
        2,
        "--updates",
        1,
    )
    return ("train", *given, "--no-progress", "--output-dir", out, *options)


# Prompt files


PROMPT_FILES = {
    "empty": (b"", "holds no prompt; write one prompt a line"),
    "comments only": ("\ufeff# one\r\n\r\n#two".encode(), "holds no prompt"),
    "10 MB in one line": (b"x" * 10_000_000, "line 1 has 10,000,000 characters; shorten it"),
    "invalid UTF-8": (b"red apple\ncaf\xe9\n", "not UTF-8 text (byte 13); save the file as UTF-8"),
    "UTF-16": ("red apple\n".encode("utf-16"), "not UTF-8 text (byte 0)"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "not UTF-8 text (byte 0)"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files(name: str, told: Told, tmp_path: Path):
    content, message = PROMPT_FILES[name]
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    out = tmp_path / "run"
    for command in (
        train("emoji", out, "--prompts", path),
        train("emoji", out, "--sample-from", path),
        ("sample", "--prompts", path, "--output-dir", out),
        ("shortcut", "--prompts", path, "--output", out / "s.safetensors"),
        ("check", "--prompts", path),
    ):
        assert f"{path}: {message}" in told(*command)
    assert told(*train("emoji", out, "--prompts", tmp_path)).count("cannot be read") == 1
    assert not out.exists()


def test_byte_order_mark_and_windows_lines_simply_work(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffred apple\r\npanda fäce\r\n\r\n".encode())
    assert read_prompts(path) == ["red apple", "panda fäce"]


# Models


def test_models_that_are_damaged_or_of_another_kind(told: Told, model: Path, tmp_path: Path):
    out = tmp_path / "run"
    cut = shutil.copytree(model, tmp_path / "cut")
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"--model {cut}: " in told(*train(cut, out, "--shortcut", "none"))
    gone = shutil.copytree(model, tmp_path / "gone")
    shutil.rmtree(gone / "unet")
    assert f"--model {gone}: " in told(*train(gone, out, "--shortcut", "none"))
    pickle = shutil.copytree(model, tmp_path / "pickle")
    weights = pickle / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert f"--model {pickle}: " in told(*train(pickle, out, "--shortcut", "none"))
    lying = shutil.copytree(model, tmp_path / "lying")
    index = json.loads((lying / "model_index.json").read_text())
    for name, message in (
        ("StableDiffusion3Pipeline", "(the scheduler DDIMScheduler is not supported)"),
        ("KandinskyPipeline", "is a KandinskyPipeline; supported are"),
    ):
        (lying / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        assert message in told(*train(lying, out, "--shortcut", "none"))
    for text in ("[]", "null", "3"):
        (lying / "model_index.json").write_text(text)
        assert f"--model {lying}: no model there" in told(*train(lying, out, "--shortcut", "none"))
    (lying / "model_index.json").write_text(json.dumps(index))
    scheduler = lying / "scheduler" / "scheduler_config.json"
    betas = {**json.loads(scheduler.read_text()), "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(betas))
    message = told(*train(lying, out, "--shortcut", "none"))
    assert f"--model {lying}: its DDIMScheduler cannot be used (schedulers with resc" in message
    with pytest.raises(UserError, match=f"--model {lying}, .*: schedulers with rescaled"):
        dry_run(load_config(None, {"model": str(lying), "shortcut": "none"}))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"--model {empty}: no model there" in told(*train(empty, out, "--shortcut", "none"))
    assert not out.exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("size", ["100", "63", "-8", "0", "64.5", "big"])
def test_image_sizes(size: str, told: Told, tmp_path: Path):
    message = told(*train("emoji", tmp_path / "run", "--resolution", size))
    assert message.startswith(f"error: --resolution {size}: must be ")
    assert "a multiple of 8" in message


@pytest.mark.usefixtures("no_model")
def test_places_that_cannot_be_written(told: Told, tmp_path: Path, monkeypatch):
    for command in (("plan", "--png"), ("check", "--output"), ("shortcut", "--output")):
        assert f"{command[1]} {tmp_path}: is a directory; name a file" in told(*command, tmp_path)
    seed = 2**63
    assert "'--seed'" in told("sample", "--prompt", "x", "--seed", seed)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "runs/x.png")

    monkeypatch.setattr("shortft.sampling.sample", full)
    assert "runs/x.png: No space left on device; mend it" in told("sample", "--prompt", "x")

    def nameless(code: int) -> Callable[..., None]:
        def fail(*args: object, **options: object) -> None:
            raise OSError(code, os.strerror(code))

        return fail

    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        monkeypatch.setattr("shortft.sampling.sample", nameless(code))
        assert f"{os.strerror(code)}; mend it" in told("sample", "--prompt", "x")
    monkeypatch.setattr("shortft.sampling.sample", nameless(errno.EBADF))
    with pytest.raises(OSError, match="Bad file"):
        main(["sample", "--prompt", "x"])

    def large(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr("shortft.sampling.sample", large)
    assert "out of memory; a smaller --batch-size" in told("sample", "--prompt", "x")
    monkeypatch.setattr("shortft.demo.demo", large)  # which has no such options
    assert "out of memory; end what else runs here" in told("demo")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("sample", "--output-dir"),
        ("evaluate", "--output-dir"),
        ("export", "--output-dir"),
        ("check", "--output"),
        ("shortcut", "--output"),
        ("plan", "--png"),
    ],
)
def test_a_folder_that_cannot_be_made_is_told_first(
    command: str, option: str, told: Told, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    place = Path("/proc/out")  # where nobody can
    options = ["--prompt", "x"] if command == "sample" else []
    if command in ("evaluate", "export"):
        options = ["--adapter", str(adapter_of(tiny_family(), tmp_path / "adapter"))]
        options += ["--model", "emoji"]
    given = place if option == "--output-dir" else place / "file.png"
    message = told(command, *options, option, given)
    assert message.startswith(f"error: {option} {place}: cannot be written (")


def test_a_full_disk_is_told_first(told: Told, small_disk: Path, no_model: None):
    with contextlib.suppress(OSError):
        (small_disk / "large").write_bytes(bytes(2**19))
    message = told("sample", "--prompt", "x", "--output-dir", small_disk)
    assert "cannot be written (No space left on device)" in message
    assert [file.name for file in small_disk.iterdir()] == ["large"]


# LoRAs


@pytest.mark.parametrize("other", ["sdxl", "sd3", "flux", "flux2"])
def test_loras_of_another_family(other: str, told: Told, model: Path, tmp_path: Path):
    """As a shortcut, and as an adapter in every command that takes one."""
    family, out = FAMILIES[other](), tmp_path / "out"
    path = lora_of(family, tmp_path / "other.safetensors")
    message = told(*train(model, out, "--shortcut", path))
    assert f"{path}: cannot be loaded as a LoRA of {model}" in message
    assert "check that it was made for this architecture" in message
    adapter = adapter_of(family, tmp_path / "adapter")
    for command in (
        ("sample", "--prompt", "x", "--num-steps", 8),
        ("evaluate", "--reward", "symmetry"),
        ("export", "--no-measure"),
    ):
        options = ("--model", model, "--adapter", adapter, "--output-dir", out)
        assert f"{adapter / lora_file(1)}: does not fit {model}" in told(*command, *options)
    assert not out.exists() or not any(out.rglob("*.*"))


def test_a_lora_of_another_width(told: Told, model: Path, tmp_path: Path):
    """The same layers, other sizes, as SD 2.x against SD 1.x."""
    family = tiny_family()
    path = lora_of(family, tmp_path / "wide.safetensors")
    wide = {
        key: torch.zeros(len(value), value.shape[1] + 8, *value.shape[2:])
        if "attn2.to_k" in key and "lora_A" in key
        else value
        for key, value in load_file(path).items()
    }
    save_file(wide, path)
    message = told(*train(model, tmp_path / "run", "--shortcut", path))
    assert f"{path}: cannot be loaded as a LoRA of {model}" in message


DAMAGE = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "header only": lambda data: data[:200],
    "a web page": lambda data: b"<html>404</html>" * 20,
    "longer": lambda data: data + b"x",
    "a pickle": lambda data: b"\x80\x02}q\x00." * 9,
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_loras_are_told_before_the_model_is_loaded(name: str, told: Told, tmp_path: Path):
    family, out = tiny_family(), tmp_path / "out"
    adapter = adapter_of(family, tmp_path / "adapter")
    path = lora_of(family, tmp_path / "shortcut.safetensors")
    for file in (path, adapter / lora_file(1)):
        file.write_bytes(DAMAGE[name](file.read_bytes()))
    for command in (train("emoji", out, "--shortcut", path), ("check", "--shortcut", path)):
        message = told(*command)
        assert f"--shortcut {path}: " in message
        assert "give a LoRA's .safetensors file" in message
    for arguments in (
        ("sample", "--prompt", "x"),
        ("evaluate", "--reward", "symmetry"),
        ("export", "--no-measure"),
    ):
        message = told(*arguments, "--adapter", adapter, "--output-dir", out)
        assert f"{adapter / lora_file(1)}: " in message
    assert not out.exists()


# Rewards


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reward", "hpsv2", "--reward-model", "hpsv2=gone.pt"), "hpsv2=gone.pt: no such model"),
        (
            ("--reward", "aesthetic", "--reward-model", "aesthetic={tmp}"),
            "holds no aesthetic-model",
        ),
        (("--reward", "gone.py:f"), "--reward gone.py:f: no such file"),
        (("--reward", "clip", "--reward-model", "{tmp}/gone"), "gone: no such model"),
        (("--held-out", "clpi"), "did you mean clip?"),
    ],
)
def test_missing_reward_files(options, message: str, told: Told, tmp_path: Path):
    filled = [option.format(tmp=tmp_path) for option in options]
    assert message in told(*train("emoji", tmp_path / "run", *filled))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_cannot_be_read_leaves_an_earlier_run_alone(
    told: Told, model: Path, tmp_path: Path
):
    out = tmp_path / "run"
    assert main([str(a) for a in train(model, out, "--shortcut", "none")]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    file = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"a": torch.ones(1)}, file)
    options = ("--reward-model", f"hpsv2={file}", "--held-out", "hpsv2", "--resume")
    command = train(model, out, "--shortcut", "none", *options, "--updates", 2, "--allow-change")
    assert "not open_clip's ViT-H-14" in told(*command)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


class Refusing(BaseHTTPRequestHandler):
    """The hub, as it answers whoever is not logged in, or wrongly."""

    def do_HEAD(self):
        codes = {"gated": "GatedRepo", "secret": "RepoNotFound"}
        code = next((code for name, code in codes.items() if name in self.path), None)
        self.send_response(401)
        self.send_header("X-Error-Code" if code else "X-Error-Message", code or "Invalid token")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_what_the_hub_refuses_is_not_called_absent(told: Told, tmp_path: Path, monkeypatch):
    """The libraries say of a gated model that it is no valid identifier."""
    token = "hf_" + "x" * 34
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    refused = {
        "owner/gated": "--model owner/gated: it is gated: accept its licence on the hub, and log",
        "owner/secret": "no model there (the hub shows none of this name: misspelt, or private",
        "owner/open": "no model there (the hub refuses this machine's token; log in again",
    }
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            place + "/{repo_id}/resolve/{revision}/{filename}",
        )
        options = ("--prompt", "x", "--output-dir", tmp_path / "s")
        for model, message in refused.items():
            said = told("sample", "--model", model, *options)
            assert message in said
            assert token not in said
        file = tmp_path / "a.safetensors"
        said = told("sample", "--model", file, "--pipeline", "owner/gated", *options)
        assert "cannot be found in owner/gated (it is gated: accept its licence" in said
        server.shutdown()


def test_a_hub_out_of_reach_is_called_that(told: Told, tmp_path: Path):
    """The tests run offline: the libraries then say that the repository lacks a file."""
    said = told("sample", "--model", "owner/name", "--prompt", "x", "--output-dir", tmp_path / "s")
    assert "--model owner/name: no model there (the hub cannot be reached" in said

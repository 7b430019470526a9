"""Which file a shortcut's name stands for, and how it runs."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError

from shortft import shortcuts
from shortft.config import Config
from shortft.errors import UserError
from shortft.families.base import Guidance
from shortft.networks import SHORTCUT, ModelNetworks
from shortft.plans import Step
from shortft.shortcuts import (
    HYPER,
    PUBLISHED,
    Shortcut,
    check_shortcut,
    find_shortcut,
    known_guidance,
)
from shortft.trainer import Trainer
from test_chain import make_shortcut
from tiny import tiny_family

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, str | None]]:
    """A hub that has every LoRA, without a JSON file; what was asked of it."""
    asked: list[tuple[str, str, str | None]] = []

    def download(repo: str, file: str, revision: str | None = None) -> str:
        asked.append((repo, file, revision))
        if file.endswith(".json"):
            raise EntryNotFoundError(f"404: {file}")
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(shortcuts, "SHA256", {})  # what is downloaded here is empty
    return asked


AS_PUBLISHED = {  # (guidance, scale of the LoRA) by their authors' model cards; docs/shortcuts.md
    r"hyper-(sd15|sdxl)-\d+": (1.0, 1.0),
    r"hyper-(sd15|sdxl)-\d+-cfg": (5.0, 1.0),
    "hyper-sd3-4": (3.0, 0.125),
    "hyper-sd3-8": (5.0, 0.125),
    "hyper-sd3-16": (7.0, 0.125),
    r"hyper-flux-\d+": (3.5, 0.125),
    r"pcm-(sd15|sdxl)-\d+": (1.0, 1.0),
    r"pcm-(sd15|sdxl)-\d+-cfg": (7.5, 1.0),
    r"tcd-\w+": (1.0, 1.0),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_ones_run_as_their_authors_say(hub, name: str, tmp_path: Path):
    wanted = PUBLISHED[name]
    found = find_shortcut("some/model", name, wanted.steps or 5)
    assert hub == [(wanted.repo, wanted.file, None)]
    (published,) = [how for names, how in AS_PUBLISHED.items() if re.fullmatch(names, name)]
    assert (found.guidance_scale, found.scale) == published
    guided = any(word in wanted.file for word in ("CFG", "FLUX", "normalcfg"))
    assert guided == (found.guidance_scale > 1)
    # The same file by its place on the hub, and (but for TCD's, called as many are) as a copy.
    places = [f"{wanted.repo}/{wanted.file}"]
    if wanted.steps:
        assert f"{wanted.steps}step" in wanted.file
        places.append(str(tmp_path / wanted.file))
    for place in places:
        again = find_shortcut("some/model", place, wanted.steps or 8)
        assert again == found
        if wanted.steps:
            with pytest.raises(UserError, match=f"use --segments {wanted.steps}"):
                find_shortcut("some/model", place, wanted.steps + 1)


def test_a_file_that_is_called_as_many_others_is_not_the_published_one(tmp_path: Path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    path.touch()
    assert find_shortcut("some/model", str(path), 5) == Shortcut(path, None)
    path.with_suffix(".json").write_text('{"shortcut_guidance_scale": 2.5}')
    assert find_shortcut("some/model", str(path), 5).guidance_scale == 2.5


def test_any_file_on_the_hub(hub):
    find_shortcut("some/model", "owner/name/sub/x.safetensors@v1", 4)
    assert hub == [("owner/name", f"sub/x.{end}", "v1") for end in ("safetensors", "json")]
    assert check_shortcut("--shortcut", "owner/name/x.safetensors")
    for wrong in ("./name/x.safetensors", "../loras/x.safetensors", "owner/.name/x.safetensors"):
        with pytest.raises(UserError, match="no such file"):
            check_shortcut("--shortcut", wrong)


def in_cache(cache: Path, *files: str, absent: str = "") -> None:
    """owner/name as the hub's library keeps it: its `main` with these files."""
    place = cache / "models--owner--name"
    for file in files:
        copy = place / "snapshots" / COMMIT / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text('{"shortcut_guidance_scale": 2.5}' if file.endswith(".json") else "")
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(COMMIT)
    if absent:
        (place / ".no_exist" / COMMIT).mkdir(parents=True)
        (place / ".no_exist" / COMMIT / absent).touch()


def test_one_on_the_hub_brings_its_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub's own library, which no network reaches here: its cache tells what was there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "owner/name/x.safetensors"
    in_cache(tmp_path, "x.safetensors")
    assert known_guidance("some/model", name, 4) is None
    with pytest.raises(UserError, match=r"x\.json of owner/name cannot be fetched"):
        find_shortcut("some/model", name, 4)  # there may be one
    assert find_shortcut("some/model", name, 4, guidance_scale=3.0).guidance_scale == 3
    in_cache(tmp_path, "x.json")
    for at in ("", "@main", f"@{COMMIT}"):
        assert find_shortcut("some/model", name + at, 4).guidance_scale == 2.5
        assert known_guidance("some/model", name + at, 4) == 2.5
    in_cache(tmp_path, "y.safetensors", absent="y.json")
    assert find_shortcut("some/model", "owner/name/y.safetensors", 4).guidance_scale is None


def test_a_published_one_at_the_users_revision(hub):
    known = PUBLISHED["hyper-sd15-4"]
    find_shortcut("some/model", f"{known.repo}/{known.file}@v2", 4)
    find_shortcut("some/model", f"{known.repo}/{known.file}", 4)
    assert [revision for *_, revision in hub] == ["v2", None]


def test_a_published_file_must_be_the_known_one(hub, monkeypatch: pytest.MonkeyPatch):
    known = PUBLISHED["hyper-sd3-4"]
    content = hashlib.sha256(b"").hexdigest()
    monkeypatch.setattr(shortcuts, "SHA256", {(known.repo, known.file): content})
    find_shortcut("some/model", "hyper-sd3-4", 4)
    monkeypatch.setattr(shortcuts, "SHA256", {(known.repo, known.file): "0" * 64})
    with pytest.raises(UserError, match=f"not the file that is known.*{content}, not 0000") as told:
        find_shortcut("some/model", "hyper-sd3-4", 4)
    remedy = str(told.value).rsplit("--shortcut ", 1)[1]
    assert find_shortcut("some/model", remedy, 4).guidance_scale == 3


def test_known_contents_belong_to_published_files():
    """Every Hyper-SD file and one of TCD's; each content once."""
    files = {(known.repo, known.file) for known in PUBLISHED.values()}
    assert set(shortcuts.SHA256) <= files
    assert {f for f in files if f[0] == HYPER} <= set(shortcuts.SHA256)
    hashes = list(shortcuts.SHA256.values())
    assert len(set(hashes)) == len(hashes) == 16
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes)


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def fails(*args: object, **options: object) -> str:
        raise OSError("no\nroute")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(UserError, match="cannot be fetched \\(no route\\); give a local file"):
        find_shortcut("some/model", "hyper-sd15-4", 4)


def test_the_shipped_ones_and_none():
    assert find_shortcut("emoji", "auto", 4).guidance_scale == 3
    unguided = find_shortcut("emoji", check_shortcut("--shortcut", "unguided"), 4)
    assert unguided.guidance_scale == 1
    assert unguided.path != find_shortcut("emoji", "auto", 4).path
    assert find_shortcut("emoji", "guided", 4) == find_shortcut("emoji", "auto", 4)
    assert find_shortcut("emoji", "auto", 4, auto="unguided") == unguided
    assert find_shortcut("emoji", "guided", 4, auto="unguided").guidance_scale == 3
    assert find_shortcut("emoji", "plain", 4).path is None
    with pytest.raises(UserError, match="no shortcut ships for mine"):
        find_shortcut("mine", "auto", 4)
    with pytest.raises(UserError, match="--shortcut unguided: no shortcut ships for mine"):
        find_shortcut("mine", "unguided", 4)


@pytest.mark.parametrize(
    ("method", "which"),
    [("jumps", "unguided"), ("shortft", "guided"), ("tune_shortcut", "guided")],
)
def test_auto_is_the_one_that_suits_the_method(method: str, which: str, tmp_path: Path):
    own = {"method": method, "output_dir": tmp_path, "rank": 2, "tensorboard": False}
    trainer = Trainer(Config(**own))
    assert trainer.shortcut == find_shortcut("emoji", which, 4)
    assert trainer.nets.shortcut_guidance.scale == (1 if which == "unguided" else 3)
    named = Trainer(Config(**own, shortcut="guided"))
    assert named.shortcut == find_shortcut("emoji", "guided", 4)


def test_jumps_without_a_shortcut_are_the_bases(tmp_path: Path):
    own = {"method": "jumps", "output_dir": tmp_path, "rank": 2, "tensorboard": False}
    steps = Trainer(Config(**own, shortcut="none")).plan(0, 1).steps
    assert {step.net for step in steps} == {"policy"}
    assert len(steps) == 4


@pytest.mark.parametrize("merge", [False, True])
def test_scale_is_the_lora_scale(tmp_path: Path, merge: bool):
    family = tiny_family()
    path = make_shortcut(family, tmp_path / "s.safetensors")

    def predict(scale: float) -> torch.Tensor:
        nets = ModelNetworks(
            family,
            guidance=Guidance(),
            shortcut=path,
            shortcut_scale=scale,
            merge=merge,
        )
        assert not any(p.requires_grad for p in nets.module(step).parameters())
        with torch.no_grad():
            return nets.predict(step, family.noise([1]), 501.0, family.encode(["red apple"]))

    step = Step(0, 1, "shortcut")
    base = ModelNetworks(family, guidance=Guidance(), plain_jumps=True)
    with torch.no_grad():
        zero = base.predict(step, family.noise([1]), 501.0, family.encode(["red apple"]))
    torch.testing.assert_close(predict(1e-9), zero, atol=1e-5, rtol=1e-5)
    assert (predict(1.0) - zero).abs().max() > 1e-3
    assert (predict(0.125) - zero).norm() < 0.5 * (predict(1.0) - zero).norm()
    assert SHORTCUT == "shortcut"

"""Where rewards come from: places and checksums of models, damaged and hostile files, own code."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, BertTokenizer, CLIPModel, CLIPTokenizer
from transformers.image_processing_base import ImageProcessingMixin

import shortft
from shortft.config import Config
from shortft.errors import UserError
from shortft.rewards import anchor_warning, make_reward, parse_reward_spec
from shortft.rewards.clip import _commit
from shortft.rewards.files import read_weights
from shortft.rewards.places import (
    BERT,
    CLIP_L,
    COMPANIONS,
    HUB,
    VIT_H,
    Place,
    parse_reward_models,
    reward_places,
)
from test_reward_models import blip_folder, folder  # noqa: F401
from test_rewards import PROMPTS, clip_dir, scenes  # noqa: F401

DIGEST = "0123456789abcdef" * 4


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_places(tmp_path):
    assert parse_reward_models(None) == {}
    assert parse_reward_models("openai/clip") == {"clip": Place("clip", "openai/clip")}
    odd = tmp_path / "a,b=c@d#e"
    odd.mkdir()
    assert parse_reward_models(str(odd)) == {"clip": Place("clip", str(odd))}
    found = parse_reward_models(f"pickscore=me/pick@1a2b, hpsv2=xswu/HPSv2@v1#{DIGEST}")
    assert found == {
        "pickscore": Place("pickscore", "me/pick", "1a2b"),
        "hpsv2": Place("hpsv2", "xswu/HPSv2", "v1", DIGEST),
    }
    assert reward_places({"hpsv2", "symmetry", "clip"}, None) == {"hpsv2": HUB["hpsv2"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hps=x/y", "no reward 'hps' with a model; write NAME=PLACE with one of clip, pickscore"),
        ("/no/where", "--reward-model /no/where: no such model; give a directory or a hub id"),
        ("hpsv2=models/missing.pt", "hpsv2=models/missing.pt: no such model; give HPS_v2_comp"),
        ("hpsv2=", "no place given"),
        ("hpsv2=x/y,hpsv2=x/y", "hpsv2 stands twice"),
        ("hpsv2=x/y#12", "x/y#12: not a SHA-256"),
        (f"pickscore=x/y#{DIGEST}", "only a .pt file has a checksum"),
    ],
)
def test_bad_places_are_user_errors(text, message):
    with pytest.raises(UserError, match=message) as caught:
        Config(reward_model=text)
    assert "\n" not in str(caught.value)


def test_places_are_checked_against_files_and_reward(tmp_path):
    with pytest.raises(UserError, match=r"holds no ImageReward.pt; name the weights file itself"):
        parse_reward_models(f"imagereward={tmp_path}")
    file = tmp_path / "model.pt"
    file.touch()
    with pytest.raises(UserError, match="is a file; give the model's directory"):
        parse_reward_models(f"pickscore={file}")
    with pytest.raises(UserError, match=f"write --reward-model pickscore={tmp_path}"):
        Config(reward="pickscore", reward_model=f"clip={tmp_path}")
    for reward, held_out in (("clip", "pickscore"), ("pickscore", "clip")):
        config = Config(reward=reward, held_out=held_out, reward_model=str(tmp_path))
        assert reward_places({held_out}, config.reward_model).keys() == {held_out}


def test_checksum(tmp_path):
    file = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"a": torch.ones(2)}, file)
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    content, path = read_weights(Place("hpsv2", str(file), sha256=right.upper()), file.name)
    assert (list(content), path) == (["a"], file)
    with pytest.raises(UserError, match=f"SHA-256 of .* is {right}, not {DIGEST}"):
        read_weights(Place("hpsv2", str(file), sha256=DIGEST), file.name)
    # the hub's cache names a large file by the checksum that the hub lists
    blob = tmp_path / DIGEST
    file.rename(blob)
    file.symlink_to(blob)
    with pytest.raises(UserError, match="the file is damaged or another one: fetch it again"):
        read_weights(Place("hpsv2", str(tmp_path)), file.name)


def test_an_unpinned_pickle_of_the_hub_says_how_to_pin_it(tmp_path, monkeypatch, caplog):
    """The hub's cache as huggingface_hub lays it out; what the warning names is then silent."""
    blob, commit = tmp_path / "blobs" / "x", "c0ffee"
    blob.parent.mkdir()
    torch.save({"a": torch.ones(2)}, blob)
    digest = hashlib.sha256(blob.read_bytes()).hexdigest()
    blob = blob.rename(blob.with_name(digest))
    file = tmp_path / "snapshots" / commit / "HPS_v2_compressed.pt"
    file.parent.mkdir(parents=True)
    file.symlink_to(blob)
    asked = []

    def download(repo: str, name: str, revision: str) -> str:
        asked.append((repo, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    read_weights(Place("hpsv2", "xswu/HPSv2"), file.name)
    (told,) = caplog.messages
    pinned = f"--reward-model hpsv2=xswu/HPSv2@{commit}#{digest}"
    assert told.endswith(f"to pin what was loaded now: {pinned}")
    place = parse_reward_models(pinned.removeprefix("--reward-model "))["hpsv2"]
    read_weights(place, file.name)
    assert len(caplog.messages) == 1
    assert asked == [("xswu/HPSv2", file.name, "main"), ("xswu/HPSv2", file.name, commit)]
    read_weights(Place("hpsv2", str(file)), file.name)  # the user's own file
    read_weights(HUB["hpsv2"], file.name)  # pinned as it comes
    assert len(caplog.messages) == 1
    assert asked[-1] == ("xswu/HPSv2", file.name, HUB["hpsv2"].revision)
    with pytest.raises(UserError, match="SHA-256 of HPS_v2_compressed"):
        read_weights(HUB["hpsv2.1"], file.name)  # not the file that is known by its checksum


def test_everything_that_the_hub_gives_by_default_is_pinned():
    assert all(place.is_pinned for place in HUB.values())
    assert not Place("hpsv2", "xswu/HPSv2", "main").is_pinned
    assert not Place("hpsv2", "xswu/HPSv2", "c0ffee").is_pinned  # may be a branch's name
    commits = [place.revision for place in HUB.values()] + list(COMPANIONS.values())
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits)


@pytest.mark.parametrize(
    ("name", "companion"), [("pickscore", VIT_H), ("hpsv2", VIT_H), ("imagereward", BERT)]
)
def test_tokenizers_come_at_their_own_commit(name: str, companion: str):
    """Not at the commit of the weights, which another repository does not have."""
    place = HUB[name]
    assert place.revision_of(place.source) == place.revision
    assert place.revision_of(companion) == COMPANIONS[companion] != place.revision
    assert place.revision_of("somebody/else") == "main"


@pytest.fixture
def asked(folder, blip_folder, monkeypatch) -> set[tuple[str, str, str]]:  # noqa: F811
    """What is asked of the hub: (class, repository, revision). Local files are what it gives."""
    found = set()

    def answer(kind, method: str) -> None:
        read = getattr(kind, method)
        files = blip_folder if kind is BertTokenizer else folder

        def from_the_hub(source, *, revision, **options):
            found.add((kind.__name__, source, revision))
            return read(files, **options)

        monkeypatch.setattr(kind, method, from_the_hub)

    for kind in (AutoConfig, CLIPModel, CLIPTokenizer, BertTokenizer):
        answer(kind, "from_pretrained")
    answer(ImageProcessingMixin, "get_image_processor_dict")
    return found


def test_loaders_ask_for_every_file_at_its_own_commit(tmp_path, folder, blip_folder, asked):  # noqa: F811
    """Of PickScore whole, and of what lies beside no weights of the others."""
    for file in (
        folder / "aesthetic-model.pth",
        blip_folder / "ImageReward.pt",
        blip_folder / "med_config.json",
    ):
        shutil.copy(file, tmp_path)
    make_reward("pickscore")
    make_reward("aesthetic,imagereward", f"aesthetic={tmp_path},imagereward={tmp_path}")
    pickscore = HUB["pickscore"]
    clip = ("AutoConfig", "CLIPModel", "ImageProcessingMixin")
    assert asked == {
        *((kind, pickscore.source, pickscore.revision) for kind in clip[:2]),
        *((kind, VIT_H, COMPANIONS[VIT_H]) for kind in ("ImageProcessingMixin", "CLIPTokenizer")),
        *((kind, CLIP_L, COMPANIONS[CLIP_L]) for kind in clip),
        ("BertTokenizer", BERT, COMPANIONS[BERT]),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"<html>not found</html>", "does not hold weights alone; refused"),
        ("truncated", "cannot be read .* damaged or incomplete: fetch it again"),
        ("hostile", r"does not hold weights alone \(\w+.system\); refused, as it may run code"),
        ("hostile pickle", "does not hold weights alone.*; refused, as it may run code"),
        ([torch.ones(1)], "holds a list, not weights"),
        ({"a": torch.ones(1)}, "hpsv2=.*: not open_clip's ViT-H-14"),
        ({"state_dict": {}}, "hpsv2=.*: not open_clip's ViT-H-14"),
    ],
)
def test_bad_files_are_user_errors(tmp_path, folder, monkeypatch, content, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "HPS_v2_compressed.pt"
    if content == "truncated":
        file.write_bytes((folder / file.name).read_bytes()[:5000])
    elif content == "hostile":
        torch.save({"state_dict": Hostile()}, file)
    elif content == "hostile pickle":
        file.write_bytes(pickle.dumps({"state_dict": Hostile()}))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    for tokens in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / tokens).write_bytes((folder / tokens).read_bytes())
    with pytest.raises(UserError, match=message) as caught:
        make_reward("hpsv2", f"hpsv2={file}")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own advice is to run the code
    assert not (tmp_path / "hacked").exists()


def test_other_architectures_are_user_errors(tmp_path, folder, blip_folder):  # noqa: F811
    def refused(name: str, source: Path, change) -> str:
        state = torch.load(source, weights_only=True)
        weights = state.get("state_dict", state)
        change(weights)
        torch.save(state, tmp_path / source.name)
        for file in source.parent.glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        with pytest.raises(UserError) as caught:
            make_reward(name, f"{name}={tmp_path / source.name}")
        return str(caught.value)

    hps = folder / "HPS_v2_compressed.pt"
    assert "layers.1.mlp.fc1.bias is missing" in refused(
        "hpsv2", hps, lambda w: w.pop("transformer.resblocks.1.mlp.c_fc.bias")
    )
    narrow = {"visual.conv1.weight": torch.ones(96, 3, 8, 8)}
    assert "of widths 96 and 128, not open_clip's" in refused(
        "hpsv2", hps, lambda w: w.update(narrow)
    )
    wrong = {"ln_final.bias": torch.ones(7)}
    assert "has shape (7,) instead of (128,)" in refused("hpsv2", hps, lambda w: w.update(wrong))
    blip = blip_folder / "ImageReward.pt"
    assert "not ImageReward's BLIP" in refused("imagereward", blip, lambda w: w.clear())
    gone = "crossattention.self.query.weight"
    assert f"{gone} is missing" in refused(
        "imagereward", blip, lambda w: w.pop(f"blip.text_encoder.encoder.layer.0.{gone}")
    )
    (tmp_path / "med_config.json").write_text("{")
    torch.save(torch.load(blip, weights_only=True), tmp_path / blip.name)
    with pytest.raises(UserError, match=r"med_config.json is not BLIP's"):
        make_reward("imagereward", f"imagereward={tmp_path}")
    (tmp_path / "med_config.json").unlink()
    with pytest.raises(UserError, match=r"no med_config.json beside ImageReward.pt"):
        make_reward("imagereward", f"imagereward={tmp_path}")


def test_hub_out_of_reach_is_a_user_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "nowhere")
    start = "--reward hpsv2: xswu/HPSv2: HPS_v2_compressed.pt cannot be fetched"
    with pytest.raises(UserError, match=f"{start}.*--reward-model hpsv2=DIRECTORY"):
        make_reward("hpsv2")
    with pytest.raises(UserError, match=r"--reward pickscore: .*: cannot be loaded"):
        make_reward("pickscore")


def test_head_of_another_clip_and_half_a_pickscore_are_user_errors(tmp_path, folder):  # noqa: F811
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = CLIPModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    torch.save({"layers.0.weight": torch.ones(3)}, tmp_path / "aesthetic-model.pth")
    with pytest.raises(UserError, match=r"aesthetic=.*: weight layers.0.bias is missing"):
        make_reward("aesthetic", f"aesthetic={tmp_path}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"--reward-model pickscore=.*: cannot be loaded"):
        make_reward("pickscore", f"pickscore={tmp_path}")


@pytest.mark.parametrize("index", [False, True])
def test_a_clip_that_is_a_pickle_is_not_read(tmp_path, clip_dir, monkeypatch, index):  # noqa: F811
    """Neither by its usual name, nor where the index of safetensors names it."""
    for file in clip_dir.glob("*.json"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save({"logit_scale": Hostile()}, tmp_path / "pytorch_model.bin")
    if index:
        content = {"metadata": {}, "weight_map": {"logit_scale": "pytorch_model.bin"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    for name, models in (("clip", tmp_path), ("pickscore", f"pickscore={tmp_path}")):
        with pytest.raises(UserError, match="give a model with a model") as caught:
            make_reward(name, models)
        assert "--reward-model" in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert "use_safetensors" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_harmless_pickles_are_not_read_either(tmp_path, clip_dir):  # noqa: F811
    for file in clip_dir.glob("*.json"):
        shutil.copy(file, tmp_path)
    weights = load_file(clip_dir / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no weights in safetensors"):
        make_reward("clip", tmp_path)


def test_a_model_of_the_hub_is_read_at_one_commit(tmp_path, clip_dir, monkeypatch, asked):  # noqa: F811
    """As huggingface_hub's cache lays it out; a branch's commit is known once a file is there."""
    commit = "c0ffee" * 6 + "0000"
    repo = tmp_path / "models--me--clip"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(clip_dir, repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert _commit(Place("clip", "me/clip")) == commit
    make_reward("clip", "me/clip")
    assert ("CLIPModel", "me/clip", commit) in asked
    assert _commit(Place("clip", "me/other")) == "main"
    assert _commit(Place("clip", str(clip_dir))) == "main"


OWN = """
import torch
LIMIT = 3
def bright(images, prompts): return images.mean((1, 2, 3))
def flat(images, prompts): return images.mean()
def cut_off(images, prompts): return images.detach().mean((1, 2, 3))
class Dark:
    name, report_name, report_higher_is_better = "dark", "darkness (%)", False
    def __init__(self, device): self.device = device
    def __call__(self, images, prompts): return -images.mean((1, 2, 3))
    def report(self, images, prompts): return -100 * self(images, prompts)
class Empty: pass
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path / "mine.py"


def test_own_function_and_class(own):
    images = scenes(3).requires_grad_()
    mix = make_reward(f"clip:2,{own}:bright:0.5,{own}:Dark")
    parts = mix.components(images, PROMPTS[:3])
    assert list(parts) == ["clip", f"{own}:bright", f"{own}:Dark"]
    torch.testing.assert_close(parts[f"{own}:bright"], images.mean((1, 2, 3)))
    assert [weight for _, weight in mix.parts] == [2.0, 0.5, 1.0]
    bright, dark = mix.parts[1][0], mix.parts[2][0]
    assert bright.report_name == f"{own}:bright"
    assert bright.report_higher_is_better
    assert not bright.report(images, PROMPTS[:3]).requires_grad
    assert (dark.report_name, dark.report_higher_is_better) == ("darkness (%)", False)
    torch.testing.assert_close(
        dark.report(images, PROMPTS[:3]), 100 * images.detach().mean((1, 2, 3))
    )
    assert anchor_warning(f"symmetry,{own}:bright") is None


def test_an_own_reward_finds_its_neighbours_and_gets_what_it_asks_for(own, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (own.parent / "a_neighbour.py").write_text("FACTOR = 2.0\n")
    own.write_text(
        "from a_neighbour import FACTOR\n"
        + OWN.replace("device): self.device = device", "device, dtype): self.made = dtype")
    )
    dark = make_reward(f"{own}:Dark", dtype=torch.bfloat16).parts[0][0]
    assert dark._scorer.made == torch.bfloat16
    assert Path(sys.path[-1]) == own.parent  # behind everything that is installed
    another = own.parent / "another" / "mine.py"
    another.parent.mkdir()
    another.write_text("from a_neighbour import FACTOR\ndef f(images, prompts): return 0\n")
    (another.parent / "a_neighbour.py").write_text("FACTOR = 3.0\n")
    with pytest.raises(UserError, match=r"imports a_neighbour, which is .*rename that file"):
        make_reward(f"{another}:f")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing.py:f", "--reward nothing.py:f: no such file"),
        ("{own}", "name the function in it, such as .*mine.py:my_reward"),
        ("{own}:brihgt", "no brihgt in mine.py; it defines bright, flat, cut_off, Dark, Empty"),
        ("{own}:bright:x", "weight 'x' of .*mine.py:bright is not a positive number"),
        ("{own}:bright,{own}:bright", "stands twice"),
        ("{bad}:f", r"bad.py is not Python \(.*line 1"),
        ("paper-mix,hpsv2", "hpsv2 stands twice"),
        ("paper-mxi", r"did you mean paper-mix\?"),
    ],
)
def test_bad_own_specs_are_found_without_running_them(own, spec, message):
    bad = own.with_name("bad.py")
    bad.write_text("def f(:\n")
    with pytest.raises(UserError, match=message):
        Config(reward=spec.format(own=own, bad=bad))


def test_own_code_that_cannot_be_a_reward(own):
    images = scenes(2).requires_grad_()
    for name, message in {
        "flat": r"returned \(\) for 2 pictures; return a tensor of shape \(2,\)",
        "cut_off": "no gradient reaches the pixels",
    }.items():
        with pytest.raises(UserError, match=message):
            make_reward(f"{own}:{name}")(images, PROMPTS[:2])
    with pytest.raises(UserError, match="class has no __call__, name, report, report_high"):
        make_reward(f"{own}:Empty")
    with pytest.raises(UserError, match="is a int; give a function or a class"):
        make_reward(f"{own}:LIMIT")
    own.write_text("import no_such_module\ndef f(images, prompts): return images\n")
    with pytest.raises(UserError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        make_reward(f"{own}:f")


def test_entry_point(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own.parent))
    entry = EntryPoint("brightness", "mine:bright", "shortft.rewards")
    monkeypatch.setattr(
        "shortft.rewards.own.entry_points",
        lambda group, name: [e for e in (entry,) if (e.group, e.name) == (group, name)],
    )
    images = scenes(2)
    reward = make_reward("brightness")
    assert reward.name == "brightness"
    torch.testing.assert_close(reward(images, PROMPTS[:2]), images.mean((1, 2, 3)))


def test_recipes():
    assert parse_reward_spec("paper-mix") == [("pickscore", 10), ("hpsv2", 2), ("aesthetic", 0.05)]
    assert parse_reward_spec("symmetry-hpsv2:0.5,clip") == [
        ("symmetry", 5.0),
        ("hpsv2", 0.5),
        ("clip", 1.0),
    ]


def test_checking_places_and_own_files_loads_no_torch(own):
    code = (
        "import sys; from shortft.rewards.places import reward_places; "
        "from shortft.rewards import parse_reward_spec; "
        f"parse_reward_spec({f'{own}:bright'!r}); reward_places({{'hpsv2'}}, None);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    path = str(Path(shortft.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})

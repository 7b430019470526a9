"""Files that were made to harm: nothing in them runs, each is refused in one line, exit code 2.

SHORTFT_FUZZ says how many random prompt files and configurations are tried (default 100 each;
docs/faults.md has the result of 10,000).
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load as loads
from safetensors.torch import save, save_file

import shortft
from shortft.adapter import load_into
from shortft.checkpoint import load_latest, manifest_of
from shortft.cli import main
from shortft.config import Config, load_config
from shortft.confined import COMPARISON, RUN, refuse_links
from shortft.drawing.grids import save_images
from shortft.errors import UserError
from shortft.families.single_file import shapes
from shortft.inputs import read_prompts
from shortft.networks import view
from shortft.redact import without_secrets
from shortft.rewards.files import read_weights
from shortft.rewards.places import FILES, Place
from shortft.train import check_same_run, train
from shortft.weights_file import MAX_HEADER, check_weights_file
from test_adapter import make_adapter
from tiny import save_tiny, tiny_family

SOURCE = Path(shortft.__file__).parent
CASES = hypothesis_settings(
    max_examples=int(os.environ.get("SHORTFT_FUZZ", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file named `hacked` in the working directory would be the proof of the opposite."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("hacked").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2, arguments
    out = capsys.readouterr()
    lines = out.err.strip().splitlines()
    assert len(lines) == 1, out.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 1200
    return lines[0]


def tensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: list[int], offsets: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def as_json(**entries: object) -> bytes:
    return json.dumps(entries).encode()


ABSURD = {
    "endless header": tensors_file(b"{}", length=2**63),
    "header beyond the file": tensors_file(b"{}", length=10_000),
    "no header": b"\0" * 8,
    "not JSON": tensors_file(b"\x80\x04pickle"),
    "brackets": tensors_file(b"[" * 100_000),
    "negative shape": tensors_file(as_json(a=entry([-2, 2], [0, 16])), b"\0" * 16),
    "overlap": tensors_file(as_json(a=entry([4], [0, 16]), b=entry([4], [8, 24])), b"\0" * 24),
    "beyond the end": tensors_file(as_json(a=entry([4], [0, 16])), b"\0" * 4),
    "overflow": tensors_file(as_json(a=entry([2**62, 2**62], [0, 16])), b"\0" * 16),
    "pickle": pickle.dumps(Hostile()),
    "empty": b"",
}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory):
    adapter = tmp_path_factory.mktemp("adapter")
    return tiny_family(), make_adapter(adapter), adapter


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_safetensors_are_refused_by_every_loader(rig, tmp_path: Path, what: str):
    """As a LoRA, in an adapter, as a single-file model, and in a checkpoint with right sums."""
    family, nets, whole = rig
    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(ABSURD[what])
    adapter = Path(shutil.copytree(whole, tmp_path / "adapter"))
    shutil.copy(evil, adapter / "lora_2.safetensors")
    folder = tmp_path / "checkpoints" / "update-000001"
    folder.mkdir(parents=True)
    files = {"lora_1.safetensors": ABSURD[what], "state.json": b"{}"}
    files["manifest.json"] = manifest_of(files)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for load in (
        lambda: family.load_lora(view(family.denoiser), evil, "evil"),
        lambda: load_into(nets, adapter),
        lambda: shapes(evil),
        lambda: load_latest(folder.parent),
    ):
        with pytest.raises(UserError) as caught:
            load()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_no_time_is_spent_on_headers_that_no_lora_needs(tmp_path: Path, capsys):
    """What is within the bound is read: trainers' notes may take megabytes."""
    file = tmp_path / "lora.safetensors"
    header = as_json(a=entry([1], [0, 4]))
    file.write_bytes(tensors_file(header.ljust(5_000_000), b"\0" * 4))
    check_weights_file("lora", file, "mend it")
    file.write_bytes(tensors_file(header.ljust(MAX_HEADER + 1), b"\0" * 4))
    with pytest.raises(UserError, match=r"lora: has a header of 20,000,001 bytes.*; mend it"):
        check_weights_file("lora", file, "mend it")
    assert "a header of 20,000,001" in refused(capsys, "train", "--dry-run", "--shortcut", file)


def test_the_commands_refuse_them_too(model, tmp_path: Path, settings, capsys):
    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(ABSURD["overlap"])
    options = ["--model", model, "--prompts", settings["prompts"], "--num-steps", 8]
    refused(capsys, "train", *options, "--shortcut", evil, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    refused(capsys, "sample", "--model", evil, "--prompt", "x")
    adapter = tmp_path / "adapter"
    make_adapter(adapter)
    shutil.copy(evil, adapter / "lora_2.safetensors")
    refused(capsys, "sample", "--model", model, "--adapter", adapter, "--prompt", "x")
    refused(capsys, "export", "--adapter", adapter, "--model", model, "--no-measure")


def saved(content: object, **options: bool) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


def bomb(path: Path) -> None:
    """A torch archive of 40 kB that unpacks to 40 MB."""
    torch.save({"state_dict": {"a": torch.zeros(4)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            with archive.open(name, "w") as file:
                for _ in range(40 if name.endswith("data/0") else 0):
                    file.write(bytes(1 << 20))
                file.write(data)


PICKLES = {
    "pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": Hostile()})),
    "archive": saved({"state_dict": Hostile()}),
    "old archive": saved({"state_dict": Hostile()}, _use_new_zipfile_serialization=False),
    "code beside weights": saved({"a": torch.ones(2), "b": Hostile()}),
    "whole module": saved(torch.nn.Linear(2, 2)),
    "bomb": bomb,
}


@pytest.mark.parametrize("make", PICKLES)
def test_pickles_with_code_and_zip_bombs_are_refused(tmp_path: Path, make: str):
    """By the one function that reads every reward's .pt file; see the test below."""
    for reward, name in FILES.items():
        file = tmp_path / name
        PICKLES[make](file)
        with pytest.raises(UserError, match="refused, as it may") as caught:
            read_weights(Place(reward, str(file)), name)
        assert "\n" not in str(caught.value)


def test_no_loader_of_the_package_runs_code_from_data():
    """Every torch.load says weights_only=True, and nothing else that reads pickles is called."""
    loads = 0
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in (
                "eval", "exec", "pickle.load", "pickle.loads", "joblib.load", "yaml.load",
                "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "np.load", "numpy.load",
            ), (path, called)  # fmt: skip
            if called == "torch.load":
                loads += 1
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("weights_only") == "True", path
    assert loads == 1


def test_models_that_bring_code_are_refused(tmp_path: Path, capsys, monkeypatch):
    model = save_tiny(tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    torch.save({"a": Hostile()}, weights.with_suffix(".bin"))
    refused(capsys, "sample", "--model", model, "--prompt", "x")
    weights.write_bytes(kept)
    weights.with_suffix(".bin").unlink()

    text = model / "text_encoder" / "model.safetensors"
    kept = text.read_bytes()
    text.unlink()
    torch.save({"a": Hostile()}, text.with_name("pytorch_model.bin"))
    refused(capsys, "sample", "--model", model, "--prompt", "x")
    text.write_bytes(kept)

    index = json.loads((model / "model_index.json").read_text())
    (model / "unet" / "evil.py").write_text("open('hacked', 'w')\nclass Evil: pass\n")
    (model / "evil.py").write_text("open('hacked', 'w')\nclass Evil: pass\n")
    for change in ({"unet": ["evil", "Evil"]}, {"_class_name": ["evil", "Evil"]}):
        (model / "model_index.json").write_text(json.dumps({**index, **change}))
        refused(capsys, "sample", "--model", model, "--prompt", "x")
    (model / "model_index.json").write_text(json.dumps(index))
    for content in ("[" * 100_000, '{"guidance_scale": "x"}', "3"):
        (model / "shortft.json").write_text(content)
        assert "shortft.json" in refused(capsys, "sample", "--model", model, "--prompt", "x")


def test_scorers_that_bring_code_are_refused(tmp_path: Path, capsys, settings):
    scorer = tmp_path / "scorer"
    scorer.mkdir()
    (scorer / "evil.py").write_text("open('hacked', 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": "evil.Evil"}
    options = ["--model", settings["model"], "--prompts", settings["prompts"], "--num-steps", 8]
    options += ["--shortcut", "none", "--reward", "clip", "--reward-model", scorer]
    for described in ({"model_type": "evil"}, {"model_type": "clip"}):
        (scorer / "config.json").write_text(json.dumps({**described, "auto_map": auto}))
        torch.save({"a": Hostile()}, scorer / "pytorch_model.bin")
        refused(capsys, "train", *options, "--output-dir", tmp_path / "run")


def test_adapters_descriptions_are_checked(model: Path, tmp_path: Path, capsys):
    make_adapter(tmp_path / "adapter")
    card = tmp_path / "adapter" / "adapter.json"
    fields = json.loads(card.read_text())
    for text in (
        "[" * 100_000,
        "null",
        "[]",
        json.dumps({**fields, "loras": 10**12}),
        json.dumps({**fields, "loras": "../../x"}),
        json.dumps({**fields, "segments": -1}),
        json.dumps({**fields, "placement": "__class__"}),
    ):
        card.write_text(text)
        said = refused(
            capsys, "sample", "--model", model, "--adapter", card.parent, "--prompt", "x"
        )
        assert f"{card}: damaged" in said


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)
YAML = {
    "object": "!!python/object/apply:os.system ['touch hacked']",
    "value": "rank: !!python/object/apply:os.system ['touch hacked']",
    "module": "rank: !!python/module:os",
    "name": "rank: !!python/name:os.system",
    "new": "!!python/object/new:os.system [touch hacked]",
    "laughs": LAUGHS,
    "laughs in a value": LAUGHS + "rank: *u\n",
    "brackets": "rank: " + "[" * 100_000,
    "itself": "rank: &a [*a]",
    "long number": "rank: " + "9" * 10_000,
}


@pytest.mark.parametrize("what", YAML)
def test_yaml_runs_nothing_and_ends(tmp_path: Path, capsys, settings, what: str):
    file = tmp_path / "evil.yaml"
    file.write_text(YAML[what])
    refused(capsys, "train", file, "--dry-run")
    with contextlib.suppress(UserError):
        check_same_run(YAML[what], Config(**settings))


def test_a_checkpoint_of_something_else_is_one_line(settings, capsys):
    config = Config(**{**settings, "updates": 1, "sample_every": 0})
    train(config)
    [folder] = config.output_dir.glob("checkpoints/update-*")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    state = json.loads(files["state.json"])
    torn = config.output_dir / "torn.safetensors"
    save_file({"../../a": torch.ones(1)}, torn)
    moments = loads(files["optimizer_1.safetensors"])
    for name, data in (
        ("state.json", b"[]"),
        ("state.json", json.dumps({**state, "config": "!!python/object:os.system {}"}).encode()),
        ("state.json", json.dumps({**state, "log_bytes": "x"}).encode()),
        ("lora_1.safetensors", torn.read_bytes()),
        ("optimizer_1.safetensors", torn.read_bytes()),
        ("optimizer_1.safetensors", save({k: v for k, v in moments.items() if "step" not in k})),
        ("optimizer_1.safetensors", save({k: v[None] for k, v in moments.items()})),
    ):
        changed = {**files, name: data}
        changed["manifest.json"] = manifest_of(changed)
        for file, content in changed.items():
            (folder / file).write_bytes(content)
        with pytest.raises(UserError) as caught:
            train(config, resume=True)
        assert "\n" not in str(caught.value), name


NAMES = [
    "../../evil",
    "/etc/evil",
    "a\0b",
    "x" * 300,
    "..",
    ".",
    "",
    "CON",
    "ü" * 300,
    "a\nb",
    "\\..\\x",
]


def test_pictures_stay_inside_their_folder(tmp_path: Path):
    out, outside = tmp_path / "a" / "out", tmp_path / "outside.png"
    outside.write_bytes(b"mine")
    out.mkdir(parents=True)
    first = save_images(tmp_path / "probe", torch.rand(1, 3, 8, 8), ["link"], [0])[0].name
    (out / first.replace("0000", f"{len(NAMES):04d}")).symlink_to(outside)
    images = torch.rand(len(NAMES) + 1, 3, 8, 8)
    paths = save_images(out, images, [*NAMES, "link"], [0] * (len(NAMES) + 1))
    assert {p.parent for p in paths} == {out}
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in paths)
    assert not any(p.is_symlink() for p in paths)
    assert outside.read_bytes() == b"mine"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nobody-by-this-name/x"])
def test_impossible_folders_and_files_are_one_line(tmp_path: Path, capsys, name: str):
    where = name if name.startswith("~") else f"{tmp_path}/{name}"
    if not name.startswith("~"):  # else a folder of just that name, as shells have it
        refused(capsys, "train", "--dry-run", "--output-dir", where)
    refused(capsys, "train", "--dry-run", "--prompts", where)
    refused(capsys, "train", "--dry-run", "--model", where)
    refused(capsys, "train", "--dry-run", "--shortcut", where)
    refused(capsys, "train", "--dry-run", "--reward-model", where)
    refused(capsys, "train", "--dry-run", "--reward", f"{where}.py:name")


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("target", ["file", "folder", "absent"])
def test_links_in_an_output_folder_are_refused(tmp_path: Path, capsys, name: str, target: str):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    if target == "file":
        outside.write_text("mine")
    elif target == "folder":
        outside.mkdir()
        (outside / "mine.txt").write_text("mine")
    (run / name).symlink_to(outside)
    before = sorted(tmp_path.rglob("*"))
    refuse_links(run, [n for n in RUN if n != name])
    for arguments in (
        ["train", "--output-dir", run],
        ["train", "--dry-run", "--resume", "--output-dir", run],
        ["demo", "--output-dir", run],
    ):
        said = refused(capsys, *arguments)
        assert f"--output-dir {run}: {run / name} is a link to {outside}" in said
        assert "remove the link, or name another folder" in said
    assert sorted(tmp_path.rglob("*")) == before
    assert target != "file" or outside.read_text() == "mine"


def test_links_further_below_are_refused_too(tmp_path: Path, capsys):
    """A comparison writes deep into its folder; the folder itself may be a link."""
    out, outside = tmp_path / "real", tmp_path / "outside"
    folder = out / "runs" / "clip" / "shortft"
    folder.mkdir(parents=True)
    (tmp_path / "out").symlink_to(out)
    refuse_links(tmp_path / "out", COMPARISON)
    (folder / "seed-0").symlink_to(outside)
    arguments = ["--rewards", "symmetry", "--methods", "draft_k", "--output-dir", tmp_path / "out"]
    assert "seed-0 is a link to" in refused(capsys, "compare", *arguments)
    assert not outside.exists()


CANARY = "hf_canary0123456789"
SECRETS = [
    f"https://user:{CANARY}@hub/x",
    "https://user:pa$$word@hub/x",
    "https://user:pa/$$word@hub/x",
    "https://user:pa@$$word@hub/x",
    "https://$$word@hub/x",
    "https://hub/x?signature=$$word",
    "user:pa$$word@hub/x",
    f"owner/{CANARY}",
]


@pytest.mark.parametrize("value", SECRETS)
@pytest.mark.parametrize(
    "option", ["--model", "--shortcut", "--reward", "--prompts", "--rank", "--output-dir"]
)
def test_no_message_repeats_a_login_or_a_token(tmp_path: Path, capsys, option: str, value: str):
    if option == "--output-dir":  # a file in the way is what makes it an error
        value = f"{value}/y"
        Path(value).parent.parent.mkdir(parents=True, exist_ok=True)
        Path(value).parent.write_text("")
    elif option == "--model" and value == SECRETS[-1]:
        value += "/not-an-id"
    said = refused(capsys, "train", "--dry-run", option, value)
    assert "canary" not in said
    assert "$$word" not in said
    assert "user:pa" not in said
    assert option in said


def test_no_message_repeats_a_secret_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse")
    monkeypatch.setenv("SHORT_TOKEN", "no")
    said = refused(capsys, "train", "--dry-run", "--model", "/nowhere/correct-horse/x")
    assert "--model /nowhere/***/x: no such model" in said


@pytest.mark.parametrize(
    "text",
    [
        "--reward hf_reward.py:f, clip:1,own.py:f: no such file",
        "--model owner/name@main: no such model; give a hub id such as owner/name",
        "--reward-model hpsv2=owner/name@main#123: try clip=/models/x@1",
        "--shortcut C:/models@home/x.safetensors: no such file",
        "http://localhost:8080/x: no answer",
    ],
)
def test_other_messages_stay_as_they_are(text: str):
    assert without_secrets(text) == text


def test_a_long_message_is_redacted_in_no_time():
    for part in ("a", "a:", "http://", "hf_", "@", "a@:/"):
        began = time.monotonic()
        without_secrets(part * 50_000)
        assert time.monotonic() - began < 5, part


def test_the_token_is_written_nowhere(settings, tmp_path: Path, capsys, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    change = {"updates": 2, "tensorboard": True, "progress": True, "held_out": "symmetry"}
    config = Config(**{**settings, **change})
    heard = []

    def said() -> str:
        """What was printed since; every command is listened to before the next one."""
        printed = capsys.readouterr()
        heard.append(printed.out + printed.err)
        return heard[-1]

    adapter = train(config)
    assert "reward" in said()
    arguments = ["--model", settings["model"], "--prompts", settings["prompts"]]
    for command in (
        ["train", *arguments, "--shortcut", "none", "--dry-run"],
        ["export", "--adapter", adapter, "--no-measure", "--output-dir", tmp_path / "exported"],
        ["sample", "--model", settings["model"], "--adapter", adapter, "--prompt", "x",
         "--output-dir", tmp_path / "sampled"],
    ):  # fmt: skip
        assert main([str(a) for a in command]) == 0, command
        assert said(), command
    for option in (["--shortcut", "no/where"], ["--reward", f"https://me:{CANARY}@hub/x"]):
        assert main([str(a) for a in ("train", *arguments, *option)]) == 2
        assert "error: " in said()
    assert [text for text in heard if CANARY in text] == []
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20
    assert [p for p in files if CANARY.encode() in p.read_bytes()] == []


TEXTS = st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))


def answer(read: Callable[[], Any]) -> Any:
    """What a reader returns, or None where it refuses in one line."""
    try:
        return read()
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError(str(error)) from error
        return None


@CASES
@given(content=st.binary(max_size=400) | TEXTS)
def test_any_prompt_file_is_read_or_refused_in_one_line(tmp_path_factory, content: bytes):
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz-prompts.txt"
    path.write_bytes(content)
    prompts = answer(lambda: read_prompts(path))
    if prompts is not None:
        assert prompts
        assert all(p == p.strip() and p and "\n" not in p for p in prompts)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["none", "true", "1e-4", "k=2", "clip:1,symmetry:2", "clip+symmetry~1"])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=5) | st.dictionaries(st.text(max_size=8), SCALARS)
NAMES_OR_TEXT = st.sampled_from(sorted(Config.model_fields)) | st.text(max_size=12)


@CASES
@given(
    content=st.binary(max_size=200)
    | TEXTS
    | st.dictionaries(NAMES_OR_TEXT, VALUES, max_size=4).map(lambda d: json.dumps(d).encode())
)
def test_any_configuration_is_read_or_refused_in_one_line(tmp_path_factory, content: bytes):
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz.yaml"
    path.write_bytes(content)
    config = answer(lambda: load_config(path))
    if config is not None:
        assert Config(**config.model_dump()).model_dump() == config.model_dump()

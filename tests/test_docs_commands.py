"""Every `shortft` line in the documentation is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from shortft.assets import asset
from shortft.cli import app, main
from shortft.cli_options import config_of, settings_in
from shortft.compare import command
from shortft.compare.jobs import Workshop
from shortft.config import Config
from shortft.paths import exists

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

PLACEHOLDERS = {" …": "", "PATH_OR_ID": "owner/name", r"\$n\b": "25", r"\bFILE\b": "prompts.txt"}


def lines(text: str) -> list[list[str]]:
    """The arguments of each `shortft` line in blocks of shell, placeholders filled in."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|[/ ])shortft ((?:" + "|".join(COMMANDS) + r")\b.*)", line)
            if match:
                words = match[1].partition("; done")[0]
                for placeholder, example in PLACEHOLDERS.items():
                    words = re.sub(placeholder, example, words)
                arguments = shlex.split(words, comments=True)
                if ">" in arguments:
                    arguments = arguments[: arguments.index(">")]
                found.append(arguments)
    return found


def make_files(arguments: list[str]) -> None:
    """What a line takes for granted: adapters, prompts, shortcuts, models, configurations."""
    for option, value in zip(["", *arguments], arguments, strict=False):
        path = Path(value)
        if option == "--adapter":
            path.mkdir(parents=True, exist_ok=True)
        elif not exists(value) and (
            (option in ("--prompts", "--sample-from", "--model", "--shortcut") and path.suffix)
            or path.suffix == ".yaml"
            or ".py:" in value
        ):
            path = Path(value.partition(":")[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                path.symlink_to(asset("shortcut", "shortcut.safetensors"))
                continue
            path.write_text("" if path.suffix == ".yaml" else "warm = 1\n", encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in lines(page.read_text(encoding="utf-8")):
        if arguments[0].startswith("-"):
            continue
        name, *rest = arguments
        make_files(rest)
        context = COMMANDS[name].make_context(name, rest)
        if name in ("train", "plan", "compare"):
            given = {key: context.params[key] for key in Config.model_fields}
            if name == "compare":
                given["output_dir"] = None
            config_of(settings_in(context.params["config_file"]), given)
        if name == "compare":  # its methods and rewards are checked when it begins
            monkeypatch.setattr(command, "compare_command", lambda *args, **_: Workshop(*args))
            assert main(arguments) == 0


@pytest.mark.parametrize("model", ["sd15", "sdxl", "sd3", "flux"])
def test_large_models_are_run_in_bf16_few_at_a_time(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / f"align-{model}.md"
    shown = [found for found in lines(page.read_text(encoding="utf-8")) if found[0] != "train"]
    assert {"evaluate", "export"} <= {name for name, *_ in shown}
    for name, *rest in shown:
        make_files(rest)
        params = COMMANDS[name].make_context(name, rest).params
        assert params["precision"] == "bf16", (name, rest)
        at_once = params["batch_size"] // params.get("accumulation", 1)
        assert at_once <= (16 if model == "sd15" else 4), (name, rest)


def test_a_wrong_option_is_found() -> None:
    (arguments,) = lines("```sh\nshortft train emoji --rnk 3  # no\n```")
    with pytest.raises(Exception, match="rnk"):
        COMMANDS["train"].make_context("train", arguments[1:])


def test_the_pages_have_commands() -> None:
    assert sum(len(lines(page.read_text(encoding="utf-8"))) for page in PAGES) >= 130

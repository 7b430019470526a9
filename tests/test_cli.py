"""The command line: fast, complete, and plain about mistakes."""

import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shortft
from shortft.cli import main
from shortft.config import Config, load_config, option_name
from shortft.errors import Stopped
from shortft.routing import load_adapter

COMMANDS = ["train", "plan", "sample", "evaluate", "check", "shortcut", "demo", "doctor"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shortft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Stand-ins for the slow modules; what the commands pass on is collected here."""
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> int:
        made.append((args, kwargs))
        return 1

    for module, function in (
        ("train", "train"),
        ("plan_view", "show_plan"),
        ("sampling", "sample"),
        ("shortcut_check", "check_command"),
    ):
        stand_in = ModuleType(f"shortft.{module}")
        setattr(stand_in, function, record)
        monkeypatch.setitem(sys.modules, f"shortft.{module}", stand_in)
    return made


def test_help_is_fast() -> None:
    """Processor time, the least of three: other processes do not count against it."""

    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        start = seconds()
        assert run("--help").returncode == 0
        times.append(seconds() - start)
    assert min(times) <= 0.5


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from shortft.cli import main; main(['train', '--help']); "
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("arguments", [[], ["--help"], *([c, "--help"] for c in COMMANDS)])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "Usage:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"shortft {shortft.__version__}\n"


def test_every_field_has_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    text = capsys.readouterr().out
    for name, field in Config.model_fields.items():
        assert option_name(name) in text
        if field.annotation is bool:
            assert f"--no-{option_name(name)[2:]}" in text


def test_dry_run_prints_the_complete_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given.yaml"
    given.write_text("rank: 8\nsegments: 2\nprogress: true\n", encoding="utf-8")
    options = ["--rank", "16", "--no-progress", "--learning-rate", "1e-4", "--updates", "3"]
    assert main(["train", str(given), *options, "--stage-shares", "0.5,0.5", "--dry-run"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(shown) == Config(
        rank=16,
        segments=2,
        progress=False,
        learning_rate=1e-4,
        updates=3,
        stage_shares=(0.5, 0.5),
    )


MISTAKES = [
    (["train", "--rnk", "3"], "--rank"),
    (["train", "--learning_rate", "3"], "--learning-rate"),
    (["trian"], "Did you mean 'train'?"),
    (["train", "--rank", "0"], "--rank 0: must be greater than or equal to 1"),
    (["train", "--rank"], "--rank"),
    (["train", "--reward", "beauty"], "--reward beauty: no reward named 'beauty'"),
    (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
    (["plan", "--stage-shares", "1"], "1 shares for 4 segments"),
    (["sample"], "give --prompt TEXT or --prompts FILE"),
    (["sample", "--prompts", "nowhere.txt"], "--prompts nowhere.txt: no such file"),
    (["sample", "--prompt", "a cat", "--num-steps", "0"], "--num-steps"),
    (["sample", "--prompt", "a cat", "--model", "emojo"], "--model emojo: no such model"),
    (["sample", "--prompt", "a cat", "--output-dir", __file__], "is a file"),
    (["evaluate"], "--adapter"),
    (["evaluate", "--adapter", "nowhere"], "nowhere"),
    (["evaluate", "--adapter", ".", "--reward", "clip:x"], "--reward clip:x"),
    (["check", "--shortcut", "nowhere"], "--shortcut nowhere: no such file"),
    (["shortcut", "--kind", "magic"], "'regression'"),
    (["demo", "--reward", "beauty"], "no reward named 'beauty'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_mistakes_show_no_traceback_from_outside() -> None:
    result = run("train", "--rank", "zero")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --rank zero: must be a valid integer")
    assert result.stderr.count("\n") == 1


def test_train_passes_its_settings_on(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    assert main(["train", "--updates", "3", "--no-timestep-lora", "--resume"]) == 0
    settings = Config(updates=3, timestep_lora=False)
    assert calls == [((settings,), {"resume": True, "allow_change": False, "auto_resume": False})]


@pytest.mark.parametrize(
    ("given", "updates", "minutes"),
    [
        ("", 180, 2.0),
        ("--minutes 5", None, 5.0),
        ("--updates 9", 9, None),
        ("--updates 9 --minutes 2", 9, 2.0),
        ("--minutes none", 180, None),
    ],
)
def test_a_budget_takes_the_place_of_the_recipes(
    given: str,
    updates: int | None,
    minutes: float | None,
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    assert main(["train", "emoji", *given.split()]) == 0
    ((config,), _) = calls[0]
    assert (config.updates, config.minutes) == (updates, minutes)


def test_plan_takes_the_options_of_train(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    assert main(["plan", "--segments", "3", "--png", "plan.png"]) == 0
    assert calls == [((Config(segments=3), Path("plan.png")), {})]


def test_sample_joins_prompts(
    tmp_path: Path, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("three\nfour\n", encoding="utf-8")
    options = ["--prompt", "one", "--prompt", "two", "--prompts", str(path)]
    assert main(["sample", *options, "--strength", "0.5"]) == 0
    ((_, passed),) = calls
    assert passed["prompts"] == ["one", "two", "three", "four"]
    assert passed["strength"] == 0.5
    assert passed["guidance_scale"] is None


def test_check_returns_its_verdict(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    assert main(["check"]) == 1
    assert calls[0][1]["shortcut"] == "auto"


@pytest.mark.parametrize(
    ("reason", "code"), [(KeyboardInterrupt(), 130), (Stopped(2), 130), (Stopped(15), 143)]
)
def test_interruption_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, reason: BaseException, code: int
) -> None:
    def interrupted(config: Config, **options: bool) -> None:
        raise reason

    stand_in = ModuleType("shortft.train")
    stand_in.train = interrupted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shortft.train", stand_in)
    assert main(["train"]) == code


def test_help_shows_defaults_as_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "none given = its paper's. [default: none]" in shown
    assert "Pydantic" not in shown


def test_package_exports_load_late() -> None:
    code = "import sys, shortft; sys.exit(bool({'torch', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert shortft.load_adapter is load_adapter
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shortft.no_such_name

"""The configuration: what it accepts, what it refuses, and how it says so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shortft.config import DEFAULT_MINUTES, Config, load_config, option_name, to_yaml
from shortft.errors import UserError
from shortft.inputs import read_prompts


def test_importing_and_validating_loads_no_torch() -> None:
    code = (
        "import sys; from shortft.config import Config; Config(reward='clip:1,symmetry:0.2'); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("field", "value"), [("sample_from", "empty.txt"), ("held_out", "nosuch"), ("reward", "clip:x")]
)
def test_the_option_that_is_wrong_is_named(tmp_path: Path, field: str, value: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    wrong = str(tmp_path / value) if field == "sample_from" else value
    with pytest.raises(UserError, match=rf"^{re.escape(option_name(field))} "):
        load_config(None, {field: wrong})


@pytest.mark.parametrize(
    ("shortcut", "field"),
    [("none", "shortcut_guidance_scale"), ("none", "shortcut_scale"), ("plain", "shortcut_scale")],
)
def test_settings_of_a_shortcut_need_one(shortcut: str, field: str) -> None:
    with pytest.raises(UserError, match=rf"{option_name(field)} 2: --shortcut {shortcut} has no"):
        Config(shortcut=shortcut, **{field: 2.0})
    assert Config(shortcut="plain", shortcut_guidance_scale=2.0).shortcut_guidance_scale == 2


def test_every_field_is_documented() -> None:
    for name, field in Config.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_defaults_obey_their_own_rules() -> None:
    defaults = Config().model_dump()
    assert Config(**defaults).model_dump() == defaults


def test_budget_defaults_only_when_none_is_given() -> None:
    assert Config().minutes == DEFAULT_MINUTES
    assert Config(updates=3).minutes is None
    assert Config(minutes=2).updates is None
    both = Config(minutes=2, updates=3)
    assert (both.minutes, both.updates) == (2, 3)


def test_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().rank = 3  # type: ignore[misc]


def test_text_values_as_the_command_line_passes_them() -> None:
    config = Config.model_validate(
        {
            "rank": "7",
            "learning_rate": "1e-4",
            "stage_shares": "0.4, 0.3,0.2,0.1",
            "guidance_scale": "none",
            "shortcut": "none",
        }
    )
    assert config.rank == 7
    assert config.learning_rate == 1e-4
    assert config.stage_shares == (0.4, 0.3, 0.2, 0.1)
    assert config.guidance_scale is None
    assert config.shortcut == "none"


MISTAKES = [
    ({"rnk": 3}, "configuration key 'rnk': unknown; did you mean 'rank'?"),
    ({"learning-rate": 3}, "did you mean 'learning_rate'?"),
    ({"zzzzzz": 3}, "'zzzzzz': unknown; see shortft train --help"),
    ({3: 3}, "configuration key '3': unknown"),
    ({"rank": 0}, "--rank 0: must be greater than or equal to 1"),
    ({"rank": "x"}, "--rank x: must be a valid integer"),
    ({"rank": True}, "--rank True: must not be a boolean"),
    ({"rank": None}, "--rank None: must be a valid integer"),
    ({"recompute": "maybe"}, "--recompute maybe: must be a valid boolean"),
    ({"learning_rate": float("nan")}, "--learning-rate nan: must be a finite number"),
    ({"learning_rate": -1.0}, "--learning-rate -1: must be greater than 0"),
    ({"weight_decay": -1}, "--weight-decay -1: must be greater than or equal to 0"),
    ({"guidance_scale": 0.5}, "--guidance-scale 0.5: must be greater than or equal to 1"),
    ({"guidance_grad": "no"}, "--guidance-grad no: must be 'both' or 'positive'"),
    ({"method": "draft"}, "--method draft: unknown; did you mean 'draft_k'?"),
    ({"method_options": "k=2"}, "--method-options k: unknown to shortft; it has: jump"),
    ({"method_options": "jump"}, "--method-options jump: write name=value"),
    ({"method_options": "jump=leap"}, "--method-options jump=leap: choose one of auto"),
    ({"method_options": {"pin": 2}}, "--method-options pin=2: wrong value"),
    ({"method": "full", "method_options": "k=2"}, "k: unknown to full; it has none"),
    ({"method": "draft_k", "method_options": "k=0"}, "k=0: must lie in [1, inf]"),
    ({"method": "draft_k", "method_options": "k=x"}, "k=x: wrong value"),
    ({"method": "drtune", "method_options": {"train_step": 2}}, "did you mean 'train_steps'?"),
    ({"precision": "fp16"}, "--precision fp16: must be 'auto', 'fp32' or 'bf16'"),
    ({"seed": -1}, "--seed -1: must be greater than or equal to 0"),
    ({"model": "emojo"}, "--model emojo: no such model; give 'emoji'"),
    ({"model": "./no/where"}, "--model ./no/where: no such model"),
    ({"reward_model": "/no/where"}, "--reward-model /no/where: no such model"),
    ({"reward": "clib"}, "did you mean clip?"),
    ({"reward": "clip:-1"}, "not a positive number"),
    (
        {"shortcut": "nowhere"},
        "--shortcut nowhere: no such file; give 'auto', 'guided', 'unguided', 'none'",
    ),
    ({"shortcut": "hyper-sd15"}, "did you mean 'hyper-sd15-"),
    ({"shortcut_scale": 0}, "--shortcut-scale 0: must be greater than 0"),
    ({"shortcut": ""}, "--shortcut '': no such file"),
    (
        {"shortcut": "none", "method_options": "jump=shortcut"},
        "--method-options jump=shortcut: --shortcut none leaves no shortcut to jump by",
    ),
    (
        {"shortcut": "none", "method": "jumps", "method_options": "jump=half"},
        "--method-options jump=half: --shortcut none leaves no shortcut to jump by",
    ),
    ({"prompts": "nowhere.txt"}, "--prompts nowhere.txt: no such file"),
    ({"prompts": 3}, "--prompts 3: "),
    ({"output_dir": __file__}, "is a file; give a directory"),
    ({"output_dir": f"{__file__}/below"}, "is a file; give a directory"),
    ({"updates": None, "minutes": None}, "no budget; give at least one"),
    ({"updates": 0}, "--updates 0: must be greater than or equal to 1"),
    ({"minutes": 0}, "--minutes 0: must be greater than 0"),
    ({"segments": 60}, "--segments 60: more segments than the 50 steps"),
    ({"batch_size": 8, "accumulation": 3}, "--accumulation 3: does not divide --batch-size 8"),
    ({"stage_shares": [0.5, 0.5]}, "--stage-shares 0.5,0.5: 2 shares for 4 segments"),
    ({"stage_shares": [0, 0, 0, 0]}, "the shares add up to 0, not 1; for example 0.25,0.25"),
    ({"stage_shares": ["x", 0.5]}, "--stage-shares x,0.5: must be a valid number"),
    ({"stage_shares": [2, -1, 0, 0]}, "--stage-shares 2,-1,0,0: a share is negative"),
    ({"stage_shares": "a,b,c,d"}, "--stage-shares a,b,c,d: must be a valid number"),
    ({"output_dir": "a\nb", "rank": "a\nb"}, "--rank 'a\\nb': must be a valid integer"),
]


@pytest.mark.parametrize(("values", "message"), MISTAKES, ids=[str(m[0]) for m in MISTAKES])
def test_mistakes_are_one_clear_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufeffrank: 8\r\nlearning_rate: 1e-4\r\noutput_dir: läufe\r\n".encode())
    config = load_config(path, {"rank": "16"})
    assert config.rank == 16
    assert config.learning_rate == 1e-4
    assert config.output_dir == Path("läufe")


@pytest.mark.parametrize("text", ["", "# nothing here\n"])
def test_an_empty_file_means_the_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == Config()


BAD_FILES = [
    (b"rank: [1", "not valid YAML at line 1, column 9"),
    (b"- rank", "not a mapping"),
    (b"rank", "not a mapping"),
    (b"rank: \xff", "not UTF-8 text (byte 6)"),
    (b"a: !!python/object:os.system {}", "not valid YAML"),
    (b"seed: 2026-99-99", "not valid YAML"),
    (b"rank: \x00", "not valid YAML"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_bad_files_are_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


@hypothesis_settings(deadline=None)  # machines are busy at times
@given(
    rank=st.integers(1, 512),
    learning_rate=st.floats(1e-8, 1.0),
    updates=st.none() | st.integers(1, 10**6),
    output_dir=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20),
    shares=st.none() | st.just((0.5, 0.25, 0.25, 0.0)),
)
def test_yaml_reads_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory,
    rank: int,
    learning_rate: float,
    updates: int | None,
    output_dir: str,
    shares: tuple[float, ...] | None,
) -> None:
    config = Config(
        rank=rank,
        learning_rate=learning_rate,
        updates=updates,
        minutes=1.5,
        output_dir=Path(output_dir),
        stage_shares=shares,
    )
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa café\r\n\r\n# a comment\r\n  red apple  \nlast\u2028one".encode())
    assert read_prompts(path) == ["a café", "red apple", "last\u2028one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n# only this\n", "holds no prompt"),
        (b"caf\xe9", "not UTF-8 text"),
        (b"ok\n" + b"x" * 2001, "line 2 has 2,001 characters"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Config(prompts=path)


def test_a_line_of_the_greatest_length_passes(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("x" * 2000, encoding="utf-8")
    assert Config(prompts=path).prompts == path


def test_paths_expand_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a cat", encoding="utf-8")
    config = Config(output_dir=Path("~/runs"), prompts=Path("~/prompts.txt"))
    assert config.output_dir == tmp_path / "runs"
    assert config.prompts == tmp_path / "prompts.txt"


def test_option_names() -> None:
    assert option_name("max_grad_norm") == "--max-grad-norm"

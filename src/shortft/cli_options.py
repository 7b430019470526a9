"""Command-line options: those that several commands share, and those made from `Config`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from shortft.assets import EMBEDDED
from shortft.config import Config, load_config, option_name, read_settings
from shortft.inputs import (
    check_model_source,
    check_output_dir,
    check_place,
    check_reward,
    read_prompts,
)
from shortft.paths import is_dir, is_file
from shortft.recipes import recipe, recipe_names
from shortft.shortcuts import check_shortcut

LIMITS = ("updates", "minutes")
Command = TypeVar("Command", bound=Callable[..., object])


def if_given(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A callback for an option that may be left out."""

    def checked(value: Any) -> Any:
        return None if value is None else check(value)

    return checked


ModelOption = Annotated[
    str,
    typer.Option(
        help="Base model: 'emoji' (embedded), a diffusers directory, a .safetensors file or a hub "
        "id.",
        callback=lambda value: check_model_source("--model", value, EMBEDDED),
    ),
]
TunedModelOption = Annotated[
    str | None,
    typer.Option(
        help="Base model, as in train; default: the adapter's own, without one 'emoji'.",
        callback=if_given(lambda value: check_model_source("--model", value, EMBEDDED)),
    ),
]
PipelineOption = Annotated[
    str | None,
    typer.Option(
        help="For a model in a single file: directory or hub id of its configuration.",
        callback=if_given(lambda value: check_place("--pipeline", value)),
    ),
]
REWARD = typer.Option(
    help="A reward's name, or weighted names such as 'clip:1,symmetry:0.2'.",
    callback=if_given(check_reward),
)
ShortcutOption = Annotated[
    str,
    typer.Option(
        help="Few-step LoRA: 'guided' (= 'auto') or 'unguided' (both ship for emoji), a file, a "
        "file on the hub (owner/name/file.safetensors), or a published one such as hyper-sd15-4.",
        callback=lambda value: check_shortcut("--shortcut", value),
    ),
]
OutputDirOption = Annotated[
    Path,
    typer.Option(
        help="Directory to write into; made if absent.",
        callback=lambda value: check_output_dir("--output-dir", value),
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text file of prompts, one a line.",
        metavar="FILE",
        callback=if_given(lambda value: _readable_prompts(value)),
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
StepsOption = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps of the chain.")]
AdapterStepsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="Denoising steps; default: the adapter's own, or 50."),
]
SegmentsOption = Annotated[int, typer.Option(min=1, help="Segments of the chain.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        min=1,
        help="Classifier-free guidance; default: the adapter's if there is one, or the model's.",
    ),
]
PrecisionOption = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(
        help="Number format of the frozen networks; 'auto' = bf16 where the machine computes "
        "in it, else fp32.",
        callback=lambda value: _own_precision() if value == "auto" else value,
    ),
]
StrengthOption = Annotated[
    float, typer.Option(help="Scale of the adapter: 0 = base model, 1 = as trained.")
]
ResolutionOption = Annotated[
    int | None,
    typer.Option(min=8, help="Height and width of the pictures; default: the model's own."),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Pictures or samples per network call.")]


def _readable_prompts(path: Path) -> Path:
    if is_file(path) or is_dir(path) or not path.exists():  # a pipe can be read once
        read_prompts(path)
    return path


def _own_precision() -> str:
    from shortft.precision import own_precision

    return own_precision()


def with_config_options(command: Command) -> Command:
    """Replace the ``**options`` of `command` by one command-line option per field of `Config`.

    Values arrive as text (flags as booleans), None where not given: `Config` alone parses and
    checks them, so a configuration file and the command line obey the same rules.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    generated = [_parameter(name, field) for name, field in Config.model_fields.items()]
    command.__signature__ = signature.replace(parameters=own + generated)  # type: ignore[attr-defined]
    return command


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = field.annotation is bool
    option = option_name(name)
    default = _shown(field.get_default(call_default_factory=True))
    declared = typer.Option(
        f"{option}/--no-{option[2:]}" if flag else option,
        help=f"{field.description} [default: {default}]",
        metavar=None if flag else _metavar(field.annotation),
    )
    annotation = (bool if flag else str) | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation, declared],
    )


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    for kind, shown in ((int, "INTEGER"), (float, "NUMBER"), (Path, "PATH"), (str, "TEXT")):
        if annotation is kind or kind in get_args(annotation):
            return shown
    return "NUMBERS"


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in (None, {}, ()) else str(default)


def config_of(settings: Mapping[str, object], options: Mapping[str, object]) -> Config:
    """A file's or a recipe's settings with the options on top."""
    given = {name: v for name, v in options.items() if v is not None}
    limits = [name for name in LIMITS if str(given.get(name, "none")) != "none"]
    if len(limits) == 1:  # takes the place of the file's
        given = {**dict.fromkeys(LIMITS, None), **given}
    return load_config(None, {**settings, **given})


def settings_in(path: Path | None) -> dict[str, object]:
    """What a file or a recipe of that name says; a file goes first."""
    if path is None:
        return {}
    if not is_file(path) and str(path) in recipe_names():
        return dict(recipe(str(path)))
    return dict(read_settings(path))

"""One validated configuration of a training run; every field is documented in place.

Importing this module loads no torch, so that a bad option is reported at once.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shortft.assets import EMBEDDED
from shortft.errors import UserError
from shortft.inputs import (
    check_model_source,
    check_output_dir,
    check_place,
    check_reward,
    parse_yaml,
    read_prompts,
    read_text,
)
from shortft.methods.catalog import METHODS, parse_options, read_options
from shortft.paths import expand
from shortft.rewards.places import check_models_are_used, parse_reward_models
from shortft.rewards.registry import REWARDS
from shortft.rewards.spec import scorers
from shortft.shortcuts import check_shortcut

DEFAULT_MINUTES = 4.0  # the budget when neither updates nor minutes is given


class Config(BaseModel):
    """What one training run does. Immutable; every violation raises `UserError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # What is aligned, and with what
    model: str = Field(
        EMBEDDED,
        description="Base model: 'emoji' (embedded in the package), a directory in diffusers' "
        "pipeline format, a .safetensors file in the original layout, or a hub id such as "
        "owner/name.",
    )
    pipeline: str | None = Field(
        None,
        description="For a model in a single file: the directory or hub id, in diffusers' pipeline "
        "format, that gives its configuration and the parts it lacks; none = the "
        "model_index.json beside the file, or the published model of its layout.",
    )
    decoder: str | None = Field(
        None,
        description="Decoder in place of the model's own while training: a directory or hub id of "
        "an AutoencoderTiny (TAESD: far less memory) or AutoencoderKL.",
    )
    resolution: int | None = Field(
        None,
        ge=8,
        multiple_of=8,
        description="Height and width of the pictures in pixels, a multiple of 8; none = the "
        "model's own.",
    )
    method: str = Field(
        "shortft",
        description=f"How the reward's gradient reaches the LoRAs: {', '.join(METHODS)}. See "
        "docs/methods.md.",
    )
    method_options: dict[str, Any] = Field(
        default_factory=dict,
        description="The method's own settings, such as 'k=2' or 'jump=ddim,pin=true'; none given "
        "= its paper's.",
    )
    reward: str = Field(
        "clip",
        description=f"Reward to maximise: {', '.join(REWARDS)}, a weighted mix such as "
        "'clip:1,symmetry:0.2', a recipe such as paper-mix, or your own 'file.py:name'. See "
        "docs/rewards.md.",
    )
    reward_model: str | None = Field(
        None,
        description="Where reward models lie: a directory or hub id for clip, or 'pickscore=PLACE,"
        "hpsv2=PLACE'; none = the embedded one for clip, the hub for others.",
    )
    prompts: Path | None = Field(
        None,
        description="UTF-8 text file of training prompts, one a line; none = those that ship: "
        "for 'emoji' its own, for others 600 general ones.",
    )
    output_dir: Path = Field(
        Path("runs/train"), description="Directory for the adapter, checkpoints, grids and logs."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of noise, prompt order and LoRA initialisation."
    )

    # The chain
    num_steps: int = Field(
        50, ge=1, le=1000, description="Denoising steps of the inference chain, 1 to 1000."
    )
    segments: int = Field(
        4,
        ge=1,
        description="Parts of the chain, one LoRA each; 1 to num_steps. Equal parts of the "
        "training timesteps; for flow models each starts where a few-step sampler calls the "
        "model.",
    )
    guidance_scale: float | None = Field(
        None,
        ge=1,
        description="Classifier-free guidance of base and policy, at least 1 (= unguided); "
        "none = the model's default.",
    )
    guidance_grad: Literal["both", "positive"] = Field(
        "both",
        description="Guidance branches that carry gradient: 'both', or 'positive', which is not "
        "exact and saves half the memory where --recompute does not.",
    )
    shortcut: str = Field(
        "auto",
        description="Few-step LoRA that jumps over a segment: 'auto' (of the two that ship for "
        "emoji the one that suits the method), 'guided' (the closer one), 'unguided' (the cheaper "
        "one), a file, a file on the hub (owner/name/file.safetensors), a published one such as "
        "hyper-sd15-4, pcm-sdxl-8 or tcd-sd15 (docs/shortcuts.md lists them), 'none' (guided DDIM "
        "jumps of the base) or 'plain' (unguided).",
    )
    shortcut_guidance_scale: float | None = Field(
        None,
        ge=1,
        description="Guidance of the shortcut, at least 1 (= unguided); none = its own: what the "
        "JSON file beside it or its publisher names, else 1, or the chain's on FLUX.1.",
    )
    shortcut_scale: float | None = Field(
        None, gt=0, description="Scale of the shortcut's LoRA, above 0; none = its own, or 1."
    )
    check_shortcut: bool = Field(
        True,
        description="Before training, measure a shortcut that does not ship on a few "
        "prompts, and refuse it where it lands no closer to the base's chain than the base does.",
    )
    merge: bool = Field(
        False,
        description="Fold LoRAs that do not train (the shortcut's, and the rewards' in calls "
        "without gradient to them) into copies of the layers they touch: faster, more memory.",
    )
    encode_ahead: bool = Field(
        False,
        description="Encode all prompts before training and let the text encoders leave memory.",
    )
    shard: bool = Field(
        False,
        description="Let each process of a run on several GPUs keep a part of the denoiser's "
        "weights alone, gathered layer by layer when they are used (as FSDP does): less memory, "
        "more time.",
    )
    recompute: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )

    # What is learned, and how
    timestep_lora: bool = Field(
        True,
        description="One stacked LoRA per segment; off = one LoRA shared by all segments. Other "
        "methods than shortft have one LoRA at every timestep.",
    )
    rank: int = Field(32, ge=1, description="Rank of each LoRA, at least 1.")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="'adamw', or 'adamw8bit' by bitsandbytes: its two moments take a quarter of "
        "the memory.",
    )
    learning_rate: float = Field(3e-4, gt=0, description="Learning rate of AdamW, above 0.")
    learning_rate_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the budget, at its end, over which the learning rate falls to 0.",
    )
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay of AdamW, at least 0.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradient norm above which gradients are scaled down, above 0."
    )
    anchor: float = Field(
        0.0,
        ge=0,
        description="Weight of a penalty on the mean squared difference between predictions with "
        "and without LoRAs at the calls that train, against over-optimisation; 0 = none.",
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of a moving average of the LoRAs' weights, such as 0.99, in [0, 1): "
        "grids, guard and adapter then use the average; 0 = none.",
    )
    batch_size: int = Field(
        8, ge=1, description="Samples per update over all processes, at least 1."
    )
    accumulation: int = Field(
        1, ge=1, description="Parts that a batch is split into to save memory; divides batch_size."
    )
    split_on_out_of_memory: bool = Field(
        False,
        description="When memory runs out, halve the pictures that are run at once and go on with "
        "the same updates.",
    )
    reward_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Number format of the models that rewards are made of; scores are fp32 always.",
    )
    reward_device: Literal["cpu", "offload"] | None = Field(
        None,
        description="Where those models live: 'cpu' scores there, which is slow; 'offload' keeps "
        "them there and lets them visit the GPU while they score, before the chain's backward "
        "pass; none = beside the model.",
    )
    reward_seconds: float | None = Field(
        300.0, gt=0, description="Limit of one call of a reward, in seconds; none = no limit."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32",
        description="Number format of the frozen networks; LoRAs always train in fp32. 'auto' is "
        "bf16 where the machine computes in it, else fp32.",
    )

    # How long
    updates: int | None = Field(
        None, ge=1, description="Budget in optimizer updates, at least 1; none = no such limit."
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="Budget in minutes of training, above 0; none = no such limit. With both "
        f"budgets the first one reached counts; with neither it is {DEFAULT_MINUTES:g} minutes.",
    )
    clock: Literal["wall", "cpu"] = Field(
        "wall",
        description="What minutes count: 'wall' time, or the 'cpu' time of all threads of the run, "
        "for equal budgets on a busy machine.",
    )
    stage_shares: tuple[float, ...] | None = Field(
        None,
        description="Share of the budget for each stage: one number per segment, adding up to 1, "
        "such as 0.4,0.3,0.2,0.1; none = equal shares. Methods without stages ignore it.",
    )

    # What is seen and kept on the way
    sample_every: int = Field(50, ge=0, description="Updates between sample grids; 0 = none.")
    sample_times: int = Field(
        0, ge=0, description="Sample grids at so many equal parts of the budget as well; 0 = none."
    )
    sample_prompts: int = Field(8, ge=1, description="Prompts of a sample grid, at least 1.")
    sample_noises: int = Field(
        2,
        ge=1,
        description="Pictures of each of those prompts that are scored, the first of them drawn; 2 "
        "or more show whether they become alike.",
    )
    sample_from: Path | None = Field(
        None,
        description="UTF-8 text file of prompts for the sample grids, one a line; none = from the "
        "training prompts.",
    )
    guard: Literal["off", "warn", "stop"] = Field(
        "warn",
        description="When a held-out scorer falls while the reward rises (measured at sample "
        "grids): 'warn', or 'stop' and go back to the best adapter so far.",
    )
    guard_drop: float = Field(
        0.1,
        gt=0,
        description="Share of its first value that the held-out scorer may lose, above 0; means "
        "little for a scorer around 0, such as imagereward.",
    )
    best_by: Literal["reward", "held_out"] = Field(
        "reward",
        description="What makes an evaluation the best, whose adapter is kept: 'reward' or "
        "'held_out'; those beyond guard_drop never are.",
    )
    held_out: str | None = Field(
        None,
        description="Reward that only measures, for the guard; none = the embedded model's own "
        "scorer, or none for other models.",
    )
    checkpoint_every: int = Field(
        50, ge=0, description="Updates between checkpoints; 0 = only at the end."
    )
    keep_checkpoints: int = Field(2, ge=2, description="Newest checkpoints kept, at least 2.")
    tensorboard: bool = Field(True, description="Write TensorBoard logs into output_dir.")
    progress: bool = Field(True, description="Show a progress bar.")

    @model_validator(mode="wrap")
    @classmethod
    def _speak_plainly(cls, data: Any, handler: ModelWrapValidatorHandler[Config]) -> Config:
        """Prepare the values and turn pydantic's report into one line about one field."""
        if not isinstance(data, Mapping):
            return handler(data)
        _check_keys(data, cls.model_fields)
        values = {name: _from_text(name, value) for name, value in data.items()}
        if "updates" not in values and "minutes" not in values:
            values["minutes"] = DEFAULT_MINUTES
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            wrong = first["msg"].replace("Input should", "must", 1)
            raise _bad_value(name, data[name], wrong, _described(name)) from None

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        return check_model_source("--model", value, EMBEDDED)

    @field_validator("pipeline", "decoder")
    @classmethod
    def _known_place(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else check_place(option_name(str(info.field_name)), value)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            near = difflib.get_close_matches(value, METHODS, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(METHODS)}"
            raise UserError(f"--method {value}: unknown; {remedy}")
        return value

    @field_validator("optimizer")
    @classmethod
    def _installed_optimizer(cls, value: str) -> str:
        if value == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "--optimizer adamw8bit: bitsandbytes is not installed; install it by "
                "`pip install bitsandbytes`, or use --optimizer adamw"
            )
        return value

    @field_validator("reward", "held_out")
    @classmethod
    def _known_reward(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else check_reward(value, option_name(str(info.field_name)))

    @field_validator("reward_model")
    @classmethod
    def _known_reward_model(cls, value: str | None) -> str | None:
        parse_reward_models(value)
        return value

    @field_validator("prompts", "sample_from")
    @classmethod
    def _readable_prompts(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None:
            value = expand(value)
            read_prompts(value, option_name(str(info.field_name)))
        return value

    @field_validator("output_dir")
    @classmethod
    def _usable_output_dir(cls, value: Path) -> Path:
        return check_output_dir("--output-dir", value)

    @field_validator("shortcut")
    @classmethod
    def _existing_shortcut(cls, value: str) -> str:
        return check_shortcut("--shortcut", value)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        """Rules that span two fields."""
        if self.updates is None and self.minutes is None:
            raise UserError("--updates none --minutes none: no budget; give at least one of them")
        if METHODS[self.method].uses_segments and self.num_steps < self.segments:
            raise _bad_value(
                "segments",
                self.segments,
                f"more segments than the {self.num_steps} steps of the chain",
                f"at most {self.num_steps}, or raise --num-steps",
            )
        if self.batch_size % self.accumulation:
            raise _bad_value(
                "accumulation",
                self.accumulation,
                f"does not divide --batch-size {self.batch_size}",
                "choose one of its divisors",
            )
        for other in ("merge", "split_on_out_of_memory"):
            if self.shard and getattr(self, other):
                raise _bad_value(
                    "shard",
                    "true",
                    f"cannot be used with {option_name(other)}",
                    f"leave one of them out (--no-{other.replace('_', '-')})",
                )
        if self.guard == "stop" and not (self.sample_every or self.sample_times):
            raise _bad_value(
                "guard", "stop", "needs evaluations", "give --sample-every or --sample-times"
            )
        check_models_are_used(self.scorers, self.reward_model)
        self._check_stage_shares()
        if METHODS[self.method].few_step and self.shortcut == "none":
            raise UserError(
                f"--shortcut none: --method {self.method} tunes the few-step model; name its LoRA, "
                "or 'plain' for the base itself in as many steps"
            )
        unused = {
            "none": ("shortcut_guidance_scale", "shortcut_scale"),
            "plain": ("shortcut_scale",),
        }
        for name in unused.get(self.shortcut, ()):
            if getattr(self, name) is not None:
                raise _bad_value(
                    name,
                    getattr(self, name),
                    f"--shortcut {self.shortcut} has no few-step LoRA that it could act on",
                    "leave it out, or name a shortcut",
                )
        options = read_options(self.method, self.method_options)
        if self.shortcut == "none" and options.get("jump") in ("shortcut", "half"):
            raise UserError(
                f"--method-options jump={options['jump']}: --shortcut none leaves no shortcut to "
                "jump by; name one, or use jump=ddim"
            )
        object.__setattr__(self, "method_options", options)
        return self

    @property
    def scorers(self) -> set[str]:
        """The single rewards that a run loads: what it maximises, and what only measures."""
        return scorers(self.reward) | (scorers(self.held_out) if self.held_out else set())

    def _check_stage_shares(self) -> None:
        shares = self.stage_shares
        if shares is None or not METHODS[self.method].by_segment:
            return
        example = ",".join(f"{1 / self.segments:.3g}" for _ in range(self.segments))
        if len(shares) != self.segments:
            wrong = f"{len(shares)} shares for {self.segments} segments"
        elif min(shares) < 0:
            wrong = "a share is negative"
        elif abs(sum(shares) - 1) > 0.01:
            wrong = f"the shares add up to {sum(shares):.4g}, not 1"
        else:
            return
        raise _bad_value("stage_shares", shares, wrong, f"for example {example}")


def load_config(path: Path | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """Read a YAML file, if any, and apply `overrides` on top (field name to value).

    Raises:
        UserError: the file is missing, not UTF-8, not YAML or not a mapping, or a value is wrong.
    """
    values = {} if path is None else read_settings(path)
    return Config.model_validate({**values, **(overrides or {})})


def read_settings(path: Path) -> dict[str, Any]:
    """What a YAML file says, unchecked.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML or not a mapping.
    """
    return parse_yaml(read_text(path, ""), str(path))


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def option_name(field: str) -> str:
    """The command-line spelling of a field: ``batch_size`` is ``--batch-size``."""
    return "--" + field.replace("_", "-")


def _check_keys(names: Iterable[object], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(str(name).replace("-", "_"), known, n=1)
            remedy = f"did you mean {nearest[0]!r}?" if nearest else "see shortft train --help"
            raise UserError(f"configuration key {str(name)!r}: unknown; {remedy}")


def _from_text(name: str, value: object) -> object:
    """Understand command-line spellings: ``none`` for an absent value, commas for a tuple."""
    field = Config.model_fields[name]
    if isinstance(value, bool) and field.annotation is not bool:
        raise _bad_value(name, value, "must not be a boolean", _described(name))
    if value == "none" and field.default is None:
        return None
    if name == "stage_shares" and isinstance(value, str):
        return value.split(",")
    if name == "method_options" and isinstance(value, str):
        return parse_options(value)
    return value


def _bad_value(name: str, value: object, wrong: str, remedy: str) -> UserError:
    parts = value if isinstance(value, (list, tuple)) else [value]
    shown = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
    if not shown.isprintable() or not shown.strip():
        shown = repr(shown)
    return UserError(f"{option_name(name)} {shown}: {wrong}; {remedy}")


def _described(name: str) -> str:
    description = Config.model_fields[name].description or ""
    return "expected: " + description.partition(". ")[0].rstrip(".")

"""Every method with its source, its hyper-parameters and their defaults: the one place for them.

Light to import: the command line reads it before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from shortft.errors import UserError

if TYPE_CHECKING:
    from shortft.plans import Placement

Value = bool | int | float | str


@dataclass(frozen=True)
class Option:
    """A hyper-parameter of a method.

    Attributes:
        default: its value where the user gives none; its type is the option's type.
        about: what it does, its range, and where the default comes from.
        low, high: bounds of numbers, both allowed.
        choices: the allowed texts.
    """

    default: Value
    about: str
    low: float = 0.0
    high: float = float("inf")
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way of backpropagating a reward through a sampling chain.

    Attributes:
        about: one line.
        source: the paper or code that defines it.
        options: its hyper-parameters.
        placement: where its LoRAs act at inference, see `plans.adapters_at`.
        shortcut: which of the embedded model's shortcuts `--shortcut auto` is; none for methods
            that make no jumps over segments.
    """

    about: str
    source: str
    options: Mapping[str, Option] = field(default_factory=dict)
    placement: Placement = "everywhere"
    shortcut: Literal["guided", "unguided"] | None = None

    @property
    def by_segment(self) -> bool:
        """Whether LoRAs sit at ShortFT's timesteps and training goes in stages."""
        return self.placement == "stacked"

    @property
    def uses_segments(self) -> bool:
        """Whether the chain is cut into segments, which a shortcut may jump over."""
        return self.shortcut is not None

    @property
    def few_step(self) -> bool:
        """Whether the few-step model is tuned, and run, instead of the base."""
        return self.placement == "few_step"

    @property
    def ours(self) -> bool:
        """Whether it is this project's own, and nobody's rival."""
        return self.source.startswith(OURS)


OURS = "this project"
SHORTFT = "Guo et al., ICCV 2025, arXiv 2507.22604"
DRAFT = "Clark et al., ICLR 2024, arXiv 2309.17400"
FLOWBP = "Wang et al. 2026, arXiv 2606.11075"
LATE_BIAS = Option(
    2.0, f"active steps are drawn with weights (step + 1)^late_bias ({FLOWBP}: the code's 2)"
)
PIN = Option(False, "jumps keep the true chain's values and give their gradient only (ours)")

METHODS: dict[str, Method] = {
    "shortft": Method(
        "jumps over segments by a shortcut; complete gradient through 2k-1 calls; stages",
        SHORTFT,
        {
            "jump": Option(
                "auto",
                "how a segment is jumped over: the shortcut LoRA, or without training one or two "
                "DDIM steps of the base, or two of DPM-Solver++(2M); auto = the shortcut if one "
                "is given, else ddim",
                choices=("auto", "shortcut", "ddim", "ddim_2", "dpm_2"),
            ),
            "pin": PIN,
            "first_by_shortcut": Option(
                False, "stage 1 jumps over segment 1 too, so that the chain has 2k calls (ours)"
            ),
            "loras": Option(
                "last",
                "where LoRA i acts: at the last timestep of segment i, the first LoRA in all of "
                "segment 1 (the paper), or at every timestep of segment i, jumps included (ours)",
                choices=("last", "segment"),
            ),
            "tail": Option(
                1,
                "timesteps at the end of the stage's own segment that train, where LoRAs act: "
                "where the gradient starts; 1 in the paper",
                low=1,
            ),
        },
        placement="stacked",
        shortcut="guided",
    ),
    "jumps": Method(
        "one jump per segment, a LoRA at every timestep, gradient through all of them",
        f"{OURS}: the first stage of ShortFT, cut down to its jumps",
        {
            "jump": Option(
                "auto",
                "by the shortcut LoRA, or without training by a DDIM step of the base; half = over "
                "the first half of the segments by the shortcut, over the others by a DDIM step; "
                "auto = half if a shortcut is given, else ddim",
                choices=("auto", "shortcut", "ddim", "half"),
            ),
            "pin": PIN,
        },
        shortcut="unguided",
    ),
    "tune_shortcut": Method(
        "the few-step model itself is tuned and run: one jump per segment, gradient through all",
        f"{SHORTFT}, Table 2",
        placement="few_step",
        shortcut="guided",
    ),
    "draft_k": Method(
        "gradient through the last K steps",
        f"DRaFT-K, {DRAFT} §4.1",
        {"k": Option(1, "steps with gradient; the paper's default is 1", low=1)},
    ),
    "draft_lv": Method(
        "gradient through the last step, repeated on re-noised copies of its result",
        f"DRaFT-LV, {DRAFT} §4.2",
        {"copies": Option(2, "re-noised copies; 2 in the paper", low=1)},
    ),
    "alignprop": Method(
        "gradient through a random suffix of the chain, one draw per update",
        "AlignProp, Prabhudesai et al. 2023, arXiv 2310.03739",
        {
            "shortest": Option(
                0.1, "shortest suffix, share of the chain; the authors' code: steps 45 of 50", 0, 1
            ),
            "longest": Option(
                0.3, "longest suffix, share of the chain; the authors' code: steps 35 of 50", 0, 1
            ),
        },
    ),
    "drtune": Method(
        "inputs detached; a few equally spaced steps train; stops early at a random late step",
        "DRTune, Wu et al., ECCV 2024, arXiv 2405.00760",
        {
            "train_steps": Option(3, f"steps that train; 3 in {FLOWBP}", low=1),
            "early_stop": Option(
                0.4, f"the stop is drawn from this last share of the chain; {FLOWBP}", 0, 1
            ),
        },
    ),
    "refl": Method(
        "gradient through one late step, whose x0 prediction the reward sees",
        "ReFL, Xu et al., NeurIPS 2023, arXiv 2304.05977",
        {"last": Option(0.25, "the step is drawn from this last share: 10 of 40 steps", 0, 1)},
    ),
    "leapalign": Method(
        "two leaps to the end, pinned to a cached rollout, one nested path",
        "LeapAlign, Liang et al., CVPR 2026, arXiv 2604.15311",
        {
            "alpha": Option(0.3, f"strength of the nested path; {FLOWBP}'s configuration", 0, 1),
            "tau": Option(0.1, "floor of a leap's miss in the sample weight; 0.1", low=1e-6),
        },
    ),
    "flowbp_sparse": Method(
        "a cached rollout, few steps run again, inputs detached",
        f"FlowBP-Sparse, {FLOWBP}",
        {"active": Option(3, "steps that are run again; 3", low=1), "late_bias": LATE_BIAS},
    ),
    "flowbp_bridge": Method(
        "as sparse, with one nested path through a random middle point",
        f"FlowBP-Bridge, {FLOWBP}",
        {
            "active": Option(4, "steps that are run again; 4", low=2),
            "alpha": Option(0.5, "strength of the nested path; 0.5", 0, 1),
            "late_bias": LATE_BIAS,
        },
    ),
    "flowbp_lagrange": Method(
        "two leaps by Lagrange quadrature over several cached predictions",
        f"FlowBP-Lagrange, {FLOWBP}",
        {
            "order": Option(3, "predictions in one quadrature; 3", low=1),
            "active": Option(2, "of them run again with gradient, from the first on; 2", low=1),
            "support_gain": Option(0.25, "gradient of those after the first; 0.25"),
            "alpha": Option(0.1, "strength of the nested path; 0.1", 0, 1),
        },
    ),
    "thinned": Method(
        "a random thinning of the chain to a few calls, gradient through all of them",
        OURS,
        {
            "calls": Option(
                6, "calls of the thinned chain; measured, see docs/measurements.md", low=1
            ),
            "late": Option(
                1.0, "above 1 the points lie denser towards the end of the chain", low=1, high=8
            ),
            "even": Option(False, "points at the same relative place in every part"),
        },
    ),
    "full": Method(
        "gradient through every step; recompute is wise",
        f"DRaFT, {DRAFT} §4: K = all steps",
    ),
}


# Settings of a run that make a named competitor of a method: ablations and training-free jumps.
VARIANTS: dict[str, dict[str, object]] = {
    "shortft_shared_lora": {"timestep_lora": False},
    "shortft_no_stages": {"stage_shares": "first"},
    "shortft_pinned": {"method_options": {"pin": True}, "stage_shares": "first"},
    "shortft_first_by_shortcut": {"method_options": {"first_by_shortcut": True}},
    "shortft_segments": {"method_options": {"loras": "segment"}},
    "shortft_everywhere": {"method_options": {"loras": "segment"}, "timestep_lora": False},
    "shortft_plain_ddim": {"shortcut": "plain"},
    "shortft_ddim": {"method_options": {"jump": "ddim"}},
    "shortft_ddim_2": {"method_options": {"jump": "ddim_2"}},
    "shortft_dpm_2": {"method_options": {"jump": "dpm_2"}},
    "draft_5": {"method": "draft_k", "method_options": {"k": 5}},
}


# Settings of a run that a competitor's name may carry beside its method's options.
OWN_SETTINGS = ("learning_rate", "batch_size", "guidance_grad", "shortcut", "recompute")


def variant_settings(name: str, segments: int) -> dict[str, object]:
    """The settings of a method or a named variant of one; "first" stands for stage 1 alone.

    Args:
        name: may carry options of the method and any of `OWN_SETTINGS`:
            ``draft_k:k=3,learning_rate=6e-3``.

    Raises:
        UserError: if there is none of that name.
    """
    name, _, options = name.partition(":")
    if name not in METHODS and name not in VARIANTS:
        near = difflib.get_close_matches(name, [*METHODS, *VARIANTS], n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "see docs/methods.md"
        raise UserError(f"--methods {name}: unknown; {remedy}")
    settings: dict[str, object] = {"method": "shortft", **VARIANTS.get(name, {"method": name})}
    if options:
        own: dict[str, object] = settings.get("method_options", {})  # type: ignore[assignment]
        given = parse_options(options)
        settings |= {name: given.pop(name) for name in OWN_SETTINGS if name in given}
        settings["method_options"] = {**own, **given}
    if settings.get("stage_shares") == "first":
        settings["stage_shares"] = [1.0] + [0.0] * (segments - 1)
    return settings


def has_own_rate(name: str) -> bool:
    """Whether a competitor's name carries its learning rate, see `variant_settings`."""
    return "learning_rate" in parse_options(name.partition(":")[2])


def without_setting(name: str, setting: str) -> str:
    """A competitor's name without one of its options: ``jumps:shortcut=x,k=2`` → ``jumps:k=2``."""
    method, _, options = name.partition(":")
    rest = [f"{key}={value}" for key, value in parse_options(options).items() if key != setting]
    return ":".join([method, ",".join(rest)] if rest else [method])


def parse_options(text: str) -> dict[str, str]:
    """'k=2,alpha=0.3' as a mapping.

    Raises:
        UserError: if a part is not name=value.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for name, equals, value in pairs:
        if not (name.strip() and equals and value.strip()):
            raise UserError(f"--method-options {text}: write name=value, such as 'k=2,alpha=0.3'")
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_options(method: str, given: Mapping[str, object]) -> dict[str, Value]:
    """All options of a method: its defaults, with the given values (text allowed) on top.

    Raises:
        UserError: for an unknown name or a value out of range.
    """
    known = METHODS[method].options
    values: dict[str, Value] = {name: option.default for name, option in known.items()}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known)}"
            if not known:
                remedy = "it has none"
            raise UserError(f"--method-options {name}: unknown to {method}; {remedy}")
        values[name] = _checked(name, known[name], value)
    return values


def _checked(name: str, option: Option, value: object) -> Value:
    wrong = UserError(f"--method-options {name}={value}: wrong value; {option.about}")
    text = str(value).strip().lower()
    if option.choices:
        if text not in option.choices:
            raise UserError(
                f"--method-options {name}={value}: choose one of {', '.join(option.choices)}"
            )
        return text
    if isinstance(option.default, bool):
        if text not in ("true", "false"):
            raise wrong
        return text == "true"
    try:
        number = int(text) if isinstance(option.default, int) else float(text)
    except ValueError:
        raise wrong from None
    if not option.low <= number <= option.high:
        raise UserError(
            f"--method-options {name}={value}: must lie in [{option.low:g}, {option.high:g}]"
        )
    return number

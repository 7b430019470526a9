"""What `shortft compare` compares: methods, rewards, seeds, and how long; two budgets of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shortft.assets import EMBEDDED
from shortft.config import option_name
from shortft.errors import UserError
from shortft.methods.catalog import has_own_rate


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        methods: names of methods or of variants of them, or with options: ``draft_k:k=3``, and with
            settings of their own (`catalog.OWN_SETTINGS`): ``draft_k:learning_rate=6e-3``.
        rewards: reward specs.
        seeds: training seeds 0 … seeds - 1.
        minutes: training time of every run; sampling, evaluation and loading are not counted.
        search: learning rates tried for every method, but for those that bring their own; one
            alone is taken untried.
        search_further: rates tried beyond an edge of those, one at a time, while the best lies
            there; the same limit for every method.
        search_reward: the reward of every trial, whose rates then hold for all rewards; each
            reward's own if empty. AdamW takes the scale off a reward, so that rates carry over.
        search_minutes: training time of every trial; as long as a run if not given. Shorter trials
            choose rates that are too high for the runs (docs/comparisons.md).
        looks: evaluations on the way, for the curves; with 0 there are none.
        num_prompts, noises: of the evaluation: held-out prompts, and pictures of each.
    """

    methods: tuple[str, ...]
    rewards: tuple[str, ...]
    seeds: int = 3
    minutes: float = 3.5
    search: tuple[float, ...] = ()
    search_further: int = 0
    search_reward: str = ""
    search_minutes: float = 0.0
    looks: int = 6
    num_prompts: int = 48
    noises: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "search_minutes", self.search_minutes or self.minutes)

    @property
    def searched_methods(self) -> tuple[str, ...]:
        """The methods whose learning rate is searched."""
        if len(self.search) < 2:
            return ()
        return tuple(method for method in self.methods if not has_own_rate(method))

    @property
    def searched_rewards(self) -> tuple[str, ...]:
        """The rewards of the trials; none without a search."""
        if not self.searched_methods:
            return ()
        return (self.search_reward,) if self.search_reward else self.rewards

    def trials(self) -> int:
        """Trials of learning rates in all, without those beyond the edges."""
        return len(self.searched_methods) * len(self.searched_rewards) * len(self.search)

    def runs(self) -> int:
        """Training runs in all, without trials."""
        return len(self.methods) * len(self.rewards) * self.seeds

    def cost_minutes(self) -> float:
        """Training minutes in all, without evaluation and without trials beyond the edges."""
        return self.runs() * self.minutes + self.trials() * self.search_minutes


BUDGETS = {
    "laptop": Comparison(
        # Rates that searches chose for this reward and time (docs/comparisons.md); the first takes
        # ShortFT's, since it makes most updates.
        (
            "jumps:learning_rate=2e-3",
            "shortft:learning_rate=2e-3",
            "draft_k:learning_rate=6e-3",
            "alignprop:learning_rate=6e-3",
        ),
        ("clip:1,symmetry:3",),
        seeds=2,
        minutes=1.5,
        looks=3,
        num_prompts=24,
    ),
    "full": Comparison(
        (
            "thinned",
            "shortft",
            "shortft_segments",
            "shortft_everywhere",
            "jumps",
            "jumps:jump=shortcut",
            "jumps:jump=shortcut,shortcut=guided",
            "shortft_shared_lora",
            "shortft_no_stages",
            "shortft_pinned",
            "shortft_first_by_shortcut",
            "shortft_ddim",
            "shortft_plain_ddim",
            "shortft_ddim_2",
            "shortft_dpm_2",
            "tune_shortcut",
            "tune_shortcut:shortcut=unguided",
            "draft_k",
            "draft_5",
            "draft_lv",
            "alignprop",
            "drtune",
            "refl",
            "leapalign",
            "flowbp_sparse",
            "flowbp_bridge",
            "flowbp_lagrange",
            "full",
        ),
        (
            "clip",
            "clip:1,symmetry:3",
            "clip:1,compressibility:0.16",
            "clip:1,symmetry:3,compressibility:0.16",
        ),
        search=(7e-4, 2e-3, 6e-3),
        search_further=2,
        search_reward="clip:1,symmetry:3",
    ),
}


def parse_list(option: str, text: str) -> tuple[str, ...]:
    """'a b' or 'a' as parts; rewards hold commas, so that blanks or semicolons separate.

    Raises:
        UserError: if there is none, or one twice.
    """
    parts = tuple(text.replace(";", " ").split())
    if not parts or len(set(parts)) < len(parts):
        raise UserError(f"{option} {text!r}: give different names, separated by blanks")
    return parts


def refuse_unused(option: str, rates: str, methods: tuple[str, ...]) -> None:
    """Tell that learning rates would change nothing.

    Raises:
        UserError: if every method brings its own.
    """
    if all(map(has_own_rate, methods)):
        raise UserError(
            f"{option} {rates}: every method brings a rate of its own; give --methods without any"
        )


def comparison_from(budget: str, *, model: str = EMBEDDED, **given: Any) -> Comparison:
    """A budget's comparison with what the user gave on top.

    Of the budget's methods those that take a shortcut of the embedded model are left out for any
    other.

    Raises:
        UserError: for an unknown budget or a value out of range.
    """
    if budget not in BUDGETS:
        raise UserError(f"--budget {budget}: unknown; choose one of {', '.join(BUDGETS)}")
    values = {**vars(BUDGETS[budget]), **{k: v for k, v in given.items() if v is not None}}
    if given.get("methods") is None and model != EMBEDDED:
        values["methods"] = tuple(m for m in values["methods"] if "shortcut=" not in m)
    try:
        values["search"] = tuple(float(rate) for rate in values["search"])
    except ValueError:
        raise UserError(f"--search {' '.join(values['search'])}: give learning rates") from None
    if any(not 0 < rate < float("inf") for rate in values["search"]):
        raise UserError(f"--search {values['search']}: learning rates lie above 0")
    if given.get("search_minutes") is None:
        del values["search_minutes"]
    for name in {"seeds", "minutes", "search_minutes", "num_prompts"} & values.keys():
        if values[name] <= 0:
            raise UserError(f"{option_name(name)} {values[name]}: must be above 0")
    for name in ("looks", "search_further"):
        if values[name] < 0:
            raise UserError(f"{option_name(name)} {values[name]}: must be 0 or more")
    if len(values["search"]) < 2 and (values["search_further"] or values["search_reward"]):
        raise UserError(
            "--search-further, --search-reward: there is no search; give --search two or more rates"
        )
    if given.get("search") is not None:
        refuse_unused("--search", " ".join(given["search"]), values["methods"])
    if values["noises"] < 2:
        raise UserError(
            f"--noises {values['noises']}: diversity compares pictures of one prompt; give 2 or "
            "more"
        )
    return Comparison(**values)

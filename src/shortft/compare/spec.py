"""What `shortft compare` compares: methods, rewards, seeds, and how long; two budgets of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shortft.assets import EMBEDDED
from shortft.config import Config, option_name
from shortft.errors import UserError
from shortft.methods.catalog import has_own_rate, without_setting


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        methods: names of methods or of variants of them, or with options: ``draft_k:k=3``, and with
            settings of their own (`catalog.OWN_SETTINGS`): ``draft_k:learning_rate=6e-3``.
        rewards: reward specs.
        seeds: training seeds 0 … seeds - 1.
        minutes: training time of every run; sampling, evaluation and loading are not counted.
        rates: learning rates that are known, per method and reward; they are not searched.
        search: learning rates tried for every method, but for those that bring their own or whose
            is known; one alone is taken untried.
        search_further: rates tried beyond an edge of those, one at a time, while the best lies
            there; the same limit for every method.
        search_reward: the reward of every trial, whose rates then hold for all rewards; each
            reward's own if empty. AdamW takes the scale off a reward, so that rates carry over.
        search_minutes: training time of every trial; as long as a run if not given. Shorter trials
            choose rates that are too high for the runs (docs/earlier-comparisons.md).
        looks: evaluations on the way, for the curves; with 0 there are none.
        num_prompts, noises: of the evaluation: held-out prompts, and pictures of each.
    """

    methods: tuple[str, ...]
    rewards: tuple[str, ...]
    seeds: int = 3
    minutes: float = 3.5
    rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    search: tuple[float, ...] = ()
    search_further: int = 0
    search_reward: str = ""
    search_minutes: float = 0.0
    looks: int = 6
    num_prompts: int = 48
    noises: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "search_minutes", self.search_minutes or self.minutes)

    def knows_rate(self, reward: str, method: str) -> bool:
        """Whether no search is needed: the method brings its rate, or `rates` has it."""
        return has_own_rate(method) or self.known_rate(reward, method) is not None

    def known_rate(self, reward: str, method: str) -> float | None:
        """That of `rates`, whether the method is recomputed or not, which changes no gradient."""
        return self.rates.get(without_setting(method, "recompute"), {}).get(reward)

    @property
    def without_rate(self) -> tuple[tuple[str, str], ...]:
        """Rewards and methods whose rate is searched, or else the base's."""
        pairs = ((reward, method) for reward in self.rewards for method in self.methods)
        return tuple(pair for pair in pairs if not self.knows_rate(*pair))

    @property
    def searched(self) -> tuple[tuple[str, str], ...]:
        """Rewards and methods of the trials; none without a search."""
        if len(self.search) < 2:
            return ()
        pairs = ((self.search_reward or reward, method) for reward, method in self.without_rate)
        return tuple(dict.fromkeys(pairs))

    def trials(self) -> int:
        """Trials of learning rates in all, without those beyond the edges."""
        return len(self.searched) * len(self.search)

    def runs(self) -> int:
        """Training runs in all, without trials."""
        return len(self.methods) * len(self.rewards) * self.seeds

    def cost_minutes(self) -> float:
        """Training minutes in all, without evaluation and without trials beyond the edges."""
        return self.runs() * self.minutes + self.trials() * self.search_minutes


REWARDS = (
    "clip",
    "clip:1,symmetry:3",
    "clip:1,compressibility:0.16",
    "clip:1,symmetry:3,compressibility:0.16",
)

# Rates for the embedded model and 1.5 minutes that searches chose for these four rewards, or what
# was nearest to it; three on clip were chosen on held-out prompts (docs/comparisons.md: Rates).
RATES = {
    method: dict(zip(REWARDS, rates, strict=True))
    for method, rates in {
        "jumps": (1e-3, 3.5e-3, 3.5e-3, 3.5e-3),
        "thinned:calls=4,late=2": (2e-3, 3.5e-3, 6e-3, 6e-3),
        "thinned": (6.7e-4, 2e-3, 2e-3, 2e-3),
        "shortft": (2e-3, 2e-3, 2e-3, 2e-3),
        "shortft_segments": (2e-3, 2e-3, 2e-3, 2e-3),
        "tune_shortcut:shortcut=unguided": (1e-3, 2e-3, 2e-3, 2e-3),
        "draft_k": (2e-3, 6e-3, 6e-3, 6e-3),
        "draft_lv": (3.5e-3, 6e-3, 6e-3, 6e-3),
        "alignprop": (2e-3, 6e-3, 6e-3, 6e-3),
        "refl": (2e-3, 6e-3, 6e-3, 6e-3),
        "drtune": (2e-3, 6e-3, 6e-3, 6e-3),
        "leapalign": (2e-3, 2e-3, 2e-3, 2e-3),
        "flowbp_sparse": (2e-3, 6e-3, 6e-3, 6e-3),
        "flowbp_bridge": (2e-3, 6e-3, 6e-3, 6e-3),
        "flowbp_lagrange": (2e-3, 6e-3, 6e-3, 6e-3),
        "full": (6e-3, 1.8e-2, 1.8e-2, 1.8e-2),
    }.items()
}

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
        tuple(RATES),
        REWARDS,
        minutes=1.5,
        rates=RATES,
        # For what has no rate above: other methods, rewards, models.
        search=(7e-4, 2e-3, 6e-3),
        search_further=2,
        search_reward="clip:1,symmetry:3",
        looks=0,
        num_prompts=24,
    ),
}


# What a comparison says by an option of its own, and which.
INSTEAD = {
    "method": "has several; give --methods",
    "method_options": "has several; give --methods name:option=value",
    "reward": "has several; give --rewards",
    "seed": "has several; give --seeds",
    "updates": "trains all methods for the same time; give --minutes",
    "sample_every": "looks at equal times; give --looks",
    "sample_times": "looks at equal times; give --looks",
    "sample_prompts": "draws held-out prompts; give --num-prompts",
    "sample_noises": "draws held-out prompts; give --noises",
}


def base_options(given: Mapping[str, object]) -> dict[str, object]:
    """Options of `shortft train`, given to all runs alike, as those of their common base.

    Raises:
        UserError: for one that a comparison has an option of its own for.
    """
    for name, instead in INSTEAD.items():
        if given.get(name) is not None:
            raise UserError(f"{option_name(name)} {given[name]}: a comparison {instead}")
    output_dir = given.get("output_dir") or "runs/compare"
    # Competitors bring methods; the base's would only ask for its segments and its shortcut.
    return {**given, "output_dir": output_dir, "method": "full", "method_options": {}}


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


def refuse_base_rate(rate: float, comparison: Comparison, *, searched: bool) -> None:
    """Tell that the base's learning rate would change nothing.

    Args:
        searched: the search is not one around that rate.

    Raises:
        UserError: if every rate is another's: the method's own, known, or searched.
    """
    refuse_unused("--learning-rate", f"{rate:g}", comparison.methods)
    if searched and (comparison.search or not comparison.without_rate):
        raise UserError(
            f"--learning-rate {rate:g}: this comparison's rates are known or searched; --search "
            f"{rate:g}, one alone, is taken untried"
        )


def for_another_model(budget: Comparison, base: Config) -> Comparison:
    """A budget with a configuration's reward and rate for what fits the embedded model alone.

    Where the budget searches, it tries the configuration's rate, a third and three times of it.
    """
    methods = budget.methods
    for setting in ("learning_rate", "shortcut"):
        methods = tuple(without_setting(method, setting) for method in methods)
    rate = base.learning_rate
    return replace(
        budget,
        methods=methods,
        rewards=(base.reward,),
        minutes=0.0,  # to be given
        rates={},
        search=(float(f"{rate / 3:.2g}"), rate, float(f"{3 * rate:.2g}")) if budget.search else (),
        search_reward=base.reward if budget.search else "",  # finds the rates of all
    )


def comparison_from(budget: str, base: Config | None = None, **given: Any) -> Comparison:
    """A budget's comparison with what the user gave on top.

    Its rates are of the embedded model: `search` given anew goes without them.

    Args:
        base: the runs' common configuration; the embedded model's if not given.

    Raises:
        UserError: for an unknown budget or a value out of range, or where nothing says how long
            runs of another model train.
    """
    if budget not in BUDGETS:
        raise UserError(f"--budget {budget}: unknown; choose one of {', '.join(BUDGETS)}")
    spec = BUDGETS[budget]
    if base is not None and base.model != EMBEDDED:
        spec = for_another_model(spec, base)
        if given.get("minutes") is None:
            raise UserError(
                f"--minutes: not given, and the budget's are the embedded model's; say how long "
                f"each run of {base.model} trains"
            )
    values = {**vars(spec), **{k: v for k, v in given.items() if v is not None}}
    if given.get("search") is not None:
        values["rates"] = {}
    if given.get("search") is not None and len(given["search"]) < 2:  # the budget's go with its own
        values["search_further"] = given.get("search_further") or 0
        values["search_reward"] = given.get("search_reward") or ""
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

"""Where a shortcut comes from and how it runs: shipped, a file, or a published few-step LoRA.

Light to import: the command line checks names before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from shortft.assets import EMBEDDED, asset
from shortft.errors import UserError
from shortft.paths import is_file
from shortft.weights_file import check_weights_file, sha256

BASE_JUMPS = ("none", "plain")  # jumps by the base itself, guided or not
# Of the embedded model: with the chain's own guidance and closest to it, or at half the cost.
GUIDED = "guided"
SHIPPED = {GUIDED: "shortcut.safetensors", "unguided": "unguided.safetensors"}
AUTO = "auto"  # the one of these that the method asks for


@dataclass(frozen=True)
class Published:
    """A few-step LoRA on the hub that preserves its base's trajectory.

    Attributes:
        repo, file: where it lies.
        steps: what it was distilled for; ShortFT's segments must be as many. None: it jumps
            between any two times, so that any number will do.
        guidance_scale: what it runs with; 1 is unguided.
        scale: of the LoRA.
    """

    repo: str
    file: str
    steps: int | None
    guidance_scale: float = 1.0
    scale: float = 1.0

    @property
    def sha256(self) -> str | None:
        """Of the file's content, where it is known."""
        return SHA256.get((self.repo, self.file))


HYPER, PCM, TCD = "ByteDance/Hyper-SD", "wangfuyun/PCM_Weights", "h1t/TCD-{}-LoRA"
# As their authors' model cards say; no file was at hand to try. See docs/shortcuts.md.
PUBLISHED = {
    "hyper-sd15-2": Published(HYPER, "Hyper-SD15-2steps-lora.safetensors", 2),
    "hyper-sd15-4": Published(HYPER, "Hyper-SD15-4steps-lora.safetensors", 4),
    "hyper-sd15-8": Published(HYPER, "Hyper-SD15-8steps-lora.safetensors", 8),
    "hyper-sd15-8-cfg": Published(HYPER, "Hyper-SD15-8steps-CFG-lora.safetensors", 8, 5.0),
    "hyper-sd15-12-cfg": Published(HYPER, "Hyper-SD15-12steps-CFG-lora.safetensors", 12, 5.0),
    "hyper-sdxl-2": Published(HYPER, "Hyper-SDXL-2steps-lora.safetensors", 2),
    "hyper-sdxl-4": Published(HYPER, "Hyper-SDXL-4steps-lora.safetensors", 4),
    "hyper-sdxl-8": Published(HYPER, "Hyper-SDXL-8steps-lora.safetensors", 8),
    "hyper-sdxl-8-cfg": Published(HYPER, "Hyper-SDXL-8steps-CFG-lora.safetensors", 8, 5.0),
    "hyper-sdxl-12-cfg": Published(HYPER, "Hyper-SDXL-12steps-CFG-lora.safetensors", 12, 5.0),
    "hyper-sd3-4": Published(HYPER, "Hyper-SD3-4steps-CFG-lora.safetensors", 4, 3.0, 0.125),
    "hyper-sd3-8": Published(HYPER, "Hyper-SD3-8steps-CFG-lora.safetensors", 8, 5.0, 0.125),
    "hyper-sd3-16": Published(HYPER, "Hyper-SD3-16steps-CFG-lora.safetensors", 16, 7.0, 0.125),
    "hyper-flux-8": Published(HYPER, "Hyper-FLUX.1-dev-8steps-lora.safetensors", 8, 3.5, 0.125),
    "hyper-flux-16": Published(HYPER, "Hyper-FLUX.1-dev-16steps-lora.safetensors", 16, 3.5, 0.125),
    **{
        f"pcm-{base}-{steps}{cfg}": Published(
            PCM,
            f"{base}/pcm_{base}_{kind}_{steps}step_converted.safetensors",
            steps,
            guidance_scale,
        )
        for base in ("sd15", "sdxl")
        for cfg, kind, guidance_scale, counts in (
            ("", "smallcfg", 1.0, (2, 4, 8, 16)),
            ("-cfg", "normalcfg", 7.5, (4, 8, 16)),
        )
        for steps in counts
    },
    **{
        name: Published(TCD.format(base), "pytorch_lora_weights.safetensors", None)
        for name, base in (
            ("tcd-sd15", "SD15"),
            ("tcd-sd21", "SD21-base"),
            ("tcd-sdxl", "SDXL"),
        )
    },
}
# No commit of these repositories is known, but what the files hold is.
SHA256 = {
    (HYPER, "Hyper-SD15-2steps-lora.safetensors"): (
        "2f26dcc1d883feb07557a552315baae2ca2a04ac08556b08a355a244547e8c3a"
    ),
    (HYPER, "Hyper-SD15-4steps-lora.safetensors"): (
        "c5dd058616461ed5053e2b14eec4dbe3fa0eea3b13688642f6d6c80ea2ba5958"
    ),
    (HYPER, "Hyper-SD15-8steps-lora.safetensors"): (
        "91fc3186236e956d64dbb4357f2e120c69b968b78af7d2db9884a5ca74d3cd13"
    ),
    (HYPER, "Hyper-SD15-8steps-CFG-lora.safetensors"): (
        "f6123d5b950d5250ab6c33600e27f4dcf71b3099ebf888685e01e9e8117ce482"
    ),
    (HYPER, "Hyper-SD15-12steps-CFG-lora.safetensors"): (
        "64b98437383537cd968fda6f87a05c33160ece9c79ff4757949a1e212ff78361"
    ),
    (HYPER, "Hyper-SDXL-2steps-lora.safetensors"): (
        "69b25c0187ced301c3603c599c0bc509ac99b8ac34db89a2aecc3d5f77a35187"
    ),
    (HYPER, "Hyper-SDXL-4steps-lora.safetensors"): (
        "12f81a27d00a751a40d68fd15597091896c5a90f3bd632fb6c475607cbdad76e"
    ),
    (HYPER, "Hyper-SDXL-8steps-lora.safetensors"): (
        "ca689190e8c46038550384b5675488526cfe5a40d35f82b27acb75c100f417c1"
    ),
    (HYPER, "Hyper-SDXL-8steps-CFG-lora.safetensors"): (
        "55b51334c85061afff5eff7c550b61963c8b8607a5868bbe4f26db49374719b1"
    ),
    (HYPER, "Hyper-SDXL-12steps-CFG-lora.safetensors"): (
        "0b97f447b5878323a28fbe7c51ba7acebd21f4d77552ba77b04b11c8911825b6"
    ),
    (HYPER, "Hyper-SD3-4steps-CFG-lora.safetensors"): (
        "0ee4e529abd17b06d4295e3bb91c0d4ddae393afad86b2b43c4f5eeb9e401602"
    ),
    (HYPER, "Hyper-SD3-8steps-CFG-lora.safetensors"): (
        "fc6a3e73e14ed11e21e4820e960d7befcffe7e333850ada9545f239e9aa6027e"
    ),
    (HYPER, "Hyper-SD3-16steps-CFG-lora.safetensors"): (
        "5b4d0b99d58deb811bdbbe521a06f4dbf56a2e9148ff3211c594e0502b656bc9"
    ),
    (HYPER, "Hyper-FLUX.1-dev-8steps-lora.safetensors"): (
        "e0ab0fdf569cd01a382f19bd87681f628879dea7ad51fe5a3799b6c18c7b2d03"
    ),
    (HYPER, "Hyper-FLUX.1-dev-16steps-lora.safetensors"): (
        "6461f67dfc1a967ae60344c3b3f350877149ccab758c273cc37f5e8a87b5842e"
    ),
    (TCD.format("SDXL"), "pytorch_lora_weights.safetensors"): (
        "2c777bc60abf41d3eb0fe405d23d73c280a020eea5adf97a82a141592c33feba"
    ),
}
_ON_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)/([^@]+\.safetensors)(?:@([\w.-]+))?")


@dataclass(frozen=True)
class Shortcut:
    """A shortcut ready to load.

    Attributes:
        path: the LoRA's file; None where the base itself jumps.
        guidance_scale: what it was made to run with; None where nobody says, see
            `networks.few_step_guidance`.
        scale: of the LoRA.
    """

    path: Path | None
    guidance_scale: float | None = 1.0
    scale: float = 1.0


def check_shortcut(option: str, value: str) -> str:
    """Return `value` if it names a shortcut; files on the hub are not looked for yet.

    Raises:
        UserError: if it does not, or the file is damaged.
    """
    known = (AUTO, *SHIPPED, *BASE_JUMPS, *PUBLISHED)
    if value not in known and is_file(value):
        check_weights_file(f"{option} {value}", Path(value), "give a LoRA's .safetensors file")
        return value
    if value in known or _ON_HUB.fullmatch(value):
        return value
    near = difflib.get_close_matches(value, known, n=1)
    remedy = "give 'auto', 'guided', 'unguided', 'none', 'plain' or a LoRA's file"
    if near:
        remedy = f"did you mean {near[0]!r}?"
    raise UserError(f"{option} {value or repr(value)}: no such file; {remedy}")


def ships(name: str) -> bool:
    """Whether a name is that of a shortcut of the embedded model."""
    return name == AUTO or name in SHIPPED


def find_shortcut(
    model: str,
    name: str,
    segments: int,
    auto: str = GUIDED,
    guidance_scale: float | None = None,
) -> Shortcut:
    """The shortcut that an option names; one on the hub is downloaded.

    A file is run as its publisher says where its name is that of a published one, or as the JSON
    file beside it says, on the hub too, where it was made by `shortft shortcut`; of any other
    nobody says.

    Args:
        segments: of the chain; most published shortcuts fit one number only.
        auto: which of the shipped ones "auto" is, see `catalog.Method.shortcut`.
        guidance_scale: what it will run with whatever it was made for; then the hub need not say.

    Raises:
        UserError: if there is none, it cannot be fetched, or it fits other segments.
    """
    if name in BASE_JUMPS:
        return Shortcut(None)
    known = check_fits(model, name, segments)
    on_hub = _on_hub(name)
    if name in PUBLISHED:
        published = PUBLISHED[name]
        path = fetch(name, published.repo, published.file, None)
        check_content(name, path, published)
    elif on_hub:
        path = fetch(name, *on_hub)
        if known is None:
            if guidance_scale is None:
                guidance_scale = guidance_in(fetch_card(name, *on_hub))
            return Shortcut(path, guidance_scale)
    elif ships(name):
        path = asset("shortcut", SHIPPED[auto if name == AUTO else name])
    else:
        path = Path(name)
    if known is not None:
        return Shortcut(path, known.guidance_scale, known.scale)
    if not path.is_file():
        raise UserError(f"--shortcut {name}: no such file; make one by `shortft shortcut`")
    return Shortcut(path, own_guidance(path))


def known_guidance(model: str, name: str, segments: int, auto: str = GUIDED) -> float | None:
    """What a shortcut will run with, without a download: as `find_shortcut` finds.

    None where nobody says, or only the hub would.

    Raises:
        UserError: if it fits other segments, or none ships for the model.
    """
    if name in BASE_JUMPS:
        return Shortcut(None).guidance_scale
    known = check_fits(model, name, segments)
    if known is not None:
        return known.guidance_scale
    if ships(name):
        return find_shortcut(model, name, segments, auto).guidance_scale
    on_hub = _on_hub(name)
    if on_hub is None:
        return own_guidance(Path(name))
    from huggingface_hub import try_to_load_from_cache

    repo, file, revision = on_hub
    card = try_to_load_from_cache(repo, card_name(file), revision=revision)
    return guidance_in(Path(card)) if isinstance(card, str) else None


def check_fits(model: str, name: str, segments: int) -> Published | None:
    """Whether a shortcut is made for a model's chain, as far as its name tells.

    Args:
        segments: of the chain; most published shortcuts fit one number only.

    Returns:
        The published shortcut that it is, or a copy of; None for any other.

    Raises:
        UserError: if it fits other segments, or none ships for the model.
    """
    if ships(name) and model != EMBEDDED:
        raise UserError(
            f"--shortcut {name}: no shortcut ships for {model}; give a few-step LoRA file (make "
            "one by `shortft shortcut`), a published one such as "
            f"{', '.join(list(PUBLISHED)[:3])}, or `none` for DDIM jumps"
        )
    repo, file, _ = _on_hub(name) or (None, name, None)
    known = PUBLISHED.get(name) or _published(repo, file)
    if known is not None and known.steps not in (None, segments):
        raise UserError(
            f"--segments {segments}: {name} was distilled for {known.steps} steps; use "
            f"--segments {known.steps}"
        )
    return known


def _on_hub(name: str) -> tuple[str, str, str | None] | None:
    """Repository, file and revision that a name stands for; None where it is no place on the hub.

    A local file of that name comes first.
    """
    place = None if Path(name).is_file() else _ON_HUB.fullmatch(name)
    return (place[1], place[2], place[3]) if place else None


def _published(repo: str | None, file: str) -> Published | None:
    """The published shortcut that a file on the hub, or a copy of it under its name, is."""
    for known in PUBLISHED.values():
        # A copy of a file that is called as many others are could be anything.
        own_name = known.steps is not None and Path(known.file).name == Path(file).name
        if (repo, file) == (known.repo, known.file) or own_name:
            return known
    return None


def fetch(
    name: str, repo: str, file: str, revision: str | None, remedy: str = "give a local file"
) -> Path:
    """A file of the hub, downloaded once.

    Raises:
        UserError: if it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # the network fails in many ways; each means "not there"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--shortcut {name}: {file} of {repo} cannot be fetched ({reason}); {remedy}"
        ) from error


def fetch_card(name: str, repo: str, file: str, revision: str | None) -> Path | None:
    """The JSON file beside a LoRA on the hub, downloaded once; None where it has none.

    Raises:
        UserError: if that cannot be found out.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    card = card_name(file)
    if try_to_load_from_cache(repo, card, revision=revision) is _CACHED_NO_EXIST:
        return None
    try:
        return fetch(name, repo, card, revision, "say by --shortcut-guidance-scale how it runs")
    except UserError as error:
        why = error.__cause__
        # A hub that cannot be reached does not say that there is none.
        if isinstance(why, LocalEntryNotFoundError) or not isinstance(why, EntryNotFoundError):
            raise
        return None


def card_name(file: str) -> str:
    """The JSON file that lies beside a LoRA."""
    return file.removesuffix(".safetensors") + ".json"


def check_content(name: str, path: Path, published: Published) -> None:
    """Whether a downloaded file is the one that is known under its name.

    Raises:
        UserError: if it is another.
    """
    if published.sha256 is None:
        return
    found = sha256(path)
    if found != published.sha256:
        raise UserError(
            f"--shortcut {name}: {published.file} of {published.repo} is not the file that is "
            f"known (SHA-256 {found}, not {published.sha256}); remove {path.resolve()} to fetch it "
            f"again, or take it as it is by --shortcut {published.repo}/{published.file}"
        )


def own_guidance(shortcut: Path) -> float | None:
    """The guidance that a shortcut was made to run with, from the JSON file beside it.

    None where there is no such file, or it does not say.

    Raises:
        UserError: if the file is damaged.
    """
    card = shortcut.with_suffix(".json")
    return guidance_in(card) if card.is_file() else None


def guidance_in(card: Path | None) -> float | None:
    """The guidance that a shortcut's JSON file names, if any.

    Raises:
        UserError: if the file is damaged.
    """
    if card is None:
        return None
    try:
        return float(json.loads(card.read_text(encoding="utf-8"))["shortcut_guidance_scale"])
    except KeyError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{card}: damaged ({error}); restore it, or remove it and give "
            "--shortcut-guidance-scale"
        ) from error

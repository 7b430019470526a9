"""Text alignment by any CLIPModel or SiglipModel: the embedded scorer, OpenAI's CLIP, ..."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    SiglipModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from shortft.assets import asset
from shortft.errors import UserError
from shortft.quiet import quiet
from shortft.rewards.files import cannot_load
from shortft.rewards.places import Place, parse_reward_models
from shortft.rewards.preprocess import ClipPreprocess

_CACHED_PROMPTS = 8192  # 33 MB at 1,024 features


class ClipReward:
    """Cosine between a picture's and its prompt's embedding, in [-1, 1].

    The model is frozen and runs in its own number format whatever autocast says. Prompts longer
    than the model's text length are cut off, as the published scorers do.

    Args:
        model: CLIPModel or SiglipModel; it is moved to `dtype` and frozen.
        tokenizer: the model's own.
        preprocess: the model's own.
        name: name in `REWARDS`.
        report_name: what the report shows.
        report_scale: the report is so many times the cosine, in the unit that was published.
        dtype: number format of the model; scores are float32 always.
    """

    report_higher_is_better = True

    def __init__(
        self,
        model: CLIPModel | SiglipModel,
        tokenizer: PreTrainedTokenizerBase,
        preprocess: ClipPreprocess,
        *,
        name: str = "clip",
        report_name: str = "CLIP cosine",
        report_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.to(dtype).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.name = name
        self.report_name = report_name
        self.report_scale = report_scale
        self._max_tokens = min(
            tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings
        )
        # SigLIP learned with padding that it does not mask.
        self._padding = "max_length" if isinstance(model, SiglipModel) else "longest"
        self._text_features: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        source: str | Path | Place | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ClipReward:
        """Load a CLIPModel or SiglipModel with its tokenizer and image preprocessing.

        Args:
            source: directory or hub id in transformers' layout; None = the embedded scorer.
            device: where the model lives and where pictures must be.
            dtype: number format of the model.

        Raises:
            UserError: the model cannot be found or read, or is of another kind.
        """
        if source is None:
            source = asset("scorers", "reward")
        place = source if isinstance(source, Place) else parse_reward_models(str(source))["clip"]
        model, preprocess = load_clip_model(place, device, dtype)
        tokenizer = load_tokenizer(place, place.source, isinstance(model, SiglipModel))
        return cls(model, tokenizer, preprocess, dtype=dtype)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine (B,), differentiable in the pixels."""
        if len(prompts) != len(images_BCHW):
            raise ValueError(f"{len(images_BCHW)} pictures but {len(prompts)} prompts")
        return (self.embed_images(images_BCHW) * self.embed_texts(prompts)).sum(-1)

    @torch.no_grad()
    def report(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine (B,) times `report_scale`."""
        return self(images_BCHW, prompts) * self.report_scale

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Unit-length features (B, D) of pictures in [0, 1], differentiable in the pixels."""
        return image_features(self.model, self.preprocess, images_BCHW)

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit-length features (B, D) of prompts; each is encoded once, and by itself.

        In a batch its last bits would depend on the others, and with them a resumed run's.
        """
        new = [text for text in dict.fromkeys(prompts) if text not in self._text_features]
        if len(self._text_features) + len(new) > _CACHED_PROMPTS:
            self._text_features.clear()
            new = list(dict.fromkeys(prompts))
        device = self.model.device
        for text in new:
            tokens = self.tokenizer(
                [text],
                padding=self._padding,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            ).to(device)
            with torch.autocast(device.type, enabled=False):
                features = self.model.get_text_features(**tokens).pooler_output.float()
            self._text_features[text] = F.normalize(features[0], dim=-1)
        return torch.stack([self._text_features[text] for text in prompts])


def image_features(
    model: CLIPModel | SiglipModel, preprocess: ClipPreprocess, images_BCHW: Tensor
) -> Tensor:
    """Unit-length image features (B, D) in float32, differentiable in the pixels."""
    with torch.autocast(images_BCHW.device.type, enabled=False):
        pixels = preprocess(images_BCHW).to(model.dtype)
        features = model.get_image_features(pixel_values=pixels).pooler_output
    return F.normalize(features.float(), dim=-1)


def load_clip_model(
    place: Place,
    device: torch.device | str,
    dtype: torch.dtype,
    processor: str | None = None,
) -> tuple[CLIPModel | SiglipModel, ClipPreprocess]:
    """The model of `place`, and its preprocessing from there or from the directory `processor`.

    Weights are read from safetensors only: a pickle here would have no checksum.

    Raises:
        UserError: it cannot be found or read, or is of another kind.
    """
    # The fused kernel's backward is slower than plain attention on CPUs.
    attention = "eager" if torch.device(device).type == "cpu" else "sdpa"
    source, revision = place.source, place.revision
    try:
        described = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        model_type = described.model_type
        if model_type not in ("clip", "siglip"):
            raise UserError(f"{place}: is a {model_type} model; give a CLIPModel or SiglipModel")
        kind = CLIPModel if model_type == "clip" else SiglipModel
        with quiet():
            loaded: Any = kind.from_pretrained(
                source,
                revision=_commit(place),
                use_safetensors=True,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
            )
        model, loading = loaded
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])[0]
            raise UserError(
                f"{place}: weight {missing} is missing; give the whole model, as save_pretrained "
                "writes it"
            )
        config, _ = ImageProcessingMixin.get_image_processor_dict(
            processor or source, revision=place.revision_of(processor or source)
        )
        preprocess = ClipPreprocess.from_config(config, siglip=model_type == "siglip")
    except UserError:
        raise
    except Exception as error:  # SafetensorError, for one, is nothing narrower
        # transformers' and torch's own messages advise to read the pickle.
        if isinstance(error, pickle.UnpicklingError) or "named model.safetensors" in str(error):
            raise UserError(
                f"{place}: has no weights in safetensors; pickles (pytorch_model.bin) may run code "
                "and are not read: give a model with a model.safetensors"
            ) from None
        raise cannot_load(place, error) from error
    return model.to(device), preprocess


def _commit(place: Place) -> str:
    """The commit that the configuration in the hub's cache is of; else the place's revision.

    Of a branch without safetensors transformers would have a service of the hub convert the pickle.
    """
    found = (
        None
        if place.is_local
        else try_to_load_from_cache(place.source, "config.json", revision=place.revision)
    )
    return Path(found).parent.name if isinstance(found, str) else place.revision


def load_tokenizer(place: Place, source: str, siglip: bool = False) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer, or whichever a SigLIP names, from `source`; raises `UserError`."""
    kind: Any = AutoTokenizer if siglip else CLIPTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            source, revision=place.revision_of(source), trust_remote_code=False
        )
    except Exception as error:
        raise cannot_load(place, error) from error
    return tokenizer

"""Text alignment by any CLIPModel: the embedded scorer, OpenAI's CLIP, PickScore, ..."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, CLIPModel, CLIPTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging as transformers_logging

from shortft.errors import UserError
from shortft.inputs import check_model_source
from shortft.rewards.preprocess import ClipPreprocess

_OPTION = "--reward-model"
_CACHED_PROMPTS = 8192  # 33 MB at 1,024 features


class ClipReward:
    """Cosine between a picture's and its prompt's CLIP embedding, in [-1, 1].

    ``scale="logit"`` multiplies it by the model's own temperature ``exp(logit_scale)``, which is
    what PickScore publishes (about 18 to 24).

    The model is frozen and runs in float32 whatever autocast says. Prompts longer than the
    model's text length are cut off, as the published scorers do.
    """

    name = "clip"
    report_name = "CLIP cosine"
    report_higher_is_better = True

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        preprocess: ClipPreprocess,
        scale: Literal["cosine", "logit"] = "cosine",
    ) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.scale = float(model.logit_scale.exp()) if scale == "logit" else 1.0
        self._max_tokens = min(
            tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings
        )
        self._text_features: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        source: str | Path | None = None,
        device: torch.device | str = "cpu",
        *,
        processor: str | Path | None = None,
        scale: Literal["cosine", "logit"] = "cosine",
    ) -> ClipReward:
        """Load a CLIPModel with its tokenizer and image preprocessing.

        Args:
            source: directory or hub id in transformers' layout; None = the embedded scorer.
            device: where the model lives and where pictures must be.
            processor: where tokenizer and ``preprocessor_config.json`` lie if not beside the
                weights (PickScore: ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``).
            scale: ``"cosine"`` or ``"logit"``.

        Raises:
            UserError: the model cannot be found or read, or is not a CLIPModel.
        """
        if source is None:
            source = Path(str(resources.files("shortft"))) / "assets" / "scorers" / "reward"
        source = check_model_source(_OPTION, str(source))
        processor = source if processor is None else check_model_source(_OPTION, str(processor))
        # The fused kernel's backward is slower than plain attention on CPUs.
        attention = "eager" if torch.device(device).type == "cpu" else "sdpa"
        try:
            model_type = AutoConfig.from_pretrained(source).model_type
            if model_type != "clip":
                raise UserError(f"{_OPTION} {source}: is a {model_type} model; give a CLIPModel")
            with _no_progress_bar():
                loaded: Any = CLIPModel.from_pretrained(
                    source,
                    dtype=torch.float32,
                    attn_implementation=attention,
                    output_loading_info=True,
                )
            model, loading = loaded
            if loading["missing_keys"]:
                missing = sorted(loading["missing_keys"])[0]
                raise UserError(
                    f"{_OPTION} {source}: weight {missing} is missing; give the whole CLIPModel, "
                    "as save_pretrained writes it"
                )
            tokenizer = CLIPTokenizer.from_pretrained(processor)
            config, _ = ImageProcessingMixin.get_image_processor_dict(processor)
            preprocess = ClipPreprocess.from_config(config)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{_OPTION} {source}: cannot be loaded ({' '.join(str(error).split())}); give a "
                "directory with a CLIPModel, its tokenizer and preprocessor_config.json"
            ) from error
        return cls(model.to(device), tokenizer, preprocess, scale)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), differentiable in the pixels."""
        if len(prompts) != len(images_BCHW):
            raise ValueError(f"{len(images_BCHW)} pictures but {len(prompts)} prompts")
        return self.scale * (self.embed_images(images_BCHW) * self.embed_texts(prompts)).sum(-1)

    @torch.no_grad()
    def report(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine (B,) in [-1, 1], whatever `scale` is."""
        return self(images_BCHW, prompts) / self.scale

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Unit-length features (B, D) of pictures in [0, 1], differentiable in the pixels."""
        with torch.autocast(images_BCHW.device.type, enabled=False):
            pixels = self.preprocess(images_BCHW)
            features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(features, dim=-1)

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit-length features (B, D) of prompts; each prompt is encoded only once."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._text_features]
        if len(self._text_features) + len(new) > _CACHED_PROMPTS:
            self._text_features.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            device = self.model.device
            tokens = self.tokenizer(
                new,
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            ).to(device)
            with torch.autocast(device.type, enabled=False):
                features = self.model.get_text_features(**tokens).pooler_output
            self._text_features.update(zip(new, F.normalize(features, dim=-1), strict=True))
        return torch.stack([self._text_features[text] for text in prompts])


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar while it reads weights; ours stands alone on the terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()

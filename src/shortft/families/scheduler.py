"""What tells, before any weights are read, that a chain of a model would not be the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from shortft.errors import UserError
from shortft.families.files import UNREADABLE
from shortft.families.single_file import shapes
from shortft.families.source import Source
from shortft.quiet import quiet

# Keys by which ComfyUI knows what a single file was trained on → noise that no schedule here has.
OTHER_NOISE = {"ztsnr": "noise of zero terminal SNR", "edm_vpred.sigma_max": "EDM's noise"}


def check_scheduler(
    source: Source, pipeline_class: Any, read: Callable[[Mapping[str, Any]], object]
) -> None:
    """Whether a schedule can be made of a model's scheduler, and is the one that its file names.

    Args:
        source: the model; of it the scheduler's configuration and a single file's header are read.
        pipeline_class: its pipeline's.
        read: makes a schedule of a configuration, or raises KeyError or ValueError.

    Raises:
        UserError: if not.
    """
    where = {"revision": source.revision}
    try:
        with quiet():
            index = pipeline_class.load_config(source.pipeline, **where)
            kind = getattr(diffusers, index["scheduler"][1])
            scheduler = kind.from_pretrained(source.pipeline, subfolder="scheduler", **where)
    except UNREADABLE:
        return  # loading will say what is wrong
    config, name = scheduler.config, f"--model {source.name}"
    keys = shapes(source.file) if source.file is not None else {}
    for key, noise in OTHER_NOISE.items():
        if key in keys:
            raise UserError(
                f"{name}: its key {key} says that it was trained on {noise}, which is not "
                "supported; give another model"
            )
    prediction = config.get("prediction_type", "epsilon")
    if "v_pred" in keys and prediction != "v_prediction":
        raise UserError(
            f"{name}: its key v_pred says that it predicts v, the scheduler of {source.pipeline} "
            f"says {prediction}; give --pipeline a configuration whose scheduler says v_prediction"
        )
    try:
        read({**config, "_class_name": kind.__name__})
    except (KeyError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        remedy = "give another model" if source.file is None else "give --pipeline another one"
        raise UserError(
            f"{name}: its {kind.__name__} cannot be used ({reason}); {remedy}"
        ) from error

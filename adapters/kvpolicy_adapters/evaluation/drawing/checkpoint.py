"""Checkpoints of transformers: which family one is of stands in its configuration."""

from __future__ import annotations

import re
from typing import Any

from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    ChameleonForConditionalGeneration,
    Emu3ForConditionalGeneration,
    JanusForConditionalGeneration,
)

from kvpolicy.errors import ParameterError, first_line, near_matches
from kvpolicy.lab.draw.image_model import IMAGE_MODELS, ImageModel, ModelSource
from kvpolicy_adapters.evaluation.drawing.chameleon import ChameleonImages
from kvpolicy_adapters.evaluation.drawing.common import dtype_of, options_of
from kvpolicy_adapters.evaluation.drawing.emu3 import Emu3Images
from kvpolicy_adapters.evaluation.drawing.janus import JanusImages
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan

__all__ = ["open_checkpoint"]

_FAMILIES: dict[str, Any] = {
    "janus": JanusForConditionalGeneration,
    "chameleon": ChameleonForConditionalGeneration,
    "emu3": Emu3ForConditionalGeneration,
}


def open_checkpoint(source: ModelSource) -> ImageModel:
    """The image model of a checkpoint of transformers: a folder, or a name on the hub.

    Options: ``size``, pixels a side of the pictures; and of Lumina-mGPT ``pixels``, the side of
    what is drawn, which the name of a released checkpoint says by itself; and of all but Emu3
    ``cache``, to compare a policy's with: ``dynamic`` or ``static``, of transformers.

    Raises:
        ParameterError: there is no such checkpoint, it draws no images, or ``vq`` is missing or
            not wanted.
    """
    path = source.path or ""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        known = near_matches(path, IMAGE_MODELS.names())
        raise ParameterError(
            f"model {path!r} is no image model ({known}), and no checkpoint of transformers could "
            f"be opened: {first_line(error)}"
        ) from error
    kind = config.model_type
    if kind not in _FAMILIES:
        raise ParameterError(
            f"model {path!r} is of the type {kind!r}, which draws no images that kvpolicy knows; "
            f"{near_matches(kind, _FAMILIES)}"
        )
    takes: dict[str, Any] = {"size": None}
    if kind != "emu3":
        takes["cache"] = "kvpolicy"
    if kind == "chameleon":
        takes["pixels"] = None
    options = options_of(source, takes)
    if (source.vq is None) == (kind == "chameleon"):
        if source.vq is None:
            raise ParameterError(f"{path}: --vq is missing: Chameleon's decoder, vqgan.ckpt")
        raise ParameterError(f"{path} has a decoder of its own; --vq {source.vq} is not wanted")
    # The small file first: a wrong one is refused before the large one is loaded.
    vqgan = None if source.vq is None else read_vqgan(source.vq).to(source.device)
    model = _FAMILIES[kind].from_pretrained(path, dtype=dtype_of(source)).eval().to(source.device)
    if kind == "janus":
        return JanusImages(model, AutoProcessor.from_pretrained(path), **options)
    if kind == "emu3":
        return Emu3Images(model, AutoProcessor.from_pretrained(path), size=options["size"])
    assert vqgan is not None
    pixels = options["pixels"]
    if pixels is None and "lumina" in path.lower():
        said = re.search(r"(512|768|1024)", path)
        if said is None:
            raise ParameterError(f"{path} does not say its size; give --option pixels=768")
        pixels = int(said[1])
    options["pixels"] = pixels
    return ChameleonImages(model, AutoTokenizer.from_pretrained(path), vqgan, **options)

"""Image models: what draws pictures under a policy.

Packages add theirs through the entry-point group ``kvpolicy.image_models``; the lab never imports
an adapter by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvpolicy.cache.stats import CacheStats
from kvpolicy.errors import ParameterError, parameter_error
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.device import check_device
from kvpolicy.lab.run.subject import Setting
from kvpolicy.layout import LateLayout, TokenLayout
from kvpolicy.registry import Registry

__all__ = [
    "IMAGE_MODELS",
    "Drawn",
    "ImageModel",
    "ModelSource",
    "Sampler",
    "load_image_model",
]

#: What serves a name that stands in no registry: a checkpoint on the hub, or a folder.
_CHECKPOINT = "checkpoint"


class Sampler(BaseModel):
    """How tokens are drawn; None is the model's own default.

    Attributes:
        cfg: classifier-free guidance; 1 is none.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the likeliest so many tokens; 0 for all.
        top_p: only the likeliest tokens that have this probability together; 1 for all.
        decoder: how logits become tokens.

    Raises:
        ParameterError: a field is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cfg: float | None = Field(None, ge=1, allow_inf_nan=False)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    decoder: str = "sequential"

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise parameter_error("draw", type(self), error) from None


@dataclass(frozen=True)
class ModelSource:
    """Where an image model comes from.

    Attributes:
        name: of an image model in the registry.
        path: behind its name: a file, a folder, or a name on the hub; None for a model that ships.
        vq: the file that makes pixels of codes, where the checkpoint has no decoder of its own.
        device: where it computes.
        dtype: of its weights: ``float32``, ``bfloat16`` or ``float16``.
        options: further ones, which the model names.
    """

    name: str
    path: str | None = None
    vq: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    options: tuple[tuple[str, Any], ...] = field(default=())

    @staticmethod
    def parse(text: str, **others: Any) -> ModelSource:
        """Of ``fashion-ar``, ``llamagen:c2i_XL_384.pt``, or a checkpoint's folder or hub name."""
        name, colon, path = text.partition(":")
        if name in IMAGE_MODELS.names():
            return ModelSource(name, path if colon else None, **others)
        return ModelSource(_CHECKPOINT, text, **others)


@dataclass(frozen=True)
class Drawn:
    """A batch of pictures.

    Attributes:
        images: uint8 ``[B, rows, cols]``, or ``[B, rows, cols, 3]`` in colour.
        stats: what the cache of the batch cost; one for each cache, where guidance has its own.
    """

    images: NDArray[np.uint8]
    stats: tuple[CacheStats, ...]


@runtime_checkable
class ImageModel(Protocol):
    """A model that draws.

    One that can draw with a cache of transformers, to compare a policy's with, takes the option
    ``cache`` (``dynamic`` or ``static``), and has an attribute of that name that says which it is.
    One whose tokens come in an order that depends on the decoder has ``layout_under(decoder)``,
    as a :class:`kvpolicy.lab.run.subject.Subject` may have it.

    Attributes:
        name: for people.
        num_layers: layers that have a cache.
    """

    name: str
    num_layers: int

    @property
    def layout(self) -> TokenLayout | LateLayout:
        """Where tokens sit; a new object each time, if it has a state."""

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse an item that can't be drawn, before anything is.

        Raises:
            ParameterError: a class is out of range, a prompt too long, an option not served.
        """

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch; each image by the random numbers of its own item (:meth:`Item.chances`)."""


IMAGE_MODELS: Registry[Callable[[ModelSource], ImageModel]] = Registry(
    "image model", "kvpolicy.image_models"
)


def load_image_model(source: ModelSource) -> ImageModel:
    """Load a model.

    Raises:
        UnknownNameError: no image model has this name; near matches are listed.
        ParameterError: its files can't be used, or an option is unknown.
        OSError: a file can't be read.
    """
    check_device(source.device)
    model = IMAGE_MODELS.get(source.name)(source)
    if not isinstance(model, ImageModel):
        raise ParameterError(f"image model {source.name!r} made {model!r}, which can't draw")
    return model

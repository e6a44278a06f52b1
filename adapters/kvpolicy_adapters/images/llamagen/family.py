"""The family of LlamaGen's models, ours and the official object, for ``attach``."""

from __future__ import annotations

from torch import nn

from kvpolicy import RasterLayout
from kvpolicy_adapters.images.llamagen import official
from kvpolicy_adapters.images.llamagen.modeling import LlamaGen

__all__ = ["LlamaGenFamily"]


class LlamaGenFamily:
    """A square grid behind a class or a caption."""

    def recognises(self, model: nn.Module) -> bool:
        """Whether a model is a :class:`LlamaGen`, or the object of the authors' repository."""
        return isinstance(model, LlamaGen) or official.recognises(model)

    def layout(self, model: nn.Module) -> RasterLayout:
        """The grid behind the condition, which is pinned, padding of captions included.

        Raises:
            LayoutError: the official object's tokens make no square.
        """
        if not isinstance(model, LlamaGen):
            return official.layout_of(model)
        side = model.config.grid_size
        return RasterLayout(rows=side, cols=side, prefix=model.config.prefix)

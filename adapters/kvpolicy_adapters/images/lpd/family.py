"""The family of LPD's models, ours and the official object, for ``attach``."""

from __future__ import annotations

from torch import nn

from kvpolicy import LayoutError, TokenLayout
from kvpolicy_adapters.images.lpd import official
from kvpolicy_adapters.images.lpd.modeling import LPD

__all__ = ["LPDFamily"]


class LPDFamily:
    """A square grid behind a class, in an order that whoever draws chooses."""

    def recognises(self, model: nn.Module) -> bool:
        """Whether a model is an :class:`LPD`, or the object of the authors' repository."""
        return isinstance(model, LPD) or official.recognises(model)

    def layout(self, model: nn.Module) -> TokenLayout:
        """There is none before somebody says what comes when.

        Raises:
            LayoutError: always; says how to make one.
        """
        raise LayoutError(official.no_layout(type(model).__name__))

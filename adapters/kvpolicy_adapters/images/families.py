"""Families of models: which layout a model draws its images in, so that ``attach`` need not ask.

A family recognises a model object and says where its tokens sit. Other packages join through the
entry-point group ``kvpolicy.adapters``: an entry point names an object that is a :class:`Family`.
"""

from __future__ import annotations

import warnings
from typing import Protocol

from transformers import PreTrainedModel

from kvpolicy import KVPolicyError, LateLayout, Registry, TextLayout, TokenLayout
from kvpolicy_adapters.images.chameleon import Chameleon
from kvpolicy_adapters.images.emu3 import Emu3
from kvpolicy_adapters.images.janus import Janus
from kvpolicy_adapters.images.llamagen.family import LlamaGenFamily
from kvpolicy_adapters.images.lpd.family import LPDFamily

__all__ = ["FAMILIES", "Family", "layout_of"]


class Family(Protocol):
    """One family of models."""

    def recognises(self, model: PreTrainedModel) -> bool:
        """Whether a model belongs to this family; cheap, and without side effects."""

    def layout(self, model: PreTrainedModel) -> TokenLayout | LateLayout:
        """Where the tokens of one generation sit; a new object each time, if it has a state.

        Raises:
            LayoutError: the model's configuration describes no grid, or does not say what comes
                when.
        """


FAMILIES: Registry[Family] = Registry("family", "kvpolicy.adapters")
FAMILIES.add("chameleon", Chameleon())
FAMILIES.add("emu3", Emu3())
FAMILIES.add("janus", Janus())
FAMILIES.add("llamagen", LlamaGenFamily())
FAMILIES.add("lpd", LPDFamily())

_SHIPPED = ("chameleon", "emu3", "janus", "llamagen", "lpd")


def layout_of(model: PreTrainedModel) -> TokenLayout | LateLayout:
    """The layout of a model's family; text where no family recognises it.

    Families that ship are asked first, then those of other packages, in the order of their names.
    A package whose entry point can't be loaded is passed over with a warning: it must not keep
    other models from being attached.

    Raises:
        LayoutError: the model's configuration describes no grid.
    """
    for name in (*_SHIPPED, *(name for name in FAMILIES.names() if name not in _SHIPPED)):
        try:
            family = FAMILIES.get(name)
        except KVPolicyError as error:
            warnings.warn(f"{error}; it is passed over", RuntimeWarning, stacklevel=2)
            continue
        if family.recognises(model):
            return family.layout(model)
    return TextLayout()

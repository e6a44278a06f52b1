"""LPD (arXiv:2507.01957): n x n image tokens of a class, in any order and many at once.

Two ways in. The ``LPD`` object of the authors' repository goes into ``attach`` as it is, its
``sample_tokens`` untouched (see :func:`attach_official`). :class:`LPD` is an implementation of our
own, a model of transformers that reads the same checkpoints (:func:`read_official`) and needs none
of that code.
"""

from kvpolicy_adapters.images.lpd.checkpoint import read_official
from kvpolicy_adapters.images.lpd.configuration import SIZES, LPDConfig
from kvpolicy_adapters.images.lpd.family import LPDFamily
from kvpolicy_adapters.images.lpd.modeling import LPD
from kvpolicy_adapters.images.lpd.official import attach_official

__all__ = [
    "LPD",
    "SIZES",
    "LPDConfig",
    "LPDFamily",
    "attach_official",
    "read_official",
]

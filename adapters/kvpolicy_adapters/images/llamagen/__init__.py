"""LlamaGen (arXiv:2406.06525): n x n image tokens behind a class or a caption.

Two ways in. The ``Transformer`` object of the authors' repository goes into ``attach`` as it is
(see :func:`attach_official`). :class:`LlamaGen` is an implementation of our own, a model of
transformers that reads the same checkpoints (:func:`read_official`) and needs none of that code.
"""

from kvpolicy_adapters.images.llamagen.checkpoint import read_official
from kvpolicy_adapters.images.llamagen.configuration import SIZES, LlamaGenConfig
from kvpolicy_adapters.images.llamagen.family import LlamaGenFamily
from kvpolicy_adapters.images.llamagen.modeling import LlamaGen
from kvpolicy_adapters.images.llamagen.official import attach_official

__all__ = [
    "SIZES",
    "LlamaGen",
    "LlamaGenConfig",
    "LlamaGenFamily",
    "attach_official",
    "read_official",
]

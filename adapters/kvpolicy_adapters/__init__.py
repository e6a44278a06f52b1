"""kvpolicy_adapters: hooks whole models up to kvpolicy.

``attach`` serves the causal language models of transformers, which many image generators are.
"""

from kvpolicy_adapters import zoo
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.decode import decode
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.compiled import compile_decode
from kvpolicy_adapters.transformers.skinny import skinny_gemm

__all__ = ["TransformersCache", "attach", "compile_decode", "decode", "skinny_gemm", "zoo"]

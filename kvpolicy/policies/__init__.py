"""The strategies that ship with kvpolicy, one file each. Importing this registers them."""

from kvpolicy.parts.compose import Compose
from kvpolicy.policies.ahead import Ahead
from kvpolicy.policies.full import Full
from kvpolicy.policies.h2o import H2O
from kvpolicy.policies.knorm import KNorm
from kvpolicy.policies.linear import Linear
from kvpolicy.policies.linear2d import Linear2D
from kvpolicy.policies.near import Near
from kvpolicy.policies.pyramid import Pyramid
from kvpolicy.policies.random import Random
from kvpolicy.policies.rkv import RKV
from kvpolicy.policies.snapkv import SnapKV
from kvpolicy.policies.ssd import SSD
from kvpolicy.policies.streaming_llm import StreamingLLM
from kvpolicy.policies.tova import TOVA

__all__ = [
    "H2O",
    "RKV",
    "SSD",
    "TOVA",
    "Ahead",
    "Compose",
    "Full",
    "KNorm",
    "Linear",
    "Linear2D",
    "Near",
    "Pyramid",
    "Random",
    "SnapKV",
    "StreamingLLM",
]

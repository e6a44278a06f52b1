"""Decoders: what turns a model's logits into tokens, over a step function and a cache."""

from kvpolicy.decoding.decoder import (
    DECODERS,
    Decoded,
    Decoder,
    Rule,
    StagingCache,
    Step,
    register_decoder,
)
from kvpolicy.decoding.joint_cache import JointCache
from kvpolicy.decoding.parallel import GroupStep, Parallel
from kvpolicy.decoding.sampling import Sampling
from kvpolicy.decoding.sequential import Sequential
from kvpolicy.decoding.speculative import SpeculativeJacobi

__all__ = [
    "DECODERS",
    "Decoded",
    "Decoder",
    "GroupStep",
    "JointCache",
    "Parallel",
    "Rule",
    "Sampling",
    "Sequential",
    "SpeculativeJacobi",
    "StagingCache",
    "Step",
    "register_decoder",
]

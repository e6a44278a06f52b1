"""kvpolicy: a KV-cache eviction policy is one small class; everything around it is here.

Three lines for a bare attention loop (adapters for whole models are in ``kvpolicy_adapters``)::

    layout = kvpolicy.RasterLayout(rows=28, cols=28, prefix=1)
    cache = kvpolicy.PolicyCache("linear", budget="1/6", layout=layout, num_layers=4)
    out = cache.attend(layer, query, key, value)
"""

from kvpolicy import decoding, policies
from kvpolicy.budget.budget import Arithmetic, Budget, PerLayer, Schedule, Uniform
from kvpolicy.budget.calibrated import Calibrated
from kvpolicy.budget.span import HalfLife, PositiveSpan, Span
from kvpolicy.cache.cache import Halves, PolicyCache, Reclaim
from kvpolicy.cache.compiled_step import SlotStep
from kvpolicy.cache.stats import CacheStats
from kvpolicy.decoding import (
    Decoded,
    Decoder,
    GroupStep,
    JointCache,
    Parallel,
    Rule,
    Sampling,
    Sequential,
    SpeculativeJacobi,
    StagingCache,
    Step,
    register_decoder,
)
from kvpolicy.errors import (
    AttentionError,
    BudgetError,
    CacheStateError,
    KernelError,
    KVPolicyError,
    LayoutError,
    ModelError,
    ParameterError,
    ShapeError,
    UnknownNameError,
)
from kvpolicy.layout import (
    AfterPrompt,
    LateLayout,
    OrderedLayout,
    RasterLayout,
    SequenceLayout,
    TextLayout,
    TokenLayout,
    group_sizes,
    locality_aware_order,
)
from kvpolicy.observers import (
    AttentionObserver,
    AttentionReport,
    CumulativeMass,
    FadingMass,
    LastQuery,
    LineMass,
    Need,
    RollingMass,
    WindowMass,
)
from kvpolicy.ops.attend import attend
from kvpolicy.parts import available_parts, register_part
from kvpolicy.parts.compose import compose
from kvpolicy.policy.policy import EvictionPolicy, ScoredPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.registry import PolicySpec, Registry, available, create, register, spec
from kvpolicy.slots import SlotShape, SlotStore
from kvpolicy.tracing.offsets import OffsetRecord, watch_offsets
from kvpolicy.tracing.recording import Recording, trace
from kvpolicy.tracing.trace import LayerTrace, Trace, load_trace

__all__ = [
    "AfterPrompt",
    "Arithmetic",
    "AttentionError",
    "AttentionObserver",
    "AttentionReport",
    "Budget",
    "BudgetError",
    "CacheStateError",
    "CacheStats",
    "CacheView",
    "Calibrated",
    "CumulativeMass",
    "Decoded",
    "Decoder",
    "EvictionPolicy",
    "FadingMass",
    "GroupStep",
    "HalfLife",
    "Halves",
    "JointCache",
    "KVPolicyError",
    "KernelError",
    "LastQuery",
    "LateLayout",
    "LayerTrace",
    "LayoutError",
    "LineMass",
    "ModelError",
    "Need",
    "OffsetRecord",
    "OrderedLayout",
    "Parallel",
    "ParameterError",
    "PerLayer",
    "PolicyCache",
    "PolicySpec",
    "PositiveSpan",
    "RasterLayout",
    "Reclaim",
    "Recording",
    "Registry",
    "RollingMass",
    "Rule",
    "Sampling",
    "Schedule",
    "ScoredPolicy",
    "SequenceLayout",
    "Sequential",
    "ShapeError",
    "SlotShape",
    "SlotStep",
    "SlotStore",
    "Span",
    "SpeculativeJacobi",
    "StagingCache",
    "Step",
    "TextLayout",
    "TokenLayout",
    "Trace",
    "Uniform",
    "UnknownNameError",
    "WindowMass",
    "attend",
    "available",
    "available_parts",
    "compose",
    "create",
    "decoding",
    "group_sizes",
    "load_trace",
    "locality_aware_order",
    "policies",
    "register",
    "register_decoder",
    "register_part",
    "spec",
    "trace",
    "watch_offsets",
]

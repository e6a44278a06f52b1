"""Tensor parallelism: which of a model's KV heads this process holds.

transformers splits attention by heads (``tp_plan="auto"``): a process computes, caches and evicts
its own heads' tokens. A policy decides a head at a time, so processes need not talk.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from kvpolicy import EvictionPolicy, ParameterError

__all__ = ["HeadSplit"]

#: Modules whose output holds the keys, and the plan that leaves each process its own slice of it.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
_SLICED = "colwise"


@dataclass(frozen=True)
class HeadSplit:
    """How a model's heads are split over processes.

    Attributes:
        rank: which share this process holds.
        size: number of shares; 1 where every process holds all heads.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, model: PreTrainedModel) -> HeadSplit:
        """The split of a model."""
        size = getattr(model, "tp_size", None) or 1
        plan = model.tp_plan if size > 1 else {}
        if not any(
            name.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and style == _SLICED
            for name, style in plan.items()
        ):
            return cls()
        from torch.distributed.tensor import DTensor  # not in every build of torch

        mesh = next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh
        return cls(mesh.get_local_rank("tp" if mesh.ndim > 1 else None), size)

    def first_head(self, model: PreTrainedModel) -> int:
        """Index, in the whole model, of the first KV head here."""
        if self.size == 1:
            return 0
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(self.rank * (heads // self.size))

    def check(self, policy: EvictionPolicy) -> None:
        """Refuse a policy that must see all heads.

        Raises:
            ParameterError: the policy lets heads influence each other, and they are split.
        """
        if self.size > 1 and policy.mixes_heads:
            raise ParameterError(
                f"policy {policy.label!r} decides for all heads of a layer together, but tensor "
                f"parallelism gives each of {self.size} processes only its own heads; use a policy "
                f"that decides per head, e.g. 'h2o', or load the model with device_map instead of "
                f"tp_plan"
            )

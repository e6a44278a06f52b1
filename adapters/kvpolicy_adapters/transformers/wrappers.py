"""What other libraries wrap a model in, and the model inside it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvpolicy import ModelError, ParameterError

__all__ = ["unwrapped"]

#: PEFT's way of learning keys and values that go before a sequence's own, in the cache itself.
_PREFIX_TUNING = "PREFIX_TUNING"


def unwrapped(model: Any) -> PreTrainedModel:
    """The model of transformers inside what was given; the wrapper goes on working around it.

    Looked into are modules compiled by ``torch.compile``, ``DataParallel`` and its distributed
    kin (also as accelerate prepares them), PEFT's models, and transformers' pipelines.

    Raises:
        ModelError: PEFT's prefix tuning brings a cache of its own.
        ParameterError: no model of transformers is in there, or it can't be told which.
    """
    given = model
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            _refuse_prefix_tuning(model)
            inside = model.get_base_model()
        elif isinstance(model, nn.Module):
            # torch.compile's wrapper; that of DataParallel, DistributedDataParallel and FSDP.
            inside = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        else:
            inside = getattr(model, "model", None)  # a pipeline's
        if not isinstance(inside, nn.Module):
            raise ParameterError(
                f"model is a {type(given).__name__}; attach() serves transformers' "
                f"PreTrainedModel{_remedy(given)}"
            )
        model = inside
    return model


def _refuse_prefix_tuning(model: Any) -> None:
    kinds = {
        getattr(config.peft_type, "value", config.peft_type)
        for config in model.peft_config.values()
    }
    if _PREFIX_TUNING in kinds:
        raise ModelError(
            f"{type(model).__name__} is tuned by prefix tuning, which puts learned keys and values "
            f"into a cache of its own, so no policy can take its place; LoRA, IA3, prompt tuning "
            f"and their like are served"
        )


def _remedy(given: Any) -> str:
    """Which part of what was given could be attached, in words."""
    if not isinstance(given, nn.Module):
        return ""
    found = [name for name, part in given.named_modules() if isinstance(part, PreTrainedModel)]
    outermost = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if not outermost:
        return ""
    return f": attach the one in it, {' or '.join(f'model.{name}' for name in outermost)}"

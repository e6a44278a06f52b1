"""Janus-Pro: 24 x 24 image tokens behind a prompt (arXiv:2501.17811).

``JanusForConditionalGeneration.generate(generation_mode="image")`` takes the cache of ``attach`` as
it is. A plain ``LlamaForCausalLM`` driven with ``inputs_embeds``, as the authors' repository does,
looks like any text model; say where its tokens sit: ``attach(model, layout=GRID, ...)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy import AfterPrompt, LayoutError, RasterLayout, Step
from kvpolicy_adapters.images.guidance import guided
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import as_argument
from kvpolicy_adapters.transformers.steps import so_far

__all__ = ["GRID", "Janus", "image_step", "recognises"]

#: The grid of the released checkpoints (384 x 384 pixels, 16 a token), behind a prompt.
GRID = AfterPrompt(RasterLayout(rows=24, cols=24))


class Janus:
    """The family of ``JanusForConditionalGeneration``, drawing images.

    The prompt is the prefix, padding included: a row that is padded on the left pins its padding,
    which nothing ever attends to. Guidance doubles the batch, and each half decides by itself.
    To answer in text (``generation_mode="text"``), attach with ``layout=TextLayout(...)``.
    """

    def recognises(self, model: PreTrainedModel) -> bool:
        """Whether a model is a Janus of transformers."""
        return recognises(model)

    def layout(self, model: PreTrainedModel) -> AfterPrompt:
        """The grid of its configuration behind the prompt.

        Raises:
            LayoutError: the grid's columns don't divide the number of image tokens.
        """
        tokens = model.config.vision_config.num_image_tokens
        cols = model.config.vq_config.num_patches
        if tokens % cols:
            raise LayoutError(
                f"{type(model).__name__} draws num_image_tokens={tokens} in lines of "
                f"num_patches={cols}, which does not divide it; mend the configuration, or say "
                f"where tokens sit: attach(..., layout=AfterPrompt(RasterLayout(rows=..., "
                f"cols=...)))"
            )
        return AfterPrompt(RasterLayout(rows=tokens // cols, cols=cols))


def recognises(model: Any) -> bool:
    """Whether a model is a Janus of transformers."""
    return bool(model.config.model_type == "janus")


def image_step(
    model: Any,
    cache: TransformersCache,
    prompt: Tensor,
    count: int,
    mask: Tensor | None,
    scale: float,
) -> tuple[Step, Tensor]:
    """What a decoder calls to draw an image, as ``generate(generation_mode="image")`` does.

    Args:
        model: attached.
        cache: of its ``attach`` block; where there is guidance, of twice the batch.
        prompt: ids ``[B, P]``.
        count: image tokens that are to be drawn.
        mask: of the prompt, ``[B, P]``, 0 where it is padding; None where none is.
        scale: of guidance; 1 is none.

    Returns:
        The step, and the prompt.
    """
    settings = model.generation_config
    ids, whole = prompt, torch.ones_like(prompt) if mask is None else mask
    if scale != 1:
        # The unconditional half has nothing but where the sequence and the image begin.
        stays = prompt == settings.bos_token_id
        stays |= prompt == settings.generation_kwargs["boi_token_id"]
        ids = torch.cat([prompt, prompt.masked_fill(~stays, settings.pad_token_id)])
        whole = whole.repeat(2, 1)

    def step(tokens: Tensor) -> Tensor:
        seen, new = cache.get_seq_length(), tokens.shape[1]
        if seen == 0:
            embeds = model.get_input_embeddings()(ids)
        else:
            both = tokens if scale == 1 else tokens.repeat(2, 1)
            embeds = model.prepare_embeddings_for_image_generation(both)
        visible, places = so_far(whole, seen, new)
        output = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=visible,
            position_ids=places,
            use_cache=True,
            **as_argument(cache),
        )
        hidden = output.last_hidden_state
        logits: Tensor = model.model.generation_head(hidden if seen else hidden[:, -1:])
        if scale == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guided(conditional, unconditional, scale)

    return step, prompt

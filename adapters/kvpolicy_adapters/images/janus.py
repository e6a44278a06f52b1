"""Janus-Pro: 24 x 24 image tokens behind a prompt (arXiv:2501.17811).

``JanusForConditionalGeneration.generate(generation_mode="image")`` takes the cache of ``attach`` as
it is. A plain ``LlamaForCausalLM`` driven with ``inputs_embeds``, as the authors' repository does,
looks like any text model; say where its tokens sit: ``attach(model, layout=GRID, ...)``.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from kvpolicy import AfterPrompt, LayoutError, RasterLayout

__all__ = ["GRID", "Janus"]

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
        return model.config.model_type == "janus"

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

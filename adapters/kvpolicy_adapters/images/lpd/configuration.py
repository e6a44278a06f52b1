"""The shapes of LPD's models (arXiv:2507.01957, table 1)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from kvpolicy import ParameterError, RasterLayout
from kvpolicy.errors import near_matches

__all__ = ["SIZES", "LPDConfig"]

#: Layers, heads and width of the released sizes.
SIZES = {"L": (24, 16, 1024), "XL": (36, 20, 1280), "XXL": (48, 24, 1536)}


class LPDConfig(PreTrainedConfig):
    """One LPD model.

    Args:
        grid_size: image tokens a side: 16 for 256 pixels, 32 for 512.
        vocab_size: image tokens that there are.
        hidden_size: width.
        num_hidden_layers: layers.
        num_attention_heads: heads, each with a key and a value of its own.
        intermediate_size: hidden units of a feed-forward layer; four widths by default.
        num_classes: classes, without the one that stands for none.
        layer_norm_eps: added to the variance before its root is taken.
        initializer_range: standard deviation of random weights.

    Raises:
        ParameterError: a shape does not work.
    """

    model_type = "lpd"

    grid_size: int = 16
    vocab_size: int = 16384
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int | None = None
    num_classes: int = 1000
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        kwargs.setdefault("tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        if self.grid_size < 1:
            raise ParameterError(f"LPDConfig: grid_size={self.grid_size} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ParameterError(
                f"LPDConfig: hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> LPDConfig:
        """The configuration of a released size: ``L``, ``XL`` or ``XXL``.

        Example:
            >>> LPDConfig.of_size("XL", grid_size=32).num_hidden_layers
            36

        Args:
            size: its name.
            changes: other fields.

        Raises:
            ParameterError: there is no such size.
        """
        if size not in SIZES:
            raise ParameterError(f"LPD has no size {size!r}: {near_matches(size, SIZES)}")
        layers, heads, width = SIZES[size]
        return cls(
            num_hidden_layers=layers, num_attention_heads=heads, hidden_size=width, **changes
        )

    @property
    def grid(self) -> RasterLayout:
        """The image behind its class; ``decoder.ordered(config.grid)`` is a layout."""
        return RasterLayout(rows=self.grid_size, cols=self.grid_size, prefix=1)

"""The shapes of LlamaGen's models (arXiv:2406.06525, table 1)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from kvpolicy import ParameterError
from kvpolicy.errors import near_matches

__all__ = ["SIZES", "LlamaGenConfig"]

#: Layers, heads and width of the released sizes.
SIZES = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}
_CONDITIONS = ("c2i", "t2i")
#: Hidden units of a feed-forward layer come in multiples of this.
_MULTIPLE = 256


class LlamaGenConfig(PreTrainedConfig):
    """One LlamaGen model.

    Args:
        condition: ``c2i``, an image of a class, or ``t2i``, of a caption.
        grid_size: image tokens a side: 16 for 256 pixels, 24 for 384, 32 for 512.
        vocab_size: image tokens that there are.
        hidden_size: width.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: KV heads; as many as query heads by default.
        intermediate_size: hidden units of a feed-forward layer; by default two thirds of four
            widths, rounded up to a multiple of 256.
        num_classes: classes, without the one that stands for none.
        caption_size: width of a caption's embeddings (those of FLAN-T5-XL).
        caption_length: embeddings of a caption, padding included.
        rope_base: base of the rotation's frequencies.
        rms_norm_eps: added to the mean square before its root is taken.
        initializer_range: standard deviation of random weights.

    Raises:
        ParameterError: a shape does not work, or the condition is unknown.
    """

    model_type = "llamagen"

    condition: str = "c2i"
    grid_size: int = 24
    vocab_size: int = 16384
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    num_classes: int = 1000
    caption_size: int = 2048
    caption_length: int = 120
    rope_base: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-(8 * self.hidden_size // 3) // _MULTIPLE) * _MULTIPLE
        kwargs.setdefault("tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        if self.condition not in _CONDITIONS:
            raise ParameterError(
                f"LlamaGenConfig: condition={self.condition!r}: "
                f"{near_matches(str(self.condition), _CONDITIONS)}"
            )
        if self.grid_size < 1:
            raise ParameterError(f"LlamaGenConfig: grid_size={self.grid_size} must be at least 1")
        # Rows turn one half of a head's pairs and columns the other.
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ParameterError(
                f"LlamaGenConfig: hidden_size={self.hidden_size} must be a multiple of four times "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ParameterError(
                f"LlamaGenConfig: num_attention_heads={self.num_attention_heads} must be a "
                f"multiple of num_key_value_heads={self.num_key_value_heads}"
            )

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> LlamaGenConfig:
        """The configuration of a released size: ``B``, ``L``, ``XL``, ``XXL`` or ``3B``.

        Example:
            >>> LlamaGenConfig.of_size("XL", condition="t2i", grid_size=32).num_hidden_layers
            36

        Args:
            size: its name.
            changes: other fields.

        Raises:
            ParameterError: there is no such size.
        """
        if size not in SIZES:
            raise ParameterError(f"LlamaGen has no size {size!r}: {near_matches(size, SIZES)}")
        layers, heads, width = SIZES[size]
        return cls(
            num_hidden_layers=layers, num_attention_heads=heads, hidden_size=width, **changes
        )

    @property
    def prefix(self) -> int:
        """Tokens before the image: the class, or the caption."""
        return 1 if self.condition == "c2i" else self.caption_length

    @property
    def length(self) -> int:
        """Tokens of a whole sequence, prefix included."""
        return self.prefix + self.grid_size**2

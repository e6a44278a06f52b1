"""What LineAR's authors published of speed and memory, as rows.

The table of efficiency of arXiv:2512.04857, as the authors' repository (Zr2223/LineAR at 6bccc0e)
shows it; quality from the paper's abstract, which has two models. Their machine stands in neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.errors import UnknownNameError, near_matches

__all__ = ["LINEAR", "Model", "Row", "table_of"]


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        key: what a file is given for: ``llamagen-xl``.
        label: as the table has it.
        tokens: of an image.
        batch: images at a time.
        example: how ``--model`` of ``kvpolicy draw`` names it.
        vq: the decoder's file that it needs beside it; None where it has its own.
        classes: whether it draws classes and not prompts.
    """

    key: str
    label: str
    tokens: int
    batch: int
    example: str
    vq: str | None = None
    classes: bool = False


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        model: which.
        budget: share of the image's tokens that a head keeps; None for the full cache.
        memory_gb: peak memory of the device.
        seconds: of drawing one batch.
        images_per_second: as published, rounded there.
        speedup: over the authors' full cache.
        fid: Fréchet inception distance; None where the abstract has none.
    """

    model: Model
    budget: str | None
    memory_gb: float
    seconds: float
    images_per_second: float
    speedup: float
    fid: float | None = None


_XL = Model(
    "llamagen-xl", "LlamaGen-XL", 576, 256, "llamagen:c2i_XL_384.pt", "vq_ds16_c2i.pt", True
)
_XXL = Model(
    "llamagen-xxl", "LlamaGen-XXL", 576, 128, "llamagen:c2i_XXL_384.pt", "vq_ds16_c2i.pt", True
)
_JANUS_1B = Model("janus-pro-1b", "Janus-Pro-1B", 576, 128, "deepseek-community/Janus-Pro-1B")
_JANUS_7B = Model("janus-pro-7b", "Janus-Pro-7B", 576, 64, "deepseek-community/Janus-Pro-7B")
_LUMINA_768 = Model(
    "lumina-768", "Lumina-mGPT-768", 2352, 12, "Alpha-VLLM/Lumina-mGPT-7B-768", "vqgan.ckpt"
)
_LUMINA_1024 = Model(
    "lumina-1024", "Lumina-mGPT-1024", 4160, 8, "Alpha-VLLM/Lumina-mGPT-7B-1024", "vqgan.ckpt"
)

#: Full cache first, then LineAR, model by model.
LINEAR = (
    Row(_XL, None, 64.75, 331.52, 0.77, 1.00, fid=2.77),
    Row(_XL, "1/4", 25.51, 63.99, 4.00, 5.18),
    Row(_XL, "1/6", 20.97, 43.78, 5.85, 7.57, fid=2.68),
    Row(_XXL, None, 51.37, 179.96, 0.71, 1.00),
    Row(_XXL, "1/4", 19.54, 50.05, 2.56, 3.60),
    Row(_XXL, "1/6", 15.87, 36.22, 3.53, 4.97),
    Row(_JANUS_1B, None, 58.68, 143.64, 0.89, 1.00, fid=23.85),
    Row(_JANUS_1B, "1/4", 37.04, 31.76, 4.03, 4.53),
    Row(_JANUS_1B, "1/6", 34.64, 24.52, 5.22, 5.87, fid=22.86),
    Row(_JANUS_7B, None, 74.01, 180.8, 0.35, 1.00),
    Row(_JANUS_7B, "1/4", 47.59, 40.3, 1.59, 4.49),
    Row(_JANUS_7B, "1/6", 44.66, 32.19, 1.99, 5.62),
    Row(_LUMINA_768, None, 55.48, 283.99, 0.04, 1.00),
    Row(_LUMINA_768, "1/6", 21.43, 146.82, 0.08, 1.93),
    Row(_LUMINA_768, "1/8", 19.64, 133.51, 0.09, 2.13),
    Row(_LUMINA_1024, None, 62.95, 655.52, 0.01, 1.00),
    Row(_LUMINA_1024, "1/8", 20.50, 248.63, 0.03, 2.64),
)
_TABLES = {"linear": LINEAR}


def table_of(policy: str) -> tuple[Row, ...]:
    """The published table of a policy.

    Raises:
        UnknownNameError: there is none; those that there are are listed.
    """
    if policy not in _TABLES:
        raise UnknownNameError(
            f"no published table of {policy!r} can be reproduced here; "
            f"{near_matches(policy, _TABLES)}"
        )
    return _TABLES[policy]

"""A LlamaGen of random weights, written and read in its authors' formats: the whole way, small."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.image_model import ModelSource
from kvpolicy_adapters.evaluation.drawing.common import options_of
from kvpolicy_adapters.evaluation.drawing.llamagen import LlamaGenImages
from kvpolicy_adapters.images.llamagen import LlamaGen, LlamaGenConfig
from kvpolicy_adapters.images.vqgan import VQGAN, VQGANConfig
from kvpolicy_adapters.images.vqgan_checkpoint import save_vqgan

__all__ = ["tiny_llamagen"]

_GRID, _CODES, _HEADS = 18, 64, 4


def tiny_llamagen(source: ModelSource) -> LlamaGenImages:
    """Two layers, 18 x 18 codes, ten classes; option ``cache`` as LlamaGen has it.

    Raises:
        ParameterError: a file or an option is given.
    """
    cache = options_of(source, {"cache": "kvpolicy"})["cache"]
    if source.path or source.vq:
        raise ParameterError("llamagen-tiny is made of random numbers; it takes no files")
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as made:
        torch.manual_seed(0)
        config = LlamaGenConfig(
            grid_size=_GRID,
            vocab_size=_CODES,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=_HEADS,
            num_classes=10,
        )
        checkpoint, vq = Path(made, "c2i_tiny.pt"), Path(made, "vq.safetensors")
        torch.save({"model": LlamaGen(config).state_dict()}, checkpoint)
        shape = VQGANConfig(32, (1, 2), blocks=1, latent=32, codes=_CODES, attends=(1,))
        save_vqgan(VQGAN(shape), vq)
        files = replace(
            source,
            name="llamagen",
            path=str(checkpoint),
            vq=str(vq),
            options=(("grid", _GRID), ("heads", _HEADS), ("cache", cache)),
        )
        return LlamaGenImages(files)

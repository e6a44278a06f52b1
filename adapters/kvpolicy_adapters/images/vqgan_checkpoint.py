"""Reads the VQGAN checkpoints that were released, without their authors' code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from kvpolicy import ParameterError
from kvpolicy_adapters.images.tensors import assign, read_checkpoint, weights_of
from kvpolicy_adapters.images.vqgan import VQGAN, VQGANConfig

__all__ = ["read_vqgan", "save_vqgan"]

#: How far from 1 the length of a vector may be that was divided by its length.
_UNIT = 1e-3
#: Where the weights lie in a checkpoint, the moving average first, where there is one.
_NESTED = ("ema", "model", "state_dict")
#: What stands in a checkpoint beside the model: losses of its training, counts of used codes.
_NOT_THE_MODEL = re.compile(r"(^|\.)loss\.|codebook_used$|^colorize$")

#: Names of both families as ours; LlamaGen's decoder counts its levels as they run, Chameleon's
#: from the finest on.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"^quantize\.embedding\.weight$", "codebook"),
    (r"^post_quant_conv\.", "from_codes."),
    (r"^quant_conv\.", "to_codes."),
    (r"\.conv_in\.", ".stem."),
    (r"\.conv_out\.", ".head."),
    (r"\.norm_out\.", ".norm."),
    (r"\.(?:conv_blocks|down|up)\.(\d+)\.", r".levels.\1."),
    (r"\.(?:res|block)\.(\d+)\.", r".blocks.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(?:downsample|upsample)\.conv\.", ".resample."),
    (r"\.mid\.block_1\.", ".middle.0."),
    (r"\.mid\.attn_1\.", ".middle.1."),
    (r"\.mid\.block_2\.", ".middle.2."),
    (r"\.mid\.(\d)\.", r".middle.\1."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.q\.", ".query."),
    (r"\.k\.", ".key."),
    (r"\.v\.", ".value."),
    (r"\.proj_out\.", ".out."),
)


def read_vqgan(source: str | Path | Mapping[str, Any]) -> VQGAN:
    """Make a :class:`VQGAN` of a released checkpoint, or of a file of :func:`save_vqgan`.

    Example::

        vqgan = read_vqgan("vq_ds16_c2i.pt").to("cuda")
        pixels = to_pixels(vqgan.decode(codes))

    Args:
        source: LlamaGen's ``vq_ds16_c2i.pt``, ``vq_ds16_t2i.pt`` or ``vq_ds8_c2i.pt``; Chameleon's,
            Lumina-mGPT's or Anole's ``vqgan.ckpt``; a ``.safetensors`` file of ours; or a state
            dict, as it is or inside a checkpoint.

    Returns:
        The model in evaluation mode, without gradients, in the checkpoint's dtype.

    Raises:
        ParameterError: the file is truncated, holds more than tensors, or holds no VQGAN.
        OSError: the file can't be read.
    """
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    weights = {
        name: tensor
        for name, tensor in weights_of(checkpoint, _NESTED).items()
        if not _NOT_THE_MODEL.search(name)
    }
    if "codebook" not in weights:
        weights = _renamed(weights)
    # Released ones all have as many groups, and do not say so; ours say theirs.
    groups = int(weights.pop("groups", torch.tensor(VQGANConfig.groups)))
    config = _configuration(weights, where, groups)
    with torch.device("meta"):
        model = VQGAN(config)
    assign(model, weights, f"{where} holds no VQGAN of {len(config.multipliers)} levels")
    return model.eval().requires_grad_(False)


def save_vqgan(model: VQGAN, path: str | Path) -> None:
    """Write a VQGAN as a ``.safetensors`` file, which :func:`read_vqgan` reads without a pickle.

    Raises:
        OSError: the file can't be written.
    """
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file({**weights, "groups": torch.tensor(model.config.groups)}, path)


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names; LlamaGen's codes are compared and looked up at length 1."""
    of_llamagen = any(".conv_blocks." in name for name in weights)
    levels = [int(m[1]) for name in weights if (m := re.match(r"decoder\.up\.(\d+)\.", name))]
    renamed = {}
    for name, tensor in weights.items():
        if (found := re.match(r"decoder\.up\.(\d+)\.", name)) is not None:
            name = f"decoder.up.{max(levels) - int(found[1])}.{name[found.end() :]}"
        for theirs, ours in _NAMES:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    if of_llamagen and "codebook" in renamed:
        renamed["codebook"] = functional.normalize(renamed["codebook"].float(), dim=-1)
    return renamed


def _configuration(weights: Mapping[str, Tensor], where: str, groups: int) -> VQGANConfig:
    """What the names and shapes of the weights say."""
    stem, codebook, latent = "encoder.stem.weight", "codebook", "decoder.stem.weight"
    for name in (codebook, stem, latent):
        if name not in weights:
            raise ParameterError(
                f"{where} holds no VQGAN: it has no {name} (under this name, LlamaGen's or "
                f"Chameleon's) among {sorted(weights)[:4]} ..."
            )
    channels = len(weights[stem])
    widths, blocks, attends = {}, set(), set()
    for name, tensor in weights.items():
        if block := re.match(r"encoder\.levels\.(\d+)\.blocks\.(\d+)\.conv1\.weight$", name):
            widths[int(block[1])] = len(tensor)
            blocks.add(int(block[2]))
        elif attention := re.match(r"encoder\.levels\.(\d+)\.attentions\.", name):
            attends.add(int(attention[1]))
    if not widths or any(width % channels for width in widths.values()):
        raise ParameterError(f"{where} holds no VQGAN: the levels of its encoder can't be read")
    if groups < 1 or channels % groups:
        raise ParameterError(f"{where} holds no VQGAN: {groups} groups of {channels} channels")
    return VQGANConfig(
        channels=channels,
        multipliers=tuple(widths[level] // channels for level in sorted(widths)),
        blocks=len(blocks),
        latent=weights[latent].shape[1],
        codes=len(weights[codebook]),
        code_size=weights[codebook].shape[1],
        attends=tuple(sorted(attends)),
        unit_codes=bool((weights[codebook].float().norm(dim=1) - 1).abs().max() < _UNIT),
        groups=groups,
    )

"""CLIP, as transformers has it, from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from kvpolicy import ParameterError
from kvpolicy.errors import first_line

__all__ = ["Clip", "open_clip"]


class Clip:
    """Cosines of images and prompts (arXiv:2103.00020).

    Args:
        model: a ``CLIPModel`` in evaluation mode.
        tokenizer: its tokenizer.
        processor: its processor of images.
    """

    name = "clip"

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self._model, self._tokenizer, self._processor = model, tokenizer, processor
        self.longest: int = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def match(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, int]:
        """Cosines of uint8 images ``[B, H, W, 3]`` and prompts, float32 ``[B]``, and cut prompts.

        A prompt of more tokens than ``longest`` is read up to there.
        """
        device = self._model.device
        lengths = [len(ids) for ids in self._tokenizer(list(prompts)).input_ids]
        words = self._tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        ).to(device)
        # Said and not guessed: an image of three rows would be taken for one of three channels.
        pixels = self._processor(
            list(images.numpy()), input_data_format="channels_last", return_tensors="pt"
        ).pixel_values
        found = self._model(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            pixel_values=pixels.to(device, self._model.dtype),
        )
        cosines = functional.cosine_similarity(
            found.image_embeds.float(), found.text_embeds.float()
        )
        return cosines.cpu(), sum(length > self.longest for length in lengths)


def open_clip(path: Path, device: str) -> Clip:
    """Open a CLIP, as ``save_pretrained`` or a clone of its repository has it.

    Args:
        path: the folder.
        device: where it computes.

    Raises:
        ParameterError: it is no folder, or holds no CLIP.
    """
    if not path.is_dir():
        raise ParameterError(
            f"--clip {path} is no folder; nothing is downloaded: clone the repository of a CLIP, "
            f"e.g. openai/clip-vit-base-patch32"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if config.model_type != "clip":
            raise ParameterError(f"--clip {path} holds a model of the type {config.model_type!r}")
        model: Any = CLIPModel.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        # One way to resize, with torchvision and without.
        processor = CLIPImageProcessorPil.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(
            f"--clip {path} holds no CLIP with its tokenizer: {first_line(error)}"
        ) from error
    return Clip(model.eval().to(device), tokenizer, processor)

"""The network of fashion-lpd: transformers' Llama, asked for pixels in any order."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

__all__ = ["FashionLPDModel"]

_ROWS, _COLS = 28, 28


class FashionLPDModel(nn.Module):
    """A Llama over embeddings of class, pixels and position queries.

    A pixel is its grey level's embedding, a position query one learned vector; to both is added a
    learned embedding of the row and one of the column.

    Args:
        llama: the network, with a vocabulary of 16 grey levels, ten classes and "any class".
    """

    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.llama = llama
        width = llama.config.hidden_size
        self.query = nn.Parameter(torch.zeros(width))
        self.row = nn.Parameter(torch.zeros(_ROWS, width))
        self.col = nn.Parameter(torch.zeros(_COLS, width))

    @classmethod
    def from_raster(cls, llama: LlamaForCausalLM) -> FashionLPDModel:
        """Start from a model in raster order: a query is, at first, the average grey level."""
        model = cls(copy.deepcopy(llama))
        with torch.no_grad():
            greys = cast(nn.Embedding, model.llama.get_input_embeddings()).weight[:16]
            model.query.copy_(greys.mean(0))
        return model

    def embed_class(self, classes: Tensor) -> Tensor:
        """Embeddings ``[..., width]`` of class tokens (16 to 26)."""
        embedded: Tensor = self.llama.get_input_embeddings()(classes)
        return embedded

    def embed_pixels(self, pixels: Tensor, places: Tensor) -> Tensor:
        """Embeddings ``[..., width]`` of grey levels (0 to 15) at raster indices 0 to 783."""
        embedded: Tensor = self.llama.get_input_embeddings()(pixels)
        return embedded + self._place(places)

    def embed_queries(self, places: Tensor) -> Tensor:
        """Embeddings ``[..., width]`` of position queries for raster indices 0 to 783."""
        return self.query + self._place(places)

    def _place(self, places: Tensor) -> Tensor:
        return self.row[places // _COLS] + self.col[places % _COLS]

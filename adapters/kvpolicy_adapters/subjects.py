"""Subjects that ship: fashion-ar, real images without a download."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import StoppingCriteria, StoppingCriteriaList

from kvpolicy.lab.subject import Advance, Generated, Scored, Setting
from kvpolicy_adapters import zoo
from kvpolicy_adapters.attach import attach

__all__ = ["FashionAR"]

_GREYS, _CLASSES = 16, 10
_SCORE_BATCH, _DRAW_BATCH = 64, 250


class FashionAR:
    """The zoo's model of Fashion-MNIST, its held-out images and its classifier."""

    name = "fashion-ar"
    class_names = (
        "T-shirt",
        "trousers",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "boot",
    )

    def __init__(self) -> None:
        self.zoo = zoo.load("fashion-ar")
        self.layout = self.zoo.layout
        self.num_layers = self.zoo.model.config.num_hidden_layers

    def score(self, setting: Setting, images: int, advance: Advance) -> Scored:
        """Teacher-force the first test images; ``advance`` counts images."""
        bits = []
        for tokens in self.zoo.test_tokens(images).split(_SCORE_BATCH):
            with self._attached(setting) as cache, torch.inference_mode():
                logits = self.zoo.model(tokens[:, :-1], past_key_values=cache).logits
            nats = functional.cross_entropy(
                logits.float().transpose(1, 2), tokens[:, 1:], reduction="none"
            )
            bits.append(nats.double().mean(1) / math.log(2))
            advance(len(tokens))
        return Scored(torch.cat(bits).numpy(), cache.stats())

    def batch_tokens(self, images: int) -> int:
        """Tokens that ``generate`` reports: those of an image, for each batch."""
        return math.ceil(images / _DRAW_BATCH) * self.layout.rows * self.layout.cols

    def generate(self, setting: Setting, images: int, seed: int, advance: Advance) -> Generated:
        """Draw images of classes 0, 1, … in turn with ``model.generate``, seeded batch by batch."""
        classes = torch.arange(images) % _CLASSES
        model: Any = self.zoo.model
        drawn = []
        seconds = 0.0
        for number, wanted in enumerate(classes.split(_DRAW_BATCH)):
            prompt = wanted[:, None] + _GREYS
            torch.manual_seed(seed + number)
            begun = time.perf_counter()
            with self._attached(setting) as cache:
                tokens = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    past_key_values=cache,
                    max_new_tokens=self.layout.rows * self.layout.cols,
                    do_sample=True,
                    top_k=0,
                    suppress_tokens=list(range(_GREYS, self.zoo.model.config.vocab_size)),
                    stopping_criteria=StoppingCriteriaList([_Watch(advance)]),
                )
            seconds += time.perf_counter() - begun
            drawn.append(tokens[:, 1:])
        pixels = torch.cat(drawn)
        return Generated(
            images=np.asarray(self.zoo.images(pixels)),
            features=self.zoo.features(pixels).double().numpy(),
            correct=(self.zoo.classify(pixels) == classes).numpy(),
            classes=classes.numpy(),
            seconds=seconds,
            stats=cache.stats(),
            batch=len(wanted),
        )

    def retention(
        self, setting: Setting, moments: tuple[int, ...]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Feed a real image and look at what is cached after ``moments`` of its tokens."""
        tokens = self.zoo.test_tokens(1)
        grid = (self.layout.rows, self.layout.cols)
        shares = []
        with self._attached(setting) as cache, torch.inference_mode():
            seen = 0
            for moment in moments:
                upto = moment + self.layout.prefix
                self.zoo.model(tokens[:, seen:upto], past_key_values=cache)
                seen = upto
                layers = [self._share(cache.positions(n)) for n in range(self.num_layers)]
                shares.append(torch.stack(layers).view(self.num_layers, *grid))
        image = np.asarray(self.zoo.images(tokens[:, 1:]))[0]
        return image, torch.stack(shares).numpy()

    def reference(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Feature statistics of the 10,000 real test images."""
        mean, covariance = self.zoo.reference
        return np.asarray(mean, np.float64), np.asarray(covariance, np.float64)

    def _attached(self, setting: Setting) -> Any:
        return attach(
            self.zoo.model, policy=setting.policy, budget=setting.budget, layout=self.layout
        )

    def _share(self, positions: Tensor) -> Tensor:
        """Share of heads that hold each image token, float64 ``[rows * cols]``."""
        image = positions[0] - self.layout.prefix
        count = torch.zeros(self.layout.rows * self.layout.cols, dtype=torch.float64)
        held = image[image >= 0]
        count.scatter_add_(0, held, torch.ones(len(held), dtype=torch.float64))
        return count / positions.shape[1]


class _Watch(StoppingCriteria):
    """Never stops; tells how far generation has come."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.advance(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

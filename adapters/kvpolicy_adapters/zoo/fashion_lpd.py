"""fashion-lpd: the image model that ships for any order of pixels, many at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources.abc import Traversable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load as parse_safetensors
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import (
    Decoded,
    Decoder,
    GroupStep,
    OrderedLayout,
    Parallel,
    ParameterError,
    RasterLayout,
    Rule,
    Sampling,
    Sequential,
    Step,
)
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.images.guidance import CFGSchedule, guided_groups
from kvpolicy_adapters.zoo.fashion import FashionModel
from kvpolicy_adapters.zoo.fashion_lpd_model import FashionLPDModel
from kvpolicy_adapters.zoo.sealed import CorruptFileError, read_sealed

__all__ = ["LPD_FILES", "FashionLPD", "LPDCard", "read_fashion_lpd"]

_GREYS = 16
#: The token of "any class", which stood for the class in a tenth of the training.
_NO_CLASS = 26
#: What the card vouches for.
LPD_FILES = ("config.json", "model.safetensors")


class LPDCard(BaseModel):
    """The facts of fashion-lpd's ``card.json``; the prose is in ``MODEL_CARD.md`` beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    parameters: int = Field(description="numbers in the weights")
    model_bytes: int = Field(description="size of the weights as shipped")
    data: str
    data_licence: str
    weights_licence: str
    started_from: str = Field(description="weights that training started from")
    steps: int = Field(description="optimiser steps of training")
    batch: int = Field(description="images a step")
    training_minutes: float = Field(description="wall clock spent in steps")
    machine: str
    scored: int = Field(description="test images that the bits below are measured on")
    bits_per_pixel_raster: float = Field(
        description="mean of −log2 p over the 784 pixels, class given, full cache, raster order"
    )
    bits_per_pixel_48: float = Field(
        description="the same, in the decoder's order in 48 passes (lpd:passes=48)"
    )
    bits_per_pixel_other_48: float = Field(
        description="the same, in an order of another seed, which training has not seen"
    )
    files: dict[str, str] = Field(description="SHA-256 of each file beside the card")


@dataclass(frozen=True)
class FashionLPD:
    """A class-conditional image model that is asked for pixels by their place.

    A sequence is a class token (16 to 25, or 26 for any class) and 784 pixel tokens (grey levels
    0 to 15), in any order: that of the layout with which a cache is made.

    Example:
        >>> from kvpolicy_adapters import zoo
        >>> from kvpolicy import Parallel
        >>> box, decoder = zoo.load("fashion-lpd"), Parallel(passes=16)
        >>> with box.attached("near", "1/4", decoder.ordered(box.grid)) as cache:
        ...     pixels = box.draw(torch.tensor([9]), cache, decoder, seed=0)  # one boot
        >>> pixels.shape, cache.stats().peak_tokens
        (torch.Size([1, 784]), (197, 197, 197, 197))

    Attributes:
        model: float32, in evaluation mode, without gradients.
        grid: 28 x 28 behind a prefix of one token; ``decoder.ordered(grid)`` is a layout.
        card: data, licences, training and measurements.
        fashion: fashion-ar, with the real images, the classifier and the reference that judge.
    """

    model: FashionLPDModel = field(repr=False)
    grid: RasterLayout
    card: LPDCard
    fashion: FashionModel = field(repr=False)

    def layout(self, decoder: Decoder) -> OrderedLayout:
        """What comes when under a decoder: groups under ``lpd``; row by row under ``sequential``.

        Raises:
            ParameterError: another decoder, which does not ask for pixels by their place.
        """
        if isinstance(decoder, Parallel):
            return decoder.ordered(self.grid)
        if isinstance(decoder, Sequential):
            return OrderedLayout(grid=self.grid, order=range(self.grid.rows * self.grid.cols))
        raise ParameterError(
            f"fashion-lpd is asked for pixels by their place, and decoder {decoder.label!r} asks "
            f"for what comes behind each token; 'lpd:passes=48' and 'sequential' work, and "
            f"{decoder.label!r} on fashion-ar"
        )

    def attached(self, policy: Any, budget: Any, layout: OrderedLayout) -> Any:
        """:func:`kvpolicy_adapters.attach` for its network: a ``with`` block that gives a cache."""
        return attach(self.model.llama, policy=policy, budget=budget, layout=layout)

    def step(self, cache: Any) -> GroupStep:
        """The model as a decoder sees it, over the cache of an ``attached`` block.

        Raises:
            ParameterError: the cache's layout has no order.
        """
        _ordered(cache)

        def step(tokens: Tensor, ask: int) -> Tensor:
            logits: Tensor = self._ask(cache, tokens, ask).logits
            return logits

        return step

    def _ask(self, cache: Any, tokens: Tensor, ask: int, **more: Any) -> Any:
        """What transformers' model returns; see :class:`kvpolicy.GroupStep`."""
        layout = _ordered(cache)
        seen, new = cache.get_seq_length(), tokens.shape[1]
        arrivals = torch.arange(seen, seen + new + ask, device=tokens.device)
        places = layout.place(arrivals)
        known, asked = places[:new], places[new:]
        first = layout.prefix if seen == 0 else 0
        content = torch.cat(
            [
                self.model.embed_class(tokens[:, :first]),
                self.model.embed_pixels(tokens[:, first:], known[first:] - 1),
            ],
            dim=1,
        )
        queries = self.model.embed_queries(asked - 1).expand(len(tokens), -1, -1)
        visible = torch.ones(
            1, 1, new + ask, seen + new + ask, dtype=torch.bool, device=tokens.device
        )
        visible[..., :new, seen + new :] = False
        return self.model.llama(
            inputs_embeds=torch.cat([content, queries], dim=1),
            # A query has the place before the one that it asks for; see the model card.
            position_ids=torch.cat([known, asked - 1]).expand(len(tokens), -1),
            attention_mask=visible,
            logits_to_keep=ask,
            **more,
            **cache.as_argument,
        )

    @torch.no_grad()
    def draw(
        self,
        classes: Tensor,
        cache: Any,
        decoder: Decoder,
        *,
        seed: int | None = None,
        cfg_scale: float = 1.0,
    ) -> Tensor:
        """Draw images of classes ``[n]`` from 0 to 9: pixel tokens in raster order ``[n, 784]``.

        Args:
            classes: int64.
            cache: of an ``attached`` block, with :meth:`layout` of the decoder.
            decoder: ``lpd``, or ``sequential``.
            seed: makes the draw repeatable; None to go on from torch's own generator.
            cfg_scale: guidance, which doubles the batch; 1 is none.
        """
        return self.decode(classes, cache, decoder, seed=seed, cfg_scale=cfg_scale).tokens

    @torch.no_grad()
    def decode(
        self,
        classes: Tensor,
        cache: Any,
        decoder: Decoder,
        *,
        seed: int | None = None,
        cfg_scale: float = 1.0,
        cfg_schedule: CFGSchedule = "constant",
        sampling: Sampling | None = None,
        rules: Sequence[Rule] = (),
        advance: Callable[[int], None] | None = None,
    ) -> Decoded:
        """Draw as :meth:`draw` does, and say in how many passes.

        Args:
            classes: as of :meth:`draw`.
            cache: likewise.
            decoder: likewise.
            seed: likewise.
            cfg_scale: likewise.
            cfg_schedule: see :func:`kvpolicy_adapters.images.guidance.guided_groups`; a scale that
                rises along the image, as the paper's, draws worse images here.
            sampling: temperature, top-k and top-p; plain sampling by default.
            rules: under ``sequential`` only.
            advance: is told how many pixels of each image have come since the last call.

        Returns:
            Pixel tokens, and the pass in which each came, in raster order ``[n, 784]``.
        """
        layout, step = _ordered(cache), self.step(cache)
        if cfg_scale != 1:
            step = guided_groups(step, cache, _NO_CLASS, cfg_scale, cfg_schedule)

        def greys(tokens: Tensor, ask: int) -> Tensor:
            logits = step(tokens, ask).clone()
            logits[..., _GREYS:] = -torch.inf
            return logits

        chance = None if seed is None else torch.Generator().manual_seed(seed)
        asking: Any = _one_by_one(greys, cache) if isinstance(decoder, Sequential) else greys
        drawn = decoder.decode(
            asking,
            cache,
            classes[:, None] + _GREYS,
            len(layout.order),
            sampling=sampling,
            rules=rules,
            generator=chance,
            advance=advance,
        )
        came = layout.arrival(torch.arange(1, layout.length, device=classes.device))
        return replace(drawn, tokens=drawn.tokens[:, came], settled=drawn.settled[:, came - 1])

    @torch.no_grad()
    def bits(self, tokens: Tensor, cache: Any) -> Tensor:
        """Bits per pixel of real images ``[n, 785]``, float64 ``[n]``, teacher-forced.

        Groups come as the cache's layout says, each given the cached tokens before it.
        """
        nats = sum(group.double().sum(1) for group in self.nats(tokens, cache))
        return torch.as_tensor(nats) / len(_ordered(cache).order) / math.log(2)

    @torch.no_grad()
    def nats(self, tokens: Tensor, cache: Any) -> Iterator[Tensor]:
        """The same group by group: ``-log p`` of each of its pixels, float32 ``[n, size]``."""
        step, layout = self.step(cache), _ordered(cache)
        arrived = tokens[:, layout.place(torch.arange(layout.length))]
        done, first = 0, layout.prefix
        for size in layout.groups:
            newest, coming = arrived[:, done:first], arrived[:, first : first + size]
            with cache.stage(newest.shape[1] + size):
                logits = step(newest, size).float()
                cache.commit(newest.shape[1])
            yield functional.cross_entropy(logits.transpose(1, 2), coming, reduction="none")
            done, first = first, first + size

    @torch.no_grad()
    def looks(self, tokens: Tensor, layout: OrderedLayout) -> list[Tensor]:
        """What each group looks at in real images ``[n, 785]`` with everything cached.

        For :class:`kvpolicy.lab.search.oracle.GroupOracle`, which knows it beforehand.

        Returns:
            Of each layer, float32 ``[n, H, groups, 785]``: the mass that a group's position
            queries, and then its tokens, give to each position by arrival.
        """
        arrived = tokens[:, layout.place(torch.arange(layout.length))]
        config = self.model.llama.config
        heads = int(config.num_key_value_heads or config.num_attention_heads)
        size = (len(tokens), heads, len(layout.groups), layout.length)
        given = [torch.zeros(size) for _ in range(config.num_hidden_layers)]
        done, first = 0, layout.prefix
        with self.attached("full", None, layout) as cache:
            for group, asked in enumerate(layout.groups):
                newest = arrived[:, done:first]
                with cache.stage(newest.shape[1] + asked):
                    found = self._ask(cache, newest, asked, output_attentions=True).attentions
                    cache.commit(newest.shape[1])
                for mass, weights in zip(given, found, strict=True):
                    by_head = weights.float().unflatten(1, (heads, -1)).mean(2)[..., :first]
                    mass[:, :, group, :first] += by_head[:, :, newest.shape[1] :].sum(2)
                    if group:
                        mass[:, :, group - 1, :first] += by_head[:, :, : newest.shape[1]].sum(2)
                done, first = first, first + asked
        return given


def _one_by_one(step: GroupStep, cache: Any) -> Step:
    """What a sequential decoder calls: each token, and a query for the one that comes next."""

    def one(tokens: Tensor) -> Tensor:
        with cache.stage(tokens.shape[1] + 1):
            logits = step(tokens, 1)
            cache.commit(tokens.shape[1])
        return logits

    return one


def _ordered(cache: Any) -> OrderedLayout:
    """The layout of a cache, if it says what comes when.

    Raises:
        ParameterError: it does not.
    """
    if not isinstance(cache.layout, OrderedLayout):
        raise ParameterError(
            f"fashion-lpd needs a cache with an OrderedLayout, not {cache.layout!r}; in raster "
            f"order that is OrderedLayout(grid=box.grid, order=range(784))"
        )
    return cache.layout


def read_fashion_lpd(folder: Traversable, fashion: FashionModel) -> FashionLPD:
    """Read the model from its folder; every file is checked against the card first.

    Raises:
        CorruptFileError: a file is missing or damaged.
    """
    try:
        card = LPDCard.model_validate_json(folder.joinpath("card.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptFileError(
            f"{folder.joinpath('card.json')} can't be read ({error}); reinstall kvpolicy"
        ) from error
    data = {name: read_sealed(folder, name, card.files) for name in LPD_FILES}
    with torch.random.fork_rng(devices=[]):  # making modules draws; the caller's seed stays
        model = FashionLPDModel(LlamaForCausalLM(LlamaConfig(**json.loads(data["config.json"]))))
    model.llama.config.dtype = torch.float32  # as loaded; the file holds bfloat16
    model.load_state_dict(parse_safetensors(data["model.safetensors"]))
    return FashionLPD(
        model=model.float().eval().requires_grad_(False),
        grid=fashion.layout,
        card=card,
        fashion=fashion,
    )

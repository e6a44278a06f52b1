"""Staging by deep copies: slow, and exact. What a cache that can stage is compared with."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch


class ReplayedCache:
    """A cache whose staged tokens are taken back by beginning again from a copy of it."""

    def __init__(self, cache) -> None:
        self.cache = cache
        self.base = None
        self.calls: dict[int, list] = {}

    layout = property(lambda self: self.cache.layout)
    seen = property(lambda self: self.cache.seen)

    def attend(self, layer, *tensors):
        if self.base is not None:
            self.calls.setdefault(layer, []).append(tensors)
        return self.cache.attend(layer, *tensors)

    @contextmanager
    def stage(self, lookahead):
        self.base = copy.deepcopy(self.cache)
        try:
            yield
        finally:
            self.commit(0)
            self.base = None

    def commit(self, count):
        self.cache, calls, self.calls = self.base, self.calls, {}
        for layer, given in sorted(calls.items()):
            joined = [torch.cat(parts, dim=2)[:, :, :count] for parts in zip(*given, strict=True)]
            if count:
                self.cache.attend(layer, *joined)
        self.base = copy.deepcopy(self.cache)

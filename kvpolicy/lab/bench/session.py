"""LocalSession: a contender that decodes in this process, with a clock."""

from __future__ import annotations

import time

import torch

from kvpolicy.lab.bench.contender import BenchModel, Contender, Workload

__all__ = ["LocalSession"]


class LocalSession:
    """Decodes the workload's tokens one by one, and times each step.

    Args:
        model: whose step is timed.
        contender: which cache it has.
        workload: what is decoded.
        singly: whether tokens that are skipped come one by one, as decoding has them, and not a
            line at a time, which is faster and takes more memory for a moment.
    """

    def __init__(
        self,
        model: BenchModel,
        contender: Contender,
        workload: Workload,
        *,
        singly: bool = False,
    ) -> None:
        self.contender = contender
        self.singly = singly
        length = model.layout.length
        self.tokens = workload.tokens(length, model.dimensions.vocab).to(workload.device)
        self.prefix = model.layout.prefix
        self.decoder = model.decoder(contender, workload)
        self.cuda = torch.device(workload.device).type == "cuda"
        self.seen = 0

    @torch.inference_mode()
    def restart(self) -> None:
        """Empty the cache and read the prefix; ``run`` goes on from there."""
        self.decoder.restart(self.tokens[:, : self.prefix])
        self.seen = self.prefix

    @torch.inference_mode()
    def run(self, count: int) -> tuple[list[float], list[float]]:
        """Decode so many tokens; seconds, and cached tokens read, of each step."""
        seconds, read = [], []
        for position in range(self.seen, self.seen + count):
            read.append(self.decoder.tokens_read())
            token = self.tokens[:, position : position + 1]
            self._settle()
            begun = time.perf_counter()
            self.decoder.step(token)
            self._settle()
            seconds.append(time.perf_counter() - begun)
        self.seen += count
        return seconds, read

    @torch.inference_mode()
    def skip(self, count: int) -> None:
        """Go on by so many tokens without the model."""
        for part in [1] * count if self.singly else [count]:
            self.decoder.skip(part)
        self.seen += count

    @torch.inference_mode()
    def wake(self) -> None:
        """Read all weights and the cache once."""
        self.decoder.wake()
        self._settle()

    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.decoder.cache_bytes()

    def release(self) -> None:
        """Give the cache back until the next image."""
        self.decoder.release()

    def close(self) -> None:
        """Give back the cache and what the decoder changed in the model; nothing follows."""
        self.decoder.close()

    def _settle(self) -> None:
        """Wait for the device: a step is timed until its logits are there."""
        if self.cuda:
            torch.cuda.synchronize()

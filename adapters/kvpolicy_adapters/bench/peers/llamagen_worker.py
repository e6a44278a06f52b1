"""LlamaGen's official model and ``generate``, from a checkout of its repository.

Its ``generate`` draws a whole image in one call. It runs in a thread, and a hook before each
forward pass holds it until the bench asks for steps. A step is from one pass to the next: the
model, and the drawing of the next token.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from protocol import serve, settle

_MULTIPLE = 256


class Stop(BaseException):
    """Ends a generation that is not wanted any more."""


class Gate:
    """Lets a thread make so many steps, and takes the time of each."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.moment = threading.Condition()
        self.wanted = 0
        self.stopped = self.arrived = False
        self.begun: float | None = None
        self.seconds: list[float] = []
        self.error: BaseException | None = None

    def step(self, *_: Any) -> None:
        """Called before each forward pass."""
        now = settle(self.device)
        with self.moment:
            if self.begun is not None:
                self.seconds.append(now - self.begun)
            self.arrived = True
            self.moment.notify_all()
            self.moment.wait_for(lambda: self.wanted > 0 or self.stopped)
            if self.stopped:
                raise Stop
            self.wanted -= 1
            self.arrived = False
            self.begun = settle(self.device)

    def end(self) -> None:
        """The last step has no forward pass behind it."""
        now = settle(self.device)
        with self.moment:
            if self.begun is not None and not self.stopped:
                self.seconds.append(now - self.begun)
            self.arrived = True
            self.moment.notify_all()

    def let(self, count: int) -> list[float]:
        """Let it make so many steps; their seconds."""
        with self.moment:
            self.seconds = []
            self.wanted = count
            self.moment.notify_all()
            self.moment.wait_for(
                lambda: (
                    self.error is not None
                    or (self.wanted == 0 and self.arrived and len(self.seconds) >= count)
                )
            )
            if self.error is not None:
                raise self.error
            return self.seconds

    def stop(self) -> None:
        """End it at its next step."""
        with self.moment:
            self.stopped = True
            self.moment.notify_all()


class Worker:
    """Guidance halves the images: B sequences are B / 2 images and their unconditional twins."""

    def __init__(self, job: dict[str, Any]) -> None:
        sys.path.insert(0, job["checkout"])
        from autoregressive.models.generate import generate
        from autoregressive.models.gpt import ModelArgs, Transformer

        self.generate = generate
        self.job, self.sizes = job, job["dimensions"]
        self.device = job["workload"]["device"]
        self.count = job["length"] - job["prefix"]
        torch.manual_seed(job["workload"]["seed"])
        self.model = Transformer(
            ModelArgs(
                dim=self.sizes["hidden"],
                n_layer=self.sizes["layers"],
                n_head=self.sizes["heads"],
                multiple_of=_MULTIPLE,
                vocab_size=self.sizes["vocab"],
                block_size=self.count,
                cls_token_num=job["prefix"],
            )
        )
        dtype = getattr(torch, job["workload"]["dtype"])
        self.model = self.model.to(device=self.device, dtype=dtype).eval()
        self.passes_left = 0
        self.gate: Any = None
        self.thread: Any = None
        self.model.register_forward_pre_hook(self._before_pass)

    def _before_pass(self, *_: Any) -> None:
        self.gate.step()

    def restart(self) -> None:
        if self.gate is not None:
            self.gate.stop()
            self.thread.join()
        self.gate = Gate(self.device)
        self.thread = threading.Thread(target=self._draw, args=(self.gate,), daemon=True)
        self.thread.start()
        self.gate.let(1)  # the prefix
        self.passes_left = self.count - 1

    def _draw(self, gate: Gate) -> None:
        batch = self.job["workload"]["batch"]
        classes = torch.arange(batch, device=self.device) % 1000
        scale = 1.0
        if batch % 2 == 0:
            classes, scale = classes[: batch // 2], 4.0
        try:
            self.generate(
                self.model, classes, self.count, cfg_scale=scale, temperature=1.0, top_k=2000
            )
            gate.end()
        except Stop:
            pass
        except BaseException as error:
            with gate.moment:
                gate.error = error
                gate.moment.notify_all()

    def run(self, count: int) -> tuple[list[float], list[float]]:
        # The image's last token is drawn from the pass before it: one pass fewer than tokens.
        count = min(count, self.passes_left)
        seconds = self.gate.let(count) if count else []
        self.passes_left -= count
        return seconds, [float(self.read)] * count

    @property
    def read(self) -> int:
        return self.model.layers[0].attention.kv_cache.k_cache.shape[2]

    def skip(self, count: int) -> None:
        """Its cache is read whole at every step, so a step costs the same anywhere: stay here."""

    def wake(self) -> None:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.sum()

    def release(self) -> None:
        if self.gate is not None:
            self.gate.stop()
            self.thread.join()
            self.gate = None
        for layer in self.model.layers:
            layer.attention.kv_cache = None

    def cache_bytes(self) -> int:
        caches = [layer.attention.kv_cache for layer in self.model.layers]
        return sum(cache.k_cache.nbytes + cache.v_cache.nbytes for cache in caches)


if __name__ == "__main__":
    serve(Worker)

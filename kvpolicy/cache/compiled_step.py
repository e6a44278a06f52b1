"""CompiledStep: one decode step of a cache in tensors alone, for code compiled or captured once.

A decision reads Python numbers (how many tokens, how much room), and a compiler would compile
anew whenever one of them changes. But what a policy decides for a token depends on nothing that
comes after the token before it. So a step falls into three parts:

1. before the model runs, each layer decides if it must, and writes the slot and the position of
   the token to come into tensors that stay where they are (:meth:`CompiledStep.begin`);
2. the model runs, compiled: keys and values go into that slot, attention goes over all slots, those
   that are empty masked, and the mass goes into a tensor that stays where it is
   (:meth:`SlotStep.attend`);
3. after it, the observers see that mass (:meth:`CompiledStep.end`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpolicy.cache.layer import Layer
from kvpolicy.cache.terms import Terms
from kvpolicy.errors import ParameterError
from kvpolicy.ops import triton
from kvpolicy.ops.attend import attend
from kvpolicy.ops.cpu import native
from kvpolicy.slots import SlotStore

__all__ = ["CompiledStep", "Hide", "SlotStep"]

#: Given a layer's store: slots of padding that are hidden from every step, bool ``[B, 1, S]``.
Hide = Callable[[SlotStore], Tensor | None]

#: Nothing but a scale of one over the root of the head dim.
_PLAIN = Terms()


class SlotStep:
    """The tensors of one layer's next token, and what is done with them.

    Attributes:
        slots: where the token goes, int64 ``[B, H, 1]``.
        position: its position, int32 ``[1]``.
        mass: what its query attended to, ``[B, H, 1, S]``, float32; None where nobody asks.
        finite: True where the kernel asserts that it is no NaN; None where nobody can say.

    Args:
        store: the layer's slots.
        need_mass: whether observers want the mass.
        window: newest tokens that a query sees, itself included; None for all.
        hidden: slots of padding, bool ``[B, 1, S]``; None where there is none.
    """

    def __init__(
        self,
        store: SlotStore,
        *,
        need_mass: bool = False,
        window: int | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        batch, heads, slots = store.positions.shape
        device = store.positions.device
        self.store, self.keys = store, store.keys
        self.window = window
        self.hidden = hidden
        with torch.inference_mode(False):
            self.slots = torch.zeros(batch, heads, 1, dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int32, device=device)
            self.mass = torch.zeros(batch, heads, 1, slots, device=device) if need_mass else None
        # A kernel, which knows empty slots, but nothing else that is hidden.
        plain = window is None and hidden is None and store.kernel is not None
        self.one_pass: Callable[..., Tensor] | None = None
        self.finite: bool | None = None
        if plain and store.keys.is_cuda:
            self.finite, self.one_pass = True, triton.step_op
        elif plain:
            self.one_pass = native.stepper(store.keys.dtype)
        kept = (store.keys, store.values, store.positions)
        for tensor in (self.slots, self.position, self.mass, *kept):
            if tensor is not None:
                # CUDA graphs copy what they are given unless it is known to stay where it is.
                torch._dynamo.mark_static_address(tensor)

    def aim(self, slots: Tensor, position: int) -> None:
        """Say where the next token goes."""
        self.slots.copy_(slots)
        self.position.fill_(position)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms = _PLAIN) -> Tensor:
        """Cache one token and attend from it; nothing here depends on a Python number that changes.

        Args:
            query: ``[B, G * H, 1, D]``.
            key: ``[B, H, 1, D]``.
            value: ``[B, H, 1, Dv]``.
            terms: scale, soft cap and sinks; masks are made here, by slot.

        Returns:
            Output ``[B, G * H, 1, Dv]``.

        Raises:
            ParameterError: the model adds a bias by position.
        """
        if terms.bias is not None:
            raise ParameterError(
                "this model's attention adds a bias by position, which a compiled step does not "
                "serve; decode without compile_decode"
            )
        store = self.store
        plain = terms.visible is None and terms.softcap is None and terms.sinks is None
        if self.one_pass is not None and plain and not query.requires_grad:
            return self.one_pass(
                *(query, store.keys, store.values, store.positions, self.mass),
                *(self.slots, key, value, self.position),
                1 / math.sqrt(query.shape[3]) if terms.scale is None else terms.scale,
            )
        store.write(self.slots, key, value, self.position)
        visible = store.positions >= 0
        if self.window is not None:
            visible = visible & (store.positions > self.position - self.window)
        if self.hidden is not None:
            visible = visible & ~self.hidden
        output, mass = attend(
            query,
            store.keys,
            store.values,
            visible=visible.unsqueeze(2),
            need_mass=self.mass is not None,
            scale=terms.scale,
            softcap=terms.softcap,
            sinks=terms.sinks,
        )
        if self.mass is not None and mass is not None:
            self.mass.copy_(mass)
        return output


class CompiledStep:
    """The layers of a cache, in the middle of one token.

    Args:
        layers: those that the policy manages.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        # By the layer's index; made anew where the store is another than it was.
        self.by_layer: dict[int, SlotStep] = {}
        self._begun: list[tuple[Layer, int, int, bool]] = []

    def begin(self, hide: Hide | None = None) -> None:
        """Decide for the next token, and say where it goes.

        Args:
            hide: asked once for the slots of padding that are hidden from every step.

        Raises:
            CacheStateError: no token has come yet, or a layer was interrupted.
            ParameterError: other layers attend to a layer's tokens.
        """
        try:
            for layer in self.layers:
                self._begin(layer, hide)
        except BaseException:
            self.end(done=False)
            raise

    def _begin(self, layer: Layer, hide: Hide | None) -> None:
        index = layer.plan.layer
        if not layer.whole:
            raise layer.interrupted()
        if layer.lending is not None:
            raise ParameterError(
                f"layer {index} lends its tokens to other layers, which a compiled step does not "
                f"serve; decode without compile_decode"
            )
        store = layer.require_store()
        layer.prepare(1)
        step = self.by_layer.get(index)
        if step is None or step.keys is not store.keys:  # reset, or another batch
            step = self.by_layer[index] = SlotStep(
                store,
                need_mass=layer.need_mass,
                window=layer.plan.window,
                hidden=None if hide is None else hide(store),
            )
        books = store.fresh, store.reclaimed
        layer.whole = False
        slots, reclaimed = store.take(1)
        self._begun.append((layer, *books, reclaimed is not None))
        step.aim(slots, layer.seen)

    def end(self, done: bool = True) -> None:
        """Account for the token, and report what it attended to.

        Args:
            done: whether the model has run. If not, the slot is taken back where it has not been
                written yet; a layer that has written it can't go on.
        """
        begun, self._begun = self._begun, []
        for layer, fresh, reclaimed, reclaims in begun:
            store, step = layer.require_store(), self.by_layer[layer.plan.layer]
            if done:
                layer.account(step.slots if reclaims else None, step.mass, step.finite)
            elif not self._written(step):
                store.fresh, store.reclaimed = fresh, reclaimed
                layer.whole = True

    def _written(self, step: SlotStep) -> bool:
        """Whether a step that was broken off has got as far as its slot."""
        there = step.store.positions.gather(2, step.slots)
        return bool((there == step.position.view(1, 1, 1)).any())

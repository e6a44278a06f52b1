"""Step: one layer's decode step in tensors alone, for code that is compiled or captured once.

A decision reads Python numbers (how many tokens, how much room), and a compiler would compile
anew whenever one of them changes. But what a policy decides for a token depends on nothing that
comes after the token before it. So a step falls into three parts:

1. before the model runs, each layer decides if it must, and writes the slot and the position of
   the token to come into tensors that stay where they are;
2. the model runs, compiled: keys and values go into that slot, attention goes over all slots, those
   that are empty masked, and the mass goes into a tensor that stays where it is;
3. after it, the observers see that mass.

Parts 1 and 3 are :meth:`LayerCache.begin_step` and :meth:`LayerCache.end_step`; this is part 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpolicy.cache.terms import Terms
from kvpolicy.errors import ParameterError
from kvpolicy.ops.attend import attend
from kvpolicy.ops.cpu import native
from kvpolicy.slots import SlotStore

__all__ = ["Step"]


class Step:
    """The tensors of one layer's next token, and what is done with them.

    Attributes:
        slots: where the token goes, int64 ``[B, H, 1]``.
        position: its position, int32 ``[1]``.
        mass: what its query attended to, ``[B, H, 1, S]``, float32; None where nobody asks.

    Args:
        store: the layer's slots.
        need_mass: whether observers want the mass.
        window: newest tokens that a query sees, itself included; None for all.
        start: position of each sequence's first real token, int32 ``[B]``; None for 0.
        hidden: slots of padding, bool ``[B, 1, S]``; None where there is none.
    """

    def __init__(
        self,
        store: SlotStore,
        *,
        need_mass: bool,
        window: int | None,
        start: Tensor | None,
        hidden: Tensor | None,
    ) -> None:
        batch, heads, slots = store.positions.shape
        device = store.positions.device
        self.store = store
        self.window = window
        self.hidden = hidden
        self.start = None if start is None else start.view(-1, 1, 1)
        self.slots = torch.zeros(batch, heads, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        self.mass = torch.zeros(batch, heads, 1, slots, device=device) if need_mass else None
        # The CPU kernel, which knows empty slots, but nothing else that is hidden.
        plain = window is None and start is None and hidden is None
        served = plain and native.serves(store.keys, store.values)
        self.one_pass = native.stepper() if served else None
        for tensor in (self.slots, self.position, self.mass, store.keys, store.values):
            if tensor is not None:
                # CUDA graphs copy what they are given unless it is known to stay where it is.
                torch._dynamo.mark_static_address(tensor)

    def aim(self, slots: Tensor, position: int) -> None:
        """Say where the next token goes."""
        self.slots.copy_(slots)
        self.position.fill_(position)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
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
        if self.one_pass is not None and terms.plain and not query.requires_grad:
            return self.one_pass(
                *(query, store.keys, store.values, store.positions, self.mass),
                *(self.slots, key, value, self.position),
                1 / math.sqrt(query.shape[3]) if terms.scale is None else terms.scale,
            )
        store.put(self.slots, key, value)
        store.positions.scatter_(2, self.slots, self.position.view(1, 1, 1).expand_as(self.slots))
        visible = store.positions >= 0
        if self.window is not None:
            visible = visible & (store.positions > self.position - self.window)
        if self.start is not None:
            visible = visible & (store.positions >= self.start)
        if self.hidden is not None:
            visible = visible & ~self.hidden
        output, mass = attend(
            query,
            store.keys,
            store.values,
            visible=visible.unsqueeze(2),
            need_mass=self.mass is not None,
            **terms.scoring(),
        )
        if self.mass is not None and mass is not None:
            self.mass.copy_(mass)
        return output

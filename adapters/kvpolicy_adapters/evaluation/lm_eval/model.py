"""The model ``kvpolicy`` of lm-evaluation-harness."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kvpolicy import CacheStats, ParameterError, PolicyCache, TextLayout, create
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.transformers.cache_argument import CACHE_ARGUMENT
from kvpolicy_adapters.transformers.steps import model_step

__all__ = ["PolicyLM"]

_LOG = logging.getLogger(__name__)


@register_model("kvpolicy")
class PolicyLM(HFLM):
    """A causal model of transformers whose cache a policy holds to a budget.

    A continuation is scored as it would be generated: the context is a prompt, which attends in
    full and is compressed to the budget at its end, and each token of the continuation attends to
    what the policy has kept. (One pass over both would let every token see everything, and score
    the full cache.) What the policy did stands in the results: see :meth:`get_model_info`.

    Args:
        policy: its name, with parameters as in ``h2o/recent=0.25``.
        budget: tokens that a head may hold besides the sinks.
        sinks: first tokens, which are never evicted.
        **options: those of lm_eval's ``hf`` model: ``pretrained``, ``dtype``, ``batch_size``, ...

    Raises:
        ParameterError: the budget is missing, or the model is no causal one.
        UnknownNameError: no policy has this name.
        BudgetError: the budget is no number of tokens, or too small for the policy.
    """

    def __init__(
        self,
        policy: str = "h2o",
        budget: int | str | None = None,
        sinks: int = 4,
        **options: Any,
    ) -> None:
        if budget is None:
            raise ParameterError("model_args: budget is missing, e.g. budget=512")
        self._how: dict[str, Any] = {
            "policy": create(policy),
            "budget": budget,
            "layout": TextLayout(sinks=int(sinks)),
        }
        PolicyCache(num_layers=1, **self._how)  # a wrong budget is said before a model is loaded
        super().__init__(**options)
        if self.backend != "causal":
            raise ParameterError(f"model kvpolicy serves causal models, not {self.backend!r}")
        self._calls = self._evicting = self._seen = self._peak = 0
        self._evicted = 0.0

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of log probabilities of each continuation, and whether greedy decoding gives it."""
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        found: dict[int, tuple[float, bool]] = {}
        # Those of like length together: least padding.
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]))
        for first in range(0, len(order), size):
            some = order[first : first + size]
            scored = self._score([requests[number][1:] for number in some])
            found.update(zip(some, scored, strict=True))
            for number in some:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return [found[number] for number in range(len(requests))]

    @torch.no_grad()
    def _score(self, pairs: list[Any]) -> list[tuple[float, bool]]:
        """A batch of contexts and continuations, both token ids."""
        # The newest token is predicted and never fed; what does not fit goes from the left.
        rooms = [self.max_length + 1 - len(continuation) for _, continuation in pairs]
        for room, (_, continuation) in zip(rooms, pairs, strict=True):
            if room < 1:
                raise ParameterError(
                    f"a continuation is {len(continuation)} tokens long; the model has room for "
                    f"{self.max_length} with its context"
                )
        contexts = [context[-room:] for room, (context, _) in zip(rooms, pairs, strict=True)]
        longest = max(len(context) for context in contexts)
        after = max(len(continuation) for _, continuation in pairs)
        ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        target = torch.zeros(len(pairs), after, dtype=torch.int64)
        for row, (context, (_, continuation)) in enumerate(zip(contexts, pairs, strict=True)):
            ids[row, longest - len(context) :] = torch.tensor(context)
            mask[row, longest - len(context) :] = 1
            target[row, : len(continuation)] = torch.tensor(continuation)
        ids, mask, target = (part.to(self.device) for part in (ids, mask, target))
        with attach(self.model, **self._how) as cache:
            step = model_step(self.model, cache, mask)
            logits = [step(ids)[:, -1:]]
            # One by one, as they would be generated: no token is a prompt's.
            logits += [step(target[:, place : place + 1]) for place in range(after - 1)]
            self._note(cache.stats(), int(mask.sum()) + sum(len(c) for _, c in pairs) - len(pairs))
        chances = torch.cat(logits, dim=1).float().log_softmax(-1)
        picked = chances.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        likeliest = chances.argmax(-1) == target
        lengths = [len(continuation) for _, continuation in pairs]
        return [
            (float(picked[row, :length].sum()), bool(likeliest[row, :length].all()))
            for row, length in enumerate(lengths)
        ]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        with attach(self.model, **self._how) as cache:
            tokens: Tensor = super()._model_generate(
                context, max_length, stop, **{**generation_kwargs, CACHE_ARGUMENT: cache}
            )
            self._note(cache.stats(), tokens.numel())
        return tokens

    def _note(self, stats: CacheStats, seen: int) -> None:
        """Take down what the policy did in one call."""
        evicted = sum(stats.evictions) / len(stats.evictions)
        self._calls += 1
        self._evicting += evicted > 0
        self._evicted += evicted
        self._seen += seen
        self._peak = max(self._peak, *stats.peak_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into ``config`` of its results; ``kvpolicy`` holds what was done.

        ``calls`` of the model (a batch each) and ``calls_that_evicted``; ``tokens_seen`` by all
        rows, padding left out of scored ones; ``evicted_tokens``, lost by a head, mean over layers,
        summed over calls; ``peak_tokens``, the most that a head held, sinks and padding included;
        ``nothing_was_evicted``, where the figures are those of the full cache.
        """
        policy = self._how["policy"]
        nothing = self._evicted == 0
        if nothing:
            _LOG.warning(
                "kvpolicy: nothing was evicted in %d calls: these results are the full cache's "
                "(budget=%s, longest sequence held: %d tokens)",
                self._calls,
                self._how["budget"],
                self._peak,
            )
        done = {
            "policy": policy.key,
            "parameters": policy.model_dump(mode="json"),
            "budget": str(self._how["budget"]),
            "sinks": self._how["layout"].prefix,
            "calls": self._calls,
            "calls_that_evicted": self._evicting,
            "tokens_seen": self._seen,
            "evicted_tokens": round(self._evicted, 2),
            "peak_tokens": self._peak,
            "nothing_was_evicted": nothing,
        }
        return {**super().get_model_info(), "kvpolicy": done}

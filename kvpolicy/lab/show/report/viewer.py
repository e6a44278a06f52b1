"""What the retention viewer is given of a trace: bytes in base64, as small as they can be."""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from kvpolicy.budget.span import lines_in
from kvpolicy.tracing.trace import STAYS, LayerTrace, Trace

__all__ = ["LONGEST", "viewer_data"]

#: What JavaScript reads as "still cached", and so the tokens that are too many for it.
LONGEST = 2**16 - 1


def viewer_data(found: Trace, label: str, budget: str) -> dict[str, Any] | None:
    """A trace for the viewer; None where there is no grid to show, or it is too long for it.

    Args:
        found: the trace.
        label: the policy with its parameters.
        budget: as a user would spell it.
    """
    if found.grid is None or found.seen >= LONGEST or not found.layers:
        return None
    line = found.grid["cols"] + found.grid["line_break"]
    span = line if found.groups is None else 1  # groups have few decisions: all are shown
    return {
        "label": label,
        "budget": budget,
        **found.grid,
        "seen": found.seen,
        "roles": _roles(found, line),
        "passes": [] if found.passes is None else found.passes.tolist(),
        "order": None if found.order is None else found.order.tolist(),
        "groups": None if found.groups is None else found.groups.tolist(),
        "images": None if found.images is None else [_bytes(image) for image in found.images],
        # Pixels of a token, down and across, and numbers of a pixel.
        "scale": 1 if found.images is None else found.images.shape[1] // found.grid["rows"],
        "channels": 3 if found.images is not None and found.images.ndim == 4 else 1,
        "prompts": found.prompts,
        "layers": [
            {
                "layer": index,
                "budget": found.budgets[index],
                "heads": layer.gone.shape[1],
                "items": [_item(layer, item, span) for item in range(layer.gone.shape[0])],
            }
            for index, layer in sorted(found.layers.items())
        ],
    }


def _roles(found: Trace, line: int) -> dict[str, int]:
    """How many tokens a policy protects for where they sit, by the names of its parameters."""
    given = found.parameters

    def count(*names: str, default: int = 0) -> int:
        """The first of these parameters; other packages' policies may call so what is no number."""
        value = next((given[name] for name in names if name in given), default)
        if isinstance(value, str) and (lines := lines_in(value)) is not None:
            value = lines * line
        return value if type(value) is int and 0 <= value <= found.seen else default

    recent = given.get("recent", 0)
    share = isinstance(recent, float) and 0 < recent < 1
    return {
        "anchors": count("anchors", "sinks"),
        "recent_lines": count("recent_lines", default=-1),
        "recent_tokens": round(recent * min(found.budgets)) if share else count("window"),
        "by_recency": int(found.policy == "streaming_llm"),
        "line": line,
    }


def _item(layer: LayerTrace, item: int, span: int) -> dict[str, Any]:
    """One image: when each token went, and the scores of the last decision in each span of them."""
    gone = layer.gone[item]
    moments, places, scores, sizes = [], [], [], []
    begun = 0
    newest: dict[int, tuple[int, int, int]] = {}
    for seen, size in zip(layer.decided.tolist(), layer.candidates.tolist(), strict=True):
        if size:
            newest[seen // span] = (seen, begun, size)
        begun += size
    for seen, first, size in newest.values():
        moments.append(seen)
        sizes.append(size)
        places.append(layer.places[item, :, first : first + size].flatten())
        scores.append(layer.scores[item, :, first : first + size].flatten())
    nothing = torch.zeros(0)
    # As int16 the same bits: the viewer reads them without a sign, and nothing lies at 65,535, -1.
    return {
        "gone": _bytes(torch.where(gone == STAYS, LONGEST, gone).to(torch.uint16)),
        "decided": moments,
        "sizes": sizes,
        "places": _bytes(torch.cat([nothing.to(torch.int32), *places]).to(torch.int16)),
        "scores": _bytes(torch.cat([nothing, *(score.float() for score in scores)])),
    }


def _bytes(tensor: Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode("ascii")

"""TokenReader: finds the images of a sequence in its token ids, as they come.

Where an image begins, and how large it is, stands in the tokens before it: a late layout therefore
has to read them. The model is watched by forward pre-hooks (a public interface of torch), which
are taken off when the ``attach`` block ends; tokens inside an image are counted, never looked at,
so that reading them costs no wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy import LayoutError, RasterLayout, SequenceLayout, TokenLayout
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import brings

__all__ = ["Header", "ReadsTokens", "TokenReader", "telling"]


class Header(Protocol):
    """Knows the tokens that open an image."""

    def grid(self, text: Sequence[int]) -> tuple[RasterLayout, int] | None:
        """Whether the newest token of a text completes the header of an image.

        Args:
            text: token ids since the image before, or since the sequence began; newest last.

        Returns:
            The image's grid, without a prefix, and how many of the newest tokens belong to the
            image already; None where no image begins here.

        Raises:
            LayoutError: the header can't be read.
        """


@dataclass(frozen=True)
class Image:
    """An image in a sequence.

    Attributes:
        start: position of its first token.
        grid: its rows, columns, line break and suffix; without a prefix.
        opened: position behind the token that completed its header.
    """

    start: int
    grid: RasterLayout
    opened: int = 0

    @property
    def stop(self) -> int:
        """Position behind its last row."""
        return self.start + self.grid.rows * self.grid.line_length


class TokenReader:
    """A late layout (:class:`kvpolicy.LateLayout`) that reads where the images of a sequence are.

    Everything up to the image that is being drawn is prefix and pinned: text, and finished images
    that text follows. From that image on nothing is pinned and the budget holds: text behind the
    image is cut into lines as long as the image's, and a further image opens a line of its own.
    Until an image is drawn everything is kept; text that is to be evicted needs a ``TextLayout``.

    It follows one sequence (a batch of rows that open images of one size at the same positions),
    and starts anew where position 0 comes again.

    Args:
        header: knows the tokens that open an image.
    """

    goes_on: ClassVar[bool] = True

    def __init__(self, header: Header) -> None:
        self.header = header
        self._restart(0)

    def _restart(self, rows: int) -> None:
        self.read = 0
        self._newest = (0, 0)
        self.images: list[Image] = []
        self._texts: list[list[int]] = [[] for _ in range(rows)]

    def told(self, first: int, ids: Tensor) -> None:
        """Read tokens.

        Args:
            first: position of the first of them: 0, or the one behind the last that was told; or
                one in the newest image, where tokens were taken back. Telling the newest ones again
                does nothing.
            ids: ``[B, T]``.

        Raises:
            LayoutError: tokens were left out, or rows of the batch open different images.
        """
        after = first + ids.shape[1]
        if first == 0:
            self._restart(ids.shape[0])
        elif (first, after) == self._newest:
            return
        elif self._counted(first):
            self.read = first  # nothing in an image was looked at
            for text in self._texts:
                text.clear()
        elif first != self.read:
            raise LayoutError(
                f"the next token is at position {self.read}, but position {first} was told; a "
                f"grid that is read from tokens needs all of them, in order"
            )
        self._newest = (first, after)
        while self.read < after:
            inside = self.images[-1].stop - self.read if self.images else 0
            if inside > 0:
                self.read = min(self.read + inside, after)
                continue
            # To the host at once: a token at a time would wait for the device each time.
            rows = ids[:, self.read - first :].tolist()
            for column in zip(*rows, strict=True):
                self.read += 1
                if self._opens(column):
                    break

    def _counted(self, first: int) -> bool:
        """Whether tokens were taken back to where the newest image is: counted, never looked at."""
        image = self.images[-1] if self.images else None
        return image is not None and image.opened <= first <= image.stop and first < self.read

    def _opens(self, tokens: Sequence[int]) -> bool:
        """Take in one more token of text a row; whether an image begins."""
        if len(tokens) != len(self._texts):  # a batch that was selected from, or repeated
            self._texts = [list(self._texts[0]) for _ in tokens]
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(token)
        found = [self.header.grid(text) for text in self._texts]
        if found[0] != found[-1] or any(grid != found[0] for grid in found):
            raise LayoutError(
                f"position {self.read - 1} opens different images in the rows of this batch "
                f"({found}); pad the prompts on the left so that images of one size begin "
                f"together, or generate the rows one by one"
            )
        if found[0] is None:
            return False
        grid, begun = found[0]
        self.images.append(Image(self.read - begun, grid, self.read))
        for text in self._texts:
            text.clear()
        return True

    def drawn(self, position: int) -> Image | None:
        """The image that a position lies in, or right behind; None for text."""
        if self.images and self.images[-1].start <= position <= self.images[-1].stop:
            return self.images[-1]
        return None

    def preview(self) -> None:
        """Nothing is known before the first token."""
        return None

    def at(self, seen: int, count: int, bound: TokenLayout | None) -> TokenLayout | None:
        """The layout as far as it has been read; see :class:`kvpolicy.LateLayout`.

        Raises:
            LayoutError: the tokens were not told.
        """
        after = seen + count
        if self.read < after:
            raise LayoutError(
                f"tokens {self.read} to {after - 1} came without ids, but this family's grid is "
                f"read from them: call the attached model with input_ids, or say where tokens sit, "
                f"e.g. attach(..., layout=AfterPrompt(RasterLayout(rows=32, cols=32)))"
            )
        if bound is None:
            if not self.images:
                return None
            image = self.images[-1]
            if after > image.stop + image.grid.suffix or image.start < seen:
                return None  # text follows: that image belongs to the prompt
            return image.grid.model_copy(update={"prefix": image.start})
        if bound.length is not None and after <= bound.length:
            return bound
        behind = [image for image in self.images if image.start >= bound.prefix]
        pieces = tuple((image.start, image.grid.line_length) for image in behind)
        if isinstance(bound, SequenceLayout) and bound.pieces == pieces:
            return bound
        return SequenceLayout(prefix=bound.prefix, pieces=pieces)


@runtime_checkable
class ReadsTokens(Protocol):
    """A late layout that wants to be told the token ids before they are cached."""

    def told(self, first: int, ids: Tensor) -> None:
        """Read the ids ``[B, T]`` of the tokens from position ``first`` on."""


@contextmanager
def telling(model: PreTrainedModel, cache: TransformersCache, layout: object) -> Iterator[None]:
    """Tell a layout the ids of all tokens that a model is about to put into a cache."""
    if not isinstance(layout, ReadsTokens):
        yield
        return

    def tell(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        # torch registers a hook before it notes that the hook wants keywords: a call of another
        # thread may come in between, and is none of this block's.
        if kwargs is not None and brings(cache, args, kwargs):
            ids = args[0] if args else kwargs.get("input_ids")
            if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
                layout.told(cache.get_seq_length(), ids)

    # The model hands its ids down to a model inside it, which users may also call by itself.
    hooks = [
        module.register_forward_pre_hook(tell, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

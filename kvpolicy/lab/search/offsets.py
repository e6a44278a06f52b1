"""Find out where a subject's heads look, by where it lies from them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from kvpolicy.decoding import Decoder
from kvpolicy.errors import ParameterError
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.subject import Setting, Watchable
from kvpolicy.parts.offsets import OffsetAttention
from kvpolicy.policies import Full
from kvpolicy.tracing.offsets import OffsetRecord, watch_offsets

__all__ = ["measure_offsets"]


def measure_offsets(
    subject: object,
    decoder: Decoder,
    out: Path,
    *,
    named: str,
    images: int = 64,
    radius: int = 5,
    seed: int = 0,
) -> OffsetAttention:
    """Watch real images being scored with everything cached, and write the file.

    Args:
        subject: a :class:`kvpolicy.lab.run.subject.Watchable`; where it has a method
            ``calibration()`` that gives the same model on items that no test scores, these are
            taken.
        decoder: in whose order tokens come.
        out: the file.
        named: how a user spells the subject.
        images: that are scored.
        radius: rows and columns up to which offsets are told apart.
        seed: of the subject.

    Raises:
        ParameterError: the subject's cache can't be watched, or an argument is out of range.
        OSError: the file can't be written; known before anything is measured.
    """
    with TemporaryFile(dir=out.parent):  # not in the end, when everything is measured
        pass
    aside = getattr(subject, "calibration", None)
    taken = subject if aside is None else aside()
    if not isinstance(taken, Watchable):
        raise ParameterError(
            f"{named} has no method watched(), so nobody can look on as it scores images; "
            f"kvpolicy.watch_offsets(cache) serves wherever a cache is at hand"
        )
    setting = Setting(Full(), None, decoder)
    seen: OffsetRecord = taken.watched(setting, seed, images, partial(watch_offsets, radius=radius))
    found = seen.finish(f"{named}, {decoder.label}")
    write_whole(out, found.text())
    return found

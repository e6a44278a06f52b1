"""Figures of folders of drawn images, of networks that lie in local files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.lab.compare.bootstrap import interval, replicates
from kvpolicy.lab.compare.frechet import frechet_distance
from kvpolicy.lab.run.device import check_device
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.provenance import versions
from kvpolicy.lab.run.runner import writing
from kvpolicy.lab.score.measures import inception_score, within
from kvpolicy.lab.score.networks import NETWORKS, FeatureNetwork, MatchNetwork
from kvpolicy.lab.score.pictures import Pictures, read_pictures
from kvpolicy.lab.score.reference import Reference, read_reference

__all__ = ["SPLITS", "Figure", "Figures", "Networks", "Scores", "Seen", "load_networks", "score"]

#: Parts that the inception score is a mean over.
SPLITS = 10
#: Of a point in its manifold.
_NEIGHBOURS = 3

Array = NDArray[np.float64]
#: Told how many more images a network has seen, of how many, and whose they are.
Tell = Callable[[int, int, Path], None]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Record):
    """A figure.

    Attributes:
        value: the figure.
        low: end of its 95 % interval, over the images of the mean; None where there is none.
        high: its other end.
    """

    value: float
    low: float | None = None
    high: float | None = None


class Figures(_Record):
    """What was found about one folder; None for what was not asked for, or can't be known.

    Attributes:
        images: how many.
        rows: of pixels.
        cols: of pixels.
        fid: Fréchet inception distance to the real images.
        inception_score: mean over ten parts.
        inception_deviation: over the ten parts.
        precision: share of these images in the manifold of real ones.
        recall: share of real images in the manifold of these.
        clip_score: 100 times the cosine of image and prompt, not below 0, mean.
        prompts_cut: prompts of which CLIP reads the beginning only.
    """

    images: int
    rows: int
    cols: int
    fid: Figure | None = None
    inception_score: Figure | None = None
    inception_deviation: float | None = None
    precision: Figure | None = None
    recall: Figure | None = None
    clip_score: Figure | None = None
    prompts_cut: int | None = None


class Scores(_Record):
    """``scores.json``.

    Attributes:
        folders: figures by folder, as it was given.
        real: what they were compared with, as it was given.
        real_images: how many; None where only statistics are published.
        inception: digest of the network's weights.
        published: whether published figures are computed with these weights.
        clip: the network of prompts, as it was given.
        versions: of Python and the packages that compute.
        notes: what a reader of the figures needs to know.
    """

    folders: dict[str, Figures]
    real: str | None = None
    real_images: int | None = None
    inception: str | None = None
    published: bool | None = None
    clip: str | None = None
    versions: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Networks:
    """What looks at the images, and where it is from.

    Attributes:
        features: for distances and the inception score; None for neither.
        match: for prompts; None for none.
        clip: where ``match`` is from.
    """

    features: FeatureNetwork | None = None
    match: MatchNetwork | None = None
    clip: Path | None = None


@dataclass(frozen=True)
class Seen:
    """What a network said of a set of pictures.

    Attributes:
        features: float32 ``[n, F]``.
        logits: float32 ``[n, C]``.
    """

    features: Tensor
    logits: Tensor

    @staticmethod
    def of(network: FeatureNetwork, batches: Iterable[NDArray[np.uint8]], source: object) -> Seen:
        """Let the network look at pictures, uint8 ``[n, rows, cols, 3]`` at a time.

        Raises:
            ParameterError: it gives numbers that are not finite; the message names the source.
        """
        looked = [network.look(torch.from_numpy(some.copy())) for some in batches]
        seen = Seen(
            torch.cat([each[0] for each in looked]), torch.cat([each[1] for each in looked])
        )
        if not (seen.features.isfinite().all() and seen.logits.isfinite().all()):
            raise ParameterError(
                f"the network of --inception gives numbers that are not finite for {source}; are "
                f"its weights whole?"
            )
        return seen

    @property
    def moments(self) -> tuple[Array, Array]:
        """Mean ``[F]`` and covariance ``[F, F]`` of the features."""
        features = self.features.double().numpy()
        return features.mean(0), np.cov(features, rowvar=False)

    def distance(self, moments: tuple[Array, Array]) -> float:
        """Fréchet distance to a mean and a covariance."""
        return frechet_distance(*self.moments, *moments)

    def within(self, other: Seen) -> Tensor:
        """Which of these pictures lie in the manifold of the other ones, bool ``[n]``."""
        return within(self.features, other.features, _NEIGHBOURS)


def load_networks(inception: Path | None, clip: Path | None, device: str) -> Networks:
    """Load what was given, from local files only.

    Raises:
        ParameterError: neither was given, a file holds another network, or the device is not here.
        OSError: a file can't be read.
    """
    check_device(device)
    if inception is None and clip is None:
        raise ParameterError("nothing to score with: give --inception FILE or --clip FOLDER")
    features = None if inception is None else NETWORKS.get("inception")(inception, device)
    match = None if clip is None else NETWORKS.get("clip")(clip, device)
    return Networks(features, match, clip)


def score(
    folders: Sequence[Path],
    networks: Networks,
    tell: Tell,
    *,
    real: Path | None = None,
    out: Path | None = None,
    batch: int = 32,
) -> Scores:
    """Compute all figures that the given networks and real images allow.

    Args:
        folders: of pictures, or ADM's ``samples.npz``.
        networks: what looks at them.
        tell: is told how it goes.
        real: folder or ``.npz`` of real images or of their statistics; without it no distance,
            precision or recall.
        out: file to write; none if None.
        batch: images at a time.

    Raises:
        ParameterError: sets that can't be compared, too few images, a folder twice, or ``real``
            without the network that compares.
        RunFolderError: the file can't be written.
    """
    if len(set(folders)) != len(folders):
        raise ParameterError("a folder is given twice")
    sets = {folder: read_pictures(folder) for folder in folders}
    reference = None if real is None else read_reference(real)
    _check(sets, reference, networks)
    seen_real = None
    moments = None if reference is None else reference.moments
    if reference is not None and reference.pictures is not None and networks.features is not None:
        seen_real = _look(networks.features, reference.pictures, batch, tell)
        moments = moments or seen_real.moments
    found = {
        str(folder): _figures(pictures, networks, moments, seen_real, batch, tell)
        for folder, pictures in sets.items()
    }
    network = networks.features
    scores = Scores(
        folders=found,
        real=None if real is None else str(real),
        real_images=None if seen_real is None else len(seen_real.features),
        inception=None if network is None else network.digest,
        published=None if network is None else network.published,
        clip=None if networks.clip is None else str(networks.clip),
        versions=versions(),
        notes=tuple(_notes(found, reference, networks)),
    )
    if out is not None:
        with writing(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, scores.model_dump_json(indent=2) + "\n")
    return scores


def _check(sets: dict[Path, Pictures], reference: Reference | None, networks: Networks) -> None:
    """Refuse what can't be compared, before a network looks at anything."""
    network = networks.features
    if reference is not None:
        if network is None:
            raise ParameterError("--real is compared through a network: give --inception FILE")
        if reference.moments is not None and len(reference.moments[0]) != network.features:
            raise ParameterError(
                f"{reference.source} holds statistics of {len(reference.moments[0])} features, but "
                f"the network of --inception gives {network.features}"
            )
    compared = dict(sets)
    if reference is not None and reference.pictures is not None:
        compared[reference.source] = reference.pictures
    for source, pictures in compared.items():
        least = 1 if network is None else SPLITS
        if pictures.count < least:
            raise ParameterError(
                f"{source} holds {pictures.count} pictures; the inception score is a mean over "
                f"{SPLITS} parts, so at least {least} are needed"
            )
        if reference is not None and reference.pictures is not None:
            real = reference.pictures.size
            if pictures.size != real:
                raise ParameterError(
                    f"{source} has pictures of {pictures.size[0]} x {pictures.size[1]} pixels, "
                    f"{reference.source} of {real[0]} x {real[1]}; a distance between sizes would "
                    f"be one of sharpness: kvpolicy draw --option size={real[0]} draws that size "
                    f"for checkpoints"
                )
        if networks.match is not None and source in sets and pictures.prompts is None:
            raise ParameterError(
                f"{source} has no prompts for --clip: its index.jsonl, which kvpolicy draw "
                f"--prompts writes, names them"
            )


def _figures(
    pictures: Pictures,
    networks: Networks,
    moments: tuple[Array, Array] | None,
    real: Seen | None,
    batch: int,
    tell: Tell,
) -> Figures:
    found: dict[str, Any] = {}
    if networks.features is not None:
        seen = _look(networks.features, pictures, batch, tell)
        score, deviation = inception_score(seen.logits, SPLITS)
        found |= {"inception_score": Figure(value=score), "inception_deviation": deviation}
        if moments is not None:
            found["fid"] = Figure(value=seen.distance(moments))
        if real is not None:
            found["precision"] = _mean(seen.within(real))
            found["recall"] = _mean(real.within(seen))
    if networks.match is not None:
        cosines, cut = _match(networks.match, pictures, batch, tell)
        found |= {"clip_score": _mean(100 * cosines.clamp(min=0)), "prompts_cut": cut}
    rows, cols = pictures.size
    return Figures(images=pictures.count, rows=rows, cols=cols, **found)


def _look(network: FeatureNetwork, pictures: Pictures, batch: int, tell: Tell) -> Seen:
    def told() -> Iterator[NDArray[np.uint8]]:
        for some in pictures.batches(batch):
            yield some
            tell(len(some), pictures.count, pictures.source)

    return Seen.of(network, told(), pictures.source)


def _match(network: MatchNetwork, pictures: Pictures, batch: int, tell: Tell) -> tuple[Tensor, int]:
    prompts = pictures.prompts or ()
    cosines, cut, done = [], 0, 0
    for some in pictures.batches(batch):
        found, more = network.match(torch.from_numpy(some.copy()), prompts[done : done + len(some)])
        cosines.append(found)
        cut, done = cut + more, done + len(some)
        tell(len(some), pictures.count, pictures.source)
    return torch.cat(cosines), cut


def _mean(values: Tensor) -> Figure:
    numbers = values.double().numpy()
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Figure(value=mean)
    low, high = interval(mean, replicates(numbers))
    return Figure(value=mean, low=low, high=high)


def _notes(found: dict[str, Figures], reference: Reference | None, networks: Networks) -> list[str]:
    """What the figures can't be taken for."""
    notes = []
    network = networks.features
    if network is not None and not network.published:
        notes.append(
            f"the weights of --inception (SHA-256 {network.digest[:8]}...) are not the file that "
            f"published figures are computed with: these compare among themselves only"
        )
    if network is not None and reference is not None:
        few = sorted({figures.images for figures in found.values()})
        if few[0] < 10_000:
            notes.append(
                f"the distance grows as images become fewer ({few[0]} here; published ones are of "
                f"10,000 to 50,000): compare equal numbers"
            )
        if reference.pictures is None:
            notes.append(
                f"{reference.source} holds statistics and no images: no precision, no recall"
            )
    cut = sum(figures.prompts_cut or 0 for figures in found.values())
    if cut and networks.match is not None:
        notes.append(
            f"CLIP reads {networks.match.longest} tokens: it saw the beginning only of {cut} "
            f"prompts"
        )
    return notes

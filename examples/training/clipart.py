"""Open clip art as 96 x 96 pictures on white with words, for the scripts beside this file.

The drawings come with Debian's package ``openclipart-png`` (public domain): folders by subject, and
file names that say what a drawing shows and, mostly, who drew it. Icons, shapes and one folder of
leftovers are not read: they are hundreds of variants of the same few pictures.

Run as a script, it writes what it has read into one file, and a sheet to look at:

    python clipart.py --out runs/clipart
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path("/usr/share/openclipart/png")
LEFT_OUT = ("computer/icons", "shapes", "special")
SIZE = 96
HELD_OUT, CALIBRATION = 400, 200
WORDS = 8  # words of a prompt, the most telling last
#: Names, and what a cut file name leaves of them, that were taken for words: tokens of clipart-ar
#: that no prompt says. (Victor, bravo and roman are names, too, and signal flags and so on.)
NAMES = frozenset(
    """aj alex andy angelo anton ar ara arauj araujo arc arch architetto ba bal benj bogdan
    boitel brice buc bucul charles costea dan daniel enrique erich es fco fitzsimon fra
    francesco frederic frouke fudriot gabrielle gates ge ger gera gui guillaume guillo
    jacq jakob jarno jean jo joel jon jonathan juliane jurgen kim krug kurt leif linda
    luiz lumen marcelo matt matthew mauro michael mo montes nic nicolas nicu olivo omic
    patricia petri philippe ro rollandin sergio staudt steele tanguy todd vas vasa vasamaa
    wolfram yve yves
    """.split()  # noqa: SIM905 (as a list it fills a page)
)
ALIKE = 0.035  # root mean square distance of two thumbnails, of 1, below which one is left out

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Drawing:
    """One drawing: where it lay, the subject that its folders name, and the words that say it."""

    path: str
    subject: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Clipart:
    """What is left of the package.

    Attributes:
        images: ``[N, 96, 96, 3]``, on white.
        drawings: N of them, in the same order.
        vocabulary: words that enough drawings share, most frequent first.
        held_out: indices of the drawings that nothing is trained on.
        calibration: indices of those that policies may be tuned on.
        train: all other indices.
    """

    images: Pixels
    drawings: tuple[Drawing, ...]
    vocabulary: tuple[str, ...]
    held_out: tuple[int, ...]
    calibration: tuple[int, ...]
    train: tuple[int, ...]


def read_clipart(folder: Path = FOLDER, *, seed: int = 0) -> Clipart:
    """Read all drawings, leave out those that look alike, and split the rest by subject."""
    paths = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.png")
        if not path.relative_to(folder).as_posix().startswith(LEFT_OUT)
    )
    if not paths:
        raise FileNotFoundError(f"no drawings below {folder}; install Debian's openclipart-png")
    read = {path: picture for path in paths if (picture := draw(folder / path)) is not None}
    images = np.stack(list(read.values()))
    kept = distinct(images)
    named = name_all([list(read)[index] for index in kept])
    held_out, calibration, train = split([drawing.subject for drawing in named], seed)
    counts = Counter(word for index in train for word in set(named[index].words))
    vocabulary = tuple(word for word, count in counts.most_common() if count >= 2)
    known = set(vocabulary)
    drawings = tuple(
        Drawing(one.path, one.subject, tuple(w for w in one.words if w in known)[-WORDS:])
        for one in named
    )
    return Clipart(images[kept], drawings, vocabulary, held_out, calibration, train)


def read_saved(folder: Path) -> Clipart:
    """What this script wrote into a folder: seconds instead of minutes."""
    about = json.loads((folder / "drawings.json").read_text())
    drawings = tuple(
        Drawing(path, subject, tuple(words)) for path, subject, words in about["drawings"]
    )
    with np.load(folder / "images.npz") as file:
        images = file["images"]
    apart = set(about["held_out"]).union(about["calibration"])
    return Clipart(
        images,
        drawings,
        tuple(about["vocabulary"]),
        tuple(about["held_out"]),
        tuple(about["calibration"]),
        tuple(index for index in range(len(drawings)) if index not in apart),
    )


def draw(path: Path) -> Pixels | None:
    """A drawing in the middle of a white square; None where it can't be read or shows nothing.

    (One is hundreds of millions of pixels large, and not worth them.)
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    box = picture.getchannel("A").getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = (SIZE - 4) / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # With alpha multiplied in, transparent pixels have no colour that could bleed into an edge.
    picture = picture.convert("RGBa").resize((width, height), Image.Resampling.BOX).convert("RGBA")
    square = Image.new("RGBA", (SIZE, SIZE), "white")
    square.alpha_composite(picture, ((SIZE - width) // 2, (SIZE - height) // 2))
    pixels = np.asarray(square.convert("RGB"))
    return None if pixels.min() > 240 else pixels


def distinct(images: Pixels) -> list[int]:
    """Indices of the images of which no earlier one is a near copy."""
    small = images.reshape(len(images), 24, SIZE // 24, 24, SIZE // 24, 3).mean((2, 4)) / 255
    flat = small.reshape(len(images), -1).astype(np.float32)
    squares = (flat**2).sum(1)
    kept: list[int] = []
    for index in range(len(images)):
        far = squares[kept] + squares[index] - 2 * (flat[kept] @ flat[index])
        if not kept or far.min() > flat.shape[1] * ALIKE**2:
            kept.append(index)
    return kept


def name_all(paths: Iterable[str]) -> list[Drawing]:
    """Subject and words of each path; the names of those who drew are left out.

    A file is called ``title_author_01.png``, cut at some length. What follows the titles of four
    or more different drawings is taken for an author.
    """
    paths = list(paths)
    stems = [re.sub(r"_\d\d[a-z]?$", "", Path(path).stem).strip("_") for path in paths]
    titles_of: dict[str, set[str]] = defaultdict(set)
    for stem in stems:
        parts = stem.split("_")
        for at in range(1, len(parts)):
            titles_of["_".join(parts[at:])].add(re.sub(r"\d+", "", "_".join(parts[:at])))
    authors = {end for end, titles in titles_of.items() if len(titles) >= 4 and len(end) > 4}
    drawings = []
    for path, stem in zip(paths, stems, strict=True):
        parts = stem.split("_")
        end = next((at for at in range(1, len(parts)) if "_".join(parts[at:]) in authors), None)
        folders = Path(path).parent.parts
        words: list[str] = []
        for word in re.findall(r"[a-z]+|\d+", " ".join([*folders, *parts[:end]]).lower()):
            if word not in words and (len(word) > 1 or word.isdigit() or "cards" in folders):
                words.append(word)
        drawings.append(Drawing(path, "/".join(folders[:2]), tuple(words)))
    return drawings


def split(
    subjects: list[str], seed: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Held-out, calibration and training indices: subjects take turns, none gives over a fifth."""
    order = list(range(len(subjects)))
    random.Random(seed).shuffle(order)
    members: dict[str, list[int]] = defaultdict(list)
    for index in order:
        members[subjects[index]].append(index)
    turns = [
        (turn, subject, index)
        for subject, indices in members.items()
        for turn, index in enumerate(indices[: len(indices) // 5])
    ]
    chosen = [index for _, _, index in sorted(turns)][: HELD_OUT + CALIBRATION]
    random.Random(seed).shuffle(chosen)
    rest = set(order).difference(chosen)
    return tuple(chosen[:HELD_OUT]), tuple(chosen[HELD_OUT:]), tuple(sorted(rest))


def sheet(images: Pixels, columns: int = 16) -> Image.Image:
    """Pictures side by side, row after row."""
    rows = -(-len(images) // columns)
    whole = np.full((rows * columns, SIZE, SIZE, 3), 255, np.uint8)
    whole[: len(images)] = images
    grid = whole.reshape(rows, columns, SIZE, SIZE, 3).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(rows * SIZE, columns * SIZE, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    clipart = read_clipart(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / "images.npz", images=clipart.images)
    about = {
        "vocabulary": clipart.vocabulary,
        "held_out": clipart.held_out,
        "calibration": clipart.calibration,
        "drawings": [(d.path, d.subject, d.words) for d in clipart.drawings],
    }
    (options.out / "drawings.json").write_text(json.dumps(about, indent=1) + "\n")
    sheet(clipart.images[list(clipart.held_out[:160])]).save(options.out / "held_out.png")
    print(
        f"{len(clipart.drawings)} drawings, {len(clipart.vocabulary)} words, "
        f"{len(clipart.held_out)} held out, {len(clipart.calibration)} for calibration"
    )


if __name__ == "__main__":
    main()

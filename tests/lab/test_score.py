"""Figures of folders of pictures: what is read, what is computed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="scoring needs the extra 'lab'")

from PIL import Image
from support.pictures import folder_of, pixels

from kvpolicy.errors import ParameterError, RunFolderError, ShapeError
from kvpolicy.lab.draw.items import class_items
from kvpolicy.lab.draw.outputs import write_npz
from kvpolicy.lab.run.device import check_device
from kvpolicy.lab.score.measures import inception_score, within
from kvpolicy.lab.score.pictures import read_pictures
from kvpolicy.lab.score.score import Networks, load_networks, score

FEATURES, CLASSES = 6, 5


class Looks:
    """Means of rows and columns, through fixed random numbers."""

    name, digest, published, features = "toy", "ab12", True, FEATURES

    def look(self, images):
        numbers = torch.Generator().manual_seed(0)
        flat = images.float().mean(3).flatten(1) / 255
        features = flat @ torch.randn(flat.shape[1], FEATURES, generator=numbers)
        return features, features @ torch.randn(FEATURES, CLASSES, generator=numbers)


class Matches:
    """Says how long a prompt is."""

    name, longest = "toy", 8

    def match(self, images, prompts):
        return torch.tensor([len(text) / 10 - 0.2 for text in prompts]), sum(
            len(text) > 8 for text in prompts
        )


NETWORKS = Networks(Looks(), None)


def ignore(*_):
    pass


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Drawn and real folders, their features, and moments of the real ones."""
    here = tmp_path_factory.mktemp("sets")
    drawn, real = pixels(1), (pixels(2, 30) * 0.9).astype(np.uint8)
    looked = [Looks().look(torch.from_numpy(images)) for images in (drawn, real)]
    return (
        folder_of(here / "drawn", drawn),
        folder_of(here / "real", real),
        looked[0],
        looked[1],
    )


# --- Figures -----------------------------------------------------------------------------------


def test_every_figure_is_what_its_formula_gives(sets):
    drawn, real, (features, logits), (theirs, _) = sets
    scores = score([drawn], NETWORKS, ignore, real=real, batch=7)
    found = scores.folders[str(drawn)]
    ours, theirs = features.double().numpy(), theirs.double().numpy()

    apart = ours.mean(0) - theirs.mean(0)
    cov, other = np.cov(ours.T), np.cov(theirs.T)
    roots = np.sqrt(np.linalg.eigvals(cov @ other).astype(complex)).real.sum()
    direct = apart @ apart + np.trace(cov) + np.trace(other) - 2 * roots
    assert direct > 0.1
    assert found.fid.value == pytest.approx(direct, rel=1e-5)

    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    parts = [p[split * 24 // 10 : (split + 1) * 24 // 10] for split in range(10)]
    kl = [(part * np.log(part / part.mean(0))).sum(1).mean() for part in parts]
    assert found.inception_score.value == pytest.approx(np.exp(kl).mean(), rel=1e-6)
    assert found.inception_deviation == pytest.approx(np.exp(kl).std(), rel=1e-5)

    def distance(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    def share(points, others):
        radii = np.sort(distance(others, others), 1)[:, 3]
        return (distance(points, others) <= radii).any(1).mean()

    assert 0 < found.precision.value == share(ours, theirs) < 1
    assert 0 < found.recall.value == share(theirs, ours) < 1
    assert found.precision.low < found.precision.value < found.precision.high
    assert (scores.real_images, found.images, found.rows) == (30, 24, 4)


def test_a_folder_is_at_no_distance_from_itself(sets):
    drawn = sets[0]
    found = score([drawn], NETWORKS, ignore, real=drawn).folders[str(drawn)]
    assert found.fid.value == pytest.approx(0, abs=1e-9)
    assert found.precision.value == found.recall.value == 1


def test_inception_score_has_its_bounds():
    assert inception_score(torch.zeros(20, 7)) == (pytest.approx(1), pytest.approx(0))
    sure = 50 * torch.eye(7).repeat(10, 1)
    assert inception_score(sure)[0] == pytest.approx(7)
    with pytest.raises(ShapeError, match="n >= 10"):
        inception_score(torch.zeros(9, 7))


def test_pieces_of_a_matrix_change_nothing(monkeypatch):
    points, others = torch.randn(23, 3), torch.randn(17, 3) + 1
    whole = within(points, others)
    assert 0 < whole.sum() < 23
    monkeypatch.setattr("kvpolicy.lab.score.measures._PIECE", 17 * 4)
    assert torch.equal(within(points, others), whole)
    with pytest.raises(ShapeError, match="no manifold"):
        within(points, others[:3])


def test_prompts_are_those_of_the_index(tmp_path):
    prompts = ["a", "four", "ten words."] * 4
    drawn = folder_of(tmp_path / "drawn", pixels(3, 12), prompts)
    scores = score([drawn], Networks(None, Matches(), Path("clip")), ignore)
    found = scores.folders[str(drawn)]
    assert found.clip_score.value == pytest.approx((0 + 20 + 80) / 3)
    assert found.prompts_cut == 4
    assert "beginning only of 4 prompts" in scores.notes[0]
    assert (found.fid, scores.clip) == (None, "clip")


# --- What is read ------------------------------------------------------------------------------


def test_statistics_and_arrays_stand_for_real_images(sets, tmp_path):
    drawn, real, _, (features, _) = sets
    whole = score([drawn], NETWORKS, ignore, real=real).folders[str(drawn)]
    numbers = features.double().numpy()
    moments = {"mu": numbers.mean(0), "sigma": np.cov(numbers.T)}
    np.savez(tmp_path / "fid.npz", **moments)
    scores = score([drawn], NETWORKS, ignore, real=tmp_path / "fid.npz")
    found = scores.folders[str(drawn)]
    assert found.fid.value == pytest.approx(whole.fid.value, rel=1e-9)
    assert (found.precision, found.recall, scores.real_images) == (None, None, None)
    assert any("no precision, no recall" in note for note in scores.notes)

    images = np.concatenate(list(read_pictures(real).batches(9)))
    moved = {**moments, "mu": moments["mu"] + 1}
    np.savez(tmp_path / "adm.npz", images, **moved)
    found = score([drawn], NETWORKS, ignore, real=tmp_path / "adm.npz").folders[str(drawn)]
    assert found.fid.value != pytest.approx(whole.fid.value)  # as published, not anew
    assert (found.precision, found.recall) == (whole.precision, whole.recall)


def test_an_array_of_draws_is_read_as_its_folder(tmp_path):
    items = class_items(range(12), 1)
    drawn = folder_of(tmp_path / "drawn", pixels(4, 12))
    array = write_npz(drawn, items)
    ours, theirs = (np.concatenate(list(read_pictures(it).batches(5))) for it in (drawn, array))
    assert np.array_equal(ours, theirs)
    assert np.array_equal(theirs, pixels(4, 12))


def test_an_index_says_what_belongs_to_a_folder(tmp_path):
    drawn = folder_of(tmp_path / "drawn", pixels(5, 11), ["x"] * 11)
    Image.fromarray(pixels(6, 1)[0]).save(drawn / "compare.png")
    folder_of(drawn / "full", pixels(6, 11), ["x"] * 11)
    assert read_pictures(drawn).count == 11
    (drawn / "index.jsonl").unlink()
    assert read_pictures(drawn).count == 23


def test_grey_pictures_count_as_colour(tmp_path):
    (tmp_path / "grey").mkdir()
    Image.fromarray(pixels(7)[0, :, :, 0]).save(tmp_path / "grey" / "a.png")
    (batch,) = read_pictures(tmp_path / "grey").batches(4)
    assert np.array_equal(batch[0], np.repeat(pixels(7)[0, :, :, :1], 3, 2))


# --- What is refused ---------------------------------------------------------------------------


def _empty(path):
    path.mkdir()
    return path


def _sizes(path):
    folder_of(path, pixels(1, 12))
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(path / "images" / "000003.png")
    return path


def _torn(path):
    folder_of(path, pixels(1, 12))
    file = path / "images" / "000003.png"
    file.write_bytes(file.read_bytes()[:60])
    return path


def _gone(path):
    folder_of(path, pixels(1, 12), ["x"] * 12)
    (path / "images" / "000003.png").unlink()
    return path


def _index(path):
    folder_of(path, pixels(1, 12), ["x"] * 12)
    with (path / "index.jsonl").open("a") as file:
        file.write('{"pa')
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_empty, r"set holds no pictures"),
        (lambda path: path, r"set is no folder"),
        (lambda path: folder_of(path, pixels(1, 9)), r"set holds 9 pictures.* at least 10"),
        (_sizes, r"000003\.png is 5 x 4 pixels, but .*000000\.png is 4 x 4"),
        (_torn, r"000003\.png can't be read as a picture"),
        (_gone, r"index\.jsonl lists images/000003\.png, which is gone"),
        (_index, r"index\.jsonl: line 13 is no JSON object"),
        (
            lambda path: folder_of(path, np.zeros((12, 6, 6, 3), np.uint8)),
            r"set has pictures of 6 x 6 pixels, .*real of 4 x 4.*--option size=4",
        ),
    ],
)
def test_folders_that_say_nothing_are_refused(sets, tmp_path, make, said):
    with pytest.raises(ParameterError, match=said):
        score([make(tmp_path / "set")], NETWORKS, ignore, real=sets[1])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mean": np.zeros(6)}, r"real\.npz holds mean; an \.npz of real images has mu and sigma"),
        ({"mu": np.zeros(6), "sigma": np.zeros((6, 5))}, r"\[6\] and float64 \[6, 5\]"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, r"statistics of 4 features, but .* gives 6"),
        ({"mu": np.array([None] * 6), "sigma": np.eye(6)}, r"real\.npz can't be read"),
        ({"arr_0": np.zeros((12, 4, 4), np.uint8)}, r"arr_0 must be uint8 \[n, rows, cols, 3\]"),
        ({"mu": np.zeros(6), "sigma": np.full((6, 6), np.nan)}, "not finite"),
    ],
)
def test_statistics_that_say_nothing_are_refused(sets, tmp_path, arrays, said):
    np.savez(tmp_path / "real.npz", **arrays)
    with pytest.raises(ParameterError, match=said):
        score([sets[0]], NETWORKS, ignore, real=tmp_path / "real.npz")


def test_files_that_are_no_npz_are_refused(sets, tmp_path):
    (tmp_path / "real.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ParameterError, match=r"real\.npz can't be read"):
        score([sets[0]], NETWORKS, ignore, real=tmp_path / "real.npz")


def test_what_does_not_go_together_is_refused(sets, tmp_path):
    drawn, real, *_ = sets
    with pytest.raises(ParameterError, match="give --inception FILE or --clip FOLDER"):
        load_networks(None, None, "cpu")
    with pytest.raises(ParameterError, match="give --inception FILE"):
        score([drawn], Networks(None, Matches()), ignore, real=real)
    with pytest.raises(ParameterError, match=r"drawn has no prompts for --clip"):
        score([drawn], Networks(Looks(), Matches()), ignore)
    with pytest.raises(ParameterError, match="given twice"):
        score([drawn, drawn], NETWORKS, ignore)
    for device, said in (("gpu", "is none"), ("cuda:99", "--device cpu"), ("meta", "none here")):
        with pytest.raises(ParameterError, match=rf"device='{device}'.*{said}"):
            check_device(device)
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="can't be written"):
        score([drawn], NETWORKS, ignore, out=tmp_path / "file" / "scores.json")


def test_a_network_that_gives_no_numbers_is_refused(sets):
    class Broken(Looks):
        def look(self, images):
            features, logits = super().look(images)
            return features * torch.nan, logits

    with pytest.raises(ParameterError, match="numbers that are not finite"):
        score([sets[0]], Networks(Broken()), ignore)

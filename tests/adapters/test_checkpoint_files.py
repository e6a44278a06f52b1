"""A file that is no checkpoint of the model that is asked for is refused by its name."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from kvpolicy import ParameterError
from kvpolicy_adapters.images import llamagen
from kvpolicy_adapters.images.lpd import read_official as read_lpd
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan


def read_llamagen(source):
    return llamagen.read_official(source, grid_size=16)


@pytest.mark.parametrize("read", [read_llamagen, read_lpd, read_vqgan])
def test_another_models_weights_and_a_file_that_is_cut_off(tmp_path, read):
    weights = {"model": {"encoder.weight": torch.zeros(3000)}}
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ParameterError, match=r"other\.pt\b.*(encoder\.weight|holds no)"):
        read(tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:5000])
    with pytest.raises(ParameterError, match=r"cut\.pt can't be .* 5,000 bytes, and may be cut"):
        read(tmp_path / "cut.pt")


@pytest.mark.parametrize("read", [read_llamagen, read_lpd])
def test_a_state_dict_has_no_name(read):
    with pytest.raises(ParameterError, match=r"^these are not the weights"):
        read({"encoder.weight": torch.zeros(3)})

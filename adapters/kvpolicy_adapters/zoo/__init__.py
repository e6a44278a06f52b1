"""The models that ship with the package: real images and real models without a download.

box = kvpolicy_adapters.zoo.load("fashion-ar")
box.model, box.layout, box.test_tokens(64), box.card
box = kvpolicy_adapters.zoo.load("fashion-lpd")  # any order of pixels, many at once
box = kvpolicy_adapters.zoo.load("clipart-ar")  # pictures in colour from words, in VQ codes
"""

from __future__ import annotations

from importlib.resources import files
from typing import Literal, overload

from kvpolicy import UnknownNameError
from kvpolicy.errors import near_matches
from kvpolicy_adapters.zoo.card import ModelCard
from kvpolicy_adapters.zoo.clipart import ClipartCard, ClipartModel, read_clipart
from kvpolicy_adapters.zoo.fashion import FashionModel, read_fashion
from kvpolicy_adapters.zoo.fashion_lpd import FashionLPD, LPDCard, read_fashion_lpd
from kvpolicy_adapters.zoo.sealed import CorruptFileError

__all__ = [
    "ClipartCard",
    "ClipartModel",
    "CorruptFileError",
    "FashionLPD",
    "FashionModel",
    "LPDCard",
    "ModelCard",
    "available",
    "load",
]

_MODELS = ("clipart-ar", "fashion-ar", "fashion-lpd")


def available() -> tuple[str, ...]:
    """Names of the models that ship, sorted."""
    return tuple(sorted(_MODELS))


@overload
def load(name: Literal["fashion-ar"]) -> FashionModel: ...
@overload
def load(name: Literal["fashion-lpd"]) -> FashionLPD: ...
@overload
def load(name: Literal["clipart-ar"]) -> ClipartModel: ...
@overload
def load(name: str) -> FashionModel | FashionLPD | ClipartModel: ...
def load(name: str) -> FashionModel | FashionLPD | ClipartModel:
    """Load a model that ships, anew on every call; nothing is downloaded.

    Args:
        name: one of ``available()``.

    Raises:
        UnknownNameError: no model has this name; near matches are listed.
        CorruptFileError: one of its files is missing or damaged.
    """
    if name not in _MODELS:
        raise UnknownNameError(
            f"no model in the zoo is called {name!r}; {near_matches(str(name), available())}"
        )
    if name == "clipart-ar":
        return read_clipart(files(__name__).joinpath("clipart_ar"))
    fashion = read_fashion(files(__name__).joinpath("fashion_ar"))
    if name == "fashion-ar":
        return fashion
    return read_fashion_lpd(files(__name__).joinpath("fashion_lpd"), fashion)

"""What is known about a model that ships: where it comes from and what it was measured at."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ModelCard"]


class ModelCard(BaseModel):
    """The facts of ``card.json``; the prose is in ``MODEL_CARD.md`` beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    parameters: int = Field(description="numbers in the weights")
    model_bytes: int = Field(description="size of the weights as shipped")
    data: str
    data_licence: str
    weights_licence: str
    steps: int = Field(description="optimiser steps of training")
    batch: int = Field(description="images a step")
    training_minutes: float = Field(description="wall clock spent in steps")
    machine: str
    bits_per_pixel: float = Field(
        description="mean of −log2 p over the 784 pixels of the first 1,000 test images, "
        "class given, full cache, float32"
    )
    bits_per_pixel_64: float = Field(description="the same over the first 64 test images")
    classifier_accuracy: float = Field(description="on all 10,000 test images, 16 grey levels")
    classifier_accuracy_1000: float = Field(description="on the 1,000 test images that ship")
    files: dict[str, str] = Field(description="SHA-256 of each file beside the card")

"""What describes a network so that it can be built again: plain data, readable without torch."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from ichpipe.classes import CLASSES
from ichpipe.params import WindowParams

PREPROCESSING_VERSION: Final = 1
"""Raised whenever the same file and weights would give another embedding; part of every fingerprint.
Golden values in the tests fail where the numbers change without it."""


class SliceCnnSpec(BaseModel):
    """All that is needed to build the slice CNN again; stored beside its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str  # timm name
    windows: tuple[WindowParams, ...] = Field(strict=False)
    size_px: int
    mean: tuple[float, ...]  # per channel, after windowing to 0 … 1
    std: tuple[float, ...]
    classes: tuple[str, ...] = CLASSES
    dropout: float = 0.0
    pooling: str | None = None  # timm's global_pool; None: the backbone's own


class SequenceSpec(BaseModel):
    """All that is needed to build the sequence model again; stored beside its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cell: str
    hidden: int
    layers: int
    bidirectional: bool
    dropout: float
    inputs: tuple[str, ...]
    embedding_dim: int
    pca: int = 0  # principal components, where they are an input
    skip: tuple[str, ...] = ()  # inputs that also go straight into the head
    residual: bool = False
    kernel: int = 3
    heads: int = 8
    members: int = 1  # networks whose probabilities are averaged
    reversed: bool = False  # … over the slices in both orders
    mirrored: bool = False  # … over the images and their left-right mirror images
    classes: tuple[str, ...] = CLASSES

    def width(self, inputs: tuple[str, ...]) -> int:
        """Return the features per slice of some inputs."""
        sizes = {
            "embedding": self.embedding_dim,
            "deltas": 2 * self.embedding_dim,
            "logits": len(self.classes),
            "pca": self.pca,
            "spacing": 2,
            "position": 1,
        }
        return sum(sizes[name] for name in inputs)

    @property
    def input_dim(self) -> int:
        """Features per slice that enter the network."""
        return self.width(self.inputs)

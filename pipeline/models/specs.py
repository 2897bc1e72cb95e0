"""Specifications from which a network can be built again: plain data, readable without torch."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ichpipe.common.classes import CLASSES
from ichpipe.params.schema import WindowParams

# Raise it when the same file gives the network another input: fingerprints and pixel caches hold it.
# Other changes of what a network computes have fields of their own in `generations.GenerationSpec`.
PREPROCESSING_VERSION: Final = 1

# Bounded well above any network here, so that a damaged header does not ask for all memory.
Size = Annotated[int, Field(ge=1, le=65_536)]
Few = Annotated[int, Field(ge=1, le=64)]
Input = Literal["embedding", "deltas", "logits", "pca", "spacing", "position"]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Spec(BaseModel):
    """A description whose classes are CLASSES: columns of logits have no other names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if getattr(self, "classes", CLASSES) != CLASSES:
            raise ValueError(f"its classes are not {', '.join(CLASSES)} in this order")
        return self


class SliceCnnSpec(_Spec):
    """What builds the slice CNN again; stored beside its weights."""

    backbone: str  # timm name
    windows: Annotated[tuple[WindowParams, ...], Field(min_length=1, max_length=8, strict=False)]
    size_px: Annotated[int, Field(ge=8, le=4096)]
    mean: tuple[float, ...]  # per channel, after windowing to 0 … 1
    std: tuple[float, ...]
    classes: tuple[str, ...] = CLASSES
    dropout: Share = 0.0
    pooling: str | None = None  # timm's global_pool; None: the backbone's own


class SequenceSpec(_Spec):
    """What builds the sequence model again; stored beside its weights."""

    cell: Literal["lstm", "gru", "transformer", "conv", "average"]
    hidden: Size
    layers: Few
    bidirectional: bool
    dropout: Share
    inputs: tuple[Input, ...]
    embedding_dim: Size
    pca: Annotated[int, Field(ge=0, le=65_536)] = 0  # principal components, where they are an input
    skip: tuple[Input, ...] = ()  # inputs that also go straight into the head
    residual: bool = False
    kernel: Annotated[int, Field(ge=1, le=1025)] = 3
    heads: Few = 8
    members: Annotated[int, Field(ge=1, le=1000)] = 1  # networks whose probabilities are averaged
    reversed: bool = False  # … over the slices in both orders
    mirrored: bool = False  # … over the images and their left-right mirror images
    classes: tuple[str, ...] = CLASSES

    def width(self, inputs: tuple[str, ...]) -> int:
        """Return the features per slice of some inputs."""
        sizes = {"embedding": self.embedding_dim, "deltas": 2 * self.embedding_dim, "logits": len(self.classes)}
        sizes |= {"pca": self.pca, "spacing": 2, "position": 1}
        return sum(sizes[name] for name in inputs)

    @property
    def input_dim(self) -> int:
        """Features per slice that enter the network."""
        return self.width(self.inputs)

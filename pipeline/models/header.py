"""Describes a model as plain data in the header of its file, and refuses a model of other inputs or folds; no torch."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from safetensors import SafetensorError, safe_open

from ichpipe.common.artifacts import MODEL_FILE, RECORD_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.constants import THICK_SLICE_MM
from ichpipe.common.errors import IchpipeError, WeightsError
from ichpipe.common.files import digest_of, digest_of_file, read_json, require_file
from ichpipe.params.schema import Fraction, Input, PositiveFloat, WindowParams

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params, PrepareParams

# Raise it when the same file gives the network another input: fingerprints and pixel caches hold it.
# 2: wrapped 12 bits, high bits and pixels that are not square are read right; version 1 gave wrong HU for such files.
# Other changes of what a network computes have fields of their own in `generations.GenerationSpec`.
PREPROCESSING_VERSION: Final = 2

# Bounded well above any network here, so that a damaged header does not ask for all memory.
Size = Annotated[int, Field(ge=1, le=65_536)]
Few = Annotated[int, Field(ge=1, le=64)]

HEAD_MM_PER_PX: Final = 1.1  # of prepare.crop: head, unless prepare.mm_per_px says otherwise

HEADER_KEY = "ichpipe"
FORMAT_VERSION = 2
ENSEMBLE_VERSION = 3  # of files with several networks; older versions of ichpipe read the others
_PARTS = {"slice-cnn": ("slice_cnn",), "sequence": ("sequence",), "end-to-end": ("slice_cnn", "sequence")}
_PARTS["ensemble"] = ("slice_cnn", "sequence", "networks")
SPACING = "spacing_mm"  # name in ``made_from`` of the distance of the slices that a model was trained on
MEANING = {"index": "index (slices, labels or split)", "embeddings": "embedding store"}
MEANING |= {"slice_cnn": "slice CNN", "sequence": "sequence model", "fold_cnns": "slice CNNs of the folds"}


class _Spec(BaseModel):
    """A description whose classes are CLASSES: columns of logits have no other names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if getattr(self, "classes", CLASSES) != CLASSES:
            raise ValueError(f"its classes are not {', '.join(CLASSES)} in this order")
        return self


@dataclass(frozen=True)
class Framing:
    """Which part of a slice becomes the square that the network sees: the whole image, or the head at one scale."""

    size_px: int  # side of the square
    mm_per_px: float | None = None  # scale of a square around the head; None: the whole image, at any scale

    @classmethod
    def of(cls, prepare: PrepareParams) -> Framing:
        """Return the framing that the parameters ask for."""
        return cls(prepare.size_px, None if prepare.crop == "none" else prepare.mm_per_px or HEAD_MM_PER_PX)

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the square; as before there was a choice where it is the whole image."""
        crop = {} if self.mm_per_px is None else {"crop": "head", "mm_per_px": self.mm_per_px}
        return {"size_px": self.size_px, **crop}


class SliceCnnSpec(_Spec):
    """What builds the slice CNN again; stored beside its weights."""

    backbone: str  # timm name
    windows: Annotated[tuple[WindowParams, ...], Field(min_length=1, max_length=8, strict=False)]
    size_px: Annotated[int, Field(ge=8, le=4096)]
    mean: tuple[float, ...]  # per channel, after windowing to 0 … 1
    std: tuple[float, ...]
    classes: tuple[str, ...] = CLASSES
    dropout: Fraction = 0.0
    pooling: str | None = None  # timm's global_pool; None: the backbone's own
    crop: Literal["none", "head"] = "none"
    mm_per_px: PositiveFloat | None = None  # with crop: head
    neighbours: Annotated[int, Field(ge=0, le=8)] = 0  # slices on each side that are further channels

    @property
    def slices(self) -> int:
        """How many slices the image of one slice holds, its own in the middle."""
        return 1 + 2 * self.neighbours

    @property
    def channels(self) -> int:
        """Channels of the image: slice by slice, each through every window."""
        return self.slices * len(self.windows)

    @property
    def framing(self) -> Framing:
        """How slices are made to fit the network."""
        return Framing(self.size_px, self.mm_per_px)

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if (self.crop == "none") != (self.mm_per_px is None):
            raise ValueError("mm_per_px belongs to crop: head")
        return self

    @model_serializer(mode="wrap")
    def _leave_defaults_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what older files don't have, so that older versions read a file that needs nothing of it."""
        newer = {name: type(self).model_fields[name].default for name in ("crop", "mm_per_px", "neighbours")}
        return {name: value for name, value in serialize(self).items() if name not in newer or value != newer[name]}


class SequenceSpec(_Spec):
    """What builds the sequence model again; stored beside its weights."""

    cell: Literal["lstm", "gru", "transformer", "conv", "average"]
    hidden: Size
    layers: Few
    bidirectional: bool
    dropout: Fraction
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
    smoothed: bool = False  # mean of their log odds and those of the slice CNN's moving average over `kernel` slices
    classes: tuple[str, ...] = CLASSES

    @property
    def all_inputs(self) -> tuple[str, ...]:
        """Every input that the model reads, each once."""
        smoothed = ("logits",) if self.smoothed else ()
        return tuple(dict.fromkeys((*self.inputs, *self.skip, *smoothed)))

    def width(self, inputs: tuple[str, ...]) -> int:
        """Return the features per slice of some inputs."""
        sizes = {"embedding": self.embedding_dim, "deltas": 2 * self.embedding_dim, "logits": len(self.classes)}
        sizes |= {"pca": self.pca, "spacing": 2, "position": 1}
        return sum(sizes[name] for name in inputs)

    @property
    def input_dim(self) -> int:
        """Features per slice that enter the network."""
        return self.width(self.inputs)


class Header(BaseModel):
    """Description of a model, from the header of its file."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["slice-cnn", "sequence", "end-to-end", "ensemble"]
    slice_cnn: SliceCnnSpec | None = None
    sequence: SequenceSpec | None = None
    format_version: int
    made_from: dict[str, str]  # digests of the inputs of its training, by name; SPACING
    # Of a slice CNN. Kept: extract could fold none of it. Files name it only then, and older files never do.
    batch_norm: Literal["folded", "kept"] = "folded"
    # Of an ensemble: digests of what each network was made from. All networks have the description above.
    networks: Annotated[tuple[dict[str, str], ...], Field(max_length=64)] = ()

    @model_validator(mode="after")
    def _require_parts(self) -> Self:
        if any(not getattr(self, part) for part in _PARTS[self.kind]):
            raise ValueError("it leaves a part of the model out")
        return self

    def description(self) -> dict[str, Any]:
        """Return the header of an end-to-end model or an ensemble as plain data, for a model card."""
        if self.slice_cnn is None or self.sequence is None:
            raise WeightsError(f"a model card needs an end-to-end model, not one of kind {self.kind}")
        facts = {"kind": self.kind, "format_version": self.format_version, "classes": list(self.slice_cnn.classes)}
        return facts | self.model_dump(mode="json", exclude={"batch_norm"} | (set() if self.networks else {"networks"}))


def read_header(folder: Path, remedy: str = "name a model folder") -> Header:
    """Read the header of the model in ``folder``, without its weights."""
    path = require_file(folder / MODEL_FILE, remedy)
    try:
        with safe_open(path, framework="np") as handle:
            text = (handle.metadata() or {}).get(HEADER_KEY)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: metadata names that JSON spoiled
        raise WeightsError(
            f"{path} is no whole safetensors file ({str(error)[:200]}); train or copy it again"
        ) from error
    if text is None:
        raise WeightsError(f"{path} was not written by ichpipe (no {HEADER_KEY!r} in its header)")
    try:
        raw = json.loads(text)
        version = raw["format_version"]
        header = None if version > ENSEMBLE_VERSION else Header.model_validate(raw)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path}: the description in its header is damaged ({reason})") from error
    if header is None:
        raise WeightsError(f"{path} has model format {version}; update ichpipe to read it")
    return header


def spacing_of(folder: Path) -> float:
    """Return the median distance of the slices that a model was trained on, mm; 5 where its header does not say."""
    text = read_header(folder).made_from.get(SPACING, "")
    with contextlib.suppress(ValueError):
        if 0 < (spacing := float(text or THICK_SLICE_MM)) < math.inf:
            return spacing
    raise WeightsError(f"{folder / MODEL_FILE}: {SPACING} in its header is {text[:20]!r}, no distance in mm")


def train_spacing(index: pd.DataFrame) -> dict[str, str]:
    """Return the median distance of neighbouring train slices, mm, as `spacing_of` reads it; empty without any."""
    sequences = (index["split"] == "train") & ~index["slices_only"]
    spacing = index.loc[sequences & (index["slice_index"] > 0), "spacing_mm"].median()
    return {SPACING: f"{spacing:.4g}"} if spacing > 0 else {}


def require_made_from(folder: Path, digests: dict[str, str], command: str) -> dict[str, str]:
    """Refuse the model in ``folder`` unless its inputs have these ``digests`` (SHA-256, by name); return ``made_from``.

    Raises WeightsError that names each input that differs and the ``command`` that trains the model anew.
    """
    made_from = read_header(folder, f"run: {command}").made_from
    changed = [MEANING.get(name, name) for name, digest in digests.items() if made_from.get(name) != digest]
    if changed:
        inputs = " and another ".join(changed)
        raise WeightsError(f"{folder / MODEL_FILE} was trained on another {inputs} than there is now; run: {command}")
    return made_from


def is_fitted(folder: Path, params: dict[str, Any], made_from: dict[str, str]) -> bool:
    """Return whether the model in ``folder`` was trained with these parameters on these inputs, and written whole.

    The record is written last. Code is not compared: a new version of this package alone retrains nothing.
    """
    try:
        require_made_from(folder, made_from, "")
        return bool(read_json(folder / RECORD_FILE)["params"] == params)
    except (IchpipeError, KeyError, TypeError):
        return False


def fold_numbers(params: Params) -> list[int]:
    """Return the folds that have a slice CNN of their own: none where ``fit-slices.folds`` is 0.

    A CNN is more certain of the slices it was fitted on, so a sequence model trains on embeddings of each train
    patient by the CNN that left this patient's fold out. ``prepare.test_fold`` has none: every CNN leaves it out.
    """
    return [fold for fold in range(params.fit_slices.folds) if fold != params.prepare.test_fold]


def fold_models(artifacts: Artifacts, params: Params, index_digest: str) -> dict[int, Path]:
    """Return the model folder of each of `fold_numbers`, checked to be what its name says.

    ``index_digest`` is the SHA-256 of the index file. Raises MissingFileError where a model is absent, WeightsError
    where one was trained on another index or left out another fold; both name the file and the remedy.
    """
    command, folders = "ichpipe fit-slices", {fold: artifacts.fold_cnn(fold) for fold in fold_numbers(params)}
    for fold, folder in folders.items():
        made_from = require_made_from(folder, {"index": index_digest}, command)
        left_out, folds = made_from.get("excluded_fold"), made_from.get("folds")
        if (left_out, folds) != (str(fold), str(params.fit_slices.folds)):
            patients = "on all folds" if None in (left_out, folds) else f"without fold {left_out} of {folds}"
            raise WeightsError(
                f"{folder / MODEL_FILE} was trained {patients}, wanted without fold {fold} of "
                f"{params.fit_slices.folds}: it may have seen the slices that it is to embed; run: {command}"
            )
    return folders


def finetuned_from(artifacts: Artifacts, params: Params, index_digest: str) -> dict[str, str]:
    """Return the digests of what `finetune` begins with, by name.

    ``index_digest`` is the SHA-256 of the index file. Raises MissingFileError where a model is absent, WeightsError
    where one was trained on another index; both name the file and the remedy.
    """
    arm, index = params.finetune.arm, {"index": index_digest}
    require_made_from(artifacts.slice_cnn, index, "ichpipe fit-slices")
    require_made_from(artifacts.sequence(arm), index, f"ichpipe fit-sequence --arm {arm}")
    digests = index | {
        "slice_cnn": digest_of_file(artifacts.slice_cnn / MODEL_FILE),
        "sequence": digest_of_file(artifacts.sequence(arm) / MODEL_FILE),
    }
    if params.finetune.out_of_fold:
        folders = fold_models(artifacts, params, index_digest)
        digests["fold_cnns"] = digest_of(
            {str(fold): digest_of_file(path / MODEL_FILE) for fold, path in folders.items()}
        )
    return digests


class Member(NamedTuple):
    """One network of an ensemble."""

    folder: Path  # of the fine-tuned model, or of a slice CNN
    made_from: dict[str, str]  # SHA-256 of the model files; the fold that the slice CNN left out
    number: int = 0  # among the networks of the fine-tuned model


def ensemble_members(artifacts: Artifacts, params: Params, index_digest: str) -> list[Member]:
    """Return the networks of an ensemble, checked to have seen the train patients of this index alone.

    The first is the fine-tuned model, or without one the slice CNN with the arm of ``finetune.arm``. Then comes the
    CNN of each fold with this arm. With ``finetune.out_of_fold`` the fine-tuned networks of the folds are all.
    ``index_digest`` is the SHA-256 of the index file. Raises MissingFileError or WeightsError, which name the file and
    the remedy.
    """
    starts = finetuned_from(artifacts, params, index_digest)
    members = [Member(artifacts.slice_cnn, {name: starts[name] for name in ("slice_cnn", "sequence")})]
    if (artifacts.finetuned / MODEL_FILE).exists():
        require_made_from(artifacts.finetuned, starts, "ichpipe finetune")
        digest = {"finetuned": digest_of_file(artifacts.finetuned / MODEL_FILE)}
        if params.finetune.out_of_fold:
            folds = [network["learned_fold"] for network in read_header(artifacts.finetuned).networks]
            return [
                Member(artifacts.finetuned, digest | {"learned_fold": fold}, number)
                for number, fold in enumerate(folds)
            ]
        members = [Member(artifacts.finetuned, digest)]
    for fold, folder in fold_models(artifacts, params, index_digest).items():
        digests = {"slice_cnn": digest_of_file(folder / MODEL_FILE), "sequence": starts["sequence"]}
        members.append(Member(folder, digests | {"excluded_fold": str(fold)}))
    return members


def require_members(folder: Path, members: list[Member], index_digest: str) -> None:
    """Refuse the ensemble in ``folder`` unless it was made from this index and these networks. Raises WeightsError."""
    require_made_from(folder, {"index": index_digest}, "ichpipe ensemble")
    if list(read_header(folder).networks) != [member.made_from for member in members]:
        raise WeightsError(
            f"{folder / MODEL_FILE} was made from other networks than there are now; "
            f"run: ichpipe ensemble, or remove {folder}"
        )

"""Which generations of the embedding store a run needs, and opening them so that none is taken for another.

A generation is one network applied to files in one way: the slice CNN of all train patients, plain; per fold, the CNN
that never saw this fold's patients (`folds`); each of them again per augmented view. Stage two trains on the
out-of-fold ones where there are any; what is held out is always seen by the network of all train patients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ichpipe.cache.fingerprint import FORMAT_VERSION, digest_rows
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.rows import Rows
from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.errors import ParamsError, WeightsError
from ichpipe.common.files import digest_of, digest_of_file
from ichpipe.index.slice_index import TextColumn
from ichpipe.models.fold_models import fold_models, rows_of_fold
from ichpipe.models.header import read_header
from ichpipe.models.specs import PREPROCESSING_VERSION
from ichpipe.params.schema import AugmentParams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pandas as pd

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params, SequenceParams


@dataclass(frozen=True)
class View:
    """One augmented look at every slice: the same change for all slices of a series, drawn from seed and number."""

    number: int  # from 1; 0 is the mirror image; the plain look is no view
    seed: int
    augment: AugmentParams

    def identity(self) -> dict[str, Any]:
        """Return what decides the draws."""
        return {"number": self.number, "seed": self.seed, **self.augment.model_dump(mode="json")}


STILL = AugmentParams(flip_probability=0.0, rotation_deg=0.0, scale=0.0, shift=0.0, offset_hu=0.0, noise_hu=0.0)
MIRROR = View(0, 0, STILL.model_copy(update={"flip_probability": 1.0}))
"""The left-right mirror image of every slice, of train and held-out series alike."""


@dataclass(frozen=True)
class GenerationSpec:
    """One generation: a network, a view or none, and the slices that go through."""

    model_dir: Path
    index: pd.DataFrame
    fold: int | None = None  # the fold that the network never saw
    view: View | None = None
    precision: str = "auto"

    def identity(self) -> dict[str, Any]:
        """Name all that turns a file's bytes into a row; the store compares it field by field."""
        header = read_header(self.model_dir, "run: ichpipe fit-slices")
        spec = header.slice_cnn
        if header.kind != "slice-cnn" or spec is None:
            raise WeightsError(f"{self.model_dir} holds a {header.kind} model; run: ichpipe fit-slices")
        # Left out where it is as it always was: stores from before there was a choice stay what they are.
        chosen = {} if self.precision == "auto" else {"precision": self.precision}
        return {
            "format_version": FORMAT_VERSION,
            "preprocessing_version": PREPROCESSING_VERSION,
            "weights": digest_of_file(self.model_dir / MODEL_FILE),
            "backbone": spec.backbone,
            "windows": [[window.level_hu, window.width_hu] for window in spec.windows],
            "size_px": spec.size_px,
            "batch_norm": "folded",  # rounds otherwise: rows of stores that were written without are not continued
            "excluded_fold": self.fold,
            "view": self.view.identity() if self.view else None,
            **chosen,
        }

    def rows(self) -> Rows:
        """Return its slices as the store names them."""
        columns = (TextColumn(self.index[name]) for name in ("series_uid", "study_uid", "sop_uid", "file_digest"))
        return Rows.of(*columns)

    def describe(self) -> str:
        """Say in a few words which one it is."""
        network = "slice CNN" if self.fold is None else f"slice CNN without fold {self.fold}"
        return network if self.view is None else f"{network}, view {self.view.number}"


def store_address(params: Params, artifacts: Artifacts) -> str:
    """Return where the store lies: ``extract.store`` if it is given, else below the artifacts."""
    return params.extract.store or str(artifacts.embeddings)


def list_generations(params: Params, artifacts: Artifacts, index: pd.DataFrame) -> list[GenerationSpec]:
    """Return all generations that ``extract`` fills: all slices plain, then train slices by fold and by view.

    With ``extract.mirror`` every slice mirrored, too, by the network that embeds it plain for stage two.
    """
    precision = params.extract.precision
    plain = GenerationSpec(artifacts.slice_cnn, index, precision=precision)
    by_fold = _out_of_fold(params, artifacts, index)
    train = by_fold or [replace(plain, index=index[index["split"] == "train"])]
    views = [replace(cache, view=view) for view in _views(params, params.extract.views.count) for cache in train]
    mirrors = _mirrored(plain, by_fold) if params.extract.mirror else []
    return [cache for cache in (plain, *by_fold, *views, *mirrors) if len(cache.index)]


def _mirrored(plain: GenerationSpec, by_fold: list[GenerationSpec]) -> list[GenerationSpec]:
    rest = plain.index[plain.index["split"] != "train"] if by_fold else plain.index
    return [
        replace(cache, index=index, view=MIRROR)
        for cache, index in ((plain, rest), *((cache, cache.index) for cache in by_fold))
    ]


def _out_of_fold(params: Params, artifacts: Artifacts, index: pd.DataFrame) -> list[GenerationSpec]:
    if not params.fit_slices.folds:
        return []
    models = fold_models(artifacts, params, digest_of_file(artifacts.index))
    precision = params.extract.precision
    return [
        GenerationSpec(folder, rows_of_fold(index, fold), fold, precision=precision) for fold, folder in models.items()
    ]


def _views(params: Params, count: int) -> list[View]:
    section = params.extract.views
    return [View(number, section.seed, section.augment) for number in range(1, count + 1)]


@dataclass(frozen=True)
class Features:
    """The opened generations that one arm of stage two reads.

    ``train[v]`` holds one view (the first: plain) of the train slices by the fold of the patient, under None where the
    network of all train patients embeds them all.
    """

    plain: EmbeddingStore
    mirrored: EmbeddingStore | None  # of what is held out
    train: tuple[dict[int | None, EmbeddingStore], ...]
    made_by: dict[str, Any]

    def sources(self, split: str, fold: int) -> list[EmbeddingStore]:
        """Return the stores from which a series of this split and fold is read: plain, its views, the mirror image."""
        if split != "train":
            return [self.plain] + ([self.mirrored] if self.mirrored else [])
        return [stores[None] if None in stores else stores[fold] for stores in self.train]

    @property
    def store(self) -> str:
        """Digest of the plain rows and the network that made them: the same for all arms of one run."""
        return digest_of({"rows": self.made_by["rows"], "plain": self.plain.identity})


def open_features(
    params: Params, artifacts: Artifacts, index: pd.DataFrame, section: SequenceParams | None = None
) -> Features:
    """Open what an arm reads and require every slice of the index in it; None: the plain rows alone.

    Raises StoreError where a generation is absent, incomplete, or holds other slices than the index.
    """
    address = store_address(params, artifacts)

    def opened(cache: GenerationSpec) -> EmbeddingStore:
        return EmbeddingStore(address, cache.identity(), cache.rows())

    caches = list(arm_caches(params, artifacts, index, section))
    stores = {(cache.fold, cache.view): opened(cache) for cache in caches}
    folded = {fold for fold, _ in stores} - {None}
    views = dict.fromkeys(view for _, view in stores)  # in the order of `wanted_caches`: plain comes first
    train = tuple(
        {fold: store for (fold, other), store in stores.items() if other == view and (fold is not None or not folded)}
        for view in views
    )
    made = _made_by(params, index, caches, section)
    return Features(stores[None, None], stores.get((None, MIRROR)), train, made)


def made_by(params: Params, artifacts: Artifacts, index: pd.DataFrame, section: SequenceParams) -> dict[str, Any]:
    """Return what `Features.made_by` of an arm will say, without opening the store."""
    return _made_by(params, index, list(arm_caches(params, artifacts, index, section)), section)


def arm_caches(
    params: Params, artifacts: Artifacts, index: pd.DataFrame, section: SequenceParams | None
) -> Iterator[GenerationSpec]:
    """Yield the generations that an arm reads; ParamsError where it asks for views that are not extracted."""
    if section is not None and "pca" in section.all_inputs and params.extract.pca is None:
        raise ParamsError("an arm has the input pca, but extract.pca is null; set it to a number of components")
    views = section.views if section else 0
    there = params.extract.views.count
    if views > there:
        raise ParamsError(f"an arm asks for {views} views, but extract.views.count is {there}")
    mirrored = section is not None and section.average.mirrored
    if mirrored and not params.extract.mirror:
        raise ParamsError("an arm averages mirrored images, but extract.mirror is false; set it to true")
    folded = section is not None and section.out_of_fold and params.fit_slices.folds > 0
    if (views or mirrored) and params.fit_slices.folds and not folded:
        raise ParamsError(
            "an arm asks for views with out_of_fold: false, but where fit-slices.folds is set views are extracted by "
            "the networks of the folds alone; set views to 0 and average.mirrored to false, or out_of_fold to true"
        )
    for cache in list_generations(params, artifacts, index):
        if cache.view == MIRROR:
            wanted = mirrored
        else:
            wanted = (cache.fold is not None) == folded and (cache.view is None or cache.view.number <= views)
        plain = cache.fold is None and cache.view is None
        if plain or (section is not None and wanted):
            yield cache


def _made_by(
    params: Params, index: pd.DataFrame, caches: list[GenerationSpec], section: SequenceParams | None
) -> dict[str, Any]:
    names = ("series_uid", "sop_uid", "file_digest")
    rows = digest_rows(zip(*(index[name].tolist() for name in names), strict=True))
    pca = params.extract.pca if section is not None and "pca" in section.all_inputs else None
    return {"rows": rows, "generations": [cache.identity() for cache in caches], "pca": pca}

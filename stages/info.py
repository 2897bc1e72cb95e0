"""``ichpipe info``: what is installed here and what this machine has, for a bug report.

It prints no path, no user name and no free text of the environment. It imports torch, which takes seconds, only where
a device file says that there may be an accelerator.
"""

from __future__ import annotations

import json
import locale
import os
import platform
import re
import shutil
import sys
import textwrap
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ichpipe.common.artifacts import CALIBRATION_FILE, MODEL_FILE, RECORD_FILE
from ichpipe.stages.options import FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from packaging.requirements import Requirement

    from ichpipe.stages.options import Settings

PACKAGE: Final = "ichpipe"
FORMAT_VERSION: Final = 1
WIDTH: Final = 80
# Variables that change what the program does, whose values are shown: numbers and a few words.
VARIABLES: Final = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ICHPIPE_GPU", "ICHPIPE_LOADERS", "ICHPIPE_WORKERS", "LOCAL_RANK",
    "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MKL_NUM_THREADS", "NO_COLOR",
    "OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "PYTHONIOENCODING",
    "PYTHONUTF8", "RANK", "TORCH_NUM_THREADS", "WORLD_SIZE",
)  # fmt: skip
# Others with these beginnings are listed as `set`: their text may be a path, a name or a secret.
PREFIXES: Final = ("ICHPIPE_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH_", "PYTORCH_", "NCCL_", "DASK_", "MALLOC_")
_NUMBERS: Final = re.compile(r"-?\d[\d,.:-]{0,40}")
_WORDS: Final = frozenset({
    "active", "auto", "close", "cores", "cpu", "false", "master", "no", "none", "off", "on", "passive", "sockets",
    "spread", "threads", "true", "utf-8", "utf8", "yes",
})  # fmt: skip
_PATH: Final = re.compile(r"(?<![\w.~-])(?:~|[A-Za-z]:\\|\.{0,2}[/\\])[^\s'\",;)]*")
_DEVICE_FILES: Final = ("nvidia[0-9]*", "kfd", "dxg", "dri/renderD*")  # of CUDA, ROCm, CUDA under WSL, and any GPU
_MEMORY: Final = ("MemTotal", "MemAvailable")
_INSTRUCTIONS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--model", type=FOLDER, help="Folder of the model to describe [ARTIFACTS/finetuned, if it is there].")
@click.pass_obj
def command(settings: Settings, /, model: Path | None, *, as_json: bool) -> str:
    """Say what is installed, what this machine has and what is missing; for a bug report.

    Versions, extras, decoders, devices, the model, and the variables that change behaviour. It holds no path, no user
    name and no secret. What can't be found out is said; the exit code is 0 all the same.

    \b
    Example:
      ichpipe info --model model
    """
    facts = collect_facts(model, settings.artifacts().finetuned)
    return json.dumps(facts, indent=2, allow_nan=False) if as_json else format_facts(facts)


def collect_facts(model: Path | None, default_model: Path) -> dict[str, Any]:
    """Return what ``info --json`` prints; a section that can't be found out is ``{"error": text}``.

    ``default_model`` is described if ``model`` is None and the folder holds a model.
    """
    folder = model or (default_model if (default_model / MODEL_FILE).exists() else None)
    facts: dict[str, Any] = {"format": "ichpipe-info", "format_version": FORMAT_VERSION}
    sections: dict[str, Callable[[], Any]] = {
        "program": _program,
        "packages": _packages,
        "extras": _extras,
        "codecs": _codecs,
        "devices": _devices,
        "model": lambda: None if folder is None else _model(folder),
        "locale": _locale,
        "environment": _environment,
    }
    for name, collect in sections.items():
        try:
            facts[name] = collect()
        except Exception as error:  # a broken package may raise anything
            facts[name] = {"error": _explain(error)}
    return facts


def _explain(error: Exception) -> str:
    """Return the kind of an error and its first line without paths."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = next(iter(text.strip().splitlines()), "")
    return f"{type(error).__name__}: {_hide_paths(first)[:200]}"


def _hide_paths(text: str) -> str:
    """Replace paths by an ellipsis; the home folder first, since its name may hold a blank."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home raises where there is none
    return _PATH.sub("…", text.replace(home, "…") if len(home) > 1 else text)


def _program() -> dict[str, Any]:
    version, editable = None, None
    with suppress(metadata.PackageNotFoundError):
        distribution = metadata.distribution(PACKAGE)
        version = distribution.version
        editable = '"editable": true' in (distribution.read_text("direct_url.json") or "")
    return {
        "ichpipe": version,
        "editable": editable,  # the code of a checkout, which may differ from the version's
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "virtual_environment": sys.prefix != sys.base_prefix,
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
    }


def _requirements(package: str, extra: str = "") -> Iterator[Requirement]:
    """Yield what ``package`` needs, or what its ``extra`` adds; extras of requirements are followed."""
    from packaging.requirements import Requirement

    for line in metadata.requires(package) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        by_extra = marker is not None and not always and marker.evaluate({"extra": extra})
        if not (by_extra if extra else always):
            continue
        if requirement.name != package:
            yield requirement
        for further in requirement.extras:
            with suppress(metadata.PackageNotFoundError):  # it is listed as missing already
                yield from _requirements(requirement.name, further)


def _state(requirement: Requirement) -> dict[str, Any]:
    """Return the installed version, the versions needed, a state, and the command that mends it.

    The state is ``ok``, ``missing``, ``broken`` (listed as installed, but its files are gone) or ``other version``.
    """
    name, needs = requirement.name, str(requirement.specifier)
    version, state = None, "broken"
    try:
        distribution = metadata.distribution(name)
        version = distribution.version
        if version and not _lacks_files(distribution):
            state = "ok" if requirement.specifier.contains(version, prereleases=True) else "other version"
    except metadata.PackageNotFoundError:
        state = "missing"
    except Exception:  # its metadata can't be read
        state = "broken"
    mend = f"pip install --force-reinstall --no-deps {name}" if state == "broken" else f"pip install '{name}{needs}'"
    return {"version": version, "needs": needs, "state": state, "mend": None if state == "ok" else mend}


def _lacks_files(distribution: metadata.Distribution) -> bool:
    """Say whether all modules are gone that a package's list of files names."""
    modules = re.findall(r"^\w+/__init__\.py(?=,)", distribution.read_text("RECORD") or "", re.MULTILINE)
    return bool(modules) and not any(Path(str(distribution.locate_file(module))).exists() for module in modules)


def _packages() -> dict[str, Any]:
    needed = {requirement.name: _state(requirement) for requirement in _requirements(PACKAGE)}
    return dict(sorted(needed.items(), key=lambda item: item[0].lower()))


def _extras() -> dict[str, Any]:
    extras = {}
    for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or []:
        packages = {requirement.name: _state(requirement) for requirement in _requirements(PACKAGE, extra)}
        lacking = sorted(name for name, state in packages.items() if state["state"] != "ok")
        remedy = f"pip install '{PACKAGE}[{extra}]'" if lacking else None
        extras[extra] = {"packages": packages, "lacking": lacking, "install": remedy}
    return extras


def _codecs() -> dict[str, Any]:
    """Return the decoders at hand for each transfer syntax that `ichpipe` reads; uncompressed ones need none."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    from ichpipe.dicom.dataset import READABLE, UNCOMPRESSED
    from ichpipe.dicom.decode import imagecodecs
    from ichpipe.dicom.stream_checks import JPEG_LOSSLESS, RUN_LENGTH

    by_imagecodecs = {RUN_LENGTH, "1.2.840.10008.1.2.4.90", *JPEG_LOSSLESS} if imagecodecs() else set()
    codecs = {}
    for syntax in sorted(READABLE):
        compressed = syntax not in UNCOMPRESSED
        decoders = ["imagecodecs"] if syntax in by_imagecodecs else []
        if compressed:
            with suppress(NotImplementedError):  # a pydicom that does not know this syntax yet
                decoders += get_decoder(UID(syntax)).available_plugins
        codecs[syntax] = {"name": UID(syntax).name, "compressed": compressed, "decoders": decoders}
    return codecs


def _devices() -> dict[str, Any]:
    """Return processor, memory and accelerators; torch is asked only where there may be an accelerator."""
    processor, instructions = _processor()
    total, available = _memory()
    shared = Path("/dev/shm")  # noqa: S108 - only measured
    usage = shutil.disk_usage(shared) if shared.is_dir() else None
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "instructions": instructions,
        "cores": os.cpu_count(),
        "cores_allowed": allowed,
        "cores_limit": _limit("cpu.max"),  # of a container or batch job; None: none
        "memory_bytes": total,
        "memory_available_bytes": available,
        "memory_limit_bytes": _limit("memory.max"),
        "shared_memory_bytes": usage and usage.total,
        "shared_memory_free_bytes": usage and usage.free,
        **_accelerators(),
    }


def _processor() -> tuple[str | None, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None, []
    fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    flags = fields.get("flags", "").split()
    return fields.get("model name"), [name for name in _INSTRUCTIONS if name in flags]


def _memory() -> tuple[int | None, int | None]:
    """Return the bytes of memory, and of what programs can still get; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        total, available = (int(re.findall(rf"^{name}: +(\d+) kB", text, re.MULTILINE)[0]) for name in _MEMORY)
        return total * 1024, available * 1024
    except (OSError, ValueError, IndexError):
        names = getattr(os, "sysconf_names", {})  # macOS has it, Windows has not
        known = "SC_PAGE_SIZE" in names and "SC_PHYS_PAGES" in names
        return (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else None), None


def _limit(name: str) -> float | int | None:
    """Return what the control group (version 2) allows: cores of ``cpu.max``, bytes of ``memory.max``; None: all."""
    try:
        words = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").split()
        return None if words[0] == "max" else int(words[0]) / int(words[1]) if len(words) > 1 else int(words[0])
    except (OSError, ValueError, IndexError):
        return None


def _accelerators() -> dict[str, Any]:
    """Return accelerators as torch sees them, and the precision that ``auto`` takes."""
    devices = Path("/dev")
    may_have = sys.platform != "linux" or any(any(devices.glob(pattern)) for pattern in _DEVICE_FILES)
    if not may_have:
        return {"accelerators": [], "accelerators_by": "no device file", "precision_auto": "fp32"}
    try:
        torch = import_module("torch")
        from ichpipe.common.device import autocast, choose_devices

        device = choose_devices("auto")[0]
        count = 0 if device.type == "cpu" else getattr(torch, device.type).device_count()
        names = [_name_of(getattr(torch, device.type), number) for number in range(count)]
        # The context of mixed precision holds its type; fp32 has a context without one.
        kind = str(getattr(autocast(device, "auto"), "fast_dtype", "torch.float32")).removeprefix("torch.")
    except Exception as error:
        return {"accelerators": [], "accelerators_by": f"torch failed: {_explain(error)}", "precision_auto": None}
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    found = [{"type": device.type, "number": number, "name": name} for number, name in enumerate(names)]
    return {"accelerators": found, "accelerators_by": "torch", "precision_auto": short.get(kind, kind)}


def _name_of(backend: Any, number: int) -> str:
    """Return the name of an accelerator, as the module of its kind in torch gives it; that of MPS gives none."""
    return str(backend.get_device_name(number)) if hasattr(backend, "get_device_name") else platform.processor()


def _model(folder: Path) -> dict[str, Any]:
    """Return what a model folder says of itself, without anything that could name a patient or a person."""
    from ichpipe.common.errors import IchpipeError
    from ichpipe.common.files import digest_of_file
    from ichpipe.models.header import read_header

    path = folder / MODEL_FILE
    try:
        header = read_header(folder)
    except IchpipeError as error:
        # In brackets stands what the file holds, which may be anything.
        return {"error": _hide_paths(str(error).replace(str(path), MODEL_FILE).partition(" (")[0])}
    digest = digest_of_file(path)
    card, record = _read(folder / "config.json"), _read(folder / RECORD_FILE)
    if card.get("model_sha256", digest) != digest:
        card = {"error": "config.json describes another model file; export the model again"}
    cnn, sequence = header.slice_cnn, header.sequence
    return {
        "kind": header.kind,
        "format_version": header.format_version,
        "networks": len(header.networks) or 1,
        "model_sha256": digest,
        "bytes": path.stat().st_size,
        "slice_cnn": cnn and {
            "backbone": _hide_paths(cnn.backbone),
            "classes": list(cnn.classes),
            "size_px": cnn.size_px,
            "mm_per_px": cnn.mm_per_px,
            "neighbours": cnn.neighbours,
            "windows": [window.model_dump() for window in cnn.windows],
        },
        "sequence": sequence and {
            "cell": sequence.cell,
            "layers": sequence.layers,
            "hidden": sequence.hidden,
            "bidirectional": sequence.bidirectional,
            "inputs": list(sequence.inputs),
        },
        "training_data": _counts(card.get("training_data")),
        "scores": _scores(card.get("metrics"), record),
        "calibration": _word(_read(folder / CALIBRATION_FILE).get("method"), ("none", "temperature", "isotonic")),
        "card_error": card.get("error"),
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object beside the model; a damaged one is ``{"error": text}``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return {"error": f"{path.name} can't be read; export the model again"}
    return value if isinstance(value, dict) else {"error": f"{path.name} holds no object; export the model again"}


def _counts(data: Any) -> dict[str, Any] | None:
    """Return the numbers of patients, studies and slices by split; only numbers and known words are passed on."""
    if not isinstance(data, dict):
        return None
    splits = {name: data[name] for name in ("train", "val", "test") if isinstance(data.get(name), dict)}
    counts = {
        name: {key: _number(split.get(key)) for key in ("patients", "studies", "slices")}
        for name, split in splits.items()
    }
    return {"dataset": _word(data.get("dataset"), ("rsna", "cq500", "folder")), **counts}


def _scores(metrics: Any, record: dict[str, Any]) -> dict[str, Any]:
    """Return the log loss on validation and test, and the AUC of any haemorrhage; None where it is not known."""

    def look_up(*keys: str) -> float | None:
        value = metrics
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return _number(value)

    return {
        "validation_log_loss": look_up("validation", "weighted_log_loss") or _number(record.get("val_loss")),
        "test_log_loss": look_up("test", "weighted_log_loss"),
        "test_auc_any_slice": look_up("test", "auc", "any", "value"),
        "test_auc_any_study": look_up("test", "study_auc", "any", "value"),
    }


def _number(value: Any) -> float | int | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12
    return value if usable else None


def _word(value: Any, words: tuple[str, ...]) -> str | None:
    return value if value in words else None


def _locale() -> dict[str, Any]:
    return {
        "encoding": locale.getencoding(),
        "stdout_encoding": getattr(sys.stdout, "encoding", None),
        "filesystem_encoding": sys.getfilesystemencoding(),
        "language": locale.setlocale(locale.LC_CTYPE),
        "utf8_mode": bool(sys.flags.utf8_mode),
    }


def _environment() -> dict[str, str]:
    """Return the variables that change behaviour; ``set`` stands for a value that is not shown."""
    names = sorted(name for name in os.environ if name in VARIABLES or name.startswith(PREFIXES))
    return {name: _shown(name, os.environ[name]) for name in names}


def _shown(name: str, value: str) -> str:
    harmless = value.lower() in _WORDS or _NUMBERS.fullmatch(value)
    return value if name in VARIABLES and harmless else "set"


def format_facts(facts: dict[str, Any]) -> str:
    """Return what `collect_facts` found as lines of 80 columns."""
    formats: dict[str, Callable[[Any], list[str]]] = {
        "program": _format_program,
        "devices": _format_devices,
        "packages": _format_packages,
        "extras": _format_extras,
        "codecs": _format_codecs,
        "model": _format_model,
        "locale": lambda values: ["locale: {language}, {encoding}, output {stdout_encoding}".format_map(values)],
        "environment": lambda values: [f"variables: {' '.join(map('='.join, values.items())) or 'none'}"],
    }
    lines = []
    for name, as_lines in formats.items():
        value = facts[name]
        lines += [f"{name}: not known ({value['error']})"] if value and "error" in value else as_lines(value)
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    # A command stays on one line, so that it can be copied.
    return "\n".join(part for line in lines for part in ([line] if "pip install" in line else wrap.wrap(line)))


def _format_program(program: dict[str, Any]) -> list[str]:
    marks = [program["implementation"]] + ["virtual environment"] * program["virtual_environment"]
    checkout = " (editable: the code of a checkout)" if program["editable"] else ""
    return [
        f"ichpipe {program['ichpipe'] or 'is not installed'}{checkout}",
        f"Python {program['python']} ({', '.join(marks)})",
        " ".join(filter(None, (program[name] for name in ("system", "release", "machine", "libc")))),
    ]


def _format_devices(devices: dict[str, Any]) -> list[str]:
    limit, memory_limit = devices["cores_limit"], devices["memory_limit_bytes"]
    cores = f"{devices['cores_allowed']} of {devices['cores']} cores" + (f", limited to {limit:g}" if limit else "")
    parts = [
        f"processor: {devices['processor'] or 'not known'}",
        cores,
        *devices["instructions"],
    ]
    memory = f"memory: {_size(devices['memory_bytes'])}, {_size(devices['memory_available_bytes'])} available"
    memory += f", limited to {_size(memory_limit)}" if memory_limit else ""
    names = [f"{part['type']} {part['number']}: {part['name']}" for part in devices["accelerators"]]
    return [
        ", ".join(parts),
        f"{memory}; shared memory (/dev/shm): {_size(devices['shared_memory_bytes'])}",
        f"accelerators: {', '.join(names) or 'none'} ({devices['accelerators_by']}); "
        f"precision auto: {devices['precision_auto'] or 'not known'}",
    ]


def _size(number: int | None) -> str:
    return "not known" if number is None else f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _format_packages(packages: dict[str, Any]) -> list[str]:
    present = [f"{name} {package['version']}" for name, package in packages.items() if package["version"]]
    return [f"packages: {', '.join(present)}", *_format_faults(packages)]


def _format_faults(packages: dict[str, Any]) -> list[str]:
    """Return a line with the remedy for each package that is not as it should be."""
    text = {"missing": "is missing", "broken": "is broken: its files are gone", "other version": "has another version"}
    return [
        line
        for name, package in packages.items()
        if package["state"] != "ok"
        for line in (f"  {name}{package['needs']} {text[package['state']]}; run:", f"    {package['mend']}")
    ]


def _format_extras(extras: dict[str, Any]) -> list[str]:
    complete = [name for name, extra in extras.items() if not extra["lacking"]]
    lines = [f"extras: {', '.join(complete) or 'none'}"]
    for name, extra in extras.items():
        if extra["lacking"]:
            lines += [f"  {name} lacks {', '.join(extra['lacking'])}; run:", f"    {extra['install']}"]
            broken = {key: package for key, package in extra["packages"].items() if package["state"] == "broken"}
            lines += _format_faults(broken)
    return lines


def _format_codecs(codecs: dict[str, Any]) -> list[str]:
    lines = ["decoders of compressed pixels:"]
    for syntax, codec in codecs.items():
        if codec["compressed"]:
            decoders = ", ".join(codec["decoders"]) or f"none; run: pip install '{PACKAGE}[dicom-codecs]'"
            lines.append(f"  {syntax:<24} {decoders}")
    return lines


def _format_model(model: dict[str, Any] | None) -> list[str]:
    if model is None:
        return ["model: none described; name its folder with --model"]
    count = f" of {model['networks']} networks" if model["networks"] > 1 else ""
    lines = [f"model: {model['kind']}{count}, {_size(model['bytes'])}, SHA-256 {model['model_sha256']}"]
    if cnn := model["slice_cnn"]:
        windows = ", ".join(f"{window['level_hu']:g}/{window['width_hu']:g}" for window in cnn["windows"])
        lines.append(f"  slice CNN: {cnn['backbone']}, {cnn['size_px']} px, windows (level/width, HU) {windows}")
        lines.append(f"  classes: {', '.join(cnn['classes'])}")
    if sequence := model["sequence"]:
        lines.append("  sequence model: {cell}, {layers} x {hidden}".format_map(sequence))
    for split, counts in (model["training_data"] or {}).items():
        if isinstance(counts, dict):
            lines.append(f"  {split}: " + ", ".join(f"{value} {key}" for key, value in counts.items()))
    titles = {key: key.replace("_", " ").replace("auc", "AUC") for key in model["scores"]}
    scores = [f"{titles[key]} {value:.4f}" for key, value in model["scores"].items() if value is not None]
    lines.append(f"  scores: {', '.join(scores) or 'not known'}; calibration: {model['calibration'] or 'none'}")
    return lines + ([f"  {model['card_error']}"] if model["card_error"] else [])

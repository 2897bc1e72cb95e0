"""Writes the end-to-end network as one ONNX file and checks that it computes the same."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ichpipe.common.errors import IchpipeError
from ichpipe.common.files import atomic_path
from ichpipe.models.sequence import mean_logits

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.models.end_to_end import EndToEnd

OPSET = 17
TOLERANCE = 1e-4
LENGTHS = (2, 13, 40)  # slices of the series on which the file is compared with the network
TENSORS = {
    "hu": "float32 (slices, 1 + 2 neighbours, size, size): Hounsfield units of one series, ascending along the slice "
    "normal; each slice stands between its neighbours, or itself in place of one that there is not; "
    "framed as `slice_cnn` in the description says (docs/data.md, Framing)",
    "position_mm": "float32 (slices): positions along the slice normal, mm",
    "probabilities": "float32 (slices, 6): probabilities",
}


class Exported(nn.Module):
    """HU (T, 1, S, S) and positions (T,) in mm to probabilities (T, 6), windows and mirrored images within."""

    def __init__(self, model: EndToEnd) -> None:
        super().__init__()
        self.model = model

    def forward(self, hu: Tensor, position_mm: Tensor) -> Tensor:
        """See the class. Positions always take part, so that the file has the same two inputs for every network."""
        looks = [hu, hu.flip(-1)] if self.model.sequence.spec.mirrored else [hu]
        logits = [self.model(look, position_mm) for look in looks]
        joined = mean_logits(torch.stack(logits)) if len(logits) > 1 else logits[0]
        return torch.sigmoid(joined) + 0 * position_mm[:, None]


def write_onnx(model: EndToEnd, target: Path, description: dict[str, Any]) -> float:
    """Write ``target`` and return its largest difference from the network, in probability.

    A difference above 1e-4 is an error, and nothing is written. So is a Transformer: PyTorch's exporters fix its number
    of slices. Needs the packages of the extra ``export``.
    """
    if model.sequence.spec.cell == "transformer":
        raise IchpipeError(
            "--onnx: a Transformer arm can't be written as ONNX for series of any length; "
            "fine-tune another arm (finetune.arm), or hand on the safetensors file alone"
        )
    try:
        import onnx  # noqa: PLC0415 - an extra
        import onnxruntime  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise IchpipeError(f"--onnx needs the package {error.name}; run: pip install 'ichpipe[export]'") from error
    exported = Exported(model).eval()
    axes = {name: {0: "slices"} for name in TENSORS}
    with atomic_path(target) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the exporter is the older one, and that Python values are constants
            # PyTorch's newer exporter unrolls recurrent layers for one length (torch 2.14: other lengths are refused).
            torch.onnx.export(
                exported, _example(exported, 7), str(temporary), dynamo=False, opset_version=OPSET, dynamic_axes=axes,
                input_names=["hu", "position_mm"], output_names=["probabilities"],
            )  # fmt: skip
        graph = onnx.load(temporary)
        for key, value in {"ichpipe": json.dumps(description, sort_keys=True), **TENSORS}.items():
            graph.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(graph)
        onnx.save(graph, temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        differences = []
        for hu, position_mm in (_example(exported, slices) for slices in LENGTHS):
            probabilities = session.run(None, {"hu": hu.numpy(), "position_mm": position_mm.numpy()})[0]
            with torch.inference_mode():
                differences.append(np.abs(probabilities - exported(hu, position_mm).numpy()).max())
        worst = float(np.max(differences))
        if not worst <= TOLERANCE:
            raise IchpipeError(
                f"the ONNX file differs from the network by {worst:.1e} in probability (allowed: {TOLERANCE:.0e}); "
                "it was not written. This backbone or torch version does not export well: take another"
            )
    return worst


def _example(exported: Exported, slices: int) -> tuple[Tensor, Tensor]:
    """Return an artificial series: air, tissue and bone in random blocks, at uneven distances."""
    draw, cnn = np.random.default_rng(slices), exported.model.cnn.spec
    size = cnn.size_px
    coarse = torch.from_numpy(draw.choice([-1000.0, 20.0, 35.0, 70.0, 900.0], size=(slices, cnn.slices, 8, 8))).float()
    noise = torch.from_numpy(draw.standard_normal((slices, cnn.slices, size, size), dtype=np.float32))
    hu = nn.functional.interpolate(coarse, size=(size, size)) + 5 * noise
    return hu, torch.from_numpy(np.cumsum(draw.uniform(2, 7, slices)).astype(np.float32))

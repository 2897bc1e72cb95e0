"""The networks: shapes and counts of the paper, padding that changes nothing, chunked gradient equal to full."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import pytest
import torch

from ichpipe.common.errors import ParamsError
from ichpipe.models.end_to_end import EndToEnd, backward_in_chunks
from ichpipe.models.header import SequenceSpec
from ichpipe.models.sequence import SequenceModel
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import load_slice_cnn, save_model
from ichpipe.params.schema import PAPER_WINDOWS
from ichpipe.training.trainer import weighted_bce

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 32
POSITION_MM = torch.arange(8) * 5.0


def small_cnn(dropout: float = 0.0, backbone: str = "resnet10t") -> SliceCnn:
    torch.manual_seed(0)
    return SliceCnn(spec_for(backbone, PAPER_WINDOWS, SIZE, dropout))


def sequence(
    cell: str = "lstm", inputs: tuple[str, ...] = ("embedding",), dim: int = 8, **changes: object
) -> SequenceModel:
    settings = {"cell": cell, "hidden": 6, "layers": 2, "bidirectional": True, "dropout": 0.0, "heads": 2} | changes
    torch.manual_seed(1)
    return SequenceModel(SequenceSpec(inputs=inputs, embedding_dim=dim, **settings)).eval()


def test_the_paper_has_40_3_million_parameters() -> None:
    cnn = SliceCnn(spec_for("resnet50", PAPER_WINDOWS, 512, 0.0))
    spec = SequenceSpec(
        cell="lstm", hidden=512, layers=2, bidirectional=True, dropout=0.0, inputs=("embedding",), embedding_dim=2048
    )
    recurrent = SequenceModel(spec)
    total = sum(p.numel() for p in cnn.backbone.parameters()) + sum(p.numel() for p in recurrent.parameters())
    assert cnn.embedding_dim == 2048
    assert round(total / 1e6, 1) == 40.3
    assert torch.equal(recurrent.head.bias, torch.zeros(6))


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto"])
def test_the_embedding_is_what_the_classifier_sees(backbone: str) -> None:
    cnn = small_cnn(backbone=backbone).eval()
    hu = torch.randint(-1000, 1500, (2, 1, SIZE, SIZE), dtype=torch.int16)
    with torch.no_grad():
        embedding, logits = cnn(hu)
        again = cnn.classify(embedding)
    assert embedding.shape == (2, cnn.embedding_dim)
    assert torch.equal(logits, again)


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_pooling_by_mean_and_maximum_gives_what_the_classifier_sees(backbone: str) -> None:
    cnn = SliceCnn(spec_for(backbone, PAPER_WINDOWS, SIZE, 0.0, "catavgmax")).eval()
    hu = torch.randint(-1000, 1500, (2, 1, SIZE, SIZE), dtype=torch.int16)
    with torch.no_grad():
        embedding, logits = cnn(hu)
    assert embedding.shape == (2, cnn.embedding_dim)
    assert logits.shape == (2, 6)
    if backbone == "resnet10t":  # nothing follows the pooling: the first half is what it is without a maximum
        plain = small_cnn(backbone=backbone).eval()
        plain.backbone.load_state_dict(cnn.backbone.state_dict())
        with torch.no_grad():
            assert torch.equal(embedding[:, : plain.embedding_dim], plain.embed(hu))


def test_pooling_survives_saving(tmp_path: Path) -> None:
    cnn = SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, SIZE, 0.0, "catavgmax")).eval()
    save_model(tmp_path, cnn, {})
    hu = torch.randint(-1000, 1500, (2, 1, SIZE, SIZE), dtype=torch.int16)
    with torch.no_grad():
        assert torch.equal(load_slice_cnn(tmp_path).eval().embed(hu), cnn.embed(hu))


def test_a_backbone_without_the_pooling_asked_for_is_named() -> None:
    with pytest.raises(ParamsError, match=r"fit-slices\.pooling.*vit_tiny"):
        SliceCnn(spec_for("vit_tiny_patch16_224", PAPER_WINDOWS, 224, 0.0, "catavgmax"))


def test_a_backbone_that_timm_does_not_know_is_named() -> None:
    with pytest.raises(ParamsError, match=r"fit-slices\.backbone.*resnet51"):
        spec_for("resnet51", PAPER_WINDOWS, SIZE, 0.0)


def test_another_image_size_than_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model wants \(1, 32, 32\)"):
        small_cnn()(torch.zeros(1, 1, 16, 16, dtype=torch.int16))


@pytest.mark.parametrize(
    ("cell", "inputs"),
    [
        ("lstm", ("embedding",)),
        ("lstm", ("logits",)),
        ("lstm", ("embedding", "logits")),
        ("gru", ("embedding", "deltas")),
        ("transformer", ("embedding", "spacing", "position")),
        ("conv", ("embedding", "logits")),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_chunked_gradient_equals_plain_backpropagation(cell: str, inputs: tuple[str, ...], dropout: float) -> None:
    cnn = small_cnn(dropout)
    model = EndToEnd(cnn, sequence(cell, inputs, cnn.embedding_dim, dropout=dropout)).train()
    hu = torch.randint(-100, 200, (7, 1, SIZE, SIZE), dtype=torch.int16)
    labels = (torch.rand(7, 6) < 0.4).float()
    loss_of = functools.partial(weighted_bce, labels=labels)
    chunks = [functools.partial(hu.__getitem__, slice(start, start + 3)) for start in (0, 3, 6)]

    settings = {"context": contextlib.nullcontext, "seed": 3}
    loss = backward_in_chunks(model, chunks, POSITION_MM[:7], loss_of, **settings)
    chunked = gradients(model)
    in_one_chunk = backward_in_chunks(model, [lambda: hu], POSITION_MM[:7], loss_of, **settings)
    if dropout == 0.0:  # other chunks draw other dropout masks
        model.zero_grad()
        plain = weighted_bce(model(hu, POSITION_MM[:7]), labels)
        plain.backward()
        assert loss == pytest.approx(float(plain.detach()), rel=1e-6)
        assert in_one_chunk == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients(model).items():
            scale = gradient.abs().max().item() + 1e-12
            assert (chunked[name] - gradient).abs().max().item() / scale < 1e-4, name
    assert any(value.abs().sum() > 0 for name, value in chunked.items() if name.startswith("cnn"))


def test_dropout_draws_the_same_in_both_passes_of_a_chunk() -> None:
    """With one chunk the two-pass gradient must equal backpropagation through the same dropout masks."""
    cnn = small_cnn(dropout=0.5)
    model = EndToEnd(cnn, sequence(inputs=("logits",), dim=cnn.embedding_dim)).train()
    hu = torch.randint(-100, 200, (4, 1, SIZE, SIZE), dtype=torch.int16)
    labels = torch.ones(4, 6)
    loss_of = functools.partial(weighted_bce, labels=labels)

    def backward(seed: int) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        settings = {"context": contextlib.nullcontext, "seed": seed}
        return backward_in_chunks(model, [lambda: hu], POSITION_MM[:4], loss_of, **settings), gradients(model)

    (first, gradient), (second, again), (other, _) = backward(5), backward(5), backward(6)
    assert first == second
    for name, value in again.items():
        assert torch.equal(value, gradient[name]), name
    assert other != first


def test_batch_norm_keeps_its_statistics_end_to_end() -> None:
    cnn = small_cnn()
    model = EndToEnd(cnn, sequence(dim=cnn.embedding_dim)).train()
    before = {name: value.clone() for name, value in cnn.named_buffers()}
    model(torch.randint(-100, 200, (4, 1, SIZE, SIZE), dtype=torch.int16), POSITION_MM[:4])
    for name, value in cnn.named_buffers():
        assert torch.equal(value, before[name]), name


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

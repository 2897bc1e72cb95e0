"""Embedding slices side by side: the same bytes whatever the lanes, loaders and neighbours."""

import functools
import threading

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from pydicom.uid import RLELossless

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom.dataset import is_compressed
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.slice_header import read_header
from ichpipe.features import embedder, prefetch
from ichpipe.features.embedder import SliceEmbedder, SliceInput, lane_batch
from ichpipe.features.generations import GenerationSpec
from ichpipe.features.prefetch import Loader, usual_loaders
from ichpipe.images.slice_dataset import load_slices
from ichpipe.models.header import Framing
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import save_model
from ichpipe.params.schema import PAPER_WINDOWS, PhantomParams
from ichpipe.stages import phantom

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, 32, 0.0))


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    phantom.run(PhantomParams(studies=4, size_px=48, seed=3), folder)
    headers = [read_header(path) for path in sorted((folder / "dicom").rglob("*.dcm"))[:70]]
    return [SliceInput(header.path, header.series_uid, header.file_digest) for header in headers]


def embed(cnn, slices, loaders=1, **options):
    embedder = SliceEmbedder(cnn, CPU, 64, loaders=loaders, **options)
    try:
        return embedder(slices)
    finally:
        embedder.close()


def same(found, wanted):
    return all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_lanes_change_no_bit(cnn, slices, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wanted = embed(cnn, slices)
        assert same(embed(cnn, slices, 3), wanted)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_its_neighbours(cnn, slices):
    """A slice that came later is computed alone and has the bytes of a run over all."""
    embedding, logits = embed(cnn, slices)
    for row in (0, 5, 69):
        assert same(embed(cnn, slices[row : row + 1]), (embedding[row : row + 1], logits[row : row + 1]))


def test_callers_take_turns_and_each_gets_its_own(cnn, slices):
    from concurrent.futures import ThreadPoolExecutor

    wanted = [embed(cnn, slices[start : start + 20]) for start in (0, 20, 40)]
    embedder = SliceEmbedder(cnn, CPU, 64, loaders=2)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda start: embedder(slices[start : start + 20]), (0, 20, 40)))
    embedder.close()
    assert all(same(*pair) for pair in zip(found, wanted, strict=True))


def test_an_unreadable_file_is_named(cnn, slices, tmp_path):
    bad = tmp_path / "bad.dcm"
    bad.write_bytes(b"nothing")
    with pytest.raises(UnreadableDicomError, match=r"bad\.dcm"):
        embed(cnn, [*slices[:40], SliceInput(str(bad), "1", "x"), *slices[40:]], 2)


def test_small_images_come_in_larger_batches():
    assert [lane_batch(size, 64) for size in (512, 256, 224, 128, 32)] == [16, 16, 20, 64, 64]
    assert lane_batch(512, 4) == 4


@pytest.mark.parametrize(("compressed", "lanes", "most"), [(False, 2, 1), (False, 5, 2), (True, 3, 3)])
def test_half_of_the_lanes_read_at_a_time_unless_a_codec_does(cnn, slices, monkeypatch, compressed, lanes, most):
    """With a codec all of them wait for each other here, so that fewer would never come through."""
    together = threading.Barrier(lanes, timeout=30)
    reading, seen = [], []

    def noted(paths, framing):
        reading.append(1)
        seen.append(len(reading))
        if compressed:
            together.wait()
        found = load_slices(paths, framing)
        reading.pop()
        return found

    monkeypatch.setattr(embedder, "load_slices", noted)
    monkeypatch.setattr(embedder, "is_compressed", lambda _path: compressed)
    slice_embedder = SliceEmbedder(cnn, CPU, 4, loaders=lanes)
    slice_embedder(slices[: 8 * lanes])
    slice_embedder.close()
    assert max(seen) <= most
    assert not compressed or max(seen) == most


def test_compression_is_told_by_the_file(tmp_path, slices):
    assert not is_compressed(slices[0].path)
    with quiet_pydicom():
        packed = pydicom.dcmread(slices[0].path)
        packed.compress(RLELossless)
        packed.save_as(tmp_path / "rle.dcm")
    assert is_compressed(tmp_path / "rle.dcm")
    (tmp_path / "bad.dcm").write_bytes(b"nothing")
    assert not is_compressed(tmp_path / "bad.dcm")


def test_rows_are_those_of_the_network_as_it_is(cnn, slices):
    """Batch normalisation is folded for speed alone; float16 rounds a thousand times coarser."""
    embedder = SliceEmbedder(cnn, CPU, 64)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in embedder.cnn.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in cnn.modules())
    with torch.inference_mode():
        wanted = [part.numpy() for part in cnn.eval()(load_slices([one.path for one in slices[:9]], Framing(32)))]
    for found, of_network in zip(embed(cnn, slices[:9]), wanted, strict=True):
        np.testing.assert_allclose(found, of_network, rtol=0, atol=2**-17 * np.abs(of_network).max())


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.slow
def test_a_loader_gives_all_slices_in_order_again_and_again(slices, count, monkeypatch):
    monkeypatch.setattr(prefetch, "PIECE_SLICES", 4)
    paths = [one.path for one in slices[:30]]
    loader = Loader(Framing(32), count)
    for some in (paths, paths[:7], paths[3:]):  # processes stay from one chunk to the next
        batches = list(loader.batches(some, 9, CPU))
        assert [len(batch) for batch in batches] == [9] * (len(some) // 9) + [len(some) % 9] * (len(some) % 9 > 0)
        assert torch.equal(torch.cat(batches), load_slices(some, Framing(32)))


def test_a_loader_names_an_unreadable_file_without_a_traceback(slices, tmp_path):
    bad = tmp_path / "bad.dcm"
    bad.write_bytes(b"nothing")
    loader = Loader(Framing(32), 1)
    with pytest.raises(UnreadableDicomError, match=r"bad\.dcm") as caught:
        list(loader.batches([slices[0].path, str(bad)], 9, CPU))
    assert "Traceback" not in str(caught.value)
    assert len(list(loader.batches([slices[0].path], 9, CPU))) == 1


@pytest.mark.slow
def test_bf16_is_another_generation_and_auto_is_the_one_of_before(cnn, slices, tmp_path):
    save_model(tmp_path, cnn, {})
    plain, half = (GenerationSpec(tmp_path, pd.DataFrame(), precision=one) for one in ("auto", "bf16"))
    assert "precision" not in plain.identity()
    assert half.identity() == plain.identity() | {"precision": "bf16"}
    exact, _ = embed(cnn, slices)
    rough, _ = embed(cnn, slices, 2, precision="bf16")
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max())
    assert same(embed(cnn, slices, 2, precision="bf16"), embed(cnn, slices, 1, precision="bf16"))


def test_cores_are_shared(monkeypatch):
    monkeypatch.setattr(prefetch, "usable_cores", lambda: 40)
    assert [usual_loaders("cpu", workers) for workers in (1, 4, 100)] == [40, 10, 1]
    assert [usual_loaders("cuda:0", workers) for workers in (1, 2, 4)] == [16, 16, 10]


@pytest.mark.gpu
@pytest.mark.parametrize("loaders", [0, 2])
def test_a_gpu_gives_what_a_cpu_gives(cnn, slices, loaders):
    wanted, _ = embed(cnn, slices, precision="fp32")
    embedder = SliceEmbedder(cnn, torch.device("cuda", 0), 64, loaders=loaders, precision="fp32")
    found = embedder(slices)
    assert same(embedder(slices), found)
    embedder.close()
    np.testing.assert_allclose(found[0], wanted, atol=1e-3 * np.abs(wanted).max())
    cnn.cpu()


@pytest.mark.gpu
def test_a_row_on_a_gpu_does_not_depend_on_its_neighbours(cnn, slices):
    embed_all = functools.partial(SliceEmbedder, cnn, torch.device("cuda", 0), 64)
    embedding, logits = embed_all()(slices)
    assert same(embed_all()(slices[69:70]), (embedding[69:70], logits[69:70]))
    cnn.cpu()

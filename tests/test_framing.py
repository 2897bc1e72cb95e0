"""The head at one scale: whatever the pixels of the file are, the same square for the network, at every step."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.common.errors import DataError, ParamsError, UnreadableDicomError
from ichpipe.features.embedder import SliceEmbedder, SliceInput, classify_series
from ichpipe.features.generations import GenerationSpec
from ichpipe.images import framing as images
from ichpipe.images.framing import fit_to_size
from ichpipe.images.pixel_cache import fill_pixel_cache
from ichpipe.images.slice_dataset import load_slice, load_slices
from ichpipe.models.end_to_end import EndToEnd
from ichpipe.models.header import Framing, SequenceSpec, SliceCnnSpec, read_header
from ichpipe.models.sequence import build_sequence
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import load_slice_cnn, save_model
from ichpipe.params.schema import PAPER_WINDOWS, load_params

CPU, HEAD = torch.device("cpu"), Framing(96, 2.2)
LONG_MM, WIDE_MM = 180, 140  # of the drawn head, front to back and side to side


def frame(hu, spacing_mm, framing):
    return images.frame([(hu, spacing_mm)], framing)


def drawn(shape, spacing_mm, at_mm=(0.0, 0.0), air=-1000):
    """A head: an elliptical skull around brain, with an air-filled sinus, above the thin shell of a headrest."""
    down, right = (
        (np.arange(length) + 0.5 - length / 2) * mm - at
        for length, mm, at in zip(shape, spacing_mm, at_mm, strict=True)
    )
    down, right = down[:, None], right[None, :]
    radius = np.hypot(down / (LONG_MM / 2), right / (WIDE_MM / 2))
    hu = np.where(radius < 1, 900, air)
    hu = np.where(radius < 0.9, 30 + 15 * (right > 0), hu)  # one half brighter: a mirror image would be noticed
    hu = np.where(np.hypot(down + 45, right - 28) < 12, air, hu)
    hu = np.where((abs(np.hypot(down, right) - 115) < 1) & (down > 40), 400, hu)
    return hu.astype(np.int16)


def width_mm(square, axis, mm_per_px):
    """Length of the skull's extent through the middle, from the area under it: it resolves parts of a pixel."""
    reach = round(105 / mm_per_px)  # the headrest lies further out
    middle = square.shape[0] // 2
    line = np.take(square, middle, axis=1 - axis)[max(0, middle - reach) : middle + reach].astype(float)
    return ((np.clip(line, -1000, 30) + 1000) / 1030).sum() * mm_per_px


@settings(deadline=None, max_examples=25)
@given(
    down_mm=st.floats(0.4, 1.0),
    across_mm=st.floats(0.4, 1.0),
    at_mm=st.tuples(st.floats(-15, 15), st.floats(-15, 15)),
    margin_mm=st.floats(0, 60),
)
def test_the_square_does_not_depend_on_the_pixels_of_the_file(down_mm, across_mm, at_mm, margin_mm):
    spacing_mm = (down_mm, across_mm)
    shape = tuple(round((250 + margin_mm) / mm) for mm in spacing_mm)
    square = frame(drawn(shape, spacing_mm, at_mm), spacing_mm, HEAD)[0].numpy()
    wanted = frame(drawn((500, 500), (0.5, 0.5)), (0.5, 0.5), HEAD)[0].numpy()
    assert square.shape == (96, 96)
    brain = np.hypot(*np.mgrid[-47.5:48, -47.5:48]) * 2.2 < 40
    assert abs(square[brain].astype(int) - wanted[brain]).mean() < 1.5
    for axis, length_mm in ((0, LONG_MM), (1, WIDE_MM)):
        assert width_mm(square, axis, 2.2) == pytest.approx(length_mm, abs=4)


def test_pixels_that_are_not_square_keep_the_widths_in_mm():
    for spacing_mm in ((0.5, 0.5), (0.5, 1.0), (1.0, 0.5)):
        shape = tuple(round(250 / mm) for mm in spacing_mm)
        square = frame(drawn(shape, spacing_mm), spacing_mm, Framing(256, 1.0))[0].numpy()
        assert width_mm(square, 0, 1.0) == pytest.approx(LONG_MM, abs=2.5)
        assert width_mm(square, 1, 1.0) == pytest.approx(WIDE_MM, abs=2.5)


@pytest.mark.parametrize("low", [0, 10, -5])
def test_an_image_clipped_to_a_window_is_framed_alike_and_has_no_border(low):
    spacing_mm, at_mm = (0.5, 0.5), (20.0, -12.0)
    whole = frame(drawn((500, 500), spacing_mm, at_mm), spacing_mm, HEAD)[0].numpy()
    clipped = drawn((500, 500), spacing_mm, at_mm).clip(low, low + 80)
    square = frame(clipped, spacing_mm, HEAD)[0].numpy()
    assert np.abs(square[20:76, 20:76].astype(int) - whole[20:76, 20:76].clip(low, low + 80)).mean() < 3
    narrow = frame(np.ascontiguousarray(clipped[:, 150:350]), spacing_mm, HEAD)[0].numpy()
    assert narrow.min() == low  # what the file does not show is the file's own lowest HU, not -1024
    assert (narrow[:, :20] == low).all()


def test_the_largest_part_is_the_head_and_without_a_head_the_middle_stays():
    spacing_mm = (0.5, 0.5)
    beside = drawn((500, 500), spacing_mm)
    beside[440:480, 20:60] = 300  # a bottle
    alone = drawn((500, 500), spacing_mm)
    middles = [frame(hu, spacing_mm, HEAD)[0, 20:76, 20:76] for hu in (alone, beside)]
    assert torch.equal(*middles)
    rows = np.arange(400, dtype=np.int16)[:, None] + np.zeros((400, 300), np.int16) - 1000  # air of 400 kinds
    rows[10:40, 20:50] = 500  # 15 mm: no head
    square = frame(rows, spacing_mm, Framing(64, 0.5))[0].numpy()
    assert np.array_equal(square, rows[168:232, 118:182])
    assert frame(np.full((2, 3), -1000, np.int16), (1.0, 1.0), HEAD).eq(-1000).all()


def test_files_without_a_usable_pixel_spacing_show_the_whole_image(write_ct):
    pixels = drawn((250, 250), (1.0, 1.0)) + np.int16(1024)
    said = write_ct("a", pixels, PixelSpacing=[1.0, 1.0])
    assert torch.equal(load_slice(said, HEAD), frame(pixels - 1024, (1.0, 1.0), HEAD))
    tags = [{}, {"PixelSpacing": [1e-9, 1e-9]}, {"PixelSpacing": [0, 0]}, {"PixelSpacing": [900, 900]}]
    for number, tag in enumerate(tags):
        assert torch.equal(load_slice(write_ct(f"b{number}", pixels, **tag), HEAD), fit_to_size(pixels - 1024, 96))
    wide = write_ct("c", pixels[::2], PixelAspectRatio=[2, 1])
    assert torch.equal(load_slice(wide, HEAD), load_slice(wide, Framing(96)))
    uneven = write_ct("d", pixels[::2], PixelSpacing=[2.0, 1.0])
    assert (load_slice(uneven, HEAD) - load_slice(said, HEAD))[0, 30:66, 30:66].float().abs().mean() < 2
    (uneven.parent / "broken").write_bytes(b"nothing")
    with pytest.raises(UnreadableDicomError, match="broken"):
        load_slice(uneven.parent / "broken", HEAD)


def test_parameters_say_the_scale(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("prepare: {size_px: 64}")
    framings = {
        (): Framing(64),
        ("prepare.crop=head",): Framing(64, 1.1),
        ("prepare.crop=head", "prepare.mm_per_px=0.8"): Framing(64, 0.8),
        ("prepare.mm_per_px=0.8",): Framing(64),
    }
    for values, framing in framings.items():
        assert Framing.of(load_params(path, values).prepare) == framing
    with pytest.raises(ParamsError, match=r"prepare\.mm_per_px"):
        load_params(path, ("prepare.mm_per_px=0",))


def slice_cnn(mm_per_px=None, size_px=32):
    torch.manual_seed(0)
    return SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, size_px, 0.0, mm_per_px=mm_per_px)).eval()


def test_a_model_file_says_how_its_slices_are_framed_and_older_ones_stay_the_same(tmp_path):
    for name, cnn in (("plain", slice_cnn()), ("head", slice_cnn(2.2))):
        save_model(tmp_path / name, cnn, {})
        assert load_slice_cnn(tmp_path / name).spec == cnn.spec
    specs = {name: read_header(tmp_path / name).slice_cnn for name in ("plain", "head")}
    assert specs["head"].framing == Framing(32, 2.2)
    plain, head = (json.loads(specs[name].model_dump_json()) for name in ("plain", "head"))
    assert head.keys() - plain.keys() == {"crop", "mm_per_px"}  # an older version reads the plain one
    assert SliceCnnSpec.model_validate_json(json.dumps(plain)).framing == Framing(32)
    for wrong in ({"crop": "head"}, {"mm_per_px": 1.1}):
        with pytest.raises(ValueError, match="mm_per_px"):
            SliceCnnSpec.model_validate_json(json.dumps(plain | wrong))


def test_stores_and_pixel_caches_of_other_framings_are_others(tmp_path, write_ct):
    identities = []
    for number, scale in enumerate((None, 1.1, 2.2)):
        save_model(tmp_path / str(number), slice_cnn(scale), {})
        identities.append(GenerationSpec(tmp_path / str(number), pd.DataFrame()).identity())
    assert "crop" not in identities[0]  # stores that are older than the choice stay valid
    assert "mm_per_px" not in identities[0]
    assert [identity["mm_per_px"] for identity in identities[1:]] == [1.1, 2.2]
    path = str(write_ct("a", drawn((250, 250), (1.0, 1.0)), PixelSpacing=[1, 1]))
    index = pd.DataFrame({"path": [path], "file_digest": ["0" * 64]})
    caches = [fill_pixel_cache(tmp_path / "pixels", index, framing) for framing in (Framing(32), Framing(32, 2.2))]
    assert caches[0].folder != caches[1].folder
    assert torch.equal(caches[1].read(path), load_slice(path, Framing(32, 2.2)))


@pytest.fixture
def head_series(write_ct):
    """Files of five slices of a head that moves, PixelSpacing 0.9 mm."""
    paths = []
    for number in range(5):
        pixels = drawn((256, 256), (0.9, 0.9), at_mm=(4.0 * number, -3.0 * number)) + np.int16(1024)
        paths.append(str(write_ct(f"{number}", pixels, number=number, z=5.0 * number, PixelSpacing=[0.9, 0.9])))
    return paths


def test_every_step_gives_the_network_the_same_square(head_series):
    cnn = slice_cnn(6.6)
    squares = load_slices(head_series, Framing(32, 6.6))
    assert not torch.equal(squares, load_slices(head_series, Framing(32)))
    embedding, logits = cnn(squares)
    embedder = SliceEmbedder(cnn, CPU, 8)
    found = embedder([SliceInput(path, "1", "0") for path in head_series])
    embedder.close()
    np.testing.assert_allclose(found[0], embedding.detach(), atol=1e-4)
    sequence = build_sequence(SequenceSpec(
        cell="average", hidden=1, layers=1, bidirectional=False, dropout=0, inputs=("logits",), embedding_dim=512
    ))  # fmt: skip
    made, bad = classify_series(EndToEnd(cnn, sequence), head_series, [5.0 * number for number in range(5)], CPU)
    assert not bad
    wanted = sequence.one_series(embedding, logits, torch.arange(5.0) * 5).detach()
    np.testing.assert_allclose(made, wanted, atol=1e-4)


def test_arrays_are_framed_by_the_spacing_that_is_given(head_series, tmp_path):
    import ichpipe

    save_model(tmp_path / "cnn", slice_cnn(6.6), {})
    model = ichpipe.load_model(tmp_path / "cnn", gpu="cpu")
    volume = ichpipe.read_series(head_series)
    wanted = model.embed_folder(head_series).values
    assert np.array_equal(model.embed(volume), wanted)
    assert np.array_equal(model.embed(volume.hu, pixel_mm=(0.9, 0.9)), wanted)
    assert not np.allclose(model.embed(volume.hu), wanted)  # the whole image
    with pytest.raises(DataError, match="pixel_mm"):
        model.embed(volume.hu, pixel_mm=(0.0, 0.9))

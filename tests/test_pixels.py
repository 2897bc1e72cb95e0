"""Decoded slices on disk: the same pixels, made once, gone on with, and damage found."""

import pickle

import pytest
import torch

from ichpipe.common.errors import DataError
from ichpipe.images import pixel_cache
from ichpipe.images.pixel_cache import fill_pixel_cache
from ichpipe.images.slice_dataset import load_slice
from ichpipe.models.header import Framing


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(pixel_cache, "SHARD_SLICES", 50)


def test_cached_pixels_equal_decoded_ones(index, tmp_path, small_shards):
    cache = fill_pixel_cache(tmp_path, index, Framing(40))
    for path in index["path"].iloc[::7]:
        assert torch.equal(cache.read(path), load_slice(path, Framing(40)))
    assert torch.equal(pickle.loads(pickle.dumps(cache)).read(path), load_slice(path, Framing(40)))  # noqa: S301 - our own


def test_a_second_run_decodes_nothing_and_another_size_has_its_own(index, tmp_path, small_shards, monkeypatch):
    fill_pixel_cache(tmp_path, index, Framing(40))
    monkeypatch.setattr(pixel_cache, "load_slices", lambda *_: pytest.fail("decoded again"))
    again = fill_pixel_cache(tmp_path, index.sample(frac=1, random_state=1), Framing(40))  # the same files
    path = index["path"].iloc[3]
    assert torch.equal(again.read(path), load_slice(path, Framing(40)))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        fill_pixel_cache(tmp_path, index, Framing(24))


def test_a_stopped_cache_goes_on_with_what_is_missing(index, tmp_path, small_shards, monkeypatch):
    decoded, load = [], pixel_cache.load_slices

    def stop_at_the_third(paths, framing):
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(len(paths))
        return load(paths, framing)

    monkeypatch.setattr(pixel_cache, "load_slices", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fill_pixel_cache(tmp_path, index, Framing(40))
    monkeypatch.setattr(
        pixel_cache, "load_slices", lambda paths, framing: decoded.append(len(paths)) or load(paths, framing)
    )
    cache = fill_pixel_cache(tmp_path, index, Framing(40))
    assert sum(decoded) == len(index)
    assert all(torch.equal(cache.read(path), load_slice(path, Framing(40))) for path in index["path"].iloc[::11])


def test_a_damaged_chunk_is_found_and_the_remedy_named(index, tmp_path, small_shards):
    cache = fill_pixel_cache(tmp_path, index, Framing(40))
    shard = next(iter(sorted((cache.folder / "c").rglob("0"))[0:1]))
    shard = shard if shard.is_file() else next(path for path in shard.rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[200] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match="delete the folder"):
        [cache.read(path) for path in index["path"]]


@pytest.mark.parametrize("command", ["fit-slices", "finetune"])
@pytest.mark.slow
def test_training_from_the_cache_gives_the_same_bytes(run, tmp_path, monkeypatch, command):
    monkeypatch.setattr("ichpipe.images.slice_dataset.HOLD_BYTES", 0)
    made = []
    for name, rest in (("plain", ()), ("cached", ("--pixel-cache", tmp_path / "pixels"))):
        other = run.copy(tmp_path / name)
        other.params.write_text(run.params.read_text())
        assert other("--set", "fit-slices.seed=3", "--set", "finetune.seed=3", command, *rest).exit_code == 0
        folder = {"fit-slices": "slice-cnn", "finetune": "finetuned"}[command]
        made.append((other.artifacts / folder / "model.safetensors").read_bytes())
        made.append((other.artifacts / folder / "history.json").read_bytes())
    assert made[:2] == made[2:]
    assert list((tmp_path / "pixels").iterdir())

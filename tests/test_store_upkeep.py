"""Looking after a store: what is in it, freeing what is not used, and that nothing else is touched."""

import shutil

import numpy as np
import pytest
import store_kit as kit
import zarr

from ichpipe.cache import maintenance
from ichpipe.cache.errors import StoreError
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore

OTHER = kit.generation(weights="bbb")


@pytest.fixture
def store(tmp_path, client):
    """Two generations; the first has ten rows in use, and three that left the index, over two segments."""
    path = tmp_path / "store"
    kit.write(path, kit.Slices((3, 3), numbers=[0, 9]), client, extra=extra)
    kit.write(path, kit.Slices(), client, extra=extra)
    kit.write(path, kit.Slices((2,)), client, made=OTHER)
    return path


def extra(rows):
    return {"augmentation": np.asarray(rows, np.float32)[:, None]}


def keep_first(identity):
    return identity["weights"] == "aaa"


def by_weights(path):
    return {one["identity"]["weights"]: one for one in maintenance.info(StoreLocation(path))["generations"]}


def test_info_counts_what_is_there(store):
    facts = maintenance.info(StoreLocation(store))
    files = kit.all_bytes(store)
    assert (facts["files"], facts["bytes"]) == (len(files), sum(map(len, files.values())))
    first, other = by_weights(store)["aaa"], by_weights(store)["bbb"]
    assert (first["rows"], first["series"], first["studies"], first["segments"]) == (10, 4, 4, 2)
    assert (first["rows_stored"], first["rows_unused"], first["rows_missing"]) == (13, 3, 0)
    assert (other["rows"], other["rows_unused"], other["complete"]) == (2, 0, True)


def test_info_names_the_studies_that_are_missing(store):
    # chunk 0 of the first segment written: series 1.0 and the first row of 1.9, which left the index
    for path in store.glob("*/segment-*/embedding/c/0/0"):
        path.unlink()
    first = by_weights(store)["aaa"]
    assert not first["complete"]
    assert "2.0" in first["missing_studies"]
    assert "2.9" not in first["missing_studies"]
    assert first["rows_missing"] > 0


def test_info_of_an_interrupted_first_run(tmp_path, client):
    def fails(_inputs):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        kit.write(tmp_path / "s", kit.Slices(), client, make=kit.maker(compute=fails))
    (one,) = maintenance.info(StoreLocation(tmp_path / "s"))["generations"]
    assert (one["complete"], one["rows"], one["chunks_missing"]) == (False, 0, 3)
    assert "not complete" in one["problem"]
    assert maintenance.verify(StoreLocation(tmp_path / "s")) == []  # nothing that is there is wrong


def test_prune_frees_and_keeps_every_row_in_use(store, client, tmp_path):
    before = kit.all_bytes(store)
    said = maintenance.prune(StoreLocation(store), keep_first, dry_run=True)
    assert kit.all_bytes(store) == before
    done = maintenance.prune(StoreLocation(store), keep_first)
    assert done["generations_removed"] == said["generations_removed"] == [OTHER.name]
    assert done["rows_removed"] == said["rows_removed"] == 3
    assert done["bytes_freed"] > 0
    assert list(by_weights(store)) == ["aaa"]
    first = by_weights(store)["aaa"]
    assert (first["rows_stored"], first["rows_unused"], first["segments"]) == (10, 0, 1)
    kit.assert_holds(store, kit.Slices())
    assert maintenance.verify(StoreLocation(store)) == []
    assert maintenance.prune(StoreLocation(store), keep_first)["bytes_freed"] == 0
    journal = tmp_path / "computed"
    kit.write(store, kit.Slices(), client, make=kit.maker(journal))
    assert kit.computed(journal) == []


def test_what_stands_beside_the_rows_moves_with_them(store):
    maintenance.prune(StoreLocation(store), keep_first)
    (segment,) = store.glob("*/segment-*")
    group = zarr.open_group(str(segment), mode="r")
    slices = kit.Slices()
    row_of = {kit.digest(text): row for row, text in enumerate(slices.inputs)}
    first_write = {kit.digest(text): row for row, text in enumerate(kit.Slices((3, 3), numbers=[0, 9]).inputs)}
    for source, (value,) in zip(group["source"][:], group["augmentation"][:], strict=True):
        name = bytes(source).hex()
        assert value == first_write.get(name, row_of[name])


@pytest.mark.parametrize("step", ["maintenance.write_rows", "layout.write_manifest"])
def test_an_interrupted_prune_loses_nothing(store, monkeypatch, step):
    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"ichpipe.cache.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            maintenance.prune(StoreLocation(store), keep_first)
    kit.assert_holds(store, kit.Slices())
    maintenance.prune(StoreLocation(store), keep_first)
    kit.assert_holds(store, kit.Slices())
    assert by_weights(store)["aaa"]["rows_stored"] == 10


def test_prune_refuses_a_generation_with_missing_rows(store):
    for path in store.glob("*/segment-*/embedding/c/1/0"):
        path.unlink()
    with pytest.raises(StoreError, match=r"lacks rows; run: ichpipe extract"):
        maintenance.prune(StoreLocation(store), keep_first)


def test_verify_finds_damage_beside_the_rows(store):
    (file, *_) = store.glob("*/segment-*/augmentation/c/0/0")
    kit.flip(file, 1)
    assert [problem.array for problem in maintenance.verify(StoreLocation(store))] == ["augmentation"]
    kit.assert_holds(store, kit.Slices())  # the rows themselves are as they were


def test_verify_finds_a_missing_segment(store):
    reader = EmbeddingStore(store, kit.generation().identity)
    shutil.rmtree(min(store.glob(f"{reader.generation}/segment-*")))
    (problem,) = maintenance.verify(StoreLocation(store))
    assert "missing" in problem.what
    assert problem.studies

"""The same store at other addresses: in memory, and on a real S3-compatible server on loopback."""

import os
import uuid

import fsspec
import pytest
import store_kit as kit

from ichpipe.cache import maintenance
from ichpipe.cache.errors import StoreError
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(botocore|aiobotocore|s3fs|moto|werkzeug).*"),
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def s3_bucket():
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    # fsspec's own configuration, as a user sets it by FSSPEC_S3_…; these are no real keys
    former = dict(fsspec.config.conf)
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}", "key": "none", "secret": "none"}
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    yield "s3://bucket"
    fsspec.config.conf.clear()
    fsspec.config.conf.update(former)
    running.stop()


@pytest.fixture(params=["memory", "s3"])
def address(request):
    root = "memory://tests" if request.param == "memory" else request.getfixturevalue("s3_bucket")
    return f"{root}/{uuid.uuid4().hex}/embeddings.zarr"


@pytest.mark.slow
def test_written_read_grown_and_pruned(address, client, tmp_path):
    kit.write(address, kit.Slices(), client)
    kit.assert_holds(address, kit.Slices())
    more = kit.Slices((3, 1, 4, 2, 2))
    journal = tmp_path / "computed"
    assert kit.write(address, more, client, make=kit.maker(journal)) == 10
    assert kit.computed(journal) == ["1.4.0", "1.4.1"]
    kit.assert_holds(address, more)
    other = kit.generation(weights="bbb")
    kit.write(address, kit.Slices((2,)), client, made=other)
    assert len(maintenance.info(StoreLocation(address))["generations"]) == 2
    done = maintenance.prune(StoreLocation(address), lambda identity: identity["weights"] == "aaa")
    assert done["generations_removed"] == [other.name]
    kit.assert_holds(address, more)
    assert maintenance.verify(StoreLocation(address)) == []


@pytest.mark.slow
def test_rows_that_do_not_fit_into_memory_are_fetched_again(address, client):
    slices = kit.Slices([4] * 10)
    kit.write(address, slices, client)
    store = EmbeddingStore(address, hold_bytes=1)
    for _ in range(2):
        for uid in store.series_uids:
            assert (store.series(uid).logit == slices.expected(uid)[1]).all()
    assert len(store.fetched) == 1


@pytest.mark.slow
def test_damage_is_refused_named_found_and_mended(address, client, tmp_path):
    slices = kit.Slices([4] * 4)
    kit.write(address, slices, client)
    place = StoreLocation(address)
    fs, root = fsspec.core.url_to_fs(address)
    file = next(name for name in place.files() if name.endswith("/embedding/c/2/0"))
    content = bytearray(fs.cat_file(f"{root}/{file}"))
    content[5] ^= 1
    fs.pipe_file(f"{root}/{file}", bytes(content))
    with pytest.raises(StoreError, match=r"fails its checksum.*study 2\.2"):
        EmbeddingStore(address).series("1.2")
    (problem,) = maintenance.verify(place)
    assert problem.studies == ["2.2"]
    assert maintenance.repair(place) == [problem]
    with pytest.raises(StoreError, match=r"is missing.*study 2\.2"):
        EmbeddingStore(address).series("1.2")
    journal = tmp_path / "computed"
    kit.write(address, slices, client, make=kit.maker(journal))
    assert kit.computed(journal) == [f"1.2.{row}" for row in range(4)]
    kit.assert_holds(address, slices)


def test_an_address_where_nothing_is(address):
    with pytest.raises(StoreError, match="does not exist"):
        EmbeddingStore(address)


def test_an_unknown_kind_of_address_is_one_message():
    with pytest.raises(StoreError, match="nonsense://x"):
        EmbeddingStore("nonsense://x")

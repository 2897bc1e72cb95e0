"""Small stores for the tests, and a program that writes one slowly enough to be killed: ``python store_kit.py``."""

import contextlib
import hashlib
import sys
import time
from pathlib import Path

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.rows import Rows
from ichpipe.cache.writer import Work, update

DIM, CLASSES = 5, ("any", "other")
LENGTHS = (3, 1, 4, 2)  # ten rows: three chunks of four, the last one short


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


class Slices:
    """Series 1.0, 1.1, … of given lengths, one study each; ``contents`` says what is in a slice's file."""

    def __init__(self, lengths=LENGTHS, contents=None, numbers=None):
        contents = contents or {}
        numbers = range(len(lengths)) if numbers is None else numbers
        self.series, self.studies, self.sops = [], [], []
        for number, length in zip(numbers, lengths, strict=True):
            self.series += [f"1.{number}"] * length
            self.studies += [f"2.{number}"] * length
            self.sops += [f"1.{number}.{row}" for row in range(length)]
        self.inputs = [contents.get(sop, sop) for sop in self.sops]
        self.rows = Rows.of(self.series, self.studies, self.sops, [digest(text) for text in self.inputs])

    def expected(self, series):
        return features([text for text, uid in zip(self.inputs, self.series, strict=True) if uid == series])


def generation(chunk_rows=4, **identity):
    made_by = {"weights": "aaa", "size_px": 32, "windows": [[40.0, 80.0]], **identity}
    return layout.Generation(made_by, DIM, CLASSES, chunk_rows)


def features(inputs):
    """Features that depend on the input's text alone, over several orders of magnitude."""
    rows = [np.random.default_rng(list(text.encode())).normal(size=DIM + len(CLASSES)) for text in inputs]
    values = np.exp(np.clip(3 * np.array(rows), -10, 10)).astype(np.float32)
    return values[:, :DIM], values[:, DIM:]


def maker(journal=None, compute=features):
    """What computes rows; inputs are written into ``journal``: Dask hands copies even to a worker in this process."""

    def make(_worker):
        def run(inputs):
            if journal is not None:
                with Path(journal).open("a") as handle:
                    handle.writelines(f"{text}\n" for text in inputs)
            return compute(inputs)

        return run

    return make


def write(where, slices, client, *, made=None, make=None, extra=None, **options):
    """Fill a generation; return how many rows were there before."""
    work = Work(slices.inputs, make or maker(), lambda: contextlib.nullcontext(client), extra)
    steps = list(update(StoreLocation(where), made or generation(), slices.rows, work, **options))
    assert sum(steps) == len(slices.rows)
    return steps[0]


def computed(journal):
    return sorted(journal.read_text().split()) if journal.exists() else []


def assert_holds(where, slices, made=None):
    """Every row is what its file's content gives, exactly, under its own names."""
    store = EmbeddingStore(where, (made or generation()).identity, slices.rows)
    for uid in dict.fromkeys(slices.series):
        found = store.series(uid)
        embedding, logit = slices.expected(uid)
        assert found.sop_uids == tuple(s for s, u in zip(slices.sops, slices.series, strict=True) if u == uid)
        assert np.array_equal(found.embedding, embedding.astype(np.float16))
        assert np.array_equal(found.logit, logit)
    return store


def chunk_files(path):
    return sorted(file for kind in layout.ROW_ARRAYS for file in Path(path).glob(f"*/segment-*/{kind}/c/*/0"))


def flip(file, at, mask=1):
    """Change bits of one byte, in a new file: what is mapped of the old one stays as it was."""
    content = bytearray(file.read_bytes())
    content[at] ^= mask
    replace(file, bytes(content))


def replace(file, content):
    file.unlink()
    file.write_bytes(content)


def all_bytes(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def slow_features(inputs):
    time.sleep(0.02)
    return features(inputs)


def main(path, n_series, limit_bytes=0):
    """Write ``n_series`` series of three slices in chunks of four; with a limit, no file may grow beyond it."""
    from ichpipe.features.dask_client import connect

    if limit_bytes:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    slices = Slices([3] * n_series)
    work = Work(slices.inputs, maker(compute=slow_features), lambda: connect(1, None))
    for _ in update(StoreLocation(path), generation(), slices.rows, work, on_wait=lambda: print("waiting", flush=True)):
        print("wrote", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

"""Freed memory stays with the process, where glibc is and the user wants nothing else."""

import os
import subprocess
import sys

import pytest

from ichpipe.common import malloc

glibc = pytest.mark.skipif(
    sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="no glibc"
)

PAGES = 20 * 2**25 // 4096

FAULTS = """
import ctypes, resource, sys, threading
from ichpipe.common.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def turns(count):
    for _ in range(count):
        block = libc.malloc(2**25)
        ctypes.memset(block, 1, 2**25)
        libc.free(block)
def on_a_thread(count):
    thread = threading.Thread(target=turns, args=(count,))
    thread.start()
    thread.join()
where = on_a_thread if sys.argv[2] == "thread" else turns
where(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
where(20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept, where, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    line = [sys.executable, "-c", FAULTS, kept, where]
    return int(subprocess.run(line, capture_output=True, text=True, check=True, env=clean | environment).stdout)


@glibc
@pytest.mark.parametrize("where", ["main", "thread"])
def test_pages_are_not_cleared_again(where):
    assert faults("plain", where) > PAGES / 2
    assert faults("kept", where) < PAGES / 50


@glibc
def test_what_the_user_has_set_stays():
    assert faults("kept", "main", MALLOC_MMAP_THRESHOLD_="65536") > PAGES / 2


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert not malloc.keep_freed_memory()


def test_a_libc_without_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "linux")
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _name: object())
    assert not malloc.keep_freed_memory()

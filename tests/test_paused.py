"""A process that slept, as on a closed laptop, goes on: no task is lost and nothing waits for ever."""

import os
import signal
import subprocess
import sys
import time

import pytest

WORK = """
import time
from distributed import as_completed
from ichpipe.features.dask_client import connect
if __name__ == "__main__":
    with connect({workers}, None) as client:
        tasks = [client.submit(time.sleep, 0.5, pure=False) for _ in range(6)]
        tasks[0].result()
        print("at work", flush=True)
        print(sum(1 for _ in as_completed(tasks)), "done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_work_goes_on_after_a_pause(workers):
    short = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1s"}  # five minutes by default
    line = [sys.executable, "-c", WORK.format(workers=workers)]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, text=True, env=os.environ | short, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == "at work\n"
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(9)  # ten heartbeats, half a second each, must be missed at least
            os.killpg(process.pid, signal.SIGCONT)
            assert process.communicate(timeout=120)[0] == "6 done\n"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

"""Every learning stage, killed within an epoch and run again, ends with the bytes of an undisturbed run."""

import os
import signal
import subprocess
import sys

import pytest

KILLED = """
import os, signal, sys
from ichpipe.training import sequence_trainer, trainer
from ichpipe.stages.cli import main
trainer.SAVE_WITHIN_S = sequence_trainer.SAVE_EVERY_S = 0.0
advance, steps = trainer.Position.advance, []
def stop(position, *rest):
    advance(position, *rest)
    steps.append(1)
    if len(steps) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Position.advance = stop
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "folder", "settings"),
    [
        ("fit-slices", "slice-cnn", ("fit-slices.batch_size=16", "fit-slices.dropout=0.3", "fit-slices.ema_decay=0.9",
                                     "fit-slices.cutmix.alpha=1.0")),
        ("fit-sequence", "sequence/paper", ("sequence.paper.batch_series=2", "sequence.paper.dropout=0.3")),
        ("finetune", "finetuned", ("finetune.batch_series=2", "finetune.epochs=2", "finetune.ema_decay=0.9")),
    ],
)  # fmt: skip
def test_killed_within_an_epoch(run, tmp_path, command, folder, settings):
    words = [word for setting in settings for word in ("--set", setting)]
    arm = ("--arm", "paper") if command == "fit-sequence" else ()
    whole, killed = (run.copy(tmp_path / name) for name in ("whole", "killed"))
    for other in (whole, killed):
        other.params.write_text(run.params.read_text())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def once(other, *before):
        line = [sys.executable, *before, *other.arguments(*words, command, *arm)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    done = once(whole, "-m", "ichpipe.stages.cli")
    assert done.returncode == 0, done.stderr
    for step in (1, 2):  # each goes on from the one before
        assert once(killed, "-c", KILLED, str(step)).returncode == -signal.SIGKILL
    resumed = once(killed, "-m", "ichpipe.stages.cli")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after epoch" in resumed.stderr
    for name in ("model.safetensors", "history.json"):
        found, wanted = ((other.artifacts / folder / name).read_bytes() for other in (killed, whole))
        assert found == wanted, name

"""What tests run in other processes, which can't import the tests themselves."""

import contextlib
from collections import Counter

import numpy as np
import torch

from ichpipe.images.slice_dataset import SliceDataset
from ichpipe.models.header import Framing
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.params.schema import PAPER_WINDOWS, AugmentParams, SliceParams
from ichpipe.training import trainer
from ichpipe.training.distributed import sum_gradients
from ichpipe.training.norm_statistics import NormStatistics
from ichpipe.training.slice_trainer import SliceFitting, Slices
from ichpipe.training.trainer import Trainer, make_optimizer, make_schedule

STILL = AugmentParams(flip_probability=0, rotation_deg=0, scale=0, shift=0, offset_hu=0, noise_hu=0)
CPU = torch.device("cpu")
SIZE = 32


def random_hu(n=6, seed=0):
    return torch.randint(-100, 200, (n, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(seed)).to(torch.int16)


def slice_fitting(n=12, **settings):
    settings = {"backbone": "test_convnext", "augment": STILL, "precision": "fp32"} | settings
    section = SliceParams(**settings)
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(section.backbone, PAPER_WINDOWS, SIZE, 0.0))
    labels = (np.arange(6 * n).reshape(n, 6) % 5 == 0) * np.float32(1)
    dataset = SliceDataset(list(range(n)), labels, Framing(SIZE), random_hu(n).__getitem__)
    slices = Slices(dataset, dataset, [f"series {row // 4}" for row in range(n)])
    return SliceFitting(cnn, section, CPU, 0, slices, range(n), 7)


class LoggedReads:
    """Reads slices whose HU are their row, and notes every read in a file; may be sent to decoding processes."""

    def __init__(self, log):
        self.log = log

    def __call__(self, row):
        with self.log.open("a") as handle:
            handle.write(f"{row}\n")
        return torch.full((1, 4, 4), row, dtype=torch.int16)

    def count(self):
        return Counter(map(int, self.log.read_text().split()))


def train_as_one_of_two(rank, folder):
    """Run in each of two processes: what they must agree on is written to a file of each."""
    trainer.SAVE_WITHIN_S = 0.0  # a checkpoint after every step
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    facts = {}

    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(2)) for name in ("both", "one", "none")})
    model["both"].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    model["one"].grad = torch.ones(2) if rank else None
    sum_gradients(model.parameters())
    facts["gradients"] = {name: parameter.grad for name, parameter in model.items()}

    def train_epoch(_epoch, position):
        position.begin()
        for step in range(position.step, 4):
            if step == 3 and "stopped" not in facts:
                facts["stopped"] = True
                raise KeyboardInterrupt
            position.advance(torch.tensor(1.0 + 2 * rank + step), 1.0 + 2 * rank)

    def run():
        layer = torch.nn.Linear(2, 1)
        optimizer = make_optimizer([(layer, 0.1)], 0.0)
        schedule = make_schedule(optimizer, 4, 1, 0.0)
        return Trainer(layer, optimizer, schedule, 0, 1, folder / "stopped.pt", "key").run(train_epoch, lambda: 1.0)

    with contextlib.suppress(KeyboardInterrupt):
        run()
    torch.distributed.barrier()
    facts["train_loss"] = run()[-1].train_loss

    norm = torch.nn.BatchNorm2d(1).eval()
    statistics = NormStatistics(norm, 0.5)
    with statistics.collected(), torch.no_grad():
        for value in (1.0, 3.0) if rank else ():  # the other process has no slice of this step
            norm(torch.full((1, 1, 2, 2), value))
    statistics.update()
    facts["statistics"] = norm.running_mean.item(), norm.running_var.item()

    fitting = slice_fitting(backbone="test_resnet", batch_size=6, ema_decay=0.8, epochs=2)
    facts["history"] = fitting.trainer(folder / "slices.pt", "key").run(fitting.train_epoch, fitting.validate)
    facts["history"] = [vars(line) for line in facts["history"]]
    facts["weights"] = fitting.cnn.state_dict()
    torch.save(facts, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()

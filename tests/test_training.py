"""Windows, augmentation, loss, schedule, and training that goes on where it was stopped."""

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from process_kit import LoggedReads
from torch import nn

from ichpipe.common.errors import IchpipeError, TrainingError
from ichpipe.images import augmentation, slice_dataset
from ichpipe.images.framing import fit_to_size
from ichpipe.images.slice_dataset import SliceDataset, batch_loader, batches_of
from ichpipe.models.header import PREPROCESSING_VERSION, Framing
from ichpipe.models.slice_cnn import Windows
from ichpipe.params.schema import PAPER_WINDOWS, AugmentParams
from ichpipe.scoring.metrics import weighted_log_loss
from ichpipe.training import trainer
from ichpipe.training.trainer import LOOK_STEPS, Position, Trainer, make_optimizer, make_schedule, weighted_bce

GOLDEN = Path(__file__).parent / "golden" / "preprocessing.json"
STILL = AugmentParams(flip_probability=0, rotation_deg=0, scale=0, shift=0, offset_hu=0, noise_hu=0)


def random_hu(n=3, size=16, seed=0):
    return torch.randint(-1024, 2000, (n, 1, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.int16)


@pytest.mark.parametrize(
    ("hu", "brain", "subdural", "bone"),
    [
        (-1000, 0, 0, 0),
        (0, 0, 32.5 / 215, 800 / 2800),  # brain 0…80, subdural -32.5…182.5, bone -800…2000
        (40, 0.5, 72.5 / 215, 840 / 2800),
        (75, 75 / 80, 0.5, 875 / 2800),
        (100, 1, 132.5 / 215, 900 / 2800),
        (600, 1, 1, 0.5),
        (2000, 1, 1, 1),
        (3000, 1, 1, 1),
    ],
)
def test_the_paper_s_windows_by_hand(hu, brain, subdural, bone):
    channels = Windows(PAPER_WINDOWS)(torch.full((1, 1, 1, 1), hu, dtype=torch.int16)).flatten()
    assert channels.tolist() == pytest.approx([brain, subdural, bone], abs=1e-6)


def test_other_numbers_need_another_preprocessing_version():
    """Resize and windows of a fixed slice. If this fails on purpose, raise PREPROCESSING_VERSION and the file."""
    rows, columns = np.mgrid[:40, :36]
    hu = (37 * rows - 23 * columns + (rows * columns) % 97).astype(np.int16)
    made = Windows(PAPER_WINDOWS)(fit_to_size(hu, 16).unsqueeze(0))[0, :, ::5, ::5]
    golden = json.loads(GOLDEN.read_text())
    assert golden["preprocessing_version"] == PREPROCESSING_VERSION
    np.testing.assert_allclose(made.numpy(), golden["channels"], atol=1e-6)


def test_fitting_keeps_what_fits_and_pads_with_air():
    square = random_hu(1)[0, 0].numpy()
    assert torch.equal(fit_to_size(square, 16)[0], torch.from_numpy(square))
    wide = np.full((10, 20), 50, dtype=np.int16)
    fitted = fit_to_size(wide, 20)[0]
    assert (fitted[5:15] == 50).all()
    assert (fitted[:5] == -1024).all()
    assert (fitted[15:] == -1024).all()
    assert (fit_to_size(np.full((64, 64), 37, np.int16), 20) == 37).all()


@pytest.mark.parametrize(("rows", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (3, [3]), (1, [1]), (0, [])])
def test_no_slice_is_left_alone_in_a_batch_nor_left_out(rows, sizes):
    batches = batches_of(range(rows), 4)
    assert [len(batch) for batch in batches] == sizes
    assert list(itertools.chain.from_iterable(batches)) == list(range(rows))


def test_held_slices_equal_those_read_again(write_ct, monkeypatch):
    paths = [str(write_ct(f"{n}", np.full((16, 16), 1000 + n, np.int16), number=n)) for n in range(3)]
    for limit, reads in ((slice_dataset.HOLD_BYTES, 3), (0, 6)):
        monkeypatch.setattr(slice_dataset, "HOLD_BYTES", limit)
        with mock.patch.object(slice_dataset, "load_slice", wraps=slice_dataset.load_slice) as load:
            dataset = SliceDataset(paths, np.zeros((3, 6), np.float32), Framing(16))
            for _ in range(2):
                assert [int(dataset[row][0][0, 0, 0]) for row in range(3)] == [-24, -23, -22]
        assert load.call_count == reads


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False])
def test_decoding_processes_decode_once_what_this_one_holds(tmp_path, monkeypatch, fits):
    if not fits:
        monkeypatch.setattr(slice_dataset, "HOLD_BYTES", 0)
    reads, labels = LoggedReads(tmp_path / "reads"), np.arange(36, dtype=np.float32).reshape(6, 6)
    dataset = SliceDataset(list(range(6)), labels, Framing(4), reads)

    def load(workers, *batches):
        loaded = list(batch_loader(dataset, batches, workers))
        assert [rows.tolist() for _, _, rows in loaded] == [list(batch) for batch in batches]
        for hu, known, rows in loaded:
            assert hu.shape == (len(rows), 1, 4, 4)
            assert hu[:, 0, 0, 0].tolist() == rows.tolist()
            assert torch.equal(known, torch.from_numpy(labels)[rows])

    load(2, [4, 1], [0, 2])
    load(2, [1, 3], [2, 4], [5, 0])  # two of six rows are new
    load(2, [5, 4, 3], [2, 1, 0])
    load(0, [0, 1, 2], [3, 4, 5])
    assert reads.count() == (dict.fromkeys(range(6), 1) if fits else {0: 4, 1: 4, 2: 4, 3: 3, 4: 4, 5: 3})
    sent = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert not sent.held
    assert sent[3][0].unique().tolist() == [3]
    assert not sent.held  # a decoding process keeps nothing


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"nothing", None])
def test_a_decoding_process_gives_the_error_of_a_file_as_it_is(tmp_path, content):
    """Its message is the one without processes: no traceback in it, and the file's name."""
    path = tmp_path / "a.dcm"
    if content is not None:
        path.write_bytes(content)
    errors = []
    for workers in (0, 1):
        dataset = SliceDataset([str(path)], np.zeros((1, 6), np.float32), Framing(16))
        with pytest.raises((IchpipeError, OSError)) as caught:
            next(batch_loader(dataset, [[0]], workers))
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1])
    assert str(errors[0]) == str(errors[1])
    assert "a.dcm" in str(errors[1])
    assert vars(errors[0]) == vars(errors[1])


def test_nothing_drawn_changes_nothing():
    hu = random_hu()
    drawn = augmentation.draw(STILL, len(hu), torch.Generator().manual_seed(0))
    torch.testing.assert_close(augmentation.apply(hu, drawn), hu.float(), atol=0.01, rtol=0)


def test_the_same_draw_gives_the_same_images_whole_or_in_parts():
    hu = random_hu(5)
    drawn = augmentation.draw(AugmentParams(), 5, torch.Generator().manual_seed(1))
    whole = augmentation.apply(hu, drawn)
    assert torch.equal(whole, augmentation.apply(hu, drawn))
    parts = [augmentation.apply(hu[rows], drawn.part(rows)) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-3, rtol=0)
    other = augmentation.apply(hu, augmentation.draw(AugmentParams(), 5, torch.Generator().manual_seed(2)))
    assert not torch.allclose(whole, other)


def test_a_series_moves_as_one_and_single_slices_apart():
    generator = torch.Generator().manual_seed(3)
    together = augmentation.draw(AugmentParams(), 6, generator, together=True)
    assert (together.affine == together.affine[0]).all()
    assert len(together.noise_seed.unique()) == 6
    apart = augmentation.draw(AugmentParams(), 6, generator)
    assert len({tuple(row.flatten().tolist()) for row in apart.affine}) == 6


def test_a_certain_flip_mirrors_left_and_right():
    hu = random_hu(2)
    drawn = augmentation.draw(STILL.model_copy(update={"flip_probability": 1.0}), 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(augmentation.apply(hu, drawn), hu.flip(-1).float(), atol=0.01, rtol=0)


def test_what_moves_in_from_outside_is_air():
    drawn = augmentation.draw(STILL, 1, torch.Generator().manual_seed(0))
    affine = drawn.affine.clone()
    affine[:, 0, 2] = 2.0  # a whole image to the side
    moved = augmentation.apply(torch.full((1, 1, 16, 16), 60, dtype=torch.int16), replace(drawn, affine=affine))
    assert (moved == augmentation.AIR_HU).all()


def test_the_loss_is_the_metric_and_divides_by_seven():
    generator = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(50, 6, generator=generator), (torch.rand(50, 6, generator=generator) < 0.3).float()
    expected = weighted_log_loss(labels.numpy(), torch.sigmoid(logits.double()).numpy())
    assert float(weighted_bce(logits, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(weighted_bce(torch.zeros(9, 6), torch.ones(9, 6))) == pytest.approx(np.log(2), rel=1e-6)


def test_an_unknown_label_counts_nothing_and_the_rest_of_its_slice_counts():
    logits, labels = torch.randn(8, 6), torch.ones(8, 6)
    labels[3], labels[5, 2] = float("nan"), float("nan")
    kept = [row for row in range(8) if row != 3]
    logits.requires_grad_()
    loss = weighted_bce(logits, labels)
    assert float(loss.detach()) == pytest.approx(float(weighted_bce(logits[kept], labels[kept]).detach()), rel=1e-6)
    loss.backward()
    assert torch.equal(logits.grad == 0, labels.isnan())


def test_the_schedule_warms_up_then_falls_to_zero():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer([(model, 1.0)], 0.01)
    schedule = make_schedule(optimizer, 10, 5, 2)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(a < b for a, b in itertools.pairwise(rates[:21]))
    assert max(rates) == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_no_weight_decay_on_biases_and_norms():
    groups = make_optimizer([(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 0.1)], 0.5).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.5, [2]),
        (0.0, [1, 1, 1]),
    ]


class Toy:
    """A linear regression whose validation loss is scripted where wanted."""

    def __init__(self, folder, epochs, key="k", script=None, stop_after=None):
        torch.manual_seed(0)
        self.stop_after = stop_after
        self.model, self.script = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)), script
        optimizer = make_optimizer([(self.model, 0.05)], 0.01)
        schedule = make_schedule(optimizer, 3, 6, 1)
        self.trainer = Trainer(self.model, optimizer, schedule, 7, epochs, folder / "checkpoint.pt", key)
        self.epochs_seen = []

    def train_epoch(self, epoch, position):
        self.epochs_seen.append(epoch)
        self.model.train()
        for number in range(position.step, 3):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(10 * epoch + number))
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            self.trainer.optimizer.zero_grad()
            loss.backward()
            self.trainer.optimizer.step()
            self.trainer.schedule.step()
            position.advance(loss)
            if (epoch, number) == self.stop_after:
                raise KeyboardInterrupt

    def validate(self):
        if self.script is not None:
            return self.script.pop(0)
        self.model.eval()
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(99))
        with torch.no_grad():
            return float((self.model(x) - x.sum(1, keepdim=True)).square().mean())

    def run(self, **options):
        return self.trainer.run(self.train_epoch, self.validate, **options)

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_weights_and_history(tmp_path, stop):
    (tmp_path / "whole").mkdir()
    whole = Toy(tmp_path / "whole", 6)
    history = whole.run()
    Toy(tmp_path, stop).run()
    resumed = Toy(tmp_path, 6)
    assert resumed.run() == history
    assert resumed.epochs_seen == list(range(stop + 1, 7))
    assert torch.equal(resumed.weights(), whole.weights())


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("stop_after", [(1, 0), (2, 1), (4, 2)])
def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_bytes(tmp_path, monkeypatch, stop_after, ema_decay):
    monkeypatch.setattr("ichpipe.training.trainer.SAVE_WITHIN_S", 0.0)
    whole = Toy(tmp_path / "whole", 6)
    whole.trainer.ema_decay = ema_decay
    history = whole.run()
    stopped = Toy(tmp_path / "stopped", 6, stop_after=stop_after)
    stopped.trainer.ema_decay = ema_decay
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    torch.manual_seed(99)  # another process
    resumed = Toy(tmp_path / "stopped", 6)
    resumed.trainer.ema_decay = ema_decay
    assert resumed.run() == history
    assert resumed.epochs_seen == list(range(stop_after[0], 7))
    assert torch.equal(resumed.weights(), whole.weights())


def test_the_moving_average_is_what_is_validated_and_kept(tmp_path):
    steps = []

    class Watched(Toy):
        def train_epoch(self, epoch, position):
            advance = position.advance
            position.advance = lambda loss: (steps.append(self.weights().clone()), advance(loss))
            super().train_epoch(epoch, position)

    plain, averaged = Toy(tmp_path / "plain", 6), Watched(tmp_path / "averaged", 6)
    averaged.trainer.ema_decay = 0.9
    averaged.trainer.last = plain.trainer.last = 6
    history, smoothed = plain.run(), averaged.run()
    assert [line.train_loss for line in smoothed] == [line.train_loss for line in history]  # learning is the same
    assert [line.val_loss for line in smoothed] != [line.val_loss for line in history]
    expected = steps[0]
    for number, weights in enumerate(steps[1:], start=1):
        expected = expected + (1 - min(0.9, (1 + number) / (10 + number))) * (weights - expected)
    torch.testing.assert_close(averaged.weights(), expected)


def test_the_loss_scale_of_fp16_goes_on_too(tmp_path):
    first = Toy(tmp_path, 1)
    first.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    first.trainer.scaler.scale(torch.ones(1))  # the scale exists from the first use on
    first.run()
    second = Toy(tmp_path, 1)
    second.trainer.scaler = torch.amp.GradScaler("cpu")
    second.run()
    assert second.trainer.scaler.get_scale() == 8.0


def test_a_checkpoint_of_other_parameters_or_a_torn_one_is_not_used(tmp_path):
    Toy(tmp_path, 2, key="other").run()
    again = Toy(tmp_path, 2)
    again.run()
    assert again.epochs_seen == [1, 2]
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    torn = Toy(tmp_path, 2)
    torn.run()
    assert torn.epochs_seen == [1, 2]


def test_the_best_weights_on_validation_are_kept(tmp_path):
    best = Toy(tmp_path, 2, script=[3.0, 1.0])
    best.run()
    (tmp_path / "more").mkdir()
    more = Toy(tmp_path / "more", 4, script=[3.0, 1.0, 2.0, 1.0])
    more.run()
    assert torch.equal(more.weights(), best.weights())


def test_weights_from_before_the_first_epoch_win_where_training_only_worsens(tmp_path):
    toy = Toy(tmp_path, 3, script=[0.5, 0.9, 0.8, 0.7])
    before = toy.weights().clone()
    history = toy.run(compare_with_start=True)
    assert torch.equal(toy.weights(), before)
    assert [line.epoch for line in history] == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_stops_with_the_remedy_and_keeps_the_last_good_state(tmp_path, value):
    with pytest.raises(TrainingError, match=r"epoch 2.*learning rate"):
        Toy(tmp_path, 3, script=[1.0, value]).run()
    again = Toy(tmp_path, 3, script=[0.9, 0.8])
    assert [line.val_loss for line in again.run()] == [1.0, 0.9, 0.8]


def test_divergence_within_an_epoch_stops_it_and_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOOK_STEPS", 2)
    monkeypatch.setattr(trainer, "SAVE_WITHIN_S", 0.0)  # a checkpoint after every step
    toy = Toy(tmp_path, 3)

    def train_epoch(epoch, position):
        if epoch == 2 and position.step == 0:
            position.advance(torch.tensor(0.5))
            with torch.no_grad():
                next(toy.model.parameters()).fill_(float("nan"))
            position.advance(torch.tensor(float("nan")))
            pytest.fail("the epoch went on")
        toy.train_epoch(epoch, position)

    with pytest.raises(TrainingError, match=r"nan in epoch 2.*learning rate"):
        toy.trainer.run(train_epoch, toy.validate)
    again = Toy(tmp_path, 3)
    again.run()  # from the step before
    assert again.epochs_seen == [2, 3]
    assert bool(again.weights().isfinite().all())


def test_an_epoch_says_its_latest_loss_and_learning_rate():
    optimizer = make_optimizer([(nn.Linear(2, 1), 3e-4)], 0.0)
    position = Position(3e-4, lambda: None)
    assert position.note(optimizer) == "loss nan, learning rate 0.0003"
    for loss in [100.0, *[0.25, 0.75] * (LOOK_STEPS // 2)]:
        position.advance(loss)
    assert position.note(optimizer) == "loss 0.5000, learning rate 0.0003"


def test_short_epochs_are_not_each_saved_but_the_last_one_is(tmp_path):
    checkpoints = []

    class Watched(Toy):
        def train_epoch(self, epoch, position):
            checkpoints.append(self.trainer.checkpoint.exists())
            super().train_epoch(epoch, position)

    toy = Watched(tmp_path, 6)
    toy.trainer.save_every_s = 1e6
    toy.run()
    assert checkpoints == [False] * 6
    again = Toy(tmp_path, 6)
    again.run()
    assert again.epochs_seen == []


def test_the_weights_of_the_last_epochs_are_kept_if_asked(tmp_path):
    every = Toy(tmp_path / "every", 6)
    every.trainer.last = 6
    some = Toy(tmp_path / "some", 6)
    some.trainer.last = 3
    stopped = Toy(tmp_path / "stopped", 4)
    stopped.trainer.last = 3
    for toy in (every, some, stopped):
        toy.run()
    resumed = Toy(tmp_path / "stopped", 6)
    resumed.trainer.last = 3
    resumed.run()
    assert len(every.trainer.kept) == 6
    for toy in (some, resumed):
        assert len(toy.trainer.kept) == 3
        for weights, expected in zip(toy.trainer.kept, every.trainer.kept[3:], strict=True):
            assert all(torch.equal(weights[name], expected[name]) for name in weights)

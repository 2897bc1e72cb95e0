"""Fine-tuning by slices, with an auxiliary loss, rates by part of the CNN, and the epoch that is kept."""

import itertools
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from process_kit import CPU, SIZE, STILL, random_hu

from ichpipe.models.end_to_end import EndToEnd
from ichpipe.models.slice_cnn import SliceCnn, parts_of, spec_for
from ichpipe.params.schema import PAPER_WINDOWS, FinetuneParams
from ichpipe.training.end_to_end_trainer import EndToEndFitting, ImageSeries
from ichpipe.training.trainer import Position, weighted_bce
from tests.conftest import set_options
from tests.test_models import sequence


def fitting_of(lengths, *, dropout=0.0, unknown=0.0, backbone="test_convnext", **settings):
    """Return the fitting of a small random network on random series; a share of the labels is unknown."""
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(backbone, PAPER_WINDOWS, SIZE, dropout))
    model = EndToEnd(cnn, sequence(inputs=("embedding", "logits"), dim=cnn.embedding_dim, dropout=dropout))
    draw = np.random.default_rng(0)
    train = []
    for number, length in enumerate(lengths):
        labels = (draw.random((length, 6)) < 0.3).astype(np.float32)
        labels[draw.random((length, 6)) < unknown] = np.nan
        paths = [f"{number}/{row}" for row in range(length)]
        train.append(ImageSeries(paths, torch.from_numpy(labels), torch.arange(length) * 5.0))
    section = FinetuneParams(**{"precision": "fp32", "augment": STILL} | settings)
    return EndToEndFitting(model, section, CPU, train, [], read=read_hu)


def read_hu(path):
    number, row = path.split("/")
    return random_hu(1, 100 * int(number) + int(row))[0]


def gradient_of_first_step(fitting):
    """Return the gradient of the first step of epoch 1, as it reaches the optimiser."""
    found = {}

    class StopError(Exception):
        pass

    def stop(*_args, **_kwargs):
        found.update({name: parameter.grad.clone() for name, parameter in fitting.model.named_parameters()
                      if parameter.grad is not None})  # fmt: skip
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ichpipe.training.end_to_end_trainer.step", stop)
        with pytest.raises(StopError):
            fitting.train_epoch(1, new_position())
    return found


def new_position():
    return Position(0.0, lambda: None)


def plain_gradient(fitting, loss_of):
    """Return the gradient of a loss of all series by one graph; ``loss_of`` gets logits, slice logits and labels."""
    fitting.model.train()
    outputs, slice_outputs = [], []
    for series in fitting.train:
        embedding, cnn_logits = fitting.model.cnn(torch.stack([read_hu(path) for path in series.paths]))
        outputs.append(fitting.model.sequence.one_series(embedding, cnn_logits, series.position_mm))
        slice_outputs.append(cnn_logits)
    fitting.model.zero_grad()
    loss_of(outputs, slice_outputs, [series.labels for series in fitting.train]).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in fitting.model.named_parameters()}
    fitting.model.zero_grad()
    return gradients


def mean_over_slices(logits, _slice_logits, labels):
    return weighted_bce(torch.cat(logits), torch.cat(labels))


def assert_same_gradient(found, expected):
    assert found.keys() == expected.keys()
    found, expected = (torch.cat([each[name].flatten() for name in expected]) for each in (found, expected))
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < 1e-5


# Batches by slices


@pytest.mark.parametrize("sample_slices", [None, 10])
@pytest.mark.parametrize("batch_slices", [1, 24, 64, 100_000])
def test_a_batch_holds_the_slices_asked_for_and_an_epoch_each_series_once(batch_slices, sample_slices):
    lengths = np.random.default_rng(1).integers(3, 41, 60).tolist()
    fitting = fitting_of(lengths, batch_slices=batch_slices, sample_slices=sample_slices)
    sizes = [min(length, sample_slices or length) for length in lengths]
    share = sum(sizes) / max(1, round(sum(sizes) / batch_slices))  # batch_slices, but that all batches are alike
    orders = []
    for epoch in (1, 2):
        batches = list(itertools.chain.from_iterable(fitting.steps(epoch)))
        series = [[int(fitting.slices.paths[batch.rows[rows[0]]].split("/")[0]) for rows, _, _ in batch.members]
                  for batch in batches]  # fmt: skip
        assert sorted(itertools.chain.from_iterable(series)) == list(range(60))
        for batch, numbers in zip(batches, series, strict=True):
            assert len(batch.rows) == sum(sizes[number] for number in numbers)
            assert len(numbers) == 1 or abs(len(batch.rows) - share) < max(sizes)
        orders.append(series)
    assert orders[0] != orders[1]
    # Where one series is more than a batch, as many batches as there are depends on the order.
    assert len(orders[0]) == len(orders[1]) or max(sizes) > share
    again = fitting_of(lengths, batch_slices=batch_slices, sample_slices=sample_slices)
    assert [batch.rows for batches in again.steps(1) for batch in batches] == [
        batch.rows for batches in fitting.steps(1) for batch in batches
    ]


@pytest.mark.parametrize("unknown", [0.0, 0.4])
def test_by_slices_a_short_series_weighs_what_it_holds(unknown):
    fitting = fitting_of([3, 20, 5], batch_slices=28, chunk_slices=4, unknown=unknown)
    assert_same_gradient(gradient_of_first_step(fitting), plain_gradient(fitting, mean_over_slices))


def test_by_series_all_weigh_the_same():
    fitting = fitting_of([3, 20, 5], batch_series=3, chunk_slices=4)

    def mean_over_series(logits, _slice_logits, labels):
        return sum(map(weighted_bce, logits, labels)) / len(labels)

    assert_same_gradient(gradient_of_first_step(fitting), plain_gradient(fitting, mean_over_series))


def test_accumulated_batches_by_slices_are_one_large_batch():
    fitting = fitting_of([3, 20, 5, 9, 4], batch_slices=14, accumulate=3, unknown=0.2)
    assert len(fitting.steps(1)[0]) > 1
    assert_same_gradient(gradient_of_first_step(fitting), plain_gradient(fitting, mean_over_slices))


def test_the_training_loss_is_the_mean_over_slices():
    fitting = fitting_of([3, 20, 5], batch_slices=28, learning_rate_cnn=1e-30, slice_loss=0.7, unknown=0.3)
    fitting.model.train()
    with torch.no_grad():
        logits = [
            fitting.model(torch.stack([read_hu(path) for path in series.paths]), series.position_mm)
            for series in fitting.train
        ]
    expected = float(weighted_bce(torch.cat(logits), torch.cat([series.labels for series in fitting.train])))
    position = new_position()
    fitting.train_epoch(1, position)
    assert position.mean() == pytest.approx(expected, rel=1e-5)


def test_without_a_known_label_nothing_is_learned():
    fitting = fitting_of([3, 4], batch_slices=7, slice_loss=1.0, unknown=1.0)
    before = [parameter.detach().clone() for parameter in fitting.model.parameters()]
    position = new_position()
    fitting.train_epoch(1, position)
    assert all(map(torch.equal, before, fitting.model.parameters()))
    assert np.isnan(position.mean())


# Statistics of batch norm


def test_statistics_follow_after_the_step_and_the_gradient_stays_exact():
    fitting = fitting_of([3, 20, 5], batch_slices=28, chunk_slices=4, backbone="test_resnet", norm_momentum=0.1)
    expected = plain_gradient(fitting, mean_over_slices)
    assert_same_gradient(gradient_of_first_step(fitting), expected)
    still = fitting_of([3, 20, 5], batch_slices=28, chunk_slices=4, backbone="test_resnet")
    for each in (fitting, still):
        before = {name: buffer.clone() for name, buffer in each.model.named_buffers() if "running" in name}
        assert before
        each.train_epoch(1, new_position())
        after = dict(each.model.named_buffers())
        moved = [name for name in before if not after[name].equal(before[name])]
        assert moved == (list(before) if each is fitting else [])


# The auxiliary loss


def test_the_slice_loss_adds_its_exact_gradient():
    fitting = fitting_of([3, 20, 5], batch_slices=28, chunk_slices=4, slice_loss=0.7, unknown=0.3)

    def with_slices(logits, slice_logits, labels):
        return mean_over_slices(logits, None, labels) + 0.7 * weighted_bce(torch.cat(slice_logits), torch.cat(labels))

    expected = plain_gradient(fitting, with_slices)
    assert_same_gradient(gradient_of_first_step(fitting), expected)
    without = fitting_of([3, 20, 5], batch_slices=28, chunk_slices=4, unknown=0.3)
    with pytest.raises(AssertionError):
        assert_same_gradient(gradient_of_first_step(without), expected)


# Rates by part


def test_each_part_of_the_cnn_has_its_rate():
    fitting = fitting_of([3], learning_rate_cnn=1e-3, layer_decay=0.5, learning_rate_sequence=0.1)
    rate_of = {id(p): g["initial_lr"] for g in fitting.optimizer.param_groups for p in g["params"]}
    parts = parts_of(fitting.model.cnn)
    assert len(parts) > 2
    for distance, part in enumerate(reversed(parts)):
        assert [rate_of[id(parameter)] for parameter in part] == pytest.approx([1e-3 * 0.5**distance] * len(part))
    assert {rate_of[id(parameter)] for parameter in fitting.model.sequence.parameters()} == {0.1}
    grouped = [id(p) for g in fitting.optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(map(id, fitting.model.parameters()))
    assert fitting.optimizer.param_groups[0]["initial_lr"] == 1e-3  # the rate that the learning curve shows
    decays = {p.ndim > 1: g["weight_decay"] for g in fitting.optimizer.param_groups for p in g["params"]}
    assert decays == {True: 0.01, False: 0.0}


def test_without_decay_the_groups_are_those_of_earlier_checkpoints():
    fitting = fitting_of([3], learning_rate_cnn=1e-3, learning_rate_sequence=0.1)
    cnn, arm = (list(module.parameters()) for module in (fitting.model.cnn, fitting.model.sequence))
    expected = [
        [p for p in parameters if (p.ndim > 1) is large] for parameters in (cnn, arm) for large in (True, False)
    ]
    found = [group["params"] for group in fitting.optimizer.param_groups]
    assert [list(map(id, group)) for group in found] == [list(map(id, group)) for group in expected]


# The epoch that is kept


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_keep_says_which_epoch_stays(tmp_path, keep, ema_decay):
    fitting = fitting_of([3, 4], epochs=3, keep=keep, ema_decay=ema_decay, learning_rate_cnn=1e-2)
    seen, losses = [], iter([0.1, 0.5, 0.4, 0.6])

    def validate():
        seen.append({name: tensor.clone() for name, tensor in fitting.model.state_dict().items()})
        return next(losses)

    trainer = fitting.trainer(tmp_path / "checkpoint.pt", "key")
    history = trainer.run(fitting.train_epoch, validate, compare_with_start=True)
    assert [line.val_loss for line in history] == [0.1, 0.5, 0.4, 0.6]
    kept = seen[{"best": 0, "last": 3}[keep]]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in fitting.model.state_dict().items())
    assert not all(torch.equal(tensor, seen[0][name]) for name, tensor in seen[3].items())


@pytest.mark.slow
def test_the_record_says_what_keeping_the_last_epoch_cost(run, tmp_path):
    other = run.copy(tmp_path / "last")
    hasty = set_options("finetune.keep=last", "finetune.learning_rate_sequence=50.0", "finetune.epochs=2")
    other.steps((*hasty, "finetune"), "evaluate", "report")
    record, history = (
        json.loads((other.artifacts / "finetuned" / name).read_text()) for name in ("record.json", "history.json")
    )
    assert record["val_loss_before"] == history[0]["val_loss"] < record["val_loss"] == history[-1]["val_loss"]
    assert record["best_epoch"] < 2
    page = (other.artifacts / "report" / "index.html").read_text()
    assert f"validation loss {history[0]['val_loss']:.4f} before, {history[-1]['val_loss']:.4f} after" in page
    assert "so the start was kept" not in page
    text = re.sub(r"<[^>]*>", " ", page)
    assert re.findall(r"fine-tuned\s+(\d)\s+[\d.]*\s+[\d.]+\s+kept", text) == ["2"]


# All together, and resumed


@pytest.mark.parametrize(
    ("backbone", "stop_after"), [("test_convnext", 1), ("test_convnext", 3), ("test_convnext", 4), ("test_resnet", 2)]
)
def test_all_of_it_resumes_to_the_same_bytes(tmp_path, monkeypatch, backbone, stop_after):
    monkeypatch.setattr("ichpipe.training.trainer.SAVE_WITHIN_S", 0.0)
    lengths = [3, 9, 4, 5, 12, 3]
    settings = {
        "epochs": 2, "batch_slices": 12, "slice_loss": 0.3, "layer_decay": 0.7, "ema_decay": 0.9, "warmup_epochs": 0.5,
        "unfreeze_epochs": 1, "keep": "last", "dropout": 0.3, "learning_rate_cnn": 1e-3,
        "backbone": backbone, "norm_momentum": 0.1,
    }  # fmt: skip

    def train(folder, stop=None):
        fitting = fitting_of(lengths, **settings)
        steps = itertools.count(1)

        def train_epoch(epoch, position):
            advance = position.advance

            def stop_there(*values):
                advance(*values)
                if next(steps) == stop:
                    raise KeyboardInterrupt

            position.advance = stop_there
            fitting.train_epoch(epoch, position)

        norm = partial(norm_of, fitting.model)
        history = fitting.trainer(folder / "checkpoint.pt", "key").run(train_epoch, norm, compare_with_start=True)
        return history, fitting.model.state_dict()

    history, weights = train(tmp_path / "whole")
    assert len(fitting_of(lengths, **settings).steps(1)) == 3
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_after)
    torch.manual_seed(99)  # another process
    resumed_history, resumed = train(tmp_path / "stopped")
    assert resumed_history == history
    assert len({line.val_loss for line in history}) == 3
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())


def norm_of(model):
    return float(sum(parameter.detach().double().square().sum() for parameter in model.parameters()))

"""What a training batch is, and that learning is the same however it is cut: in chunks, accumulated, over processes."""

import contextlib
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from process_kit import CPU, SIZE, STILL, random_hu, slice_fitting, train_as_one_of_two
from safetensors.torch import load_file

from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.common.device import generator, training_precision
from ichpipe.features.generations import open_features
from ichpipe.features.sequence_dataset import collect_series, plain_batches
from ichpipe.images import augmentation
from ichpipe.images.slice_batch import Batch, Cut, draw_cut, sample
from ichpipe.index.slice_index import read_index
from ichpipe.models.end_to_end import EndToEnd, backward_in_chunks, repeat_random
from ichpipe.models.slice_cnn import SliceCnn, parts_of, spec_for
from ichpipe.models.weights import load_sequence, load_slice_cnn
from ichpipe.params.schema import PAPER_WINDOWS, AugmentParams, CutMixParams, load_params
from ichpipe.training.end_to_end_trainer import EndToEndFitting, ImageSeries, image_series
from ichpipe.training.sequence_trainer import SequenceFitting
from ichpipe.training.trainer import Position, weighted_bce
from tests.test_models import sequence

WILD = AugmentParams(
    vertical_flip_probability=0.5, crop_area=0.6, crop_aspect=1.3, distortion=0.05, blur_px=1.5, rotation_deg=30
)


# Augmentation


def test_upside_down_and_back():
    hu = random_hu(2)
    certain = STILL.model_copy(update={"vertical_flip_probability": 1.0})
    turned = augmentation.apply(hu, augmentation.draw(certain, 2, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(turned, hu.flip(-2).float(), atol=0.02, rtol=0)


def test_a_crop_keeps_what_it_should_and_stretches_it():
    rows = torch.arange(SIZE, dtype=torch.float32).view(1, 1, SIZE, 1).expand(200, 1, SIZE, SIZE)
    cropped = STILL.model_copy(update={"crop_area": 0.25})
    made = augmentation.apply(rows, augmentation.draw(cropped, 200, torch.Generator().manual_seed(0)))
    inner = made[:, 0, 1:-1, 1:-1]
    assert float(inner.min()) >= 0  # no air moves in: the crop lies within
    areas = ((inner[:, -1, 0] - inner[:, 0, 0]) / (SIZE - 3)) ** 2  # by the rows that remain
    assert 0.2 < float(areas.min()) < 0.35
    assert float(areas.max()) > 0.9
    assert float(areas.mean()) == pytest.approx(0.625, abs=0.06)


def test_a_blur_keeps_the_mean_and_takes_the_grain():
    hu = random_hu(4).float()
    blurred = augmentation.apply(hu, augmentation.draw(STILL.model_copy(update={"blur_px": 3.0}), 4, generator(1)))
    assert torch.allclose(blurred.mean(dim=(1, 2, 3)), hu.mean(dim=(1, 2, 3)), atol=6)
    assert (blurred.std(dim=(1, 2, 3)) < 0.6 * hu.std(dim=(1, 2, 3))).all()
    even = torch.full((4, 1, SIZE, SIZE), 37.0)
    drawn = augmentation.draw(STILL.model_copy(update={"blur_px": 3.0}), 4, generator(1))
    torch.testing.assert_close(
        augmentation.apply(even, drawn)[..., 4:-4, 4:-4], even[..., 4:-4, 4:-4], atol=0.01, rtol=0
    )


def test_a_warp_moves_pixels_no_further_than_asked():
    columns = torch.arange(SIZE, dtype=torch.float32).view(1, 1, 1, SIZE).expand(50, 1, SIZE, SIZE)
    drawn = augmentation.draw(STILL.model_copy(update={"distortion": 0.05}), 50, generator(2))
    moved = augmentation.apply(columns, drawn)[..., 4:-4, 4:-4] - columns[..., 4:-4, 4:-4]
    assert 0.5 < float(moved.abs().max()) < 0.05 * SIZE * 1.4  # bicubic between the nodes overshoots a little


def test_draws_are_the_same_whole_in_parts_and_joined():
    hu = random_hu(5)
    drawn = augmentation.draw(WILD, 5, generator(3))
    whole = augmentation.apply(hu, drawn)
    parts = [augmentation.apply(hu[rows], drawn.part(rows)) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-2, rtol=0)
    joined = augmentation.AugmentDraw.joined([drawn.part(slice(0, 2)), drawn.part(slice(2, 5))])
    assert torch.equal(augmentation.apply(hu, joined), whole)
    together = augmentation.draw(WILD, 4, generator(3), together=True)
    assert (together.warp == together.warp[0]).all()


def test_new_kinds_of_change_leave_the_old_draws_as_they_were():
    old, new = (augmentation.draw(params, 5, generator(4)) for params in (AugmentParams(), WILD))
    assert torch.equal(old.noise_seed, new.noise_seed)
    assert torch.equal(old.offset_hu, new.offset_hu)


# CutMix


def test_a_cut_takes_its_share_of_pixels_and_label():
    own, others = torch.zeros(3, 1, SIZE, SIZE), torch.ones(3, 1, SIZE, SIZE)
    labels = torch.tensor([[1.0] * 6, [0.0] * 6, [float("nan")] * 6])
    shares = []
    for seed in range(300):
        cut = draw_cut(CutMixParams(alpha=1.0), 3, SIZE, seed)
        assert float(cut.images(own, others).mean()) == pytest.approx(1 - cut.kept, abs=1e-6)
        shares.append(cut.kept)
    assert 0.6 < np.mean(shares) < 0.8  # .5, and what is clipped at the border
    cut = Cut(torch.tensor([1, 0, 1]), slice(0, 8), slice(0, SIZE), 0.75)
    mixed = cut.labels(labels)
    assert mixed[0].tolist() == [0.75] * 6
    assert mixed[1].tolist() == [0.25] * 6
    assert mixed[2].isnan().all()


def test_some_batches_are_mixed_and_none_without_alpha():
    drawn = [draw_cut(CutMixParams(alpha=1.0, probability=0.3), 4, SIZE, seed) for seed in range(400)]
    assert 0.2 < np.mean([cut is not None for cut in drawn]) < 0.4
    assert draw_cut(CutMixParams(), 4, SIZE, 0) is None


def test_images_of_a_batch_are_the_same_whole_in_parts_and_in_shares():
    hu, rows = random_hu(6), range(6)
    drawn = augmentation.draw(WILD, 6, generator(5))
    cut = draw_cut(CutMixParams(alpha=1.0), 6, SIZE, 1)

    def images(mine):
        batch = Batch(rows, mine, cut, lambda: drawn)
        return batch.images(hu[batch.needed_rows], mine, CPU)

    whole = images(list(rows))
    assert not torch.equal(whole, augmentation.apply(hu, drawn))
    for mine in ([0, 2, 4], [1, 3, 5], [5]):
        torch.testing.assert_close(images(mine), whole[mine], atol=1e-2, rtol=0)


# Which slices


@pytest.mark.parametrize(("n", "size"), [(30, 10), (10, 10), (4, 10), (30, None)])
def test_samples_are_contiguous_and_reach_both_ends(n, size):
    samples = [list(sample(range(n), size, generator(seed))) for seed in range(200)]
    assert all(rows == list(range(rows[0], rows[0] + len(rows))) for rows in samples)
    assert {len(rows) for rows in samples} == {min(n, size or n)}
    assert set().union(*samples) == set(range(n))


def rows_of(fitting, epoch=1):
    return [list(batch.rows) for batches in fitting.steps(epoch) for batch in batches]


def test_an_epoch_is_every_slice_once_or_one_sample_of_each_series():
    whole = slice_fitting(batch_size=5)
    assert sorted(row for rows in rows_of(whole) for row in rows) == list(range(12))
    assert rows_of(whole) != rows_of(whole, 2)
    (rows,) = rows_of(slice_fitting(batch_size=4, sample_slices=2))  # a lone series joins the batch before it
    assert len(rows) == 6
    assert {row // 4 for row in rows} == {0, 1, 2}
    assert all(rows[at + 1] == rows[at] + 1 for at in (0, 2, 4))


def one_step(fitting):
    fitting.train_epoch(1, Position(0.0, lambda: None))
    return torch.cat([parameter.detach().flatten() for parameter in fitting.cnn.parameters()])


def test_accumulated_batches_learn_what_one_batch_does():
    settings = {"adam_eps": 1e-3, "warmup_epochs": 0.0}
    whole = one_step(slice_fitting(batch_size=12, **settings))
    parts = one_step(slice_fitting(batch_size=4, accumulate=3, **settings))
    other = one_step(slice_fitting(batch_size=4, accumulate=3, **settings | {"adam_eps": 1e-2}))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(other, whole, atol=1e-6, rtol=1e-4)


def test_images_are_made_in_full_precision_whatever_the_network_computes_in(monkeypatch):
    seen, embed = [], SliceCnn.embed
    monkeypatch.setattr(SliceCnn, "embed", lambda cnn, hu: seen.append(hu) or embed(cnn, hu))
    for precision in ("fp32", "bf16"):
        one_step(slice_fitting(batch_size=12, precision=precision, augment=WILD))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("supported", "used"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_imitated_on_no_cpu(monkeypatch, caplog, supported, used):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert training_precision(CPU, "bf16") == used
    assert ("no bf16 instructions" in caplog.text) == (not supported)
    assert training_precision(torch.device("cuda"), "bf16") == "bf16"
    assert training_precision(CPU, "fp16") == "fp16"
    assert slice_fitting(precision="bf16").precision == used


# End to end


@pytest.mark.parametrize("slice_weight", [0.0, 0.4])
def test_chunked_gradient_equals_plain_within_1e_5_with_dropout_and_augmentation(slice_weight):
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, SIZE, 0.4))
    model = EndToEnd(cnn, sequence(inputs=("embedding", "logits"), dim=cnn.embedding_dim, dropout=0.3)).train()
    hu, labels = random_hu(10), (torch.arange(60).view(10, 6) % 7 == 0).float()
    drawn = augmentation.draw(WILD, 10, generator(8), together=True)
    cut = draw_cut(CutMixParams(alpha=1.0), 10, SIZE, 3)
    batch, position_mm = Batch(range(10), list(range(10)), cut, lambda: drawn), torch.arange(10) * 5.0
    parts = [list(range(start, min(start + 4, 10))) for start in (0, 4, 8)]
    loss_of = partial(weighted_bce, labels=batch.labels(labels))
    chunks = [partial(batch.images, hu, part, CPU) for part in parts]
    context = contextlib.nullcontext
    found = backward_in_chunks(model, chunks, position_mm, loss_of, context=context, seed=3, slice_weight=slice_weight)
    chunked = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    outputs = []
    for number, chunk in enumerate(chunks):
        with repeat_random(3, number, CPU):
            outputs.append(model.cnn(chunk()))
    with repeat_random(3, -1, CPU):
        embedding, logits = (torch.cat(each) for each in zip(*outputs, strict=True))
        loss = loss_of(model.sequence.one_series(embedding, logits, position_mm))
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    (loss + slice_weight * loss_of(logits)).backward()
    plain = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert float((chunked - plain).norm() / plain.norm()) < 1e-5
    assert float(plain.norm()) > 0


def series_fitting(run, **settings):
    params, artifacts = load_params(run.params), Artifacts(run.artifacts)
    index = read_index(artifacts.index)
    model = EndToEnd(load_slice_cnn(artifacts.slice_cnn), load_sequence(artifacts.sequence("paper")))
    section = params.finetune.model_copy(update={"precision": "fp32", "augment": STILL} | settings)
    train, val = image_series(index, "train"), image_series(index, "val")
    return EndToEndFitting(model, section, CPU, train, val), params, artifacts, index


def sequence_gradient(fitting):
    return torch.cat([parameter.grad.flatten() for parameter in fitting.model.sequence.parameters()])


def test_with_a_frozen_cnn_it_is_stage_two_on_the_cache(run):
    """Loss and gradient of the sequence model are those on the cached embeddings, within their float16."""
    fitting, params, artifacts, index = series_fitting(run, learning_rate_cnn=0.0, batch_series=3)
    features = open_features(params, artifacts, index, params.sequence["paper"])
    fitting.model.train()
    fitting.model.sequence.eval()  # no dropout; the CNN has none
    fitting.unfreeze(1)
    batch = fitting.steps(1)[0][0]
    hu = torch.stack([fitting.slices[row][0] for row in batch.needed_rows])
    losses = fitting.backward(batch, hu, 3)
    assert all(parameter.grad is None for parameter in fitting.model.cnn.parameters())
    gradient = sequence_gradient(fitting)
    fitting.model.zero_grad()
    uids = [index.loc[index["path"] == fitting.slices.paths[batch.rows[rows[0]]], "series_uid"].item()
            for rows, _, _ in batch.members]  # fmt: skip
    cached = []
    for uid in uids:
        (batch,) = plain_batches(
            collect_series(features, index[index["series_uid"] == uid]), ("embedding", "logits"), 1
        )
        loss = weighted_bce(fitting.model.sequence(batch.sources, batch.lengths)[0], batch.labels[0])
        (loss / 3).backward()
        cached.append(float(loss.detach()))
    expected = sequence_gradient(fitting)
    assert [loss for loss, _ in losses] == pytest.approx(cached, abs=2e-3)
    assert [weight for _, weight in losses] == [1.0] * 3
    assert float((gradient - expected).norm() / expected.norm()) < 5e-3


def test_the_cnn_thaws_from_its_end(run):
    fitting = series_fitting(run, unfreeze_epochs=2)[0]
    parts = parts_of(fitting.model.cnn)
    assert sum(len(part) for part in parts) == len(list(fitting.model.cnn.parameters()))
    for epoch, count in ((1, 1), (2, 1), (3, 2), (2 * len(parts) + 1, len(parts))):
        fitting.unfreeze(epoch)
        learning = [all(parameter.requires_grad for parameter in part) for part in parts]
        assert learning == [False] * (len(parts) - count) + [True] * count
    at_once = series_fitting(run)[0]
    at_once.unfreeze(1)
    assert all(parameter.requires_grad for parameter in at_once.model.cnn.parameters())


def test_a_sample_without_labels_teaches_nothing(run):
    fitting = series_fitting(run, sample_slices=4, batch_series=2)[0]
    unknown = torch.full_like(fitting.slices.labels, float("nan"))
    fitting.slices.labels = unknown
    batch = fitting.steps(1)[0][0]
    assert [len(rows) for rows, _, _ in batch.members] == [4, 4]
    assert fitting.backward(batch, torch.zeros(8, 1, 48, 48), 2) == []


@pytest.mark.parametrize("half_precision", [True, False])
def test_a_step_without_labels_moves_the_schedule_alone(run, half_precision):
    fitting = series_fitting(run, batch_series=2, epochs=1)[0]
    fitting.scaler = torch.amp.GradScaler("cpu", enabled=half_precision)
    fitting.slices.labels = torch.full_like(fitting.slices.labels, float("nan"))
    before = [parameter.detach().clone() for parameter in fitting.model.parameters()]
    position = Position(0.0, lambda: None)
    fitting.train_epoch(1, position)
    assert all(map(torch.equal, before, fitting.model.parameters()))
    assert position.step == len(fitting.steps(1)) == fitting.schedule.last_epoch
    assert np.isnan(position.mean())


@pytest.mark.parametrize("known", [0, 1])
def test_unknown_classes_teach_a_sequence_model_nothing(run, known):
    """Where none is known nothing is learned; where `any` alone is, the outputs of the others stay."""
    params, artifacts = load_params(run.params), Artifacts(run.artifacts)
    index = read_index(artifacts.index)
    index.loc[:, list(CLASSES[known:])] = np.nan
    section = params.sequence["paper"]
    train = collect_series(open_features(params, artifacts, index, section), index[index["split"] == "train"])
    fitting = SequenceFitting(load_sequence(artifacts.sequence("paper")), section, CPU, train, [], 0)
    before = [parameter.detach().clone() for parameter in fitting.model.parameters()]
    position = Position(0.0, lambda: None)
    fitting.train_epoch(1, position)
    assert position.step
    assert all(loss.isfinite() for loss in map(torch.as_tensor, position.losses))
    assert all(map(torch.equal, before, fitting.model.parameters())) == (not known)
    if known:
        of_any, *others = (before[-1] != list(fitting.model.parameters())[-1]).tolist()  # the bias, by class
        assert of_any
        assert not any(others)


def test_the_batches_of_a_step_hold_each_series_once(run):
    fitting = series_fitting(run, batch_series=2, accumulate=2)[0]
    steps = fitting.steps(1)
    rows = [row for batches in steps for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(len(fitting.slices)))
    assert all(len(batches) == 2 for batches in steps[:-1])
    assert isinstance(fitting.train[0], ImageSeries)


# Stopped within an epoch, and over two processes


def finetuned(run, folder, *settings, processes=1, command="finetune"):
    other = run.copy(folder)
    words = [f"{word}" for setting in settings for word in ("--set", setting)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    code = [*(start if processes > 1 else [sys.executable]), "-m", "ichpipe.stages.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*code, *other.arguments(*words, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return other.artifacts


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("both")
    torch.multiprocessing.spawn(train_as_one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_a_gradient_that_no_process_has_stays_away(both):
    for facts in both:
        assert facts["gradients"]["both"].tolist() == [3.0, 6.0]
        assert facts["gradients"]["one"].tolist() == [1.0, 1.0]
        assert facts["gradients"]["none"] is None


def test_processes_that_go_on_count_every_loss_once(both):
    expected = np.mean([(1 + step + 3 * (3 + step)) / 4 for step in range(4)])
    assert [facts["train_loss"] for facts in both] == pytest.approx([expected] * 2)


def test_processes_end_with_the_same_averaged_network(both):
    """Statistics of its batch normalisation, too."""
    assert both[0]["history"] == both[1]["history"]
    assert any("running_mean" in name for name in both[0]["weights"])
    for name, values in both[0]["weights"].items():
        assert torch.equal(values, both[1]["weights"][name]), name


def test_processes_move_statistics_by_the_slices_of_all(both):
    assert both[0]["statistics"] == both[1]["statistics"] == (1.0, 1.0)  # half way from 0 and 1 to 2 and 1


def assert_same_weights(one, other):
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-6, rtol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("command", "settings", "model"),
    [
        ("finetune", ("finetune.adam_eps=0.001", "finetune.batch_series=4", "finetune.cutmix.alpha=1.0"), "finetuned"),
        (
            "finetune",
            ("finetune.adam_eps=0.001", "finetune.batch_slices=90", "finetune.slice_loss=0.5",
             "finetune.layer_decay=0.7", "finetune.ema_decay=0.5", "finetune.keep=last"),
            "finetuned",
        ),
        (
            "fit-slices",
            ("fit-slices.backbone=test_convnext", "fit-slices.adam_eps=0.001", "fit-slices.batch_size=31",
             "fit-slices.cutmix.alpha=1.0"),
            "slice-cnn",
        ),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_two_processes_learn_what_one_does(run, tmp_path, command, settings, model):
    one = finetuned(run, tmp_path / "one", *settings, command=command)
    two = finetuned(run, tmp_path / "two", *settings, command=command, processes=2)
    assert_same_weights(one / model / "model.safetensors", two / model / "model.safetensors")
    history, expected = (json.loads((root / model / "history.json").read_text()) for root in (two, one))
    for line, other in zip(history, expected, strict=True):
        assert line["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
        if line["epoch"]:
            assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    assert len({line["val_loss"] for line in history}) == len(history)  # they did learn

"""Changes of training sequences: what is drawn is in range, replayable, and moves features, labels and places alike."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.features.sequence_dataset import (
    LabelledSeries,
    Shuffle,
    apply_changes,
    draw_changes,
    plain_batches,
    train_batches,
)
from ichpipe.params.schema import RegularizeParams

ALL = RegularizeParams(
    reverse_probability=0.5, stride2_probability=0.5, crop_slices=10, feature_noise=0.1, feature_dropout=0.2
)
NAMES = ("embedding", "logits")


def make_series(count=12, seed=0):
    """Series in which every number of a slice says which slice it is."""
    generator = np.random.default_rng(seed)
    series = []
    for number in range(count):
        size = int(generator.integers(1, 40))
        own = torch.arange(size, dtype=torch.float32) + 100 * number
        held = {"embedding": own[:, None].repeat(1, 5), "logits": own[:, None].repeat(1, 6)}
        labels = own[:, None].repeat(1, 6)
        series.append(LabelledSeries(f"1.2.{number}", np.arange(size), (held,), labels, own * 5))
    return series


@settings(max_examples=100, deadline=None)
@given(
    slices=st.integers(1, 70),
    seed=st.integers(0, 10_000),
    crop=st.one_of(st.none(), st.integers(1, 20)),
    stride=st.sampled_from([0.0, 1.0]),
    turn=st.sampled_from([0.0, 1.0]),
)
def test_what_is_drawn_is_a_run_of_slices_of_the_series(slices, seed, crop, stride, turn):
    section = RegularizeParams(crop_slices=crop, stride2_probability=stride, reverse_probability=turn)
    rows = draw_changes(section, slices, seed).rows.tolist()
    assert 0 < len(rows) <= (crop or slices)
    assert all(0 <= row < slices for row in rows)
    step = 2 if stride and slices >= 8 else 1
    assert {b - a for a, b in itertools.pairwise(rows)} <= {-step if turn else step}
    if crop and slices // step >= crop:
        assert len(rows) == crop


def test_every_start_of_a_crop_is_drawn():
    section = RegularizeParams(crop_slices=4)
    starts = {int(draw_changes(section, 9, seed).rows[0]) for seed in range(300)}
    assert starts == set(range(6))


def test_the_same_draw_gives_the_same_numbers_and_another_seed_others():
    sources = {"embedding": torch.randn(30, 8), "logits": torch.randn(30, 6), "position_mm": torch.randn(30)}
    one, again, other = (draw_changes(ALL, 30, seed) for seed in (1, 1, 2))
    first, second, third = (apply_changes(ALL, sources, drawn) for drawn in (one, again, other))
    assert all(torch.equal(first[name], second[name]) for name in sources)
    assert first["embedding"].shape != third["embedding"].shape or not torch.equal(
        first["embedding"], third["embedding"]
    )
    assert torch.equal(first["logits"], sources["logits"][one.rows])  # noise is for features alone


def test_noise_and_dropout_have_the_size_they_are_asked_for():
    sources = {"embedding": torch.full((40, 4000), 3.0)}
    noisy = apply_changes(RegularizeParams(feature_noise=0.2), sources, draw_changes(ALL, 40, 5))["embedding"]
    assert float(noisy.mean()) == pytest.approx(3, rel=0.01)
    assert float(noisy.std()) == pytest.approx(0.6, rel=0.02)
    section = RegularizeParams(feature_dropout=0.3)
    dropped = apply_changes(section, sources, draw_changes(section, 40, 5))["embedding"]
    gone = (dropped == 0).all(dim=0)
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.allclose(dropped[:, ~gone], torch.tensor(3 / 0.7))  # whole features, throughout the series


def test_features_labels_and_places_move_together():
    section = ALL.model_copy(update={"feature_noise": 0.0, "feature_dropout": 0.0})
    seen = 0
    for batch in train_batches(make_series(), NAMES, 4, Shuffle(0, 1, section)):
        real = ~batch.labels[..., 0].isnan()
        assert real.sum(1).tolist() == batch.lengths.tolist()
        for values in (batch.sources["embedding"][..., 0], batch.sources["logits"][..., 3]):
            assert torch.equal(values[real], batch.labels[..., 0][real])
        assert torch.equal(batch.sources["position_mm"][real] / 5, batch.labels[..., 0][real])
        seen += len(batch.lengths)
    assert seen == 12


def test_a_series_is_changed_in_the_same_way_whatever_its_batch():
    def by_series(size, series):
        embeddings = {}
        for batch in train_batches(series, NAMES, size, Shuffle(3, 2, ALL)):
            for row, length in enumerate(batch.lengths.tolist()):
                embeddings[int(batch.labels[row, 0, 0]) // 100] = batch.sources["embedding"][row, :length]
        return embeddings

    series = make_series()
    one, other = by_series(3, series), by_series(5, series[::-1])
    assert one.keys() == other.keys() == set(range(12))
    assert all(torch.equal(one[number], other[number]) for number in one)


def test_epochs_differ_and_nothing_asked_changes_nothing():
    series = make_series()

    def first_slices(epoch):
        first = [
            batch.sources["embedding"][:, 0, 0] for batch in train_batches(series, NAMES, 4, Shuffle(0, epoch, ALL))
        ]
        return sorted(torch.cat(first).tolist())

    assert first_slices(1) != first_slices(2)
    plain = {int(batch.labels[0, 0, 0]): batch.sources["embedding"][0] for batch in plain_batches(series, NAMES, 1)}
    for batch in train_batches(series, NAMES, 1, Shuffle(0, 1, RegularizeParams())):
        assert torch.equal(batch.sources["embedding"][0], plain[int(batch.labels[0, 0, 0])])

"""Thin and thick series of one head have comparable maxima."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.index.thin_slices import smooth_thin, stride_of


def cut(thick, parts, start=0.0):
    """Thick slices (n, k) of 5 mm cut into ``parts`` equal thin ones each: values and positions."""
    return np.repeat(thick, parts, axis=0), start + (np.arange(len(thick) * parts) + 0.5) * 5.0 / parts


@settings(deadline=None, max_examples=100)
@given(count=st.integers(1, 40), parts=st.integers(3, 16), seed=st.integers(0, 99), start=st.floats(-500, 500))
def test_a_thick_slice_cut_into_thin_ones_keeps_the_maximum(count, parts, seed, start):
    thick = np.random.default_rng(seed).random((count, 6))
    found = smooth_thin(*cut(thick, parts, start))
    np.testing.assert_allclose(found.max(axis=0), thick.max(axis=0), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), parts=st.integers(3, 8), seed=st.integers(0, 99))
def test_positions_rounded_in_the_header_change_nothing(count, parts, seed):
    generator = np.random.default_rng(seed)
    values, places = cut(generator.random((count, 6)), parts)
    rounded = places + generator.uniform(-0.01, 0.01, len(places))
    np.testing.assert_allclose(smooth_thin(values, rounded), smooth_thin(values, places), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), parts=st.integers(3, 8), seed=st.integers(0, 99), copies=st.integers(2, 4))
def test_slices_at_one_place_count_once_and_their_order_does_not(count, parts, seed, copies):
    generator = np.random.default_rng(seed)
    values, places = generator.random((count * parts, 6)), cut(np.zeros((count, 6)), parts)[1]
    weights = generator.integers(1, copies + 1, len(places))  # some places once, some several times
    order = generator.permutation(weights.sum())
    found = smooth_thin(np.repeat(values, weights, axis=0)[order], np.repeat(places, weights)[order])
    expected = np.repeat(smooth_thin(values, places), weights, axis=0)[order]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), count=st.integers(1, 60))
def test_means_stay_within_the_values_of_their_window(seed, count):
    generator = np.random.default_rng(seed)
    values, places = generator.random((count, 6)), np.sort(generator.random(count) * 30)
    found = smooth_thin(values, places)
    for number in range(count):
        near = np.abs(places - places[number]) <= 8.0
        assert (found[number] <= values[near].max(axis=0) + 1e-9).all()
        assert (found[number] >= values[near].min(axis=0) - 1e-9).all()
    np.testing.assert_allclose(smooth_thin(np.full((count, 6), 0.3), places), 0.3, atol=1e-9)


@given(step=st.floats(2.5, 10.0), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_thick_series_stay_as_they_are(step, count, seed):
    values = np.random.default_rng(seed).random((count, 6))
    assert smooth_thin(values, np.arange(count) * step) is values


@pytest.mark.parametrize("step", [0.5, 0.625, 1.0, 1.25, 2.0])
def test_a_lone_slice_at_an_end_weighs_as_much_as_one_in_the_middle(step):
    count = 60
    weights = []
    for lone in (0, 1, count // 2, count - 1):
        values = np.zeros((count, 1))
        values[lone] = 1.0
        weights.append(smooth_thin(values, np.arange(count) * step).max())
    assert weights == pytest.approx([weights[2]] * 4)
    assert weights[2] == pytest.approx(step / 5.0, rel=0.2)


def test_beyond_a_gap_slices_are_not_mixed():
    places = np.concatenate([np.arange(20) * 1.0, [40.0], 60 + np.arange(20) * 1.0])
    values = np.concatenate([np.zeros(20), [0.9], np.full(20, 0.5)])[:, None]
    np.testing.assert_allclose(smooth_thin(values, places), values, atol=1e-12)


def test_the_window_is_a_parameter():
    values, places = cut(np.random.default_rng(0).random((9, 2)), 3)
    assert smooth_thin(values, places, window_mm=3.0) is values
    assert smooth_thin(values, places, window_mm=10.0).max() < smooth_thin(values, places).max()


def test_noise_of_single_slices_no_longer_decides():
    generator = np.random.default_rng(0)
    noise = generator.beta(1, 30, size=(250, 6))  # a healthy head in 250 slices, and in 31
    thin = smooth_thin(noise, np.arange(250) * 0.625)
    thick = noise[::8]
    assert noise.max() > 2 * thin.max()
    assert thin.max() < 1.2 * thick.max()


@pytest.mark.parametrize("count", [1, 2])
def test_a_slice_or_two(count):
    values = np.full((count, 6), 0.4)
    np.testing.assert_allclose(smooth_thin(values, np.arange(count) * 1.0), 0.4)


@pytest.mark.parametrize(
    ("step", "spacing", "stride"),
    [(5.0, 5.0, 1), (2.5, 5.0, 1), (1.25, 5.0, 4), (0.625, 5.0, 8), (1.0, 5.0, 5), (1.0, 1.0, 1), (0.6, 5.0, 8)],
)
def test_parts_have_about_the_spacing_of_training(step, spacing, stride):
    assert stride_of(np.arange(60) * step, spacing) == stride
    assert stride_of(np.repeat(np.arange(60) * step, 2), spacing) == stride  # two slices at each place


def test_one_slice_is_one_part():
    assert stride_of(np.array([3.0])) == stride_of(np.array([])) == stride_of(np.array([3.0, 3.0])) == 1

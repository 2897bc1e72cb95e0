"""Thin and thick series of one head have comparable maxima."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.thin import smooth_thin


@settings(deadline=None, max_examples=60)
@given(count=st.integers(2, 40), parts=st.integers(3, 9), seed=st.integers(0, 99), start=st.floats(-500, 500))
def test_a_thick_slice_cut_into_thin_ones_keeps_the_maximum(count, parts, seed, start):
    thick = np.random.default_rng(seed).random((count, 6))
    thin = np.repeat(thick, parts, axis=0)
    places = start + (np.arange(count * parts) + 0.5) * 5.0 / parts
    found = smooth_thin(thin, places)
    # Odd parts have a slice at the middle of each thick one; with even ones the windows lie half a part aside.
    tolerance = 1e-3 if parts % 2 else 0.5 / parts + 1e-3
    np.testing.assert_allclose(found.max(axis=0), thick.max(axis=0), atol=tolerance)
    assert (found.max(axis=0) <= thick.max(axis=0) + 1e-9).all()


@given(step=st.floats(2.5, 10.0), seed=st.integers(0, 9))
def test_thick_series_stay_as_they_are(step, seed):
    values = np.random.default_rng(seed).random((20, 6))
    assert smooth_thin(values, np.arange(20) * (step + 0.01)) is values


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), count=st.integers(1, 60))
def test_means_stay_within_the_values_of_their_window(seed, count):
    generator = np.random.default_rng(seed)
    values, places = generator.random((count, 6)), np.sort(generator.random(count) * 30)
    found = smooth_thin(values, places)
    for number in range(count):
        near = np.abs(places - places[number]) <= 8.0
        assert (found[number] <= values[near].max(axis=0) + 1e-9).all()
    np.testing.assert_allclose(smooth_thin(np.full((count, 6), 0.3), places), 0.3, atol=1e-9)


def test_noise_of_single_slices_no_longer_decides():
    generator = np.random.default_rng(0)
    noise = generator.beta(1, 30, size=(250, 6))  # a healthy head in 250 slices, and in 31
    thin = smooth_thin(noise, np.arange(250) * 0.625)
    thick = noise[::8]
    assert noise.max() > 2 * thin.max()
    assert thin.max() < 1.2 * thick.max()


def test_slices_at_one_place_count_once():
    values = np.array([[0.0], [0.0], [0.0], [1.0], [0.0], [0.0]])
    places = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    doubled, places_doubled = np.repeat(values, 3, axis=0), np.repeat(places, 3)
    np.testing.assert_allclose(smooth_thin(doubled, places_doubled)[::3], smooth_thin(values, places))


@pytest.mark.parametrize("count", [1, 2])
def test_a_slice_or_two(count):
    values = np.full((count, 6), 0.4)
    np.testing.assert_allclose(smooth_thin(values, np.arange(count) * 1.0), 0.4)

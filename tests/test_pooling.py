"""Slices to studies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.scoring.pooling import pool

BY_HAND = {
    "max": lambda rows: rows.max(axis=0),
    "mean": lambda rows: rows.mean(axis=0),
    "mean-of-top-3": lambda rows: np.sort(rows, axis=0)[::-1][:3].mean(axis=0),
    "noisy-or": lambda rows: 1 - np.prod(1 - rows, axis=0),
}


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=6), seed=st.integers(0, 99))
@pytest.mark.parametrize("how", list(BY_HAND))
def test_each_group_is_pooled_by_itself_in_any_order_of_rows(how, sizes, seed):
    generator = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    values = generator.random((len(group), 2))
    order = generator.permutation(len(group))
    found = pool(values[order], group[order], len(sizes), how)
    expected = [BY_HAND[how](values[group == number]) for number in range(len(sizes))]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("how", list(BY_HAND))
def test_certainty_stays_certain(how):
    found = pool(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([0, 0]), 2, how)
    np.testing.assert_allclose(found, [[0, 1], [0, 0]], atol=1e-12)

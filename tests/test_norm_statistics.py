"""Statistics of batch norm that follow the weights end to end."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ichpipe.training.norm_statistics import NormStatistics


def network(learns=True):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return layers.requires_grad_(learns).eval()


def images(n=12):
    return torch.randn(n, 1, 9, 9, generator=torch.Generator().manual_seed(1)) * 3 + 2


def follow(layers, parts, momentum=0.1):
    statistics = NormStatistics(layers, momentum)
    with statistics.collected():
        for part in parts:
            with torch.no_grad():
                layers(part)
            layers(part)  # the pass with a graph counts nothing
    statistics.update()
    return statistics


@pytest.mark.parametrize("size", [1, 5, 12])
def test_statistics_move_towards_those_of_the_step_whatever_its_chunks(size):
    layers = network()
    with torch.no_grad():
        first = layers[0](images())
        second = layers[3](F.relu(layers[1](first)))  # what the second norm gets, while the first has not moved
    follow(layers, images().split(size))
    for norm, seen in ((layers[1], first), (layers[4], second)):
        variance, mean = torch.var_mean(seen, (0, 2, 3), correction=0)
        assert torch.allclose(norm.running_mean, 0.1 * mean, atol=1e-5)
        assert torch.allclose(norm.running_var, 0.9 + 0.1 * variance, rtol=1e-4)


def test_each_update_counts_its_own_slices_alone():
    layers, twice = network(), network()
    statistics = follow(twice, [images()])
    follow(layers, [images()])
    before = layers[4].running_mean.clone()
    assert torch.equal(before, twice[4].running_mean)
    statistics.update()  # nothing was seen: nothing moves, and nothing is NaN
    assert torch.equal(before, twice[4].running_mean)
    layers(images())  # outside of `collected`
    assert not layers[1]._forward_pre_hooks


@pytest.mark.parametrize(("learns", "momentum"), [(False, 0.1), (True, 0.0)])
def test_what_does_not_learn_keeps_its_statistics(learns, momentum):
    layers = network(learns)
    follow(layers, [images()], momentum)
    assert torch.equal(layers[1].running_mean, torch.zeros(3))
    assert torch.equal(layers[4].running_var, torch.ones(4))


def test_they_come_to_the_mean_and_variance_of_the_images():
    layers = network()
    for _ in range(200):
        follow(layers, [images()])
    with torch.no_grad():
        out = layers(images())
    np.testing.assert_allclose(out.mean((0, 2, 3)), 0.0, atol=1e-4)
    np.testing.assert_allclose(out.var((0, 2, 3), correction=0), 1.0, rtol=1e-3)

"""Batch normalisation folded into convolutions: the same features, and nothing folded that is not known."""

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from timm.layers import BatchNormAct2d
from torch import nn

from ichpipe.features.generations import GenerationSpec
from ichpipe.models.folding import folded
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import save_model
from ichpipe.params.schema import PAPER_WINDOWS

NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def make_network(backbone, size_px=64):
    """Return a network whose normalisations do something; a new one has mean 0 and variance 1."""
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(backbone, PAPER_WINDOWS, size_px, 0.0)).eval()
    for module in norms_of(cnn):
        nn.init.uniform_(module.running_mean, -0.2, 0.2)
        nn.init.uniform_(module.running_var, 0.5, 2.0)
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.uniform_(module.bias, -0.2, 0.2)
    return cnn


def norms_of(cnn):
    return [module for module in cnn.modules() if isinstance(module, NORMS)]


@torch.inference_mode()
def outputs(cnn):
    hu = torch.randint(-1024, 2000, (3, 1, cnn.spec.size_px, cnn.spec.size_px), generator=torch.Generator())
    return cnn(hu.to(torch.int16))


def assert_same_function(network, reference):
    for output, expected in zip(outputs(network), outputs(reference), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    "backbone", ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "test_byobnet", "test_efficientnet"]
)
def test_all_are_folded_and_the_features_stay(backbone):
    cnn = make_network(backbone)
    before = [values.clone() for values in cnn.state_dict().values()]
    fused = folded(cnn)
    assert norms_of(cnn)
    assert not norms_of(fused)
    assert_same_function(fused, cnn)
    assert all(torch.equal(*pair) for pair in zip(cnn.state_dict().values(), before, strict=True))


def test_a_normalisation_before_its_convolution_stays():
    """DenseNet normalises what several layers gave together; its pairs of convolution and normalisation are folded."""
    cnn = make_network("densenet121")
    fused = folded(cnn)
    assert 0 < len(norms_of(fused)) < len(norms_of(cnn))
    assert_same_function(fused, cnn)


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_efficientnet_gn", "test_nfnet"])
def test_a_network_without_batch_normalisation_is_returned_as_it_is(backbone):
    cnn = make_network(backbone, 160)
    assert folded(cnn) is cnn


class Backbone(nn.Module):
    """By timm's contract, with one pair whose layers are joined in a given way."""

    def __init__(self, join, channels=3):
        super().__init__()
        self.join, self.first, self.norm = join, nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(0.3)

    def forward_features(self, image):
        return self.join(self, image)

    def forward_head(self, features, *, pre_logits):
        assert pre_logits
        return (sum(features) if isinstance(features, list) else features).mean((2, 3))


def used_twice(self, image):
    given = self.first(image)
    return self.norm(given) + given


def changed_in_place(self, image):
    return self.norm(self.first(image).relu_())


def applied_twice(self, image):
    return self.norm(self.first(image)) - self.norm(image.repeat(1, 2, 1, 1)[:, :4, 2:, 2:])


def read_directly(self, image):
    return self.norm(self.first(image)) * self.norm.running_var.view(1, -1, 1, 1)


def plain(self, image):
    return self.norm(self.first(image))


@pytest.mark.parametrize("join", [used_twice, changed_in_place, applied_twice, read_directly])
def test_what_is_no_pair_is_not_folded(join):
    cnn = make_network("test_resnet")
    cnn.backbone = Backbone(join)
    assert folded(cnn) is cnn
    cnn.backbone = Backbone(plain)
    assert not norms_of(folded(cnn))


@pytest.mark.parametrize(
    ("backbone", "join", "expected"),
    [
        ("test_resnet", None, "folded"),
        ("test_convnext", None, "folded"),  # it has none
        ("test_resnet", plain, "folded"),
        ("test_resnet", used_twice, "kept"),
        ("test_resnet", read_directly, "kept"),
        ("test_resnet", lambda self, image: 0 * plain(self, image), "kept"),
    ],
)
def test_the_identity_of_a_store_says_whether_it_was_folded(tmp_path, backbone, join, expected):
    cnn = make_network(backbone, 160).train()
    if join is not None:
        cnn.backbone = Backbone(join)
    save_model(tmp_path, cnn, {})
    assert all(module.training for module in cnn.modules())
    assert GenerationSpec(tmp_path, pd.DataFrame()).identity()["batch_norm"] == expected
    with safe_open(tmp_path / "model.safetensors", "np") as file:  # other files have the bytes of before
        assert ("batch_norm" in file.metadata()["ichpipe"]) == (expected == "kept")
    assert (folded(cnn) is cnn) == (expected == "kept" or backbone == "test_convnext")


def test_a_backbone_that_gives_its_head_several_tensors():
    """As timm's EfficientViM does."""
    cnn = make_network("test_resnet")
    cnn.backbone = Backbone(lambda self, image: [plain(self, image)] * 2)
    assert not norms_of(folded(cnn))
    cnn.backbone = Backbone(lambda self, image: [used_twice(self, image)] * 2)
    assert folded(cnn) is cnn


def test_a_network_that_gives_nothing_but_zeros_is_left_alone():
    """Any folding would seem right there."""
    cnn = make_network("test_resnet")
    cnn.backbone = Backbone(lambda self, image: 0 * plain(self, image))
    assert folded(cnn) is cnn


def test_a_backbone_of_fixed_size_gets_an_image_of_its_own_size():
    sides = []

    def join(backbone, image):
        sides.append(image.shape[-1])
        if image.shape[-1] != 96:
            raise AssertionError("Input height (64) doesn't match model (96).")
        return plain(backbone, image)

    cnn = make_network("test_resnet", 96)
    cnn.backbone = Backbone(join)
    assert not norms_of(folded(cnn))
    assert sides[0] == 64
    assert set(sides[1:]) == {96}

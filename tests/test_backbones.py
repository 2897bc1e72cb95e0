"""Backbones at another size than theirs, and checkpoints in the forms that people have."""

import argparse

import pytest
import timm
import torch

from ichpipe.common.errors import ParamsError, WeightsError
from ichpipe.models.folding import folded, keeps_batch_norm
from ichpipe.models.slice_cnn import SliceCnn, require_size, spec_for
from ichpipe.models.weights import load_pretrained
from ichpipe.params.schema import Params

WINDOWS = Params().windows

pytestmark = pytest.mark.slow  # each starts processes or writes whole heads


def build(name, size_px=96):
    torch.manual_seed(0)
    return SliceCnn(spec_for(name, WINDOWS, size_px, 0.0))


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "coat_lite_tiny", "resmlp_12_224",
     "levit_128s", "mobilenetv4_conv_small", "resnet10t", "lambda_resnet26t"],
)  # fmt: skip
def test_backbones_take_another_size(name):
    cnn = build(name)
    before = {key: value.clone() for key, value in cnn.state_dict().items()}
    random = torch.random.get_rng_state()
    require_size(cnn)
    assert cnn.training
    assert all(torch.equal(before[key], value) for key, value in cnn.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert cnn(torch.zeros(2, 1, 96, 96))[1].shape == (2, 6)


@pytest.mark.parametrize("name", ["lambda_resnet26t", "resnet10t", "mobilenetv4_conv_small"])
def test_what_folds_gives_the_same_features(name):
    """lambda_resnet26t has weights of five dimensions (Conv3d) beside those that fold."""
    cnn = build(name).eval()
    hu = torch.randn(2, 1, 96, 96) * 40
    assert not keeps_batch_norm(cnn)
    with torch.no_grad():
        assert torch.allclose(folded(cnn)(hu)[0], cnn(hu)[0], atol=1e-4)


@pytest.mark.parametrize(("name", "own"), [("efficientformer_l1", 224), ("crossvit_tiny_240", 240)])
def test_a_backbone_of_one_size_names_it(name, own):
    with pytest.raises(ParamsError, match=f"{name} can't .* 96 px.*set prepare.size_px to {own}"):
        require_size(build(name))
    require_size(build(name, own))


def backbone_state(name):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=10).state_dict()


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "nested": lambda state: {"model": {"state_dict": state}},
    "module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "compiled and parallel": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "Lightning": lambda state: {
        "state_dict": {**{f"model.{key}": value for key, value in state.items()}, "loss.weight": torch.ones(1)},
        "pytorch-lightning_version": "2.0",
        "hyper_parameters": {"lr": 0.1},
    },
    "Lightning, deeper": lambda state: {
        "state_dict": {**{f"net.backbone.{key}": value for key, value in state.items()}, "head.bias": torch.ones(1)}
    },
    "DINO": lambda state: {
        "teacher": {**{f"backbone.{key}": value for key, value in state.items()}, "head.mlp.weight": torch.ones(1)},
        "student": {f"module.backbone.{key}": value + 1 for key, value in state.items()},
        "epoch": 3,
    },
    "a name of its own": lambda state: {"my_weights": state, "optimizer": {"state": {0: {"step": 1}}}},
    "half precision": lambda state: {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    },
    "averaged": lambda state: {"n_averaged": torch.ones(1), **{f"module.{key}": value for key, value in state.items()}},
    "another head": lambda state: {**state, "head.bn.weight": torch.ones(3), "aux.weight": torch.ones(2)},
    "timm of the hub": lambda state: {f"timm_model.{key}": value for key, value in state.items()},
    "timm": lambda state: {
        "epoch": 1, "arch": "resnet10t", "state_dict": state, "args": argparse.Namespace(lr=0.1), "version": 2,
        "metric": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("form", WRAPPERS)
def test_checkpoints_are_unwrapped(tmp_path, form):
    state = backbone_state("resnet10t")
    torch.save(WRAPPERS[form](state), tmp_path / "weights.pt")
    cnn = build("resnet10t")
    load_pretrained(cnn.backbone, "resnet10t", str(tmp_path / "weights.pt"))
    loaded = cnn.backbone.state_dict()
    exact = {key: value.half().to(value.dtype) if form == "half precision" else value for key, value in state.items()}
    assert all(torch.equal(loaded[key], exact[key]) for key in loaded)


@pytest.mark.parametrize("name", ["levit_128s", "resmlp_12_224"])
def test_weights_of_another_size_load_or_name_the_size(tmp_path, name):
    torch.save(backbone_state(name), tmp_path / "weights.pt")
    load_pretrained(build(name, 224).backbone, name, str(tmp_path / "weights.pt"))
    with pytest.raises(WeightsError, match=r"the prepare\.size_px that its weights were trained with"):
        load_pretrained(build(name).backbone, name, str(tmp_path / "weights.pt"))


def test_a_folder_of_weights_is_named(tmp_path):
    with pytest.raises(WeightsError, match="is a folder; name the weights file in it"):
        load_pretrained(build("resnet10t").backbone, "resnet10t", str(tmp_path))


def test_position_embeddings_follow_the_size(tmp_path):
    state = backbone_state("vit_tiny_patch16_224")
    torch.save({"model": state}, tmp_path / "weights.pt")
    cnn = build("vit_tiny_patch16_224")
    load_pretrained(cnn.backbone, "vit_tiny_patch16_224", str(tmp_path / "weights.pt"))
    assert cnn.backbone.pos_embed.shape[1] == 1 + 36
    assert torch.equal(cnn.backbone.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


class Stranger:
    """An object that a checkpoint must not bring with it."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3, "lr": 0.1}, "it holds epoch, lr; save the state_dict alone"),
        ([torch.ones(1)], "no table of named tensors"),
        ({"state_dict": {"a": torch.ones(1)}, "config": Stranger()}, "holds objects of .*Stranger.*not unpickled"),
        ({}, "no table of named tensors"),
    ],
)
def test_what_was_found_is_said(tmp_path, content, reason):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=reason):
        load_pretrained(build("resnet10t").backbone, "resnet10t", str(tmp_path / "weights.pt"))

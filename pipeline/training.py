"""What the three learning steps share: optimiser, schedule, resuming, and keeping the best weights."""

from __future__ import annotations

import logging
import math
import pickle
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ichpipe.device import derive_seed
from ichpipe.errors import TrainingError
from ichpipe.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

log = logging.getLogger("ichpipe")

Weights = dict[str, "Tensor"]


@dataclass(frozen=True)
class Epoch:
    """One line of a learning curve. Losses are weighted log losses (RSNA 2019)."""

    epoch: int  # 0: before the first step
    train_loss: float | None
    val_loss: float
    learning_rate: float


def make_optimizer(groups: Sequence[tuple[nn.Module, float]], weight_decay: float, eps: float = 1e-8) -> Optimizer:
    """Build AdamW with a learning rate per module; no weight decay on biases and norms (one-dimensional)."""
    parameters: list[dict[str, Any]] = []
    for module, rate in groups:
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.ndim > 1]
        vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
        parameters.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
        parameters.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(parameters, eps=eps)


def make_schedule(optimizer: Optimizer, steps_per_epoch: int, epochs: int, warmup_epochs: float) -> LambdaLR:
    """Linear warm-up, then half a cosine down to zero, by optimiser step (Nguyen et al. 2020)."""
    total = max(1, steps_per_epoch * epochs)
    warmup = min(total - 1, round(warmup_epochs * steps_per_epoch))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def step(
    model: nn.Module, optimizer: Optimizer, schedule: LambdaLR, scaler: torch.amp.GradScaler, max_norm: float
) -> None:
    """Clip the gradient, step optimiser and schedule, and clear the gradient."""
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()


@dataclass
class Trainer:
    """Runs epochs, keeps the weights that are best on validation, and goes on where it was stopped.

    ``key`` is a digest of all that decides the result; a checkpoint with another key is not used.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    seed: int
    epochs: int
    checkpoint: Path
    key: str
    scaler: torch.amp.GradScaler | None = None  # of fp16: its scale is part of where training stands
    last: int = 1  # keep the weights of the last so many epochs; 1: of the one that is best on validation
    save_every_s: float = 0.0  # seconds between checkpoints: weights of 200 MB cost more than a short epoch
    kept: list[Weights] = field(default_factory=list)  # oldest first, after `run`

    def run(
        self,
        train_epoch: Callable[[int], float],
        validate: Callable[[], float],
        *,
        compare_with_start: bool = False,
    ) -> list[Epoch]:
        """Train, leave in the model what was kept (of several epochs the last), return the learning curve.

        ``compare_with_start`` lets the weights from before the first epoch win, so that the model never ends
        worse on validation than it began. Raises TrainingError where the loss is not finite.
        """
        history = self._resume()
        if not history and (compare_with_start or not self.epochs):
            history = [Epoch(0, None, self._finite(validate(), 0), 0.0)]
            self.kept = [self._weights()]
        first, saved = history[-1].epoch + 1 if history else 1, time.monotonic()
        for epoch in range(first, self.epochs + 1):
            torch.manual_seed(derive_seed(self.seed, "dropout", epoch))
            rate = self.optimizer.param_groups[0]["lr"]
            train_loss = self._finite(train_epoch(epoch), epoch)
            val_loss = self._finite(validate(), epoch)
            self._keep(all(val_loss < earlier.val_loss for earlier in history))
            history.append(Epoch(epoch, train_loss, val_loss, rate))
            if epoch == self.epochs or time.monotonic() - saved >= self.save_every_s:
                self._save(history)
                saved = time.monotonic()
            log.info("epoch %d/%d: train %.4f, validation %.4f", epoch, self.epochs, train_loss, val_loss)
        self.model.load_state_dict(self.kept[-1])
        return history

    def finish(self) -> None:
        """Remove the checkpoint, once the stage's outputs are written."""
        self.checkpoint.unlink(missing_ok=True)

    def _keep(self, is_best: bool) -> None:
        if self.last > 1:
            self.kept = [*self.kept, self._weights()][-self.last :]
        elif is_best:
            self.kept = [self._weights()]

    def _weights(self) -> Weights:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def _finite(self, loss: float, epoch: int) -> float:
        if math.isfinite(loss):
            return loss
        raise TrainingError(
            f"the loss is {loss} in epoch {epoch}: training has diverged. The last good state is kept; "
            f"lower the learning rate (or set precision to fp32) and run again"
        )

    def _save(self, history: list[Epoch]) -> None:
        with atomic_path(self.checkpoint) as temporary:
            torch.save(
                {
                    "key": self.key,
                    "history": [asdict(line) for line in history],
                    "kept": self.kept,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": self.scaler.state_dict() if self.scaler else {},
                },
                temporary,
            )

    def _resume(self) -> list[Epoch]:
        state = self._read_checkpoint()
        if state is None or state.get("key") != self.key or "kept" not in state:
            return []
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        history = [Epoch(**line) for line in state["history"]]
        log.info("going on after epoch %d", history[-1].epoch)
        self.kept = state["kept"]
        return history

    def _read_checkpoint(self) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            log.warning("%s can't be read; starting from the first epoch", self.checkpoint)
            return None
        return state if isinstance(state, dict) else None

"""What a training run was asked to do, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from robustlab.core.errors import ConfigError, RangeError

OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["cosine", "constant"]


@dataclass(frozen=True)
class FitSettings:
    """Numbers of a training run.

    Args:
        epochs: Passes over the training data, at most.
        batch_size: Largest number of samples in a step; an epoch is cut into parts whose sizes differ by at most one.
        lr: Learning rate at the start.
        weight_decay: Decoupled weight decay for AdamW, L2 penalty for SGD.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum 0.9.
        schedule: ``"cosine"`` (to 0 over all steps) or ``"constant"``.
        amp: Run forward passes under bfloat16 autocast.
        early_stopping: Stop after this many epochs without a lower validation loss; None never stops.
        seed: Seed of shuffling, dropout and augmentation.

    Raises:
        RangeError: A number is out of range.
        ConfigError: Unknown optimizer or schedule.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: OptimizerName = "adamw"
    schedule: ScheduleName = "cosine"
    amp: bool = False
    early_stopping: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "batch_size": self.batch_size, "early_stopping": self.early_stopping}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise RangeError("fit", f"{name} of at least 1", f"{count}", "Pass a positive number.")
        if not self.lr > 0 or not self.weight_decay >= 0:
            got = f"lr={self.lr}, weight_decay={self.weight_decay}"
            raise RangeError("fit", "a positive lr and a weight_decay of 0 or more", got, "1e-3 and 1e-4 often work.")
        for name, value, allowed in (
            ("optimizer", self.optimizer, get_args(OptimizerName)),
            ("schedule", self.schedule, get_args(ScheduleName)),
        ):
            if value not in allowed:
                raise ConfigError("fit", f"{name} among {', '.join(allowed)}", repr(value), "Check the spelling.")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Args:
        epoch: Counted from 0.
        train_loss: Mean loss over the samples seen, in training mode.
        val_loss: Mean loss on validation data, None without.
        lr: Learning rate of the last step.
    """

    epoch: int
    train_loss: float
    val_loss: float | None
    lr: float


@dataclass(frozen=True)
class FitResult:
    """What a training run did.

    Args:
        history: One record an epoch.
        best_epoch: Epoch whose weights the network has now: lowest validation loss, or the last one without.
        seconds: Wall time, over all resumed parts.
    """

    history: tuple[EpochRecord, ...]
    best_epoch: int
    seconds: float

"""fit: a plain training loop that can be killed and goes on with the same bits."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from robustlab.core.checks import check_labels
from robustlab.core.errors import ConfigError, KindError, LabelError, ModelError
from robustlab.core.model import Model, wrap
from robustlab.core.rng import SampleRng
from robustlab.core.source import Source
from robustlab.core.types import Batch, Task

from .checkpoint import load_optimizer, load_weights, optimizer_tensors, read_checkpoint, weights_of, write_checkpoint
from .history import EpochRecord, FitResult, FitSettings, OptimizerName, ScheduleName
from .losses import task_loss
from .seeding import scoped_seed

logger = logging.getLogger("robustlab")

Loss = Callable[[Tensor, Tensor], Tensor]
Augment = Callable[[Batch, int], Batch]

_CACHE_BYTES = 512 << 20
_READ = 256


def fit(
    model: Model | nn.Module,
    train: Source,
    val: Source | None = None,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    optimizer: OptimizerName = "adamw",
    schedule: ScheduleName = "cosine",
    loss: Loss | None = None,
    task: Task | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    early_stopping: int | None = None,
    checkpoint: str | Path | None = None,
    augment: Augment | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a network in place; it ends in eval mode, with its best weights where ``val`` is given.

    Shuffling depends on (seed, epoch, sample ids). Dropout and the like draw from torch's global generators, which
    are seeded for each epoch and restored afterwards, so a run that was killed and goes on from its checkpoint ends
    with the same bits as one that was not (on one device).

    Args:
        model: A network, or a wrapped one whose preprocessing is then part of the forward pass.
        train: Labelled training data.
        val: Labelled validation data for early stopping and the choice of the best epoch.
        epochs: Passes over the training data, at most.
        batch_size: Largest number of samples in a step.
        lr: Learning rate at the start.
        weight_decay: Decoupled weight decay for AdamW, L2 penalty for SGD.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum 0.9.
        schedule: ``"cosine"`` (to 0 over all steps) or ``"constant"``.
        loss: Maps logits (N, C) and labels to a scalar mean; cross-entropy, or binary cross-entropy over annotated
            labels for multi-label, if not given.
        task: Task of a bare network; the training data's task if not given.
        seed: Seed of shuffling, dropout and augmentation.
        device: Where to train; the network moves there. None stays.
        amp: Run forward passes under bfloat16 autocast.
        early_stopping: Stop after this many epochs without a lower validation loss.
        checkpoint: Folder for one file, written after each epoch; a run with the same arguments goes on from it.
        augment: Maps a training batch and the epoch to a batch, e.g. ``lambda b, e: shift.on(b, 2, context(e))``.
        progress: Show a progress bar.

    Returns:
        History, best epoch and wall time.

    Raises:
        ConfigError: Arguments do not fit together, or the checkpoint belongs to another run.
        LabelError: Training or validation data have no labels, or labels out of range.
        ModelError: The loss became NaN or infinite.
    """
    settings = FitSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        amp=amp,
        early_stopping=early_stopping,
        seed=seed,
    )
    return fit_with(
        settings,
        model,
        train,
        val,
        loss=loss,
        task=task,
        device=device,
        checkpoint=checkpoint,
        augment=augment,
        progress=progress,
    )


def fit_with(
    settings: FitSettings,
    model: Model | nn.Module,
    train: Source,
    val: Source | None = None,
    *,
    loss: Loss | None = None,
    task: Task | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    augment: Augment | None = None,
    progress: bool = True,
) -> FitResult:
    """``fit`` with its numbers in one object; arguments as there."""
    started = time.perf_counter()
    wrapped = _as_model(model, train, task)
    for role, source in (("train", train), ("val", val)):
        if source is not None and (source.info.labels is None or len(source) == 0):
            got = f"{len(source)} samples {'without' if source.info.labels is None else 'with'} labels"
            raise LabelError("fit", f"labelled {role} data", got, "Load data with labels, or leave val out.")
    if settings.early_stopping is not None and val is None:
        raise ConfigError("fit", "val for early_stopping", "no val", "Pass val=, or early_stopping=None.")
    if device is not None:
        wrapped.to(device)
    run = _Run(
        settings=settings,
        model=wrapped,
        train=_Reader(train, wrapped.device),
        val=None if val is None else _Reader(val, wrapped.device),
        loss=loss or (lambda logits, labels: task_loss(logits, labels, wrapped.task)),
        augment=augment,
        optimizer=_optimizer(wrapped, settings),
    )
    folder = None if checkpoint is None else Path(checkpoint)
    identity = _identity(run, train, val, loss)
    if folder is not None:
        _resume(run, folder, identity)
    before = run.seconds
    bar = tqdm(total=settings.epochs, initial=len(run.history), desc="fit", unit="epoch", disable=not progress)
    try:
        with bar:
            while not run.done:
                run.epoch()
                run.seconds = before + time.perf_counter() - started
                if folder is not None:
                    _store(run, folder, identity)
                bar.update()
                bar.set_postfix(train_loss=run.history[-1].train_loss, val_loss=run.history[-1].val_loss)
    finally:
        for module in wrapped.modules():
            module.eval()
    if run.best:
        load_weights(wrapped.modules(), run.best, "fit")
    return FitResult(tuple(run.history), run.best_epoch, run.seconds)


@dataclass(eq=False)
class _Run:
    """State of a training run."""

    settings: FitSettings
    model: Model
    train: _Reader
    val: _Reader | None
    loss: Loss
    augment: Augment | None
    optimizer: torch.optim.Optimizer
    history: list[EpochRecord] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = -1
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        patience = self.settings.early_stopping
        waited = len(self.history) - 1 - self.best_epoch
        return len(self.history) >= self.settings.epochs or (patience is not None and waited >= patience)

    def epoch(self) -> None:
        """Train one epoch, validate and remember the best weights."""
        epoch = len(self.history)
        with scoped_seed("fit", self.settings.seed, epoch):
            train_loss, lr = self._steps(epoch)
        if not math.isfinite(train_loss):
            raise ModelError(
                "fit", "a finite training loss", f"{train_loss} in epoch {epoch}", "Lower lr, or look for NaN pixels."
            )
        val_loss = None if self.val is None else self._validate(self.val)
        self.history.append(EpochRecord(epoch, train_loss, val_loss, lr))
        if val_loss is None:
            self.best_epoch = epoch
        elif self.best_epoch < 0 or val_loss < self._best_loss():
            self.best_epoch = epoch
            self.best = weights_of(self.model.modules())
        logger.info("fit: %s", self.history[-1])

    def _best_loss(self) -> float:
        value = self.history[self.best_epoch].val_loss
        return math.inf if value is None or math.isnan(value) else value

    def _steps(self, epoch: int) -> tuple[float, float]:
        for module in self.model.modules():
            module.train()
        device = self.model.device
        order = SampleRng.make(self.settings.seed, "fit/shuffle", self.train.ids, epoch=epoch).keys.argsort()
        parts = order.tensor_split(math.ceil(len(order) / self.settings.batch_size))
        total = torch.zeros((), dtype=torch.float64, device=device)
        lr = self.settings.lr
        for step, rows in enumerate(parts):
            lr = _lr(self.settings, epoch * len(parts) + step, self.settings.epochs * len(parts))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            batch = self.train.read(rows)
            if self.augment is not None:
                batch = self.augment(batch, epoch)
            loss = self._loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach() * len(batch)
        self.optimizer.zero_grad(set_to_none=True)
        return (total / len(order)).item(), lr

    def _loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.settings.amp):
            logits = self.model.outputs(batch).logits
        if batch.labels is None:
            raise LabelError("fit", "a batch with labels", "none", "The augmentation must keep the labels.")
        self.train.check(self.model, logits)
        if self.val is not None:
            self.val.check(self.model, logits)
        return self.loss(logits, batch.labels)

    def _validate(self, val: _Reader) -> float:
        for module in self.model.modules():
            module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        with torch.no_grad():
            for rows in _parts(len(val.ids), max(self.settings.batch_size, _READ)):
                batch = val.read(torch.tensor(rows))
                total += self._loss(batch) * len(batch)
        return (total / len(val.ids)).item()


class _Reader:
    """Batches of a source by row; small sources are decoded once and stay on the device."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.ids = source.info.ids
        self.checked = False
        spec = source.info.spec
        self.cache: Batch | None = None
        if len(source) * spec.channels * math.prod(spec.size) * 4 <= _CACHE_BYTES:
            images = [source.pixels(rows) for rows in _parts(len(source), _READ)]
            first = source.read([0])
            labels = source.info.labels
            whole = dataclasses.replace(
                first, images=torch.cat(images), labels=labels, ids=self.ids, groups=source.info.groups
            )
            self.cache = whole.to(device)

    def read(self, rows: Tensor) -> Batch:
        """Return the samples at ``rows`` (int64 (M,), on the CPU) on the device."""
        if self.cache is not None:
            return self.cache.select(rows.to(self.device))
        return self.source.read(rows.tolist()).to(self.device)

    def check(self, model: Model, logits: Tensor) -> None:
        """Check all labels against the model, once its number of outputs is known."""
        labels = self.source.info.labels
        if self.checked or labels is None:
            return
        check_labels(labels, task=model.task, num_classes=logits.shape[1], count=len(self.ids), who="fit")
        self.checked = True


def _parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _as_model(model: Model | nn.Module, train: Source, task: Task | None) -> Model:
    if isinstance(model, Model):
        if task is not None and task != model.task:
            raise ConfigError("fit", f"task={model.task!r} as wrapped", repr(task), "Leave task out.")
    elif isinstance(model, nn.Module):
        model = wrap(model, task=task or train.info.task)
    else:
        raise KindError("fit", "a torch module or a wrapped model", type(model).__name__, "Pass the network.")
    if not any(p.requires_grad for module in model.modules() for p in module.parameters()):
        raise ConfigError("fit", "parameters that require gradients", "none", "Unfreeze some, or do not fit.")
    return model


def _optimizer(model: Model, settings: FitSettings) -> torch.optim.Optimizer:
    parameters = [p for module in model.modules() for p in module.parameters() if p.requires_grad]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, lr=settings.lr, weight_decay=settings.weight_decay, momentum=0.9, nesterov=True)


def _lr(settings: FitSettings, step: int, steps: int) -> float:
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def _identity(run: _Run, train: Source, val: Source | None, loss: Loss | None) -> dict[str, Any]:
    """What must be equal for a run to go on from a checkpoint; functions are known by their name only."""

    def name(function: object) -> str | None:
        return None if function is None else getattr(function, "__qualname__", type(function).__qualname__)

    return {
        "settings": dataclasses.asdict(run.settings),
        "train": train.fingerprint(),
        "val": None if val is None else val.fingerprint(),
        "loss": name(loss),
        "augment": name(run.augment),
        "task": run.model.task,
    }


def _store(run: _Run, folder: Path, identity: dict[str, Any]) -> None:
    parts = {
        "model": weights_of(run.model.modules()),
        "best": run.best,
        "optimizer": optimizer_tensors(run.optimizer),
    }
    state = {
        "identity": identity,
        "history": [dataclasses.asdict(record) for record in run.history],
        "best_epoch": run.best_epoch,
        "seconds": run.seconds,
    }
    write_checkpoint(folder, parts, state)


def _resume(run: _Run, folder: Path, identity: dict[str, Any]) -> None:
    found = read_checkpoint(folder)
    if found is None:
        return
    parts, state = found
    if state["identity"] != identity:
        changed = [key for key in identity if state["identity"].get(key) != identity[key]]
        raise ConfigError(
            f"fit, checkpoint {folder}",
            "the arguments and data of the run that wrote it",
            f"other {', '.join(changed)}",
            "Pass the same ones, or another checkpoint folder.",
        )
    load_weights(run.model.modules(), parts.get("model", {}), f"fit, checkpoint {folder}")
    load_optimizer(run.optimizer, parts.get("optimizer", {}))
    run.best = {name: value.to(run.model.device) for name, value in parts.get("best", {}).items()}
    run.best_epoch = state["best_epoch"]
    run.seconds = state["seconds"]
    run.history = [EpochRecord(**record) for record in state["history"]]
    logger.info("fit: going on after epoch %d", len(run.history) - 1)

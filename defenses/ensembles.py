"""Deep ensembles: networks trained from different seeds, whose probabilities are averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustlab.core.defense import Defense
from robustlab.core.errors import ConfigError
from robustlab.core.model import Model, wrap
from robustlab.core.registry import DEFENSES
from robustlab.core.rng import stable_hash
from robustlab.core.source import Source
from robustlab.core.types import Batch, ModelOutputs, Task
from robustlab.train.fit import Augment, fit_with
from robustlab.train.history import FitResult, FitSettings, OptimizerName, ScheduleName
from robustlab.train.seeding import seeded_init

from .storage import read_config, restore_models, save_models

Build = Callable[[], Model | nn.Module]


@DEFENSES.register("deep-ensemble")
class DeepEnsemble(Defense):
    """The mean probability of several networks.

    ``logits`` is the log of the mean probability, (multi-label: the logit of the mean sigmoid), ``members`` holds the
    members' log-probabilities, and the score ``"mutual-information"`` is the entropy of the mean minus the mean
    entropy, in nats (multi-label: summed over labels).

    Args:
        members: At least one model, all of one task and number of classes.

    Raises:
        ConfigError: No members, or members that do not fit together.

    References:
        Lakshminarayanan, Pritzel, Blundell 2017, arXiv:1612.01474.
    """

    has_offset = False

    def __init__(self, members: Sequence[Model | nn.Module]) -> None:
        if not members:
            raise ConfigError("DeepEnsemble", "at least one member", "none", "Pass trained models.")
        self.members = tuple(wrap(member) for member in members)
        tasks = sorted({member.task for member in self.members})
        if len(tasks) > 1:
            raise ConfigError("DeepEnsemble", "members of one task", ", ".join(tasks), "Wrap them alike.")
        self.class_names = self.members[0].class_names
        self.model_name = f"{self.members[0].model_name} x {len(self.members)}"
        self._recipe: _Recipe | None = None
        self.history: tuple[FitResult, ...] = ()

    @classmethod
    def train(
        cls,
        build: Build,
        train: Source,
        val: Source | None = None,
        *,
        epochs: int,
        size: int = 5,
        seed: int = 0,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        optimizer: OptimizerName = "adamw",
        schedule: ScheduleName = "cosine",
        task: Task | None = None,
        device: torch.device | str | None = None,
        amp: bool = False,
        early_stopping: int | None = None,
        checkpoint: str | Path | None = None,
        augment: Augment | None = None,
        progress: bool = True,
    ) -> Self:
        """Train an ensemble; members differ in initial weights, shuffling and dropout.

        Args:
            build: Makes an untrained network, bare or wrapped; called once a member under a seed of its own.
            train: Labelled training data.
            val: Labelled validation data, see ``robustlab.train.fit``.
            epochs: As in ``robustlab.train.fit``, like all arguments that are not named here.
            size: Number of members.
            seed: Seed of the ensemble.
            batch_size: See ``fit``.
            lr: See ``fit``.
            weight_decay: See ``fit``.
            optimizer: See ``fit``.
            schedule: See ``fit``.
            task: Task of bare networks; the training data's task if not given.
            device: See ``fit``.
            amp: See ``fit``.
            early_stopping: See ``fit``.
            checkpoint: Folder with one sub-folder a member.
            augment: See ``fit``.
            progress: See ``fit``.

        Raises:
            ConfigError: ``size`` is below 1, or as in ``fit``.
        """
        if size < 1:
            raise ConfigError("DeepEnsemble.train", "size of at least 1", f"{size}", "Five members are usual.")
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
        folder = None if checkpoint is None else Path(checkpoint)
        recipe = _Recipe(build, settings, task or train.info.task, device, folder, augment, progress)
        ensemble = cls([recipe.member(index) for index in range(size)])
        ensemble._recipe = recipe
        return ensemble.fit(train, val)

    @property
    def task(self) -> Task:  # type: ignore[override]
        """Task of the members."""
        return self.members[0].task

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """Classes of the members."""
        return self.members[0].num_classes

    def modules(self) -> Sequence[nn.Module]:
        return [module for member in self.members for module in member.modules()]

    def settings(self) -> Mapping[str, Any]:
        return {"defense": self.name, "members": [dict(member.settings()) for member in self.members]}

    def for_attack(self) -> Model:
        return DeepEnsemble([member.for_attack() for member in self.members])

    has_members = True

    def outputs(self, batch: Batch) -> ModelOutputs:
        logits = torch.stack([self._checked(member.outputs(batch).logits) for member in self.members])
        pooled, members, information = pool(logits, self.task)
        return ModelOutputs(logits=pooled, members=members, scores={"mutual-information": information}, task=self.task)

    def _checked(self, logits: Tensor) -> Tensor:
        if logits.shape[1] != self.num_classes:
            raise ConfigError(
                "DeepEnsemble",
                f"{self.num_classes} classes, as the first member has",
                f"{logits.shape[1]}",
                "Train all members on the same classes.",
            )
        return logits

    def fit(self, train: Source | None, val: Source | None) -> Self:
        """Train every member again, from fresh initial weights.

        Args:
            train: Labelled training data.
            val: Labelled validation data, or None.

        Raises:
            ConfigError: No training data, or the ensemble was not made by ``DeepEnsemble.train``.
        """
        if self._recipe is None:
            raise ConfigError(
                "DeepEnsemble.fit",
                "an ensemble that knows how its members are built",
                "one made of given members",
                "Use DeepEnsemble.train(build, train, val, epochs=...).",
            )
        if train is None:
            raise ConfigError("DeepEnsemble.fit", "training data", "train=None", "Pass labelled training data.")
        members = tuple(self._recipe.member(index) for index in range(len(self.members)))
        self.history = tuple(self._recipe.fit(index, member, train, val) for index, member in enumerate(members))
        self.members = members
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the weights of all members.

        Raises:
            DataFileError: The folder cannot be written.
        """
        return save_models(folder, self.members, {"defense": self.name, "version": self.version})

    @classmethod
    def load(cls, folder: str | Path, *, build: Build) -> Self:
        """Return a saved ensemble.

        Args:
            folder: Where it was saved.
            build: Makes one member, wrapped as it was; called once a member.

        Raises:
            DataFileError: Nothing was saved there, or it is damaged.
            ConfigError: ``build`` makes another network than the one that was saved.
        """
        config = read_config(folder, cls.name, cls.version)
        tasks = [saved.get("task") for saved in config["models"]]
        members = [_wrapped(seeded_init(build, index), task) for index, task in enumerate(tasks)]
        for member in members:
            for module in member.modules():
                module.eval()
        restore_models(folder, members, config)
        return cls(members)


def pool(logits: Tensor, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """Average the probabilities of members.

    Args:
        logits: float (S, N, C).
        task: Task of the members.

    Returns:
        Logits of the mean, float32 (N, C); members' log-probabilities, float32 (S, N, C); mutual information in nats,
        float32 (N,), 0 or more.
    """
    wide = logits.to(torch.float64)
    if task == "multilabel":
        yes, no = F.logsigmoid(wide), F.logsigmoid(-wide)
        mean_yes, mean_no = _mean_exp(yes), _mean_exp(no)
        each = torch.stack([yes, no], -1)
        mean = torch.stack([mean_yes, mean_no], -1)
        information = (_entropy(mean) - _entropy(each).mean(0)).sum(-1)
        return (mean_yes - mean_no).float(), yes.float(), information.clamp_min(0).float()
    each = F.log_softmax(wide, -1)
    mean = _mean_exp(each)
    information = _entropy(mean) - _entropy(each).mean(0)
    return mean.float(), each.float(), information.clamp_min(0).float()


def _mean_exp(values: Tensor) -> Tensor:
    """Log of the mean of exponentials over the first axis."""
    return torch.logsumexp(values, 0) - math.log(len(values))


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats over the last axis; a class of probability 0 adds 0."""
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def _wrapped(model: Model | nn.Module, task: Task | None) -> Model:
    return model if isinstance(model, Model) else wrap(model, task=task)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How members are made."""

    build: Build
    settings: FitSettings
    task: Task | None
    device: torch.device | str | None
    checkpoint: Path | None
    augment: Augment | None
    progress: bool

    def member(self, index: int) -> Model:
        return _wrapped(seeded_init(self.build, self._seed(index)), self.task)

    def fit(self, index: int, member: Model, train: Source, val: Source | None) -> FitResult:
        return fit_with(
            replace(self.settings, seed=self._seed(index)),
            member,
            train,
            val,
            device=self.device,
            checkpoint=None if self.checkpoint is None else self.checkpoint / f"member-{index}",
            augment=self.augment,
            progress=self.progress,
        )

    def _seed(self, index: int) -> int:
        return stable_hash("member", self.settings.seed, index) & 0x7FFFFFFF

"""Attacks of foolbox and torchattacks, held to our threat model.

What another library returns is moved into the ball, the mask and the box, rounded as it would be stored, and judged by
a forward pass of ours; its own flags of success are not read.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from robustlab.core.attack import Norm
from robustlab.core.errors import ConfigError, KindError, MissingExtraError, RobustlabWarning, ShapeError
from robustlab.core.model import Model
from robustlab.core.rng import SampleRng, stable_hash
from robustlab.core.spec import fingerprint
from robustlab.core.types import Batch
from robustlab.data.torch_data import same_random_state
from robustlab.train.seeding import scoped_seed

from .base import Search
from .oracle import Oracle
from .steps import lengths

TOLERANCE = 1e-4
"""How far, on the [0, 1] scale, images may leave the ball or the box before a warning says so."""

_STAMP = re.compile(r"/[0-9a-f]{8}$")


def stamped(title: str, attack: Search, *, apart: tuple[str, ...], also: object = None) -> str:
    """Return a name for an attack that holds an object which has no JSON form: caches know it by its name alone.

    Args:
        title: Name, or a name that was stamped before.
        attack: Its other fields go into the stamp, so that two budgets under one title are told apart.
        apart: Fields that do not go in.
        also: JSON types that do.
    """
    facts = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack) if f.name not in apart}
    return f"{_STAMP.sub('', title)}/{fingerprint([facts, also])[:8]}"


class _Network(nn.Module):
    """The model on one batch as other libraries take it: images in [0, 1] to logits.

    The model is no part of it in torch's sense, so what is done to this module's mode, device or parameters does not
    reach the model.
    """

    def __init__(self, model: Model, batch: Batch) -> None:
        super().__init__()
        self.model = model
        self.batch = batch
        self.passed = 0
        # libraries look for the device in the first parameter
        self.anchor = nn.Parameter(batch.images.new_zeros(()), requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.passed += len(images)
        if len(images) == len(self.batch):
            return self.model.outputs(self.batch.replace(images)).logits
        ids = torch.arange(len(images), device=images.device)
        return self.model.outputs(Batch(images=images, labels=None, ids=ids)).logits


@dataclass(frozen=True)
class _Foreign(Search):
    """What the adapters share."""

    opaque: ClassVar[bool] = True
    package: ClassVar[str] = ""
    example: ClassVar[str] = ""

    norm: Norm = field(kw_only=True)
    eps: tuple[float, ...] = field(kw_only=True)
    attack: Any
    name: str = field(default="", kw_only=True)  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride] - one class, many attacks
    version: int = field(default=1, kw_only=True)  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._is_wrong():
            who = type(self).__name__
            raise KindError(who, f"an attack of {self.package}", repr(self.attack), f"Pass e.g. {self.example}.")
        object.__setattr__(self, "_named", bool(self.name))
        kind = getattr(self.attack, "__name__", type(self.attack).__name__).strip("<>")
        kebab = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", "-", kind).lower()
        title = self.name or f"{self.package}:{kebab}"
        object.__setattr__(self, "name", stamped(title, self, apart=("attack", "name", "version")))

    @property
    def cacheable(self) -> bool:
        return bool(getattr(self, "_named", False))

    @property
    def label(self) -> str:
        return f"{_STAMP.sub('', self.name)}-{self.norm}"

    @final
    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        del stop
        if oracle.model.task == "multilabel":
            raise ConfigError(self.label, "a model with one class an image", "several labels", "Use PGD or APGD.")
        if start is not None:
            oracle.forward(start, rows)
        rows = oracle.open(rows)
        if not len(rows):
            return
        network = _Network(oracle.model, oracle.batch.select(rows))
        images, labels = oracle.clean[rows], oracle.labels[rows]
        seed = stable_hash("batch", int(rng.select(rows).keys.sum()))
        with _shielded(oracle.model), _seeded(seed):
            found = self._found(network, images.clone(), labels.clone(), oracle.eps)
        oracle.queries[rows] += -(-network.passed // len(rows))
        oracle.forward(oracle.project(self._received(found, images, oracle.eps), rows), rows)

    def _received(self, found: Any, clean: Tensor, eps: float) -> Tensor:
        """Return what came back as finite images of the clean ones' kind, and tell once of broken rules."""
        if not isinstance(found, Tensor):
            raise KindError(self.label, "images as a torch tensor", type(found).__name__, f"Pass e.g. {self.example}.")
        if found.shape != clean.shape:
            got = f"{tuple(found.shape)}"
            raise ShapeError(self.label, f"images of shape {tuple(clean.shape)}", got, "It must keep the shape.")
        found = found.detach().to(clean.device, clean.dtype)
        finite = torch.isfinite(found).flatten(1).all(1).view(-1, 1, 1, 1)
        images = torch.where(finite, found, clean)
        beyond = lengths(images - clean, self.norm).amax() - eps
        excess = float(torch.maximum(beyond, (images - images.clamp(0, 1)).abs().amax()))
        broken = int((~finite).sum())
        if broken:
            self._warn(f"{broken} of {len(images)} images have pixels that are not finite; those samples stay clean")
        if excess > TOLERANCE:
            self._warn(
                f"images leave the ball of radius {eps:.4g} ({self.norm}) or [0, 1] by up to {excess:.3g} and are "
                "projected, which weakens them; see whether norm and eps are what the attack works with"
            )
        return images

    def _warn(self, message: str) -> None:
        if not getattr(self, "_warned", False):
            object.__setattr__(self, "_warned", True)
            warnings.warn(f"{self.label}: {message}.", RobustlabWarning, stacklevel=6)

    @abstractmethod
    def _is_wrong(self) -> bool:
        """Return whether ``attack`` is something else than it should be."""

    @abstractmethod
    def _found(self, network: _Network, images: Tensor, labels: Tensor, eps: float) -> Any:
        """Return what the other library's attack makes of the images."""


@dataclass(frozen=True)
class FromFoolbox(_Foreign):
    """Any foolbox attack on torch models, untargeted.

    It runs on the model's attack view in eval mode, on samples that are not wrong yet. Its images are then projected
    on the ball, the mask and [0, 1], rounded to the source's bit depth, and success is judged by a forward pass on what
    is left; where nothing better was found, the clean image stays. The model's flags are put back.

    Foreign attacks draw for a whole batch from global random state, which is seeded from the batch's samples and put
    back: results repeat, but a sample's result depends on the samples beside it, and ``queries`` is a mean over them.
    The attack sees single forward passes of random models, whatever ``draws`` says; only the judgement averages.

    Args:
        attack: A foolbox attack, e.g. ``foolbox.attacks.LinfPGD(steps=20)``; called with ``epsilons=eps``.
        norm: As of ``Search``; refused if it is not the attack's own.
        eps: As of ``Search``.
        name: Kebab-case name for tables; also stands for the attack in caches, with the fields other than ``attack``.
            The class's name if not given; results are then not kept in a cache, which could not tell two such attacks
            apart.
        version: Raise it when the attack's own settings change: caches cannot see them.

    Raises:
        KindError: ``attack`` is no foolbox attack.
        ConfigError: The attack works in another norm.
        MissingExtraError: The library is not installed.

    References:
        J. Rauber, R. Zimmermann, M. Bethge, W. Brendel, "Foolbox Native", 2020, JOSS 5(53), 2607.
    """

    package: ClassVar[str] = "foolbox"
    example: ClassVar[str] = "foolbox.attacks.LinfPGD(steps=20)"

    def __post_init__(self) -> None:
        super().__post_init__()
        power = getattr(getattr(self.attack, "distance", None), "p", None)
        if power is not None and power != {"linf": float("inf"), "l2": 2}[self.norm]:
            raise ConfigError(
                "FromFoolbox", f"an attack in the norm {self.norm!r}", f"one of order {power}", "Correct norm=."
            )

    def _is_wrong(self) -> bool:
        return isinstance(self.attack, type) or not callable(self.attack)

    def _found(self, network: _Network, images: Tensor, labels: Tensor, eps: float) -> Any:
        try:
            library = importlib.import_module(self.package)
        except ImportError as error:
            hint = "Run: pip install foolbox"
            raise MissingExtraError("FromFoolbox", "the package foolbox", "no such package", hint) from error
        model = library.PyTorchModel(network, bounds=(0, 1), device=images.device)
        _, clipped, _ = self.attack(model, images, labels, epsilons=eps)
        return clipped


@dataclass(frozen=True)
class FromTorchattacks(_Foreign):
    """Any attack of torchattacks, or of a library with its interface, untargeted unless the attack says otherwise.

    As ``FromFoolbox``: on the model's attack view in eval mode, on samples that are not wrong yet, with its images
    projected, rounded and judged anew, flags restored, and random state seeded from the batch's samples, so that a
    sample's result depends on the samples beside it.

    Args:
        attack: Makes an attack of a model and a budget, e.g. ``lambda model, eps: torchattacks.PGD(model, eps=eps)``.
            Attacks without a budget, such as ``CW``, are cut off at the ball.
        norm: As of ``Search``.
        eps: As of ``Search``.
        name: As of ``FromFoolbox``.
        version: As of ``FromFoolbox``.

    Raises:
        KindError: ``attack`` is no function that makes one.

    References:
        H. Kim, "Torchattacks: a PyTorch repository for adversarial attacks", 2020, 2010.01950.
    """

    package: ClassVar[str] = "torchattacks"
    example: ClassVar[str] = "lambda model, eps: torchattacks.PGD(model, eps=eps)"

    def _is_wrong(self) -> bool:
        made = type(self.attack).__module__.partition(".")[0] == self.package  # an attack already, of some other model
        return made or isinstance(self.attack, type) or not callable(self.attack)

    def _found(self, network: _Network, images: Tensor, labels: Tensor, eps: float) -> Any:
        made = self.attack(network, eps)
        if not callable(made):
            raise KindError(self.label, "a function that makes an attack", repr(made), f"Pass e.g. {self.example}.")
        return made(images, labels)


@contextmanager
def _shielded(model: Model) -> Iterator[None]:
    """Freeze the parameters, so that no gradient is stored in them, and put back all flags afterwards."""
    modes = [(module, module.training) for root in model.modules() for module in root.modules()]
    frozen = [weight for root in model.modules() for weight in root.parameters() if weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight in frozen:
            weight.requires_grad_(True)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random state of Python, NumPy and torch, and put it back afterwards."""
    with same_random_state(), scoped_seed("foreign attack", seed):
        random.seed(seed)
        np.random.set_state(np.random.RandomState(seed & 0xFFFFFFFF).get_state())  # noqa: NPY002
        yield

"""Fixed sequences of attacks, each on the samples that the earlier ones left right, for any number of classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from robustlab.core.errors import ConfigError
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.types import Task

from .apgd import APGD, TargetedAPGD
from .base import Search
from .fab import FAB
from .oracle import Oracle
from .square import Square

_Make = Callable[..., Search]
_RANDOM_DRAWS = 20


@dataclass(frozen=True)
class Ensemble(Search):
    """A sequence of attacks; a sample is given to the next one only while the model is right on all that was tried.

    That finds the same successes as the worst over all attacks, sample by sample, and margins that are below 0 but not
    the smallest. ``AttackResult.found_by`` tells which attack made the model wrong.
    """

    @abstractmethod
    def plan(self, num_classes: int, task: Task) -> tuple[_Make, ...]:
        """Return what builds each attack for a model.

        Raises:
            ConfigError: The ensemble is not made for such a model.
        """

    def attacks(self, num_classes: int, task: Task) -> tuple[Search, ...]:
        """Return the attacks in their order.

        Raises:
            ConfigError: The ensemble is not made for such a model.
        """
        # budget and mask belong to the oracle
        return tuple(make(norm=self.norm, draws=self.draws) for make in self.plan(num_classes, task))

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        del start, stop
        for place, attack in enumerate(self.attacks(oracle.num_classes, oracle.model.task), start=1):
            rows = oracle.open(rows)
            if not len(rows):
                return
            oracle.stage = place
            attack.search(oracle, rng.child(attack.label), rows, None, stop=True)

    def _refuse(self, expected: str, num_classes: int, task: Task, instead: str) -> ConfigError:
        got = "several labels an image" if task == "multilabel" else f"{num_classes} classes"
        hint = f"Use {instead}, or auto-attack, which picks the right one; with draws=20 where the model is random."
        return ConfigError(self.name, expected, got, hint)


@ATTACKS.register("aa-standard")
@dataclass(frozen=True)
class StandardEnsemble(Ensemble):
    """The reference ensemble "standard": APGD on cross-entropy, targeted APGD, targeted FAB, Square, on survivors.

    With 10 classes or more it is the authors', step for step, but that random numbers are keyed by sample (and Square
    draws its windows for each sample by itself). With 4 to 9 classes, where the authors' code fails, the targeted
    attacks aim at all C - 1 wrong classes.

    References:
        F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020, 2003.01690.
    """

    def plan(self, num_classes: int, task: Task) -> tuple[_Make, ...]:
        if task == "multilabel" or num_classes < 4:
            raise self._refuse("a model of 4 classes or more", num_classes, task, _right_one(num_classes, task))
        return partial(APGD, loss="ce"), TargetedAPGD, partial(FAB, refine=False), partial(Square, edges=False)


@ATTACKS.register("aa-rand")
@dataclass(frozen=True)
class RandomEnsemble(Ensemble):
    """The reference ensemble "rand", for random models: APGD on cross-entropy and on DLR, gradients over 20 draws.

    The reference judges what it finds by one more forward pass; here 20 fresh ones do, more than half must be wrong.

    References:
        F. Croce, M. Hein, 2020, 2003.01690.
    """

    draws: int = field(default=_RANDOM_DRAWS, kw_only=True)

    def plan(self, num_classes: int, task: Task) -> tuple[_Make, ...]:
        if task == "multilabel" or num_classes < 3:
            raise self._refuse("a model of 3 classes or more", num_classes, task, _right_one(num_classes, task))
        return partial(APGD, loss="ce"), partial(APGD, loss="dlr")


@ATTACKS.register("aa-3")
@dataclass(frozen=True)
class ThreeClassEnsemble(Ensemble):
    """For three classes: APGD on cross-entropy and on DLR, targeted APGD and FAB at both wrong classes, Square.

    The reference's targeted loss needs four classes; ``TargetedAPGD`` takes the difference of two logits instead.
    """

    def plan(self, num_classes: int, task: Task) -> tuple[_Make, ...]:
        if task == "multilabel" or num_classes != 3:
            raise self._refuse("a model of 3 classes", num_classes, task, _right_one(num_classes, task))
        return partial(APGD, loss="ce"), partial(APGD, loss="dlr"), TargetedAPGD, FAB, Square


@ATTACKS.register("aa-binary")
@dataclass(frozen=True)
class BinaryEnsemble(Ensemble):
    """For two classes: APGD on the margin from five starts, FAB, Square.

    With two classes cross-entropy, and every other rising function of the margin, has the gradient direction of the
    margin, and DLR is not defined.
    """

    def plan(self, num_classes: int, task: Task) -> tuple[_Make, ...]:
        if task == "multilabel" or num_classes != 2:
            raise self._refuse("a model of 2 classes", num_classes, task, _right_one(num_classes, task))
        return partial(APGD, loss="margin", restarts=5), FAB, Square


@ATTACKS.register("aa-multilabel")
@dataclass(frozen=True)
class MultilabelEnsemble(Ensemble):
    """For several labels an image: APGD on the margin from five starts, on each of the 9 closest labels, and Square.

    A sample counts as wrong as soon as one annotated label flips.
    """

    def plan(self, num_classes: int, task: Task) -> tuple[_Make, ...]:
        if task != "multilabel":
            raise self._refuse("a model with several labels an image", num_classes, task, _right_one(num_classes, task))
        return partial(APGD, loss="margin", restarts=5), TargetedAPGD, Square


@ATTACKS.register("auto-attack")
@dataclass(frozen=True)
class AutoAttack(Ensemble):
    """The ensemble that fits the model: ``aa-binary``, ``aa-3``, ``aa-standard`` or ``aa-multilabel``."""

    def plan(self, num_classes: int, task: Task) -> tuple[_Make, ...]:
        return _ENSEMBLES[_right_one(num_classes, task)](norm=self.norm).plan(num_classes, task)


def _right_one(num_classes: int, task: Task) -> str:
    if task == "multilabel":
        return "aa-multilabel"
    return {1: "aa-binary", 2: "aa-binary", 3: "aa-3"}.get(num_classes, "aa-standard")


_ENSEMBLES: dict[str, type[Ensemble]] = {
    "aa-binary": BinaryEnsemble,
    "aa-3": ThreeClassEnsemble,
    "aa-standard": StandardEnsemble,
    "aa-multilabel": MultilabelEnsemble,
}

"""Attacks on detectors: foreign inputs that hide, known inputs that raise an alarm."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from robustlab.core.attack import Goal
from robustlab.core.detector import Detector
from robustlab.core.errors import ConfigError, KindError
from robustlab.core.model import Model
from robustlab.core.registry import ATTACKS, DETECTORS
from robustlab.core.rng import SampleRng
from robustlab.core.types import ModelOutputs, Task

from .apgd import Climb, Stepped, started
from .oracle import Objective, Oracle


@ATTACKS.register("detector-attack")
@dataclass(frozen=True)
class DetectorAttack(Stepped):
    """Auto-PGD on the score of a detector, which looks at the logits: labels are not used.

    ``goal="hide"`` lowers the score of foreign inputs until they look familiar; in an evaluation it is run on the OOD
    sets. ``goal="alarm"`` raises the score of known inputs until they look foreign, which sends harmless cases to a
    person; it is run on the test data. The detector may be another one than those that are evaluated.

    In the result the margin is how far the score moved away from the goal, below 0 for towards it, and success means
    that it moved towards it: whether that is enough depends on a threshold, which the report applies.

    Args:
        goal: ``"hide"`` or ``"alarm"``.
        detector: Name of a detector, or a detector, that needs logits and nothing else.
        steps: Gradient steps of each restart.
        restarts: Independent starts.
        rho: Share of rising steps that is taken for progress.

    Raises:
        ConfigError: Another goal.
        KindError: ``detector`` is no detector.
        UnknownNameError: There is no detector of that name.

    References:
        The search: F. Croce, M. Hein, 2020, 2003.01690. Foreign inputs that hide: V. Sehwag et al., "Better the devil
        you know: an analysis of evasion attacks using out-of-distribution adversarial examples", 2019, 1905.01726;
        J. Bitterwolf, A. Meinke, M. Hein, "Certifiably adversarially robust detection of out-of-distribution data",
        2020, 2007.08473.
    """

    goal: Goal = field(default="hide", kw_only=True)
    detector: str | Detector = field(default="msp", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goal not in ("hide", "alarm"):
            raise ConfigError("DetectorAttack", "goal 'hide' or 'alarm'", repr(self.goal), "PGD attacks answers.")
        if not isinstance(self.resolved(), Detector):
            raise KindError(
                "DetectorAttack", "detector as a name or a Detector", repr(self.detector), "For example 'msp'."
            )

    def resolved(self) -> Detector:
        """Return the detector."""
        return DETECTORS.get(self.detector)() if isinstance(self.detector, str) else self.detector

    @property
    def label(self) -> str:
        detector = self.resolved()
        return f"{self.goal}-{detector.name or type(detector).__name__.lower()}-{self.norm}"

    def objective(self, model: Model) -> Objective:
        detector, sign = self.resolved(), 1.0 if self.goal == "hide" else -1.0
        reason = detector.skip_reason(model)
        if reason is not None:
            raise ConfigError("DetectorAttack", "a detector that suits the model", f"{detector.name}: {reason}",
                              "Attack another one.")  # fmt: skip
        return lambda logits: sign * detector.score(ModelOutputs(logits=logits, task=model.task))

    def search(self, oracle: Oracle, rng: SampleRng, rows: Tensor, start: Tensor | None, *, stop: bool) -> None:
        del stop  # there is no score that is low enough
        objective = self.objective(oracle.model)

        def loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
            return -objective(logits).to(logits.dtype)

        for restart in range(self.restarts):
            first = start if start is not None and restart == 0 else started(oracle, rows, rng.child(restart))
            Climb(oracle, rows, first, steps=self.steps, rho=self.rho, stop=False).run(loss)

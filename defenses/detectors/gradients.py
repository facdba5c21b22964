"""Detectors that take a gradient with respect to the image: ODIN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.detector import Detector, Needs
from robustlab.core.errors import ConfigError, RangeError
from robustlab.core.model import Model
from robustlab.core.registry import DETECTORS
from robustlab.core.types import Batch, ModelOutputs

from .logits import MSP


@DETECTORS.register("odin")
@dataclass(frozen=True)
class ODIN(Detector):
    """Maximum softmax probability at a high temperature, of an image moved a step towards the model's own answer.

    x' = x - eps sign(gradient of the cross-entropy of f(x) / T for the answer), then the log-odds of the softmax of
    f(x') / T, as ``MSP`` has them. The step is on the [0, 1] scale of the image, before any normalisation of the
    network: the authors take it after that, where 0.0014 is about 0.0014 times the standard deviation. Images keep to
    [0, 1]. Any number of channels. Two more forward passes and one backward pass. Not for several labels.

    Args:
        temperature: T, above 0.
        eps: Length of the step, 0 or more; 0 leaves only the temperature.

    Raises:
        RangeError: Numbers make no sense.

    References:
        Liang, Li, Srikant 2018, arXiv:1706.02690.
    """

    needs: ClassVar[frozenset[Needs]] = frozenset({Needs.LOGITS, Needs.INPUT_GRAD, Needs.EXTRA_FORWARD})

    temperature: float = 1000.0
    eps: float = 0.0014

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.eps >= 0:
            got = f"temperature={self.temperature}, eps={self.eps}"
            raise RangeError("ODIN", "temperature above 0, eps of 0 or more", got, "The authors use 1000 and 0.0014.")

    def score(self, outputs: ModelOutputs) -> Tensor:
        """Return float64 (N,) of outputs for images that were moved already: the temperature alone.

        Raises:
            ConfigError: Several labels an image.
        """
        if outputs.task == "multilabel":
            raise ConfigError("odin", "one class a sample", "several labels", "Use another detector.")
        logits = outputs.logits.to(torch.float64) / self.temperature
        return MSP().score(ModelOutputs(logits=logits, task=outputs.task))

    def score_in_pass(self, model: Model, batch: Batch, outputs: ModelOutputs) -> Tensor:
        if self.eps == 0:
            return self.score(outputs)
        view = model.for_attack()
        with torch.inference_mode(False), torch.enable_grad(), view.evaluating():
            images = batch.images.detach().clone().requires_grad_(True)
            logits = view.outputs(batch.replace(images)).logits / self.temperature
            loss = F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
            (slope,) = torch.autograd.grad(loss, images)
        moved = (batch.images - self.eps * torch.nan_to_num(slope).sign()).clamp(0, 1)
        return self.score(model.predict(batch.replace(moved)))

    def skip_reason(self, model: Model) -> str | None:
        if model.task == "multilabel":
            return "needs one class a sample"
        return super().skip_reason(model)

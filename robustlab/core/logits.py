"""From what networks return to logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ModelError
from .types import OutputKind, Task

_TINY = torch.finfo(torch.float32).tiny


def to_logits(raw: Tensor, output: OutputKind, task: Task, who: str, fix: str = "Declare output='logits'.") -> Tensor:
    """Turn outputs of a declared kind into logits.

    Args:
        raw: float32 (N, C); one column is one sigmoid, unless the task is multi-label.
        output: What ``raw`` holds.
        task: Says whether columns compete (softmax) or stand alone (one sigmoid a label).
        who: Name used in messages.
        fix: What to do when the numbers cannot be of that kind.

    Returns:
        float32 (N, C), two columns for one sigmoid; NaN where the output was no number.

    Raises:
        ModelError: Finite numbers lie outside the range of the declared kind.
    """
    single = raw.shape[1] == 1 and task != "multilabel"
    if output == "probs":
        _check_declared(raw, -1e-6, 1 + 1e-6, "probabilities in [0, 1]", who, fix)
        # rounding may leave 1 + 1e-7, whose complement has no logarithm
        raw = torch.where(torch.isinf(raw), torch.nan, raw.clamp_max(1.0))
        log_p = raw.clamp_min(_TINY).log()
        logits = log_p - torch.log1p(-raw).clamp_min(-100.0) if single or task == "multilabel" else log_p
    elif output == "log_probs":
        _check_declared(raw, -torch.inf, 1e-4, "log-probabilities, at most 0", who, fix)
        # a probability of 0 is an answer, and no broken output
        log_p = torch.where(raw == -torch.inf, math.log(_TINY), raw)
        log_p = torch.where(log_p == torch.inf, torch.nan, log_p.clamp_max(0.0))
        log_q = torch.log1p(-log_p.exp()).clamp_min(-100.0)
        logits = log_p - log_q if single or task == "multilabel" else log_p
    else:
        logits = raw
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if single else logits


def _check_declared(raw: Tensor, low: float, high: float, expected: str, who: str, fix: str) -> None:
    """Stop when finite outputs leave the range of the declared kind; others count as errors of the model."""
    values = raw.detach()
    finite = torch.isfinite(values)
    if bool((finite & ((values < low) | (values > high))).any()):
        found = values[finite]
        raise ModelError(who, expected, f"values from {found.min().item():.3g} to {found.max().item():.3g}", fix)

"""Classes and labels as two-way problems, each with one log-odds and one outcome, and the way back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.checks import check_labels
from robustlab.core.errors import LabelError
from robustlab.core.types import Task


def prepared(logits: Tensor, labels: Tensor, task: Task, who: str) -> tuple[Tensor, Tensor]:
    """Return float64 logits and labels of the rows whose logits are all finite.

    Args:
        logits: float (N, C).
        labels: int64 (N,), or (N, C) in {0, 1, -1} for multi-label.
        task: Task of the model.
        who: Name used in messages.

    Raises:
        LabelError: No row is left, labels are out of range, or an outcome never occurs: no map can be fitted for it.
    """
    check_labels(labels, task=task, num_classes=logits.shape[1], count=len(logits), who=who)
    finite = torch.isfinite(logits).all(1)
    z, y = logits[finite].to(torch.float64), labels[finite]
    if len(z) == 0:
        raise LabelError(who, "labelled samples with finite logits", "none", "Look at the model's outputs on val.")
    fix = "Add such samples, or use TemperatureScaling, which needs no class in particular."
    if task == "multilabel":
        lacking = ~((y == 1).any(0) & (y == 0).any(0))
        expected, thing = "validation data with both outcomes of every label", "one outcome at most of labels"
    else:
        lacking = torch.bincount(y, minlength=z.shape[1]) == 0
        expected, thing = "validation data with every class", "no sample of classes"
    if bool(lacking.any()):
        names = lacking.nonzero().flatten().tolist()
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise LabelError(who, expected, f"{thing} {', '.join(map(str, names[:8]))}{more}", fix)
    return z, y


def outcomes(labels: Tensor, task: Task, classes: int) -> tuple[Tensor, Tensor]:
    """Return whether each event happened and whether it was annotated, float64 (N, M); M as in ``log_odds``."""
    if task == "multilabel":
        return (labels == 1).to(torch.float64), (labels >= 0).to(torch.float64)
    happened = (labels == 1)[:, None] if classes == 2 else F.one_hot(labels, classes)
    return happened.to(torch.float64), torch.ones(happened.shape, dtype=torch.float64, device=labels.device)


def log_odds(logits: Tensor, task: Task) -> Tensor:
    """Return log(p / (1 - p)) of each event: of every label, of class 1 of two, or of every class against the rest.

    Taken from the logits, so that probabilities that round to 0 or 1 keep their order: z_k - log sum_{j != k} e^{z_j}.

    Args:
        logits: float64 (N, C), finite.
        task: Task of the model.

    Returns:
        float64 (N, M), with M = 1 for two classes and C otherwise.
    """
    if task == "multilabel":
        return logits
    if logits.shape[1] == 2:
        return logits[:, 1:] - logits[:, :1]
    best = logits.argmax(1, keepdim=True)
    log_p = torch.log_softmax(logits, 1)
    # only the largest of several probabilities can be near 1, where 1 - p has no digits left
    others = torch.log1p(-log_p.exp().clamp_max(0.5))
    beside_best = torch.logsumexp(log_p.scatter(1, best, -torch.inf), 1, keepdim=True)
    return log_p - others.scatter(1, best, beside_best)


def from_log_odds(odds: Tensor, task: Task) -> Tensor:
    """Return logits (N, C) of calibrated log-odds (N, M): log-probabilities, or for multi-label the log-odds.

    Several classes are scaled to sum to 1 in the logarithm, where no row sums to 0.
    """
    if task == "multilabel":
        return odds
    if odds.shape[1] == 1:
        return torch.cat([F.logsigmoid(-odds), F.logsigmoid(odds)], 1)
    return torch.log_softmax(F.logsigmoid(odds), 1)


def from_frequencies(p: Tensor, count: Tensor, logits: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return logits (N, C) of observed frequencies, and which rows (N,) were left as they were.

    Frequencies are kept off 0 and 1, which would make one surprise infinitely bad: in [1/(n+2), 1 - 1/(n+2)]. A row of
    several classes that were all seen 0 times says nothing of their order and keeps the model's probabilities.

    Args:
        p: float64 (N, M) frequencies in [0, 1], M as in ``log_odds``.
        count: float64 (M,), samples behind each column's map.
        logits: float64 (N, C), finite.
        task: Task of the model.
    """
    least = 1 / (count + 2)
    clipped = torch.minimum(torch.maximum(p, least), 1 - least)
    mapped = from_log_odds(clipped.log() - torch.log1p(-clipped), task)
    if task == "multilabel" or p.shape[1] == 1:
        return mapped, torch.zeros_like(p[:, 0], dtype=torch.bool)
    # the least frequency above 0 is 1/n
    empty = (p < 0.5 / count).all(1)
    # probabilities that sum to 1 are needed here, not the odds against the rest
    return torch.where(empty[:, None], torch.log_softmax(logits, 1), torch.log_softmax(clipped.log(), 1)), empty


def table(rows: list[Tensor], fill: float | None = None) -> Tensor:
    """Return rows of different lengths as one (M, Q), padded at the end with ``fill`` or their last value."""
    width = max(len(row) for row in rows)
    ends = [row[-1] if fill is None else row.new_tensor(fill) for row in rows]
    return torch.stack([torch.cat([row, end.expand(width - len(row))]) for row, end in zip(rows, ends, strict=True)])

"""What the doctor makes a model do: a few forward passes over samples spread over the set, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from robustlab.core.model import Model, WrappedModel, wrap
from robustlab.core.rng import SampleRng
from robustlab.core.source import Source

CHUNK = 32
FEW, SOME, ENOUGH, MANY, ALL = 16, 32, 64, 256, 512

_CENTRE = {"logits": 0.0, "probs": 0.5, "log_probs": log(0.5)}
_PAIRS = (("mean", "std"), ("pixel_mean", "pixel_std"), ("image_mean", "image_std"), ("norm_mean", "norm_std"))


def spread_rows(count: int, wanted: int) -> Tensor:
    """Return ``wanted`` of ``count`` positions, increasing: one at a keyed random place in each of equal parts.

    Equal steps would meet labels that alternate, or batches of a scanner, always in the same phase.
    """
    if count <= wanted:
        return torch.arange(count)
    edges = torch.arange(wanted + 1) * count // wanted
    place = SampleRng.make(0, "doctor", torch.arange(wanted)).uniform("place").double()
    return edges[:-1] + (place * (edges[1:] - edges[:-1])).to(torch.int64)


def passes(model: Model, source: Source, rows: Tensor) -> Tensor:
    """Return logits float32 (N, C) for some samples, in batches of one size; the last one is padded by repetition."""
    size = max(2, min(CHUNK, len(rows)))
    parts = []
    for start in range(0, len(rows), size):
        index = rows[start : start + size].tolist()
        batch = source.read(index + [index[-1]] * (size - len(index))).to(model.device)
        parts.append(model.predict(batch).logits[: len(index)])
    return torch.cat(parts).to("cpu", torch.float32)


def declared_kind(model: Model) -> str:
    """Return ``"logits"``, ``"log_probs"``, ``"probs"``, or ``"assumed"`` for logits that nobody declared."""
    if not isinstance(model, WrappedModel):
        return "logits"
    kind = str(model.settings()["output"])
    return "assumed" if "assumed" in kind else kind


def tolerant(model: Model, *, mean: Any = None, std: Any = None, bounds: tuple[float, float] | None = None) -> Model:
    """Return the model as one that shows what its network puts out, and refuses nothing.

    Args:
        model: A wrapped network, of which another view is made with the same preprocessing; others are returned as
            they are.
        mean: Another mean, together with ``std``; the model's own if both are None.
        std: Another standard deviation.
        bounds: Other values of black and white.
    """
    if not isinstance(model, WrappedModel):
        return model
    if mean is None and std is None:
        mean, std = model.mean, model.std
    return wrap(
        model.net,
        task=model.task,
        output="logits",
        mean=mean,
        std=std,
        size=model.size,
        channels=model.channels,
        bounds=bounds or model.bounds,
        name=model.model_name,
    )


def normalising_layer(net: Any) -> str | None:
    """Return the class name of a module that normalises images before the first convolution or linear layer, or None.

    It is one whose class is called normalise or normalize, or that holds a mean and a standard deviation; the direct
    parts of the network are looked at in any order, since they may be defined after the backbone.
    """
    if not isinstance(net, nn.Module):
        return None
    early = []
    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            break
        early.append(module)
    for module in (*early, *net.children()):
        name = type(module).__name__.lower()
        called = name.startswith(("normalize", "normalise", "imagenormal")) or name.endswith(("normalize", "normalise"))
        holds = any(hasattr(module, mean) and hasattr(module, std) for mean, std in _PAIRS)
        if (called or holds) and not list(module.parameters(recurse=False)):
            return type(module).__name__
    return None


def stated_normalisation(model: WrappedModel) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation that the network or a part of it states (timm's ``pretrained_cfg``)."""
    if not isinstance(model.net, nn.Module):
        return None
    for module in model.net.modules():
        stated: Mapping[str, Any] | None = getattr(module, "pretrained_cfg", None)
        if isinstance(stated, Mapping) and stated.get("mean") and stated.get("std"):
            mean, std = (tuple(float(v) for v in stated[key]) for key in ("mean", "std"))
            if model.channels is not None and len(mean) not in (1, model.channels):
                return (sum(mean) / len(mean),), (sum(std) / len(std),)
            return mean, std
    return None


@dataclass(frozen=True, eq=False)
class Answers:
    """What a network put out for some labelled samples.

    Args:
        raw: float32 (N, C), as it came from the network; (0, x) where there is a single output x.
        labels: int64 (N,) or (N, L), or None.
        kind: What the outputs are declared to be, as in ``declared_kind``.
        multilabel: One output a label.
    """

    raw: Tensor
    labels: Tensor | None
    kind: str
    multilabel: bool

    @cached_property
    def single(self) -> bool:
        """The network has one output, the positive class."""
        return not self.multilabel and self.raw.shape[1] == 2 and bool((self.raw[:, 0] == 0).all())

    @cached_property
    def values(self) -> Tensor:
        """float32 (M, C) outputs of the network itself where all of a row are finite."""
        raw = self.raw[:, 1:] if self.single else self.raw
        return raw[torch.isfinite(raw).all(1)]

    @cached_property
    def unit(self) -> bool:
        """At least four rows, and every output in [0, 1]."""
        return len(self.values) >= 4 and bool(((self.values >= 0) & (self.values <= 1)).all())

    @cached_property
    def answers(self) -> Tensor:
        """int64 (N,) answers, -1 where the outputs are not finite. Not for multi-label."""
        centre = 0.5 if self.kind == "assumed" and self.unit else _CENTRE.get(self.kind, 0.0)
        top = (self.raw[:, 1] > centre).to(torch.int64) if self.single else self.raw.nan_to_num().argmax(1)
        return torch.where(torch.isfinite(self.raw).all(1), top, -1)

    def given_to(self, classes: Tensor) -> Tensor:
        """Return the probability (N,) given to a class of each sample, 0 for classes that do not exist."""
        if self.kind == "log_probs":
            probs = self.raw[:, 1:].exp() if self.single else self.raw.exp()
        elif self.kind == "probs" or (self.kind == "assumed" and self.unit):
            probs = self.raw[:, 1:] if self.single else self.raw
        else:
            return self._pick(self.raw.softmax(1), classes)
        return self._pick(torch.cat([1 - probs, probs], 1) if self.single else probs, classes)

    def _pick(self, probs: Tensor, classes: Tensor) -> Tensor:
        there = (classes >= 0) & (classes < self.classes)
        return torch.where(there, probs.gather(1, classes.clamp(0, self.classes - 1)[:, None])[:, 0], 0.0)

    @property
    def classes(self) -> int:
        """Number of outputs, two for a single one."""
        return self.raw.shape[1]


class Evidence:
    """Forward passes, made when a check first asks for them.

    Args:
        model: The model.
        source: The data.
        thorough: Look at up to 512 samples at once, instead of 32 and, where those look suspicious, 256.
    """

    def __init__(self, model: Model, source: Source, *, thorough: bool) -> None:
        self.model = model
        self.view = tolerant(model)
        self.source = source
        self.thorough = thorough
        self.kind = declared_kind(model)

    def look(self, view: Model, rows: Tensor) -> Answers:
        """Return a view's answers to the samples at ``rows``."""
        labels = self.source.info.labels
        return Answers(
            raw=passes(view, self.source, rows),
            labels=None if labels is None else labels[rows],
            kind=self.kind,
            multilabel=self.model.task == "multilabel",
        )

    @cached_property
    def first_rows(self) -> Tensor:
        """Positions of the first look."""
        return spread_rows(len(self.source), ALL if self.thorough else SOME)

    @cached_property
    def second_rows(self) -> Tensor:
        """Positions of the second look."""
        return self.first_rows if self.thorough else spread_rows(len(self.source), MANY)

    @cached_property
    def first(self) -> Answers:
        """Answers at the first look."""
        return self.look(self.view, self.first_rows)

    @cached_property
    def second(self) -> Answers:
        """Answers at the second look."""
        return self.first if torch.equal(self.first_rows, self.second_rows) else self.look(self.view, self.second_rows)

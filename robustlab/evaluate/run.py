"""The loop: read a chunk once, draw once a shift, apply at each severity, one forward pass a condition."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from robustlab.core.detector import Detector
from robustlab.core.errors import ConfigError
from robustlab.core.model import Model
from robustlab.core.shift import ShiftContext, quantize
from robustlab.core.source import Source
from robustlab.core.types import Batch, ImageSpec, ModelOutputs
from robustlab.metrics.store import PredictionStore

from .plan import CLEAN, Plan

logger = logging.getLogger("robustlab")


class Bar(Protocol):
    """What is used of a progress bar."""

    def update(self) -> object:
        """Move by one."""
        ...


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Bar]:
    """Show a bar that moves by one a forward pass."""
    with tqdm(total=total, disable=not show, desc="robustlab", unit="pass") as bar:
        yield bar


@dataclass(eq=False)
class _Answers:
    """Outputs of one condition, chunk by chunk, on the model's device until the end."""

    logits: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, outputs: ModelOutputs, scores: Mapping[str, Tensor]) -> None:
        self.logits.append(outputs.logits)
        for name, values in scores.items():
            self.scores.setdefault(name, []).append(values)


@dataclass(frozen=True, eq=False)
class Pass:
    """Predictions of one source under all its conditions.

    Args:
        stores: Condition key to predictions; failed conditions are missing.
        failures: Condition label to the error text.
    """

    stores: Mapping[str, PredictionStore]
    failures: Mapping[str, str]


def clusters_of(source: Source, cluster: str | None) -> Tensor | None:
    """Return the codes of the resampling unit; samples whose unit is unknown stand alone."""
    if cluster is None:
        return None
    codes = source.column(cluster)
    alone = -1 - torch.arange(len(codes))
    return torch.where(codes < 0, alone, codes)


def adapt(batch: Batch, source: ImageSpec, target: ImageSpec) -> Batch:
    """Bring a foreign set's images to the channels, size and bit depth of the in-distribution data."""
    images = batch.images
    if source.channels != target.channels:
        if source.channels == 1:
            images = images.expand(-1, target.channels, -1, -1)
        elif target.channels == 1 and source.channels == 3:
            weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
            images = (images * weights).sum(1, keepdim=True)
        else:
            raise ConfigError(
                "evaluate_under_shift",
                f"OOD images with 1, 3 or {target.channels} channels",
                f"{source.channels}",
                "Convert them before.",
            )
    if source.size != target.size:
        images = F.interpolate(images, size=target.size, mode="bilinear", align_corners=False, antialias=True)
    return batch.replace(quantize(images.clamp(0, 1), target))


def chunks(
    source: Source, size: int, device: torch.device, adapter: Callable[[Batch], Batch]
) -> Iterator[tuple[Batch, int]]:
    """Iterate over (batch of exactly ``size`` samples, number of real ones); the last one is padded by repetition."""
    for start in range(0, len(source), size):
        index = list(range(start, min(start + size, len(source))))
        count = len(index)
        index += [index[-1]] * (size - count)
        yield adapter(source.read(index).to(device)), count


def predict_source(
    model: Model,
    source: Source,
    plan: Plan,
    *,
    detectors: Mapping[str, Detector],
    seed: int,
    chunk: int,
    cluster: str | None,
    adapter: Callable[[Batch], Batch] = lambda batch: batch,
    spec: ImageSpec | None = None,
    bar: Bar | None = None,
) -> Pass:
    """Run a model over a source under every condition of a plan.

    Args:
        model: The model, on its device.
        source: The data.
        plan: Conditions; clean is always run.
        detectors: Scorer name to detector.
        seed: Seed of the draws.
        chunk: Exact number of samples of every forward pass.
        cluster: Group column of the resampling unit.
        adapter: Applied to each batch after reading.
        spec: Meaning of the pixels after ``adapter``; the source's own by default.
        bar: Progress bar, moved by one a forward pass.
    """
    spec = spec or source.info.spec
    answers: dict[str, _Answers] = {condition.key: _Answers() for condition in plan.conditions}
    failures: dict[str, str] = {}
    usable = {name: detector for name, detector in detectors.items() if detector.skip_reason(model) is None}

    def record(key: str, batch: Batch, count: int) -> None:
        outputs = model.predict(batch).head(count)
        scores = {name: detector.score(outputs) for name, detector in usable.items()}
        answers[key].add(outputs, {**scores, **outputs.scores})
        if bar is not None:
            bar.update()

    for batch, count in chunks(source, chunk, model.device, adapter):
        record(CLEAN.key, batch, count)
        for sweep in plan.sweeps:
            if sweep.conditions[0].label in failures:
                continue
            ctx = ShiftContext(seed=seed, spec=spec, model=model)
            try:
                draws = sweep.shift.prepare(batch, ctx)
                for condition in sweep.conditions:
                    shifted = sweep.shift.perform(batch, draws, condition.severity, ctx)
                    record(condition.key, shifted.replace(quantize(shifted.images, spec)), count)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                logger.warning("%s failed: %s", sweep.conditions[0].label, error)
                failures[sweep.conditions[0].label] = f"{type(error).__name__}: {error}"
    clusters = clusters_of(source, cluster)
    reasons = {name: reason for name, d in detectors.items() if (reason := d.skip_reason(model)) is not None}
    stores = {
        condition.key: _store(answers[condition.key], source, model, clusters, reasons)
        for condition in plan.conditions
        if condition.label not in failures
    }
    return Pass(stores, failures)


def _store(
    answers: _Answers, source: Source, model: Model, clusters: Tensor | None, reasons: Mapping[str, str]
) -> PredictionStore:
    logits = torch.cat(answers.logits).to("cpu", torch.float32)
    scores = {name: torch.cat(values).cpu() for name, values in answers.scores.items()}
    nothing = torch.full((len(logits),), torch.nan)
    return PredictionStore(
        ids=source.info.ids,
        logits=logits,
        labels=source.info.labels,
        task=model.task,
        scores={**scores, **dict.fromkeys(reasons, nothing)},
        score_reasons=reasons,
        groups=source.info.groups,
        clusters=clusters,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def first_chunk(source: Source, device: torch.device) -> int:
    """Return the chunk to try first: large enough to keep the device busy, small enough to stay in its caches."""
    pixels = source.info.spec.size[0] * source.info.spec.size[1]
    if device.type == "cuda":
        return max(2, min(256, len(source)))
    return max(2, min(64 if pixels <= 96 * 96 else 16, len(source)))


def forward_passes(counts: Sequence[tuple[int, int]], chunk: int) -> int:
    """Return the number of forward passes for (samples, conditions) pairs."""
    return sum(-(-samples // chunk) * conditions for samples, conditions in counts)

"""Example pictures for a report, made only when asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from robustlab.core.attack import Attack
from robustlab.core.model import Model
from robustlab.core.shift import ShiftContext, as_stored
from robustlab.core.source import Source
from robustlab.metrics.store import PredictionStore
from robustlab.report.confusing import of_the_best
from robustlab.report.report import Picture, Report

from .plan import CLEAN, Plan

EDGE = 128


def make_gallery(
    source: Source, plan: Plan, model: Model, seed: int, stores: Mapping[str, PredictionStore]
) -> tuple[Picture, ...]:
    """Return one sample, clean and under every condition that was run, with the model's answer below."""
    labels = source.info.labels
    row = 0
    if labels is not None and labels.ndim == 1 and bool((labels == labels.max()).any()):
        row = int((labels == labels.max()).nonzero()[0])
    place = (stores[CLEAN.key].ids == source.info.ids[row]).nonzero()
    if len(place) == 0:  # the sample could not be evaluated
        return ()
    at = int(place[0])
    batch = source.read([row, row]).to(model.device)
    truth = "" if labels is None or labels.ndim != 1 else f" (truth: {_name(model, source, int(labels[row]))})"

    def answer(key: str) -> str:
        return _caption(model, stores[key].logits[at], source)

    pictures = [Picture(CLEAN.label, 0.0, encode_png(batch.images[0]), answer(CLEAN.key) + truth)]
    ctx = ShiftContext(seed=seed, spec=source.info.spec, model=model, thresholds=plan.thresholds)
    for sweep in plan.sweeps:
        if isinstance(sweep.shift, Attack) and batch.labels is None:
            continue
        if sweep.conditions[0].key not in stores:
            continue
        draws = sweep.shift.prepare(batch, ctx)
        for condition in sweep.conditions:
            images = as_stored(sweep.shift, sweep.shift.perform(batch, draws, condition.severity, ctx).images, ctx.spec)
            png = encode_png(images[0])
            pictures.append(Picture(condition.label, condition.severity, png, answer(condition.key)))
    return tuple(pictures)


def confusing_pictures(
    report: Report, source: Source, ood: Mapping[str, Source], count: int = 4
) -> tuple[Picture, ...]:
    """Return what confuses the best score of each foreign set most: foreign images, and images of the data.

    Args:
        report: The report, with its predictions.
        source: The data.
        ood: Name to foreign data.
        count: Pictures of each kind.
    """
    pictures = []
    for item in of_the_best(report, count):
        known = item.kind == "looks foreign"
        images = source if known else ood[item.data]
        store = report.predictions[CLEAN.key if known else f"ood:{item.data}"]
        title = f"{item.data} {item.kind} to {item.scorer}"
        for sample in item.samples:
            row = int((images.info.ids == store.ids[sample.row]).nonzero()[0])
            caption = f"{100 * sample.share:.0f} % {item.words}"
            pictures.append(Picture(title, 0.0, encode_png(images.pixels([row])[0]), caption))
    return tuple(pictures)


def _caption(model: Model, logits: Tensor, source: Source) -> str:
    if model.task == "multilabel":
        return f"{int((logits > 0).sum())} findings"
    probability, answer = torch.softmax(logits.double(), 0).max(0)
    return f"{_name(model, source, int(answer))} {probability.item():.2f}"


def _name(model: Model, source: Source, index: int) -> str:
    names = model.class_names or source.info.class_names
    return names[index] if names is not None and len(names) == model.num_classes else f"class {index}"


def encode_png(image: Tensor) -> bytes:
    """Return a (C, H, W) image in [0, 1] as PNG bytes, its longer edge at most 128 px."""
    array = (image[:3] if image.shape[0] >= 3 else image[:1]).mul(255).round().to(torch.uint8).cpu()
    picture = Image.fromarray(array.permute(1, 2, 0).numpy() if len(array) == 3 else array[0].numpy())
    picture.thumbnail((EDGE, EDGE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

"""How fast metrics are beside scikit-learn, netcal, torchmetrics and pytorch-ood, and the cost of the intervals.

Point values: 1,000,000 predictions of ten classes (OOD: 1,000,000 scores a side). All start from float32 logits and
labels: ours from a fresh PredictionStore, torchmetrics from the logits, which it takes, scikit-learn and netcal from
the probabilities or answers that they ask for, made by torch in their time. Rounds alternate, medians count, and a row
says whether both computed the same number (to 1e-5, a rival's float32). The bar: no row below 1, geometric mean at
least 2 over the fastest rival of each metric.

Default set: everything that ``metrics="default"`` computes for labelled data, intervals included, at 100,000 x 10,
beside the point values alone of the same metrics from scikit-learn and netcal. Bootstrap: 1,000 exact paired replicates
of the difference of two models in every default metric, 10,000 x 10.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustlab.core.registry import METRICS
from robustlab.metrics import Context, Frozen, Metric, PredictionStore, Resampler, compute, fit_frozen
from robustlab.metrics.stats import bootstrap

ROWS, CLASSES, BINS = 1_000_000, 10, 15
SAME = 1e-5
BAR_EACH, BAR_MEAN, BAR_DEFAULT, BAR_BOOTSTRAP = 1.0, 2.0, 3.0, 60.0
LIBRARIES = ("scikit-learn", "netcal", "torchmetrics", "pytorch-ood")

Value = Callable[[], float]


@dataclass(frozen=True, eq=False)
class Data:
    """Predictions."""

    logits: torch.Tensor
    labels: torch.Tensor

    @staticmethod
    def make(rows: int, seed: int = 0) -> Data:
        """Return predictions of which about 60 % are right."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, CLASSES, (rows,), generator=generator)
        logits = torch.randn((rows, CLASSES), generator=generator) * 1.5
        logits[torch.arange(rows), labels] += 2.0
        return Data(logits, labels)

    def store(self) -> PredictionStore:
        """Return a store that has derived nothing yet."""
        return PredictionStore(torch.arange(len(self.logits)), self.logits, self.labels, "multiclass")


def rivals_of(data: Data) -> dict[str, dict[str, Value]]:
    """Return metric to library to a call that computes the same number from the logits."""
    import sklearn.metrics as sk
    from netcal.metrics import ECE, MCE
    from torchmetrics.functional import classification as tm

    y, logits, truth = data.labels.numpy(), data.logits, data.labels
    names, one_hot = np.arange(CLASSES), np.eye(CLASSES)[data.labels.numpy()]

    def answers() -> Any:
        return logits.argmax(1).numpy()

    def probs() -> Any:
        return torch.softmax(logits, 1).numpy()

    def exact_probs() -> Any:  # rows that sum to 1 in float64, which scikit-learn and netcal want
        return torch.softmax(logits.double(), 1).numpy()

    def torch_metric(function: Callable[..., torch.Tensor], **more: Any) -> Value:
        return lambda: float(function(logits, truth, num_classes=CLASSES, validate_args=False, **more))

    return {
        "accuracy": {
            "scikit-learn": lambda: float(sk.accuracy_score(y, answers())),
            "torchmetrics": torch_metric(tm.multiclass_accuracy, average="micro"),
        },
        "balanced-accuracy": {
            "scikit-learn": lambda: float(sk.balanced_accuracy_score(y, answers())),
            "torchmetrics": torch_metric(tm.multiclass_accuracy, average="macro"),
        },
        "f1": {
            "scikit-learn": lambda: float(sk.f1_score(y, answers(), labels=names, average="macro")),
            "torchmetrics": torch_metric(tm.multiclass_f1_score, average="macro"),
        },
        "mcc": {
            "scikit-learn": lambda: float(sk.matthews_corrcoef(y, answers())),
            "torchmetrics": torch_metric(tm.multiclass_matthews_corrcoef),
        },
        "kappa": {
            "scikit-learn": lambda: float(sk.cohen_kappa_score(y, answers())),
            "torchmetrics": torch_metric(tm.multiclass_cohen_kappa),
        },
        "top-3-accuracy": {
            "scikit-learn": lambda: float(sk.top_k_accuracy_score(y, logits.numpy(), k=3, labels=names)),
            "torchmetrics": torch_metric(tm.multiclass_accuracy, average="micro", top_k=3),
        },
        "auroc": {
            "scikit-learn": lambda: float(sk.roc_auc_score(y, exact_probs(), multi_class="ovr", average="macro")),
            "torchmetrics": torch_metric(tm.multiclass_auroc, average="macro", thresholds=None),
        },
        "average-precision": {
            "scikit-learn": lambda: float(sk.average_precision_score(one_hot, probs(), average="macro")),
            "torchmetrics": torch_metric(tm.multiclass_average_precision, average="macro", thresholds=None),
        },
        "nll": {"scikit-learn": lambda: float(sk.log_loss(y, exact_probs(), labels=names))},
        "brier": {
            "scikit-learn": lambda: float(sk.brier_score_loss(y, exact_probs(), labels=names, scale_by_half=False))
        },
        "ece": {
            "netcal": lambda: float(ECE(BINS).measure(exact_probs(), y)),
            "torchmetrics": torch_metric(tm.multiclass_calibration_error, n_bins=BINS, norm="l1"),
        },
        "mce": {
            "netcal": lambda: float(MCE(BINS).measure(exact_probs(), y)),
            "torchmetrics": torch_metric(tm.multiclass_calibration_error, n_bins=BINS, norm="max"),
        },
    }


def ood_rivals(inside: torch.Tensor, outside: torch.Tensor) -> dict[str, dict[str, Value]]:
    """Return OOD metric to library to a call."""
    import sklearn.metrics as sk
    from torchmetrics.functional import classification as tm

    scores = torch.cat([inside, outside])
    out = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    numbers, truth = scores.numpy(), out.numpy()
    found: dict[str, dict[str, Value]] = {
        "auroc-ood": {
            "scikit-learn": lambda: float(sk.roc_auc_score(truth, numbers)),
            "torchmetrics": lambda: float(tm.binary_auroc(scores, out, thresholds=None, validate_args=False)),
        },
        "aupr-ood-pos": {"scikit-learn": lambda: float(sk.average_precision_score(truth, numbers))},
        "fpr95-ood-pos": {},
    }
    from pytorch_ood.metrics import OODMetrics

    target = torch.where(out == 1, -1, 1)  # negative labels are OOD there

    def all_at_once() -> float:
        made = OODMetrics()
        made.update(scores, target)
        return float(made.compute()["FPR95TPR"])

    found["fpr95-ood-pos"]["pytorch-ood"] = all_at_once
    return found


def timed(ours: Value, theirs: dict[str, Value], rounds: int) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Return (our seconds, our value, library to (seconds, value)); rounds alternate, medians count."""
    calls = {"": ours, **theirs}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    values = {name: call() for name, call in calls.items()}  # warm-up
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in spent.items()}
    return median[""], values[""], {name: (median[name], values[name]) for name in theirs}


def point(name: str, store: Callable[[], PredictionStore], context: Context) -> Value:
    """Return a call that computes a metric from logits."""
    item = METRICS.get(name)
    if not issubclass(item, Metric):
        raise TypeError(f"{name} is not a metric of one store")
    return lambda: next(iter(item().point(store(), context).values()))


def point_rows(rows: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each metric and library."""
    data = Data.make(rows)
    context = Context(Resampler(), Frozen())
    work = [(name, point(name, data.store, context), theirs) for name, theirs in rivals_of(data).items()]
    generator = torch.Generator().manual_seed(1)
    inside, outside = (torch.randn(rows, generator=generator) + shift for shift in (0.0, 1.5))

    def scored(scores: torch.Tensor) -> PredictionStore:
        return PredictionStore(torch.arange(rows), torch.zeros((rows, 2)), None, "binary", scores={"score": scores})

    against = Context(Resampler(), Frozen(), reference=scored(inside))
    work += [
        (name, point(name, lambda: scored(outside), against), theirs)
        for name, theirs in ood_rivals(inside, outside).items()
    ]
    found = []
    for name, ours, theirs in work:
        seconds, value, others = timed(ours, theirs, rounds)
        for library, (rival_seconds, rival_value) in others.items():
            same = math.isclose(value, rival_value, abs_tol=SAME)
            found.append(
                {
                    "case": f"{name}, {rows:,}" + (f" x {CLASSES}" if METRICS.get(name).on == "labels" else " a side"),
                    "metric": name,
                    "rival": library,
                    "ours_s": round(seconds, 5),
                    "rival_s": round(rival_seconds, 5),
                    "ratio": round(rival_seconds / seconds, 3),
                    "ours": value,
                    "theirs": rival_value,
                    "agree": "equal" if same else f"differ by {abs(value - rival_value):.2g}",
                }
            )
            _show(found[-1])
    return found


def default_row(rows: int, rounds: int) -> dict[str, Any]:
    """Return the default set with intervals beside point values of the same metrics."""
    import sklearn.metrics as sk
    from netcal.metrics import ECE

    data = Data.make(rows)
    frozen = fit_frozen(Data.make(20_000, seed=1).store(), 0.1)
    y = data.labels.numpy()

    def theirs() -> float:
        answers, probs = data.logits.argmax(1).numpy(), torch.softmax(data.logits.double(), 1).numpy()
        sk.accuracy_score(y, answers)
        sk.balanced_accuracy_score(y, answers)
        sk.recall_score(y, answers, average=None)
        for matrix in sk.multilabel_confusion_matrix(y, answers):
            _ = matrix[0, 0] / matrix[0].sum()
        sk.roc_auc_score(y, probs, multi_class="ovr", average="macro")
        sk.brier_score_loss(y, probs, scale_by_half=False)
        return float(ECE(BINS).measure(probs, y))

    def ours() -> float:
        return next(v.estimate.value for v in compute(data.store(), Context(Resampler(), frozen)) if v.metric == "ece")

    seconds, value, others = timed(ours, {"scikit-learn and netcal": theirs}, rounds)
    ((library, (rival_seconds, rival_value)),) = others.items()
    return {
        "case": f"default set with intervals, {rows:,} x {CLASSES}, beside their point values",
        "rival": library,
        "ours_s": round(seconds, 4),
        "rival_s": round(rival_seconds, 4),
        "ratio": round(rival_seconds / seconds, 3),
        "times": round(seconds / rival_seconds, 3),
        "agree": "equal ECE" if math.isclose(value, rival_value, abs_tol=SAME) else f"ECE {value} and {rival_value}",
    }


def bootstrap_seconds(rows: int, replicates: int) -> float:
    """Return the time of exact paired replicates of every default metric's difference."""
    first, second = Data.make(rows).store(), Data.make(rows, seed=0)
    noise = torch.randn(second.logits.shape, generator=torch.Generator().manual_seed(2))
    other = PredictionStore(first.ids, second.logits + 0.5 * noise, first.labels, "multiclass")
    context = Context(Resampler(replicates=replicates), fit_frozen(first, 0.1))
    everyone = torch.ones(rows, dtype=torch.bool)
    start = time.perf_counter()
    for _, item in METRICS.items():
        if not (item.default and issubclass(item, Metric) and item.on == "labels"):
            continue
        before, after = (item().statistics(store, context) for store in (first, other))
        for target, statistic in before.items():

            def difference(weights: torch.Tensor, target: str = target, statistic: Any = statistic) -> torch.Tensor:
                return after[target](weights) - statistic(weights)  # noqa: B023 - called before the next round

            bootstrap(first, difference, context.resampler, everyone)
    return time.perf_counter() - start


def _show(row: dict[str, Any]) -> None:
    print(
        f"{row['case']:<66}{row['rival']:<25}ours {row['ours_s']:>8.4f} s  theirs {row['rival_s']:>8.4f} s  "
        f"ratio {row['ratio']:>7.2f}  {row['agree']}",
        flush=True,
    )


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return geometric mean and minimum over the fastest rival of every metric."""
    fastest: dict[str, float] = {}
    for row in rows:
        fastest[row["metric"]] = min(row["ratio"], fastest.get(row["metric"], math.inf))
    low = min(fastest, key=lambda name: fastest[name])
    return {
        "geomean": round(math.exp(statistics.fmean(map(math.log, fastest.values()))), 3),
        "min": fastest[low],
        "slowest": low,
        "below": [name for name, ratio in fastest.items() if ratio < BAR_EACH],
    }


def main() -> None:
    """Run everything and print rows and summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows and two rounds")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    share, rounds = (10, 2) if arguments.quick else (1, 5)
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing: pip install 'robustlab[dev]'"
    print(", ".join(f"{name} {text}" for name, text in versions.items()))
    rows = point_rows(ROWS // share, rounds)
    summary = summary_of(rows)
    default = default_row(100_000 // share, rounds)
    _show(default)
    replicates = 1000 // share
    spent = bootstrap_seconds(10_000, replicates)
    print(f"point values: geometric mean {summary['geomean']} (bar {BAR_MEAN}), least {summary['min']} "
          f"({summary['slowest']}, bar {BAR_EACH})")  # fmt: skip
    print(f"default set with intervals: {default['times']} times their point values (bar {BAR_DEFAULT})")
    print(f"{replicates} exact paired bootstrap replicates of all default metrics at 10,000 x {CLASSES}: "
          f"{spent:.1f} s (bar {BAR_BOOTSTRAP:g} for 1,000)")  # fmt: skip
    if arguments.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {
            "machine": machine,
            "versions": {**versions, "torch": torch.__version__},
            "rows": [*rows, default],
            "bootstrap_s": spent,
            "summary": summary,
        }
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

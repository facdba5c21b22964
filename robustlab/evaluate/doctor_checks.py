"""The checks of a model, each a function of the evidence; the rules are in ``doctor_rules``."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlab.core.model import Capabilities, Model, WrappedModel

from .diagnosis import Finding, Outcome
from .doctor_passes import (
    ENOUGH,
    FEW,
    Answers,
    Evidence,
    normalising_layer,
    passes,
    spread_rows,
    stated_normalisation,
    tolerant,
)
from .doctor_rules import ALPHA, LITTLE_RECALL, Comparison, below_majority, is_constant, p_below, p_paired

NO_LABELS = "the data has no labels"
SEVERAL_LABELS = "several labels an image: answers are not one class"
ANOTHER_TASK = "the labels are made for another task"
FEW_LABELS = "the labels looked at are all of one class"


def no_single_labels(evidence: Evidence) -> str | None:
    """Return why answers cannot be compared with labels, or None."""
    labels = evidence.source.info.labels
    if labels is None:
        return NO_LABELS
    if evidence.model.task == "multilabel":
        return SEVERAL_LABELS
    return ANOTHER_TASK if labels.ndim != 1 else None


def _right(answers: Answers) -> Tensor:
    if answers.labels is None:
        return torch.zeros(len(answers.raw), dtype=torch.bool)
    return answers.answers == answers.labels


def check_train_mode(was_training: bool, names: tuple[str, ...]) -> Outcome:
    """Report a network that came in training mode."""
    if not was_training:
        return None
    layers = f"; it holds {', '.join(names)}, which work otherwise in that mode" if names else ""
    return Finding(
        "train-mode",
        f"The network was in training mode when it was passed{layers}.",
        "It is evaluated in eval mode and put back. Call net.eval() before, so that it is used so everywhere.",
    )


def check_normalisation(evidence: Evidence) -> list[tuple[str, Outcome]]:
    """Compare the answers with and without the declared mean and std, or with those that the network states.

    A finding if the exact McNemar test prefers the other preprocessing at 0.001 and its answers are good (see
    ``doctor_rules``); or if the network holds a normalising layer and the declared mean and std do not help either
    (no preference for them at 0.05).
    """
    model = evidence.model
    if not isinstance(model, WrappedModel):
        return [("double-normalisation", "only a network that wrap() made has a declared mean and std")]
    layer = normalising_layer(model.net)
    declared = _acts(model)
    out: list[tuple[str, Outcome]] = []
    if declared:
        bounds = evidence.source.info.spec.range
        plain = tolerant(model, mean=0.0, std=1.0, bounds=bounds if bounds[0] < 0 else None)
        out.append(("double-normalisation", _compare(evidence, plain, layer, "double-normalisation")))
    else:
        out.append(("double-normalisation", None))
    stated = stated_normalisation(model)
    if stated is None or layer is not None or _close(model, stated):
        reason = "the network states no other mean and std than those in use" if layer is None else f"it holds {layer}"
        out.append(("missing-normalisation", None if stated is not None else reason))
    elif declared and not evidence.thorough:
        out.append(("missing-normalisation", "judged by the thorough doctor only where another mean is declared"))
    else:
        other = tolerant(model, mean=stated[0], std=stated[1], bounds=(0.0, 1.0))
        out.append(("missing-normalisation", _compare(evidence, other, None, "missing-normalisation")))
    return out


def _acts(model: WrappedModel) -> bool:
    """Tell whether the declared mean and std change anything."""
    return any(v != 0 for v in model.mean or ()) or any(v != 1 for v in model.std or ())


def _close(model: WrappedModel, stated: tuple[tuple[float, ...], tuple[float, ...]]) -> bool:
    if model.mean is None or model.std is None or model.bounds != (0.0, 1.0):
        return False
    channels = max(map(len, (model.mean, model.std, *stated)))
    mine, theirs = ([v * (channels // len(v)) for v in pair] for pair in ((model.mean, model.std), stated))
    return all(abs(a - b) < 1e-3 for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))


def _compare(evidence: Evidence, other: Model, layer: str | None, check: str) -> Outcome:
    """Judge another preprocessing by the answers that are right with it and with the declared one."""
    reason = no_single_labels(evidence)
    if reason is not None:
        return reason if layer is None else _normalisation_finding(evidence, check, layer, None)
    first = evidence.first
    rows = evidence.first_rows
    base = first
    if not evidence.thorough and len(rows) > FEW:
        few = torch.arange(0, len(rows), 2)[:FEW]
        rows = rows[few]
        few_labels = None if first.labels is None else first.labels[few]
        base = Answers(first.raw[few], few_labels, first.kind, first.multilabel)
    found = _count(base, evidence.look(other, rows))
    if layer is None and not evidence.thorough and not found.suspicious():
        return None
    if not torch.equal(rows, evidence.second_rows):
        found = _count(evidence.second, evidence.look(other, evidence.second_rows))
    if found.second_is_right() or (layer is not None and not found.first_is_better()):
        return _normalisation_finding(evidence, check, layer, found)
    return None


def _count(base: Answers, other: Answers) -> Comparison:
    labels = base.labels if base.labels is not None else torch.zeros(len(base.raw), dtype=torch.int64)
    return Comparison.of(labels, _right(base), _right(other), other.given_to(labels), other.classes)


def _normalisation_finding(evidence: Evidence, check: str, layer: str | None, found: Comparison | None) -> Finding:
    doubled = check == "double-normalisation"
    with_or_without = "without mean and std" if doubled else "with the mean and std that the network states"
    seen = ""
    if found is not None:
        seen = (
            f"Of {found.n} labelled images {found.right} are answered right as declared and {found.other} "
            f"{with_or_without} (gained {found.gained}, lost {found.lost}; exact McNemar p = {found.p:.1e})."
        )
    if not doubled:
        return Finding(check, seen, "Pass that mean and std to wrap(), or leave both out: wrap() reads them.")
    if layer is not None:
        held = f"The network holds a normalising layer ({layer}), and mean and std are declared besides."
        return Finding(check, f"{held} {seen}".strip(), "Leave mean= and std= out of wrap(), or take the layer out.")
    low, high = evidence.source.info.spec.range
    hint = f" The stored pixels run from {low:g} to {high:g}: bounds=({low:g}, {high:g}) restores them." * (low < 0)
    return Finding(
        check,
        seen,
        "The network seems to normalise inside, or the images are standardised already. Leave mean= and std= out of "
        f"wrap().{hint}",
    )


def check_label_offset(evidence: Evidence) -> Outcome:
    """Ask whether the labels, moved by one class, fit the answers far better.

    Both directions, cyclic or with a class to spare; a finding if the exact McNemar test prefers the moved labels at
    0.0005 (two directions) and they fit well (see ``doctor_rules``). For two classes the labels are swapped.
    """
    reason = no_single_labels(evidence)
    if reason is not None:
        return reason
    first = evidence.first
    right = int(_right(first).sum())
    ahead = any(int(_moved(first, step).sum()) - right >= 4 for step in (1, -1))
    if not ahead:
        return None
    answers = evidence.second
    labels = answers.labels
    if labels is None:
        return NO_LABELS
    for step in (1, -1):
        found = _count_moved(answers, labels, step)
        if found.second_is_right(ALPHA / 2):
            how = "swapped (0 for 1)" if answers.classes == 2 else f"{'raised' if step > 0 else 'lowered'} by one"
            return Finding(
                "labels-off-by-one",
                f"Of {found.n} answers {found.right} fit the labels and {found.other} fit the labels {how} "
                f"(exact McNemar p = {found.p:.1e}).",
                "Compare the class order of the network and the data: labels may start at 1, or the network may have "
                "a background class first.",
            )
    return None


def _count_moved(answers: Answers, labels: Tensor, step: int) -> Comparison:
    given = answers.given_to((labels + step) % answers.classes)
    return Comparison.of(labels, _right(answers), _moved(answers, step), given, answers.classes)


def _moved(answers: Answers, step: int) -> Tensor:
    """Return bool (N,): the answer fits the label moved by ``step``, around the end."""
    if answers.labels is None:
        return torch.zeros(len(answers.raw), dtype=torch.bool)
    return answers.answers == (answers.labels + step) % answers.classes


def check_output_kind(evidence: Evidence) -> list[tuple[str, Outcome]]:
    """Ask whether outputs are of the declared kind.

    Rows of several outputs that all lie in [0, 1] and sum to one (to 0.001) are no logits, and outputs below 0, above
    1, or with other sums (by 0.01) are no probabilities; these hold for every finite row, so there is no chance in
    them. Single outputs, and those of several labels, all in [0, 1] may be logits: where logits were declared, they
    must also reach from below 1/4 to above 3/4, and a threshold of 1/2 must give more right answers than the threshold
    0 of logits (exact sign test over the samples at 0.001). Undeclared ones are reported, as evaluations refuse them.
    """
    names = ("probabilities-as-logits", "logits-as-probabilities")
    if not isinstance(evidence.model, WrappedModel):
        return [(name, "only a network that wrap() made has a declared output kind") for name in names]
    answers = evidence.first
    if not len(answers.values):
        return [(name, "no output was finite") for name in names]
    if evidence.kind in ("logits", "assumed"):
        return [(names[0], _probabilities_as_logits(evidence)), (names[1], None)]
    return [(names[0], None), (names[1], _logits_as_probabilities(answers))]


def _probabilities_as_logits(evidence: Evidence) -> Outcome:
    answers = evidence.first
    if not answers.unit:
        return None
    values = answers.values
    alone = answers.single or answers.multilabel
    sums = "" if alone else " and sum to one"
    extra = ""
    if not alone and not bool(((values.sum(1) - 1).abs() < 1e-3).all()):
        return None
    if alone and evidence.kind == "logits":
        gained, lost, n = _threshold_test(evidence.second)
        wide = float(values.min()) < 0.25 and float(values.max()) > 0.75
        if not (wide and evidence.second.unit and p_paired(gained, lost) <= ALPHA):
            return None
        extra = f"; of {n} images {gained} are answered better and {lost} worse by a threshold of 1/2 than of 0"
    stated = "declared as logits" if evidence.kind == "logits" else "not declared, so logits are assumed"
    return Finding(
        "probabilities-as-logits",
        f"All outputs for {len(values)} images lie in [0, 1]{sums}, and they are {stated}{extra}.",
        "Declare output='probs' in wrap(), or let the network return what comes before its softmax or sigmoid.",
    )


def _threshold_test(answers: Answers) -> tuple[int, int, int]:
    """Return samples with more, and with fewer, right answers at a threshold of 1/2 than of 0, and how many there are.

    For several labels the right ones of each sample are counted, so that the samples stay the units.
    """
    if answers.labels is None:
        return 0, 0, len(answers.raw)
    outputs = answers.raw[:, 1:] if answers.single else answers.raw
    labels = answers.labels.reshape(len(outputs), -1)
    if labels.shape != outputs.shape:
        return 0, 0, len(outputs)
    known = labels >= 0
    half = (((outputs > 0.5) == (labels == 1)) & known).sum(1)
    zero = (((outputs > 0) == (labels == 1)) & known).sum(1)
    return int((half > zero).sum()), int((half < zero).sum()), len(outputs)


def _logits_as_probabilities(answers: Answers) -> Outcome:
    values = answers.values
    alone = answers.single or answers.multilabel
    if answers.kind == "probs":
        outside = ((values < -1e-6) | (values > 1 + 1e-6)).any(1)
        sums = torch.zeros_like(outside) if alone else (values.sum(1) - 1).abs() > 1e-2
        wanted = "probabilities, in [0, 1]" + ("" if alone else " and summing to one")
    else:
        outside = (values > 1e-4).any(1)
        sums = torch.zeros_like(outside) if alone else values.logsumexp(1).abs() > 1e-2
        wanted = "log-probabilities, at most 0" + ("" if alone else " with exponentials summing to one")
    wrong = outside | sums
    if not bool(wrong.any()):
        return None
    return Finding(
        "logits-as-probabilities",
        f"Outputs are declared as {wanted}; of {len(values)} images {int(wrong.sum())} have others (outputs from "
        f"{float(values.min()):.3g} to {float(values.max()):.3g}).",
        "Declare output='logits' in wrap(), or add the softmax or sigmoid.",
    )


def check_capabilities(evidence: Evidence, capabilities: Capabilities | None) -> list[tuple[str, Outcome]]:
    """Report what the probe measured of batch dependence and nondeterminism, with its size."""
    if capabilities is None:
        return [(name, "the model was not probed") for name in ("batch-dependence", "nondeterminism")]
    rows = torch.arange(min(8, len(evidence.source)))
    out: list[tuple[str, Outcome]] = []
    if capabilities.deterministic:
        out.append(("nondeterminism", None))
    else:
        one, two = (passes(evidence.view, evidence.source, rows) for _ in range(2))
        finding = Finding(
            "nondeterminism",
            f"Two passes over the same {len(rows)} images differ by up to {_largest(one, two):.2g} in the outputs.",
            "Switch random layers off in eval mode (dropout called as a function needs training=self.training), or "
            "wrap a stochastic model so that it seeds itself.",
        )
        return [
            ("nondeterminism", finding),
            ("batch-dependence", "cannot be told from the random part of the answers"),
        ]
    if capabilities.batch_independent:
        return [*out, ("batch-dependence", None)]
    half = rows.flip(0)[: max(1, len(rows) // 2)]
    together = passes(evidence.view, evidence.source, rows)[half]
    size = _largest(together, passes(evidence.view, evidence.source, half))
    finding = Finding(
        "batch-dependence",
        f"Outputs of {len(half)} images change by up to {size:.2g} with {len(rows) - len(half)} others beside them.",
        "Use stored statistics in eval mode (batch norm with track_running_stats=True); nothing may be computed over "
        "the batch.",
    )
    return [*out, ("batch-dependence", finding)]


def _largest(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().nan_to_num().max())


def check_outputs(evidence: Evidence, declared: int | None) -> Outcome:
    """Compare the number of outputs with what was declared and with the model's class names."""
    found = evidence.first.classes
    names = evidence.model.class_names
    if declared is not None and declared != found:
        return Finding(
            "class-count",
            f"{declared} classes are declared and the network has {found} outputs.",
            "Correct num_classes, or the network's last layer.",
        )
    if names is not None and len(names) != found:
        return Finding(
            "class-count",
            f"The model has {len(names)} class names and {found} outputs.",
            "Name every output, in order.",
        )
    return None


def check_majority(evidence: Evidence) -> Outcome:
    """Ask whether the model gives one answer only, or is worse than the most frequent label would be.

    Exact binomial tests at 0.001; see ``is_constant``, for which up to 64 images with another label than the usual
    answer are looked at, and ``below_majority``, which does not accuse a model whose answers are associated with the
    labels.
    """
    reason = no_single_labels(evidence)
    labels, every = evidence.first.labels, evidence.source.info.labels
    if reason is not None or labels is None or every is None:
        return reason or NO_LABELS
    answers = evidence.first.answers
    top = int(torch.bincount(answers.clamp_min(0)).argmax())
    others = labels != top
    if bool((labels == labels[0]).all()):
        return FEW_LABELS
    stays = int((answers[others] != top).sum()) <= LITTLE_RECALL * int(others.sum())
    if int((answers == top).sum()) >= 0.9 * len(answers) and stays:
        return _constant(evidence, top, (every != top).nonzero()[:, 0])
    most = int(torch.bincount(labels).max())
    if p_below(int(_right(evidence.first).sum()), len(labels), most / len(labels)) > 0.05:
        return None
    return _below(evidence.second)


def _constant(evidence: Evidence, top: int, others: Tensor) -> Outcome:
    rows = others[spread_rows(len(others), ENOUGH)]
    if not is_constant(0, len(rows)):
        return f"only {len(rows)} images have another label than the usual answer"
    moved = int((evidence.look(evidence.view, rows).answers != top).sum())
    if not is_constant(moved, len(rows)):
        return None
    often = int((evidence.first.answers == top).sum())
    return Finding(
        "majority-class",
        f"{often} of {len(evidence.first_rows)} answers are class {top}, and so are {len(rows) - moved} of the answers "
        f"to {len(rows)} images with another label.",
        "Check the weights (were they loaded?), the preprocessing, and whether training collapsed.",
    )


def _below(answers: Answers) -> Outcome:
    worse = None if answers.labels is None else below_majority(answers.answers, answers.labels)
    if worse is None:
        return None
    right, most, p = worse
    return Finding(
        "majority-class",
        f"{right} of {len(answers.raw)} answers are right; always answering the most frequent class would give {most} "
        f"(exact binomial p = {p:.1e}), and the answers show no association with the labels.",
        "Check the weights (were they loaded?), the preprocessing, and the class order.",
    )

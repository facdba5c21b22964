"""What the package promises of a whole evaluation (docs/design.md, "Promises"), over all that is registered."""

import copy
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import robustlab
from corruptions import Compose, GaussianNoise, OneOf
from robustlab.core.registry import ATTACKS
from robustlab.core.shift import ShiftContext
from robustlab.data import subset
from tests.contracts.quick import for_three_classes, quick
from tests.contracts.toys import (
    ATTACK,
    CHUNK,
    COUNT,
    EVERY,
    ORDER,
    SHIFTS,
    Exact,
    Small,
    by_id,
    conditions,
    digest,
    evaluate,
    source,
)

# ---- 1: a sample's result depends only on (seed, shift, severity, sample id)

VIEWS = {
    "permuted": lambda data: (subset(data, ORDER.tolist()), CHUNK),
    "part of it": lambda data: (subset(data, ORDER[:23].tolist()), CHUNK),
    "small batches": lambda data: (data, 3),
    "one batch": lambda data: (data, COUNT),
}


@pytest.mark.parametrize("view", VIEWS)
def test_1_pixels_follow_the_sample_and_not_its_company(view, exact):
    data, chunk = VIEWS[view](source())
    report = evaluate(Exact(), data, batch_size=chunk)
    assert conditions(report) == list(report.predictions)
    assert len(report.predictions) == 1 + 2 * len(SHIFTS)
    for condition in report.predictions:
        wanted = by_id(exact, condition)
        found = by_id(report, condition)
        assert len(found) == len(data)
        assert all(torch.equal(found[key], wanted[key]) for key in found), condition


def test_1_every_shift_moves_pixels_and_the_seed_moves_the_draws(exact):
    other = evaluate(Exact(), source(), seed=1)
    clean = exact.predictions["clean"].logits
    for condition in exact.predictions:
        moved = (exact.predictions[condition].logits != clean).any(1).float().mean()
        # half a severity: not at the corners yet, below one grey level on 12 px, below the next odd kernel
        quiet = ("dark-corners@0.5", "ref:black-corner@0.5", "gaussian-blur@0.5", "ref:torchvision-blur@0.5")
        untouched = condition in ("clean", *quiet)
        assert moved > 0.9 if condition.endswith("@3") else untouched or moved > 0, condition
    noisy = "gaussian-noise@3"
    assert not torch.equal(exact.predictions[noisy].logits, other.predictions[noisy].logits)


def test_1_logits_follow_the_sample(exact):
    data = source()
    whole = evaluate(Small(), data, attacks=ATTACK)
    again = evaluate(Small(), subset(data, range(2 * CHUNK)), attacks=ATTACK)
    other = evaluate(Small(), subset(data, ORDER.tolist()), batch_size=5)
    for condition in whole.predictions:
        wanted = whole.predictions[condition].logits
        assert torch.equal(again.predictions[condition].logits, wanted[: 2 * CHUNK]), condition
        if condition in other.predictions:
            assert torch.allclose(other.predictions[condition].logits, wanted[torch.from_numpy(ORDER)], atol=1e-5)


@pytest.mark.parametrize("format", ["npz", "png"])
def test_1_written_files_hold_what_was_evaluated(format, exact, tmp_path):
    part = subset(source(), ORDER[:23].tolist())
    out = robustlab.write_corrupted(part, SHIFTS, (0.5, 3), tmp_path, format=format, chunk=5, progress=False)
    entries = json.loads((out / "manifest.json").read_text())["conditions"]
    assert len(entries) == 2 * len(SHIFTS)
    for entry in entries:
        stored = robustlab.load_data(out / entry["file"])
        logits = Exact()(stored.pixels(range(len(stored))))
        wanted = by_id(exact, f"{entry['shift']}@{entry['severity']:g}")
        assert len(stored) == 23
        assert all(torch.equal(row, wanted[key]) for key, row in zip(stored.info.ids.tolist(), logits, strict=True))


def test_1_global_random_state_is_neither_read_nor_changed(tmp_path):
    rows, net = [], Small()
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the legacy state is what must not change
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        report = evaluate(net, source(), attacks=ATTACK, ood={"far/x": source(seed=3)}, gallery=True)
        report.to_html(report.save(tmp_path) / "report.html")
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        rows.append(list(map(repr, report.rows)))
    assert rows[0] == rows[1]


def test_1_a_second_process_finds_the_same_bits(exact, elsewhere):
    assert json.loads((elsewhere / "digest.json").read_text()) == digest(exact)


# ---- 2: severity 0 and eps 0 reproduce the clean row


def test_2_severity_zero_is_the_clean_row(exact):
    data = source()
    batch = data.read(range(COUNT))
    clean = exact.predictions["clean"].logits
    context = ShiftContext(spec=data.info.spec, model=robustlab.wrap(Exact(), num_classes=3))
    attacks = [ATTACKS.get(name)() for name in ATTACKS.names()]
    mixed = OneOf([*SHIFTS, *attacks])
    trees = [Compose([OneOf(SHIFTS), *attacks]), mixed, Compose([OneOf([GaussianNoise(), *attacks])])]
    for shift in (*SHIFTS, *attacks, *trees):
        assert torch.equal(Exact()(shift.on(batch, 0, context).images), clean), repr(shift)


def test_2_severities_and_budgets_below_one_grey_level_reach_it(exact):
    counted = ("jpeg", "down-up-sampling", "pixelate")  # whole quality steps and pixels: they start with a jump
    smooth = tuple(shift for shift in EVERY if shift.mode == "physical" and shift.name not in counted)
    tiny = evaluate(Exact(), source(), shifts=smooth, severities=(1e-7,))
    for condition, store in tiny.predictions.items():
        assert torch.equal(store.logits, exact.predictions["clean"].logits), condition
    for norm in ("linf", "l2"):
        attacks = [quick(name, norm=norm, eps=(0.9 / 255,)) for name in for_three_classes(norm)]
        report = evaluate(Small(), source(), shifts=(), attacks=attacks)
        for name, store in report.predictions.items():
            assert torch.equal(store.logits, report.predictions["clean"].logits), name


def test_2_severity_zero_is_written_as_it_was_read(tmp_path):
    data = source()
    out = robustlab.write_corrupted(data, SHIFTS, (0,), tmp_path, progress=False)
    for path in sorted(out.glob("*.npz")):
        assert torch.equal(robustlab.load_data(path).pixels(range(COUNT)), data.pixels(range(COUNT))), path.name


# ---- 4: forms of output


def binary_logit(x):
    return Small(2)(x)[:, 1] * 2


def forms(task):
    """Form to (callable, output): all of them say the same."""
    if task == "binary":

        def logits(x):
            z = binary_logit(x)
            return torch.stack([torch.zeros_like(z), z], 1)

        extra = {
            "one logit": (binary_logit, "logits"),
            "one logit, (N, 1)": (lambda x: binary_logit(x)[:, None], "logits"),
            "one probability": (lambda x: torch.sigmoid(binary_logit(x)), "probs"),
            "one log-probability": (lambda x: F.logsigmoid(binary_logit(x)), "log_probs"),
        }
    else:
        logits, extra = Small(3), {}
    probs, log_probs = (
        (torch.sigmoid, F.logsigmoid)
        if task == "multilabel"
        else (lambda z: torch.softmax(z, 1), lambda z: torch.log_softmax(z, 1))
    )
    return {
        "logits": (logits, "logits"),
        "tuple": (lambda x: (logits(x), "features"), "logits"),
        "dict": (lambda x: {"logits": logits(x), "loss": None}, "logits"),
        "object": (lambda x: SimpleNamespace(logits=logits(x)), "logits"),
        "log_probs": (lambda x: log_probs(logits(x)), "log_probs"),
        "probs": (lambda x: probs(logits(x)), "probs"),
        **extra,
    }


def say(task, form, **options):
    net, output = forms(task)[form]
    model = robustlab.wrap(net, task=task, output=output, name="net")
    settings = {"shifts": (GaussianNoise(),), "severities": (3,), "val": source(task, seed=1), "cluster": None}
    return evaluate(model, source(task), **settings | {"ood": {"far/x": source(task, seed=2)}} | options)


# they look at log-odds, of which a float32 probability near 1 holds few digits
OF_LOG_ODDS = {"calibration-slope": 1e-4, "calibration-intercept": 1e-4}
CASES = [(task, form) for task in ("binary", "multiclass", "multilabel") for form in forms(task) if form != "logits"]


@pytest.mark.parametrize(("task", "form"), CASES, ids=[" ".join(case) for case in CASES])
def test_4_forms_of_output_give_the_same_rows(task, form):
    wanted, found = (say(task, kind, detectors=("msp",), metrics="all") for kind in ("logits", form))
    needed = {"nll", "brier", "ece", "silent-failure-rate"} | ({"auroc", "accuracy"} if task != "multilabel" else set())
    assert needed <= {row.metric for row in wanted.rows if not math.isnan(row.value)}
    assert len(found.rows) == len(wanted.rows)
    for one, two in zip(wanted.rows, found.rows, strict=True):
        assert (one.shift, one.metric, one.target, one.n, one.reason) == (
            two.shift,
            two.metric,
            two.target,
            two.n,
            two.reason,
        )
        for name in ("value", "low", "high"):
            tolerance = OF_LOG_ODDS.get(one.metric, 1e-6)
            close = pytest.approx(getattr(one, name), rel=tolerance, abs=tolerance, nan_ok=True)
            assert getattr(two, name) == close, (one, two)


@pytest.mark.parametrize("form", ["probs", "log_probs", "one probability"])
def test_4_energy_of_probabilities_is_undefined_with_a_reason(form, tmp_path):
    report = say("binary", form)
    report.save(tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    column = {name: place for place, name in enumerate(stored["columns"])}
    lines = [line for line in stored["rows"] if line[column["scorer"]] == "energy"]
    rows = [row for row in report.rows if row.scorer == "energy"]
    assert len(rows) == len(lines) > 0
    for row, line in zip(rows, lines, strict=True):
        assert math.isnan(row.value)
        assert line[column["value"]] is None
        assert "offset" in row.reason
        assert line[column["reason"]] == row.reason
    usable = [row for row in say("binary", "logits").rows if row.scorer == "energy"]
    assert len(usable) == len(rows)
    assert all(math.isfinite(row.value) for row in usable)


# ---- 5: every number has n and an interval


@pytest.fixture(scope="module", params=["binary", "multiclass", "multilabel"])
def full(request):
    task = request.param

    def data(count, seed):
        columns = {"sex": ["F", "M"] * (count // 2), "pid": np.arange(count) // 2}
        return source(task, count, seed, groups=columns)

    return evaluate(
        robustlab.wrap(Small(2 if task == "binary" else 3), task=task, output="logits"),
        data(120, 0),
        val=data(80, 1),
        shifts=(*SHIFTS[:3], SHIFTS[-1]),
        severities=(1, 3, 5),
        attacks=ATTACK,
        ood={"near/a": data(60, 2), "far/b": data(40, 3)},
        groups=("sex",),
        cluster="pid",
        replicates=200,
        metrics="all",
    )


def test_5_every_number_has_n_and_an_interval(full):
    assert len(full.rows) > 200
    assert {row.group for row in full.rows} == {"", "sex", "sex=F", "sex=M"}
    assert {row.shift for row in full.rows} >= {"clean", "worst", "worst plausible", "pgd-linf"}
    assert {row.data for row in full.rows} >= {"ID vs near/a", "ID vs far/b"}
    for row in full.rows:
        if math.isnan(row.value):
            assert row.reason, row
            continue
        assert row.n > 0, row
        assert 0 < row.n_units <= row.n, row
        assert row.method not in ("", "none"), row
        if math.isnan(row.low) or math.isnan(row.high):
            assert row.reason, row
            continue
        assert math.isfinite(row.low), row
        assert math.isfinite(row.high), row
        # an error that is biased upwards has an interval that need not hold its estimate; its method says so
        middle = row.low if "reflected" in row.method else row.value
        assert row.low - 1e-12 <= middle <= row.high + 1e-12, row
        # identical predictions differ by nothing, and a risk that no coverage meets is met by none
        same = row.metric == "accuracy-drop" or row.method.startswith("identical predictions")
        # budgets are few: all of an interval may lie at one of them
        few = row.metric == "minimal-budget"
        assert row.high > row.low or same or few or row.reason == "risk_not_met", row
    undefined = sum(math.isnan(row.value) for row in full.rows)
    assert undefined < len(full.rows) / 10


def test_5_clusters_are_counted_as_units(full):
    assert full.value("nll").n == 120
    assert full.value("nll").n_units == 60


def test_5_what_is_undefined_says_why(tmp_path):
    """One class, no validation data, probabilities, no shift: much cannot be known, and nothing is 0 for that."""
    data = source("binary", labels=np.ones(COUNT, dtype=int))
    net, output = forms("binary")["probs"]
    report = evaluate(robustlab.wrap(net, output=output), data, shifts=(), ood={"far/x": source(seed=2)})
    undefined = [row for row in report.rows if math.isnan(row.value)]
    found = {row.scorer or row.shift if row.scorer or row.shift != "clean" else row.metric for row in undefined}
    assert {"auroc", "silent-failure-rate", "specificity", "energy", "worst", "worst plausible"} <= found
    stored = json.loads((report.save(tmp_path) / "report.json").read_text())
    lines = [dict(zip(stored["columns"], line, strict=True)) for line in stored["rows"]]
    for row, line in zip(report.rows, lines, strict=True):
        if math.isnan(row.value) or math.isnan(row.low):
            assert row.reason, row
            assert line["reason"] == row.reason
            assert None in (line["value"], line["low"])


@pytest.mark.parametrize("label", ["worst", "worst plausible"])
def test_5_the_worst_of_many_pays_for_having_been_picked(full, label):
    rows = [row for row in full.rows if row.shift == label and not math.isnan(row.value)]
    assert rows
    for row in rows:
        shift, severity = row.target.rsplit("@", 1)
        plain = [
            item
            for item in full.rows
            if (item.shift, item.severity, item.metric, item.group) == (shift, float(severity), row.metric, "")
            and not item.target
        ]
        assert len(plain) == 1
        assert row.value == pytest.approx(plain[0].value)
        assert row.high - row.low > (plain[0].high - plain[0].low) * 1.05


def test_5_a_difference_inside_the_noise_is_no_decision():
    data, net = source(count=120), Small()
    settings = {"shifts": (GaussianNoise(),), "severities": (1, 5)}
    nearly, worse = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        nearly.head.bias += torch.tensor([0.02, 0.0, 0.0])
        worse.head.bias += torch.tensor([9.0, 0.0, 0.0])
    first, twin, near, far = (evaluate(model, data, **settings) for model in (net, copy.deepcopy(net), nearly, worse))
    for report in (twin, near):
        compared = robustlab.compare(first, report)
        rows = (*compared.rows, compared.worst)
        assert len(rows) == 4
        assert all(row.verdict.startswith("no decision") for row in rows)
        assert all(row.n == 120 and row.low <= row.difference <= row.high for row in rows)
    assert {row.verdict for row in robustlab.compare(first, far).rows} == {"worse"}

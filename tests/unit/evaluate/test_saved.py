"""Saved predictions: the report of a file of answers is that of the model that gave them."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robustlab import Report, evaluate_under_shift, wrap
from robustlab.core.errors import ConfigError, ModelError
from robustlab.core.registry import DETECTORS
from robustlab.core.shift import ShiftContext, quantize
from robustlab.corruptions import PGD, Gamma, GaussianNoise
from robustlab.data import load_data, load_predictions, write_corrupted
from robustlab.evaluate.plan import CLEAN, Plan, make_plan
from robustlab.evaluate.run import Arena, make_store
from robustlab.evaluate.saved import (
    RecordedShift,
    saved_notes,
    saved_pass,
    saved_plan,
    unparsed_sentences,
    val_condition,
)
from robustlab.evaluate.score import Subject, condition_rows, ood_rows, summary_rows, worst_rows
from robustlab.metrics import Context, Resampler, fit_frozen

COUNT = 60
NAMES = ("low", "middle", "high")
SHIFTS = (Gamma(), GaussianNoise())
SEVERITIES = (1.0, 3.0)
DETECTED = {name: DETECTORS.get(name)() for name in ("msp", "energy")}
ONLY_CLEAN = Plan((), ())


class Corner(nn.Module):
    """Looks at two pixels, one number at a time: its answers have the same bits in any batch."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        a, b = x[:, 0, 0, 0], x[:, 0, 0, 1]
        return torch.stack([4.173 * a - 2, 1 - 0.917 * b, 3.331 * b - 2.111 * a][: self.classes], 1)


def cases(count=COUNT, seed=0, classes=3, first=0, **options):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 6, 6), dtype=np.uint8)
    answer = Corner(classes)(torch.from_numpy(images[:, None]).float() / 255).argmax(1).numpy()
    labels = np.where(generator.random(count) < 0.25, generator.integers(0, classes, count), answer)
    settings = {
        "labels": labels,
        "ids": [f"case {first + i}" for i in range(count)],
        "groups": {"site": generator.integers(0, 3, count), "patient": np.arange(count) // 2},
        "class_names": NAMES[:classes],
        "name": "cases",
    }
    return load_data(images, **(settings | options))


def shifted(source):
    """Yield (condition, batch) as the evaluation would see them, by the public pieces."""
    batch = source.read(range(len(source)))
    yield "clean", batch
    for shift in SHIFTS:
        for severity in SEVERITIES:
            moved = shift.on(batch, severity, ShiftContext(seed=5, spec=source.info.spec))
            yield f"{shift.label}@{severity:g}", moved.replace(quantize(moved.images, source.info.spec))


class World:
    """A live model with its predictions on test, validation and OOD data."""

    def __init__(self, classes=3):
        self.data, self.val = cases(classes=classes), cases(40, 1, classes, first=1000)
        self.ood = cases(30, 2, classes, first=2000)
        self.wrapped = wrap(Corner(classes).eval(), output="logits", task=self.data.info.task)
        self.logits = {key: self.wrapped.predict(batch).logits for key, batch in shifted(self.data)}
        self.val_logits = self.wrapped.predict(self.val.read(range(40))).logits
        self.ood_logits = self.wrapped.predict(self.ood.read(range(30))).logits

    def rows(self):
        stores = {key: self._store(self.data, logits) for key, logits in self.logits.items()}
        foreign = dataclasses.replace(self._store(self.ood, self.ood_logits), labels=None)
        plan = make_plan(SHIFTS, SEVERITIES, (), self.data.info.spec)
        return score(plan, stores, self._store(self.val, self.val_logits), foreign, self.data)

    def _store(self, source, logits):
        return make_store(source, self.wrapped, logits, {}, DETECTED, "patient", arena=Arena())

    def table(self):
        """Return what a person would save: (id, condition, logits) of everything."""
        parts = [(self.data, key, logits) for key, logits in self.logits.items()]
        parts += [(self.val, "val", self.val_logits), (self.ood, "ood:far", self.ood_logits)]
        first = {id(self.data): 0, id(self.val): 1000, id(self.ood): 2000}
        return [
            (f"case {first[id(source)] + i}", key, row) for source, key, logits in parts for i, row in enumerate(logits)
        ]


def score(plan, stores, val, foreign, source):
    context = Context(
        resampler=Resampler(seed=3, replicates=200), frozen=fit_frozen(val, 0.2, "energy"), class_names=NAMES
    )
    subject = Subject("m", "cases")
    rows = []
    for condition in plan.conditions:
        rows += condition_rows(
            subject, condition, stores[condition.key], stores["clean"], context, None, source, ("site",)
        )
    rows += worst_rows(subject, plan.conditions[1:], stores, context, "worst")
    rows += summary_rows(subject, plan.conditions[1:], [], stores, context, None)
    return rows + ood_rows(subject, "far", foreign, stores["clean"], context, None)


def saved_rows(saved, world):
    saved = saved.bind(world.data)
    plan = saved_plan(saved)
    options = {"detectors": DETECTED, "cluster": "patient", "arena": Arena()}
    stores = saved_pass(saved, world.data, plan, **options).stores
    place = val_condition(saved, world.val, world.data)
    val = saved_pass(saved, world.val, ONLY_CLEAN, stands_for=place, **options).stores["clean"]
    foreign = saved_pass(saved, world.ood, ONLY_CLEAN, stands_for="ood:far", **options).stores["clean"]
    assert foreign.labels is None
    return score(plan, stores, val, foreign, world.data)


def save(path, table, key, values):
    ids, conditions = [row[0] for row in table], [row[1] for row in table]
    if path.suffix == ".jsonl":
        lines = zip(ids, conditions, values, strict=True)
        path.write_text("".join(json.dumps({"id": i, "condition": c, key: v}) + "\n" for i, c, v in lines))
    elif path.suffix == ".npz":
        np.savez(path, ids=np.array(ids), conditions=np.array(conditions), **{key: np.array(values)})
    else:
        pytest.importorskip("pyarrow")
        pd.DataFrame({"id": ids, "condition": conditions, key: values}).to_parquet(path)
    return path


def same(a, b, tolerance=0.0):
    """Compare rows of two reports, in any order."""
    facts = [f.name for f in dataclasses.fields(a[0]) if f.type != "float" and f.name != "method"]

    def key(row):
        return (*(getattr(row, name) for name in facts), row.severity)

    first, second = ({key(row): row for row in rows} for rows in (a, b))
    assert len(first) == len(a)
    assert sorted(first) == sorted(second)
    for name, row in first.items():
        for column in ("amount", "value", "low", "high"):
            pair = getattr(row, column), getattr(second[name], column)
            assert pair[0] == pytest.approx(pair[1], abs=tolerance, rel=0, nan_ok=True), (name, column)
        if tolerance == 0:
            assert row.method == second[name].method


@pytest.fixture(scope="module", params=[2, 3])
def world(request):
    return World(request.param)


@pytest.mark.parametrize("suffix", [".jsonl", ".npz", ".parquet"])
def test_every_row_is_that_of_the_live_model(tmp_path, world, suffix):
    table = world.table()
    mixed = [table[i] for i in np.random.default_rng(0).permutation(len(table))]
    path = save(tmp_path / f"a{suffix}", mixed, "logits", [row[2].tolist() for row in mixed])
    same(world.rows(), saved_rows(load_predictions(path), world))


@pytest.mark.parametrize("kind", ["probs", "log_probs"])
def test_probabilities_give_the_same_numbers_but_no_energy(tmp_path, world, kind):
    table = world.table()
    values = [getattr(row[2].double(), "softmax" if kind == "probs" else "log_softmax")(0).tolist() for row in table]
    rows = saved_rows(load_predictions(save(tmp_path / "a.jsonl", table, kind, values)), world)
    about_energy = [row for row in rows if row.scorer == "energy"]
    assert about_energy
    assert all("offset of the logits is lost" in row.reason and math.isnan(row.value) for row in about_energy)
    no_part = ("silent-failure-rate", "referred-share")  # energy refers cases of the live model

    def softmax(part):
        return [row for row in part if row.scorer != "energy" and row.metric not in no_part]

    same(softmax(world.rows()), softmax(rows), 1e-6)


def test_answers_alone_give_accuracy_and_reasons(tmp_path, world):
    table = world.table()
    classes = len(world.data.info.class_names)
    words = [f" {NAMES[int(row[2].argmax())].upper()}" for row in table]
    rows = saved_rows(load_predictions(save(tmp_path / "a.jsonl", table, "label", words)), world)
    follow = {"accuracy", "balanced-accuracy", "accuracy-drop", "failure-threshold"} | (
        {"sensitivity", "specificity"} if classes > 2 else set()
    )
    same([r for r in world.rows() if r.metric in follow], [r for r in rows if r.metric in follow])
    rest = [row for row in rows if row.metric not in follow | {"sensitivity", "specificity"}]
    assert {"auroc", "brier", "ece", "silent-failure-rate", "auroc-ood"} <= {row.metric for row in rest}
    assert {row.reason for row in rest} == {"answers_only"}
    assert all(math.isnan(row.value) for row in rest)
    if classes == 2:
        clean = next(row for row in rows if row.metric == "sensitivity" and row.shift == "clean" and not row.group)
        positive = world.data.info.labels == 1
        hits = world.logits["clean"].argmax(1)[positive] == 1
        assert clean.value == pytest.approx(float(hits.double().mean()))


def test_unparsed_answers_are_wrong_and_counted(tmp_path, world):
    table = world.table()
    words = [NAMES[int(row[2].argmax())] for row in table]
    right = dict(zip(((i, c) for i, c, _ in table), words, strict=True))
    truth = {f"case {i}": NAMES[int(y)] for i, y in enumerate(world.data.info.labels)}
    lost = [i for i, (who, where, _) in enumerate(table) if where == "clean" and right[who, where] == truth[who]][:3]
    for row, text in zip(lost, (None, "cannot say", ""), strict=True):
        words[row] = text
    saved = load_predictions(save(tmp_path / "a.jsonl", table, "label", words)).bind(world.data)
    stores = saved_pass(saved, world.data, saved_plan(saved), detectors={}, cluster=None, arena=Arena()).stores
    before = float((world.logits["clean"].argmax(1) == world.data.info.labels).double().mean())
    rows = saved_rows(saved, world)
    accuracy = next(row for row in rows if (row.metric, row.shift, row.group) == ("accuracy", "clean", ""))
    assert accuracy.value == pytest.approx(before - 3 / COUNT)
    assert accuracy.n == COUNT
    assert unparsed_sentences(stores) == [
        "Unparsed answers: 3 of 60 answers could not be parsed on clean data; they count as wrong."
    ]


def test_unparsed_sentences_name_the_worst_of_many_conditions():
    data = cases()
    hot = torch.nn.functional.one_hot(data.info.labels, 3).float()
    saved_store = make_store(data, wrap(Corner(3).eval(), output="logits"), hot, {}, {}, None, arena=Arena())

    def broken(count, **options):
        logits = hot.clone()
        logits[:count] = math.nan
        return dataclasses.replace(saved_store, logits=logits, **({"answers_only": True} | options))

    few = {"clean": broken(0), "a@1": broken(1), "b@1": broken(2)}
    assert unparsed_sentences(few) == [
        "Unparsed answers: 2 of 60 answers could not be parsed under b@1; they count as wrong.",
        "Unparsed answers: 1 of 60 answers could not be parsed under a@1; it counts as wrong.",
    ]
    many = {f"a@{i}": broken(i) for i in range(1, 6)}
    (sentence,) = unparsed_sentences(many)
    assert "5 of 60 answers could not be parsed under a@5, the most of 5 such conditions;" in sentence
    assert unparsed_sentences({"clean": broken(4, answers_only=False), "ood:x": broken(4, labels=None)}) == []


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_round_trip_through_the_files_of_write_corrupted(tmp_path, world, kind):
    """A stranger's script: read each file of the manifest, run a model, save id, condition and answer."""
    folder = write_corrupted(world.data, SHIFTS, SEVERITIES, tmp_path / "set", seed=5, format=kind, progress=False)
    out = (tmp_path / "answers.jsonl").open("w")
    for entry in [None, *json.loads((folder / "manifest.json").read_text())["conditions"]]:
        part = world.data if entry is None else load_data(folder / entry["file"])
        images, ids = part.pixels(range(len(part))), part.info.ids.tolist()
        if entry is not None and kind == "npz":
            with np.load(folder / entry["file"]) as file:
                images, ids = torch.from_numpy(file["test_images"])[:, None] / 255, file["test_ids"].tolist()
        condition = "clean" if entry is None else entry["condition"]
        assert condition == "clean" or condition.replace("@", "_s") == entry["file"].removesuffix(".npz")
        answers = Corner(len(world.data.info.class_names))(images).argmax(1).tolist()
        for i, answer in zip(ids, answers, strict=True):
            out.write(json.dumps({"id": i, "condition": condition, "label": answer}) + "\n")
    out.close()
    saved = load_predictions(tmp_path / "answers.jsonl").bind(world.data)
    plan = saved_plan(saved)
    stores = saved_pass(saved, world.data, plan, detectors=DETECTED, cluster="patient", arena=Arena()).stores
    context = Context(resampler=Resampler(seed=3, replicates=200), class_names=NAMES)
    rows = []
    for condition in plan.conditions:
        rows += condition_rows(
            Subject("m", "cases"),
            condition,
            stores[condition.key],
            stores["clean"],
            context,
            ["accuracy"],
            world.data,
            (),
        )
    live = [r for r in world.rows() if r.metric in ("accuracy", "accuracy-drop") and not r.group and r.shift != "worst"]
    same(live, rows)


def test_the_plan_is_that_of_an_evaluation_with_the_same_conditions(tmp_path, world):
    table = world.table()
    saved = load_predictions(save(tmp_path / "a.npz", table, "logits", [row[2].tolist() for row in table]))
    plan, live = saved_plan(saved), make_plan(SHIFTS, SEVERITIES, (), world.data.info.spec)
    assert plan.conditions == live.conditions
    assert [sweep.shift for sweep in plan.sweeps] == list(SHIFTS)
    assert saved_plan(saved, (PGD(),)).skipped == (("pgd-linf", "saved answers cannot be attacked"),)


def test_conditions_that_robustlab_did_not_make(tmp_path):
    names = [
        "scanner-b@1",
        "clean",
        "gamma@2.5",
        "ood:a@3",
        "gaussian-noise#2@1",
        "gaussian-noise@10e",
        "gamma@2",
    ]
    names[5] = "a b@5"
    table = [(i, name, None) for name in names for i in range(3)]
    saved = load_predictions(save(tmp_path / "a.jsonl", table, "label", [0] * len(table)))
    plan = saved_plan(saved)
    assert [c.key for c in plan.conditions] == [
        "clean",
        "a b@5",
        "gamma@2",
        "gamma@2.5",
        "gaussian-noise#2@1",
        "scanner-b@1",
    ]
    known = {c.key: c for c in plan.conditions if not math.isnan(c.amount)}
    assert set(known) == {"gamma@2", "gamma@2.5"}
    assert dict(known["gamma@2.5"].parameters) == dict(Gamma().parameters(2.5))
    assert all(c.kind == "corruption" for c in plan.conditions[1:])
    shift = plan.sweeps[-1].shift
    assert isinstance(shift, RecordedShift)
    assert shift.label == "scanner-b"
    data = cases(4)
    with pytest.raises(ModelError, match="recorded"):
        shift.on(data.read([0]), 1, ShiftContext())


def test_where_the_answers_for_validation_data_stand(tmp_path):
    data, val = cases(5), cases(4, 1, first=100)

    def answers(*parts):
        table = [(f"case {i}", name, None) for name, ids in parts for i in ids]
        return load_predictions(save(tmp_path / "a.jsonl", table, "label", [0] * len(table))).bind(data)

    of_val = range(100, 104)
    assert val_condition(answers(("clean", range(5)), ("val", of_val)), val, data) == "val"
    assert val_condition(answers(("clean", [*range(5), *of_val])), val, data) == "clean"
    with pytest.raises(ConfigError, match="no id of val under 'clean'"):
        val_condition(answers(("clean", range(5))), val, data)
    with pytest.raises(ConfigError, match="3 of 4 ids of val are also ids of data"):
        val_condition(answers(("clean", [*range(5), *of_val])), cases(4, 1, first=2), data)
    half = answers(("clean", [*range(5), 100, 101]))
    with pytest.raises(ConfigError, match="'clean' for all 4 samples of 'cases', got none for 2 of 4"):
        saved_pass(
            half, val, ONLY_CLEAN, detectors={}, cluster=None, arena=Arena(), stands_for=val_condition(half, val, data)
        )


def test_notes_say_what_was_not_used(tmp_path):
    data, val = cases(5), cases(4, 1, first=100)
    parts = [("clean", [*range(6), *range(100, 104)]), ("gamma@1", range(7)), ("x@1", range(5)), ("ood:b", [1])]
    table = [(f"case {i}", name, None) for name, ids in parts for i in ids]
    saved = load_predictions(save(tmp_path / "a.jsonl", table, "label", [0] * len(table))).bind(data)
    notes = saved_notes(saved, data, saved_plan(saved), val, {})
    assert len(notes) == 4
    assert "not probed" in notes[0]
    assert notes[1].startswith("Amounts of gamma:")
    assert "1 under 'clean', 2 under 'gamma@1'." in notes[2]
    assert "'ood:b' were ignored" in notes[3]
    alone = saved_notes(saved, data, saved_plan(saved), None, {"b": cases(1, first=1)})
    assert "5 under 'clean'" in alone[2]
    assert len(alone) == 3


def test_a_condition_without_all_samples_is_refused(tmp_path):
    data = cases(5)
    table = [(f"case {i}", name, None) for name, count in (("clean", 5), ("blur@1", 4)) for i in range(count)]
    saved = load_predictions(save(tmp_path / "a.jsonl", table, "label", [0] * 9)).bind(data)
    with pytest.raises(ConfigError, match="'blur@1' for all 5 samples of 'cases', got none for 1 of 5"):
        saved_pass(saved, data, saved_plan(saved), detectors={}, cluster=None, arena=Arena())
    assert CLEAN.key in saved_pass(saved, data, ONLY_CLEAN, detectors={}, cluster=None, arena=Arena()).stores


@pytest.mark.parametrize("key", ["logits", "label"])
def test_the_report_of_a_file_is_that_of_the_live_model(tmp_path, world, key):
    table = world.table()
    values = [row[2].tolist() if key == "logits" else int(row[2].argmax()) for row in table]
    saved = load_predictions(save(tmp_path / "a.jsonl", table, key, values), name=world.wrapped.model_name)
    options = {"val": world.val, "ood": {"far": world.ood}, "cluster": "patient", "groups": ("site",)}
    options |= {"severities": SEVERITIES, "shifts": SHIFTS, "seed": 5, "replicates": 200, "progress": False}
    live = evaluate_under_shift(world.wrapped, world.data, **options)
    report = evaluate_under_shift(saved, world.data, **options)
    follow = {"accuracy", "accuracy-drop", "balanced-accuracy"}
    chosen = [[row for row in r.rows if key == "logits" or row.metric in follow] for r in (live, report)]
    same(*chosen)
    again = Report.load(report.save(tmp_path / "report"))
    assert {k: store.answers_only for k, store in again.predictions.items()} == dict.fromkeys(
        report.predictions, key == "label"
    )

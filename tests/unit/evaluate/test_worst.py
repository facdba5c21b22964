"""Attacks together: the worst of several for each sample, budgets in native units, labels at their thresholds."""

import numpy as np
import pytest
import torch

import robustlab
from corruptions import APGD, FGSM, PGD
from robustlab.core.errors import ConfigError
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch, ImageSpec
from robustlab.evaluate.worst import worst_of_each
from robustlab.metrics.store import PredictionStore
from tests.contracts.toys import Small, evaluate, pixels, source

LEVELS = (2 / 255, 8 / 255)


def build(task="multiclass"):
    return robustlab.wrap(Small(), task=task, output="logits", num_classes=3)


def right(store):
    return store.logits.argmax(1) == store.labels


@pytest.fixture(scope="module")
def report():
    bright, dark = (0.5, 1.0), (0.0, 0.5)  # each may change only a part, so neither is always the stronger one
    attacks = (
        FGSM(eps=LEVELS, mask=bright),
        PGD(eps=(*LEVELS, 16 / 255), steps=5),
        APGD(eps=LEVELS, steps=8, loss="margin", mask=dark),
    )
    return evaluate(build(), source(), shifts=(), attacks=attacks)


def test_a_sample_withstands_all_attacks_or_none(report):
    for place, severity in enumerate((2.5, 5)):
        keys = [f"fgsm-linf@{severity:g}", f"pgd-linf@{5 * (place + 1) / 3:g}", f"apgd-margin-linf@{severity:g}"]
        parts = [report.predictions[key] for key in keys]
        worst = report.predictions[f"worst attack linf@{severity:g}"]
        assert torch.equal(right(worst), torch.stack([right(part) for part in parts]).all(0))
        rows = [row for row in report.rows if row.shift == "worst attack linf" and row.severity == severity]
        accuracy = next(row for row in rows if row.metric == "accuracy" and not row.group)
        assert accuracy.value == pytest.approx(right(worst).double().mean().item())
        assert accuracy.n == len(worst)
        assert accuracy.low < accuracy.value <= accuracy.high
        assert accuracy.amount == pytest.approx(255 * LEVELS[place])
    weakest = {row.shift: row.value for row in report.rows if row.metric == "accuracy" and row.severity == 2.5}
    assert weakest["worst attack linf"] < min(weakest["fgsm-linf"], weakest["apgd-margin-linf"])
    assert "worst attack linf@7.5" not in report.predictions, "a budget of one attack has no worst"


def test_one_attack_has_no_worst_of_several():
    report = evaluate(build(), source(), shifts=(), attacks=PGD(eps=LEVELS, steps=3))
    assert not [key for key in report.predictions if key.startswith("worst attack")]


def test_rows_that_are_not_finite_come_last():
    def store(logits):
        return PredictionStore(torch.arange(3), torch.tensor(logits), torch.tensor([0, 0, 0]), "multiclass")

    nan = float("nan")
    worst = worst_of_each([store([[2.0, 1.0], [nan, 0.0], [nan, 0.0]]), store([[1.5, 1.0], [3.0, 0.0], [0.0, nan]])])
    assert worst.logits[:2].tolist() == [[1.5, 1.0], [3.0, 0.0]]
    assert not torch.isfinite(worst.logits[2]).all()


def test_labels_are_weighed_at_their_thresholds():
    """At one half the first store is closer to a wrong answer; decided at 0.88 the second is wrong."""

    def store(logit):
        labels = torch.tensor([[1, 0]])
        return PredictionStore(torch.arange(1), torch.tensor([logit]), labels, "multilabel")

    stores = [store([3.0, -0.5]), store([1.0, -4.0])]
    assert worst_of_each(stores).logits.tolist() == [[3.0, -0.5]]
    assert worst_of_each(stores, (0.88, 0.5)).logits.tolist() == [[1.0, -4.0]]


def test_native_units_are_those_of_the_source(report):
    native = evaluate(build(), source(), shifts=(), attacks=PGD(eps=(2, 8, 16), units="native", steps=5))
    for severity in (5 / 3, 10 / 3, 5):
        key = f"pgd-linf@{severity:g}"
        assert torch.equal(native.predictions[key].logits, report.predictions[key].logits)
    amounts = [entry["amount"] for entry in native.manifest["conditions"] if entry["kind"] == "attack"]
    assert amounts == pytest.approx([2, 8, 16])
    hu = ImageSpec(1, (4, 4), range=(-1000.0, 1000.0), unit="HU")
    assert PGD(eps=(20,), units="native").budget(20.0, hu) == pytest.approx(0.01)
    with pytest.raises(ConfigError, match="what their values mean"):
        PGD(eps=(20,), units="native").budget(20.0, None)


def test_attacks_on_labels_aim_at_the_thresholds_of_val():
    """A label that is decided at 0.9 is flipped where its probability crosses 0.9, not one half."""
    weight = torch.zeros(2, 16)
    weight[0, 0], weight[1, 1] = 40.0, 40.0

    def net(images):
        return images.flatten(1) @ weight.T - 20.0

    images = torch.full((4, 1, 4, 4), 0.5)
    images[:, 0, 0, 0] = 0.5 + torch.tensor([3.0, 2.0, -3.0, -2.0]) / 40  # logits 3, 2, -3, -2
    images[:, 0, 0, 1] = 0.1
    labels = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0]])
    model = robustlab.wrap(net, task="multilabel", output="logits", num_classes=2)
    batch = Batch(images=images, labels=labels, ids=torch.arange(4))
    at = float(torch.sigmoid(torch.tensor(2.5)))
    eps = 0.9 / 40  # moves a logit by 0.9
    flipped = PGD(eps=(eps,)).run(batch, ShiftContext(model=model, thresholds=(at, 0.5)), eps=eps)
    assert flipped.success.tolist() == [True, True, False, False]
    plain = PGD(eps=(eps,)).run(batch, ShiftContext(model=model), eps=eps)
    assert plain.success.tolist() == [False, True, False, False], "the second is wrong at one half already"
    assert flipped.margin[:3].tolist() == pytest.approx([-0.4, -0.4, 4.6], abs=1e-3)


def test_a_report_on_several_labels_attacks_at_its_frozen_thresholds():
    model = build("multilabel")

    def labelled(seed):
        """Images whose labels the model itself would give at other thresholds than one half."""
        logits = model(torch.from_numpy(pixels(seed=seed)[0]).permute(0, 3, 1, 2) / 255).logits
        return source("multilabel", seed=seed, labels=(logits > logits.median(0).values).long().numpy())

    attacks = (PGD(eps=(4 / 255,), steps=5), FGSM(eps=(4 / 255,), mask=(0.5, 1.0)))
    report = evaluate(model, labelled(0), val=labelled(3), shifts=(), attacks=attacks)
    thresholds = np.array(report.manifest["frozen"]["thresholds"])
    assert not np.allclose(thresholds, 0.5)
    clean, attacked = report.predictions["clean"], report.predictions["pgd-linf@5"]
    at = torch.from_numpy(thresholds)

    def wrong(store):
        return ((torch.sigmoid(store.logits.double()) >= at) != (store.labels == 1)).any(1)

    assert wrong(attacked).sum() > wrong(clean).sum()
    assert (wrong(attacked) >= wrong(clean)).all()
    moved = (attacked.logits - clean.logits).abs().amax(1) > 0
    assert not moved[wrong(clean)].any(), "what is wrong already is left as it is"
    assert moved[~wrong(clean)].all(), "what is right at its thresholds is attacked, also where one half calls it wrong"
    parts = [wrong(report.predictions[key]) for key in ("pgd-linf@5", "fgsm-linf@5")]
    assert torch.equal(wrong(report.predictions["worst attack linf@5"]), parts[0] | parts[1])


def test_smallest_budget_of_every_sample(report, tmp_path):
    table = report.minimal_budgets()
    clean = report.predictions["clean"]
    assert set(table["attack"]) == {"fgsm-linf", "pgd-linf", "apgd-margin-linf", "worst attack linf"}
    part = table[table["attack"] == "worst attack linf"]
    assert part["sample"].tolist() == clean.keys.tolist()
    for index, (low, high) in enumerate(zip(part["holds_at"], part["falls_at"], strict=True)):
        answers = [right(clean)[index].item()]
        answers += [right(report.predictions[f"worst attack linf@{severity}"])[index].item() for severity in (2.5, 5)]
        steps = [0.0, *(255 * level for level in LEVELS)]
        first = next((place for place, ok in enumerate(answers) if not ok), None)
        assert (np.isnan(high) and first is None) or high == pytest.approx(steps[first])
        below = len(steps) - 1 if first is None else first - 1
        assert (np.isnan(low) and first == 0) or low == pytest.approx(steps[below])
    row = report.value("minimal-budget", "worst attack linf")
    falls = part["falls_at"].fillna(np.inf).to_numpy()
    assert row.value == pytest.approx(np.sort(falls)[int(np.ceil(len(falls) / 2)) - 1])
    report.save(tmp_path)
    assert robustlab.Report.load(tmp_path).minimal_budgets().equals(table)
    assert len(robustlab.Report.from_json(report.to_json()).minimal_budgets()) == 0


def test_budgets_meet_on_one_scale_and_never_share_a_key():
    same = evaluate(
        build(), source(), shifts=(), attacks=(PGD(eps=(4 / 255,), steps=3), FGSM(eps=(4,), units="native"))
    )
    assert "worst attack linf@5" in same.predictions
    apart = evaluate(
        build(),
        source(),
        shifts=(),
        attacks=(
            PGD(eps=(2 / 255,), steps=3),
            FGSM(eps=(2 / 255,)),
            PGD(eps=(16,), units="native", steps=3),
            FGSM(eps=(16,), units="native"),
        ),
    )
    keys = [entry["key"] for entry in apart.manifest["conditions"]]
    assert len(keys) == len(set(keys))
    amounts = {entry["severity"]: entry["amount"] for entry in apart.manifest["conditions"] if "worst" in entry["key"]}
    assert amounts == {2.5: pytest.approx(2), 5.0: pytest.approx(16)}
    for severity, parts in ((2.5, ("pgd-linf@5", "fgsm-linf@5")), (5, ("pgd-linf#2@5", "fgsm-linf#2@5"))):
        together = torch.stack([right(apart.predictions[key]) for key in parts]).all(0)
        assert torch.equal(right(apart.predictions[f"worst attack linf@{severity:g}"]), together)


def test_numbers_over_all_shifts_are_of_corruptions():
    options = {"shifts": ("gaussian-noise",), "severities": (5,), "metrics": ("mean-corruption-error", "flip-rate")}
    alone = evaluate(build(), source(), **options)
    attacked = evaluate(build(), source(), attacks=(PGD(eps=LEVELS, steps=3), FGSM(eps=LEVELS)), **options)
    for metric in options["metrics"]:
        rows = [report.value(metric, "all shifts") for report in (alone, attacked)]
        assert rows[0].value == rows[1].value


def test_of_a_random_model_no_worst_is_told():
    class Noisy(Small):
        def forward(self, x):
            return super().forward(x + 0.2 * torch.randn_like(x))

    model = robustlab.wrap(Noisy(), task="multiclass", output="logits", num_classes=3)
    report = evaluate(model, source(), shifts=(), attacks=(PGD(eps=LEVELS, steps=2), FGSM(eps=LEVELS)))
    assert not [key for key in report.predictions if key.startswith("worst attack")]
    assert len(report.minimal_budgets()) == 0
    assert not [row for row in report.rows if row.metric == "minimal-budget"]
    assert any("lucky draws" in sentence for sentence in report.manifest["not_tested"])


def test_budgets_that_can_change_nothing_are_told():
    report = evaluate(build(), source(), shifts=(), attacks=FGSM(eps=(0.5 / 255, 2 / 255)))
    assert any("fgsm-linf at 0.5 grey levels: less than one level" in text for text in report.manifest["not_tested"])


def test_thresholds_near_zero_are_aimed_at():
    from corruptions.adversarial.losses import decided_at

    moved = decided_at(
        torch.tensor([[-40.0, 0.0]]), (torch.sigmoid(torch.tensor(-40.0, dtype=torch.float64)).item(), 0.5)
    )
    assert moved.tolist() == [[pytest.approx(0.0, abs=1e-4), 0.0]]


def test_few_samples_of_the_checklist_are_refused_at_once():
    for wrong in (5, -1):
        with pytest.raises(ValueError, match="trust of 10 samples or more"):
            robustlab.evaluate_under_shift(build(), source(), attacks="pgd", trust=wrong, progress=False)

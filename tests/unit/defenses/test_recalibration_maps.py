"""The fitted maps: what they gain, what they refuse, and what they do on separable, tied and broken data."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import (
    BetaCalibration,
    DirichletCalibration,
    HistogramBinning,
    IsotonicCalibration,
    PlattScaling,
    TemperatureScaling,
    VectorScaling,
)
from defenses.recalibration import fit_beta, fit_dirichlet, fit_histogram, fit_isotonic, fit_platt, fit_vector
from defenses.recalibration.columns import from_log_odds, log_odds
from defenses.recalibration.histogram import bins_of
from robustlab.core.errors import ConfigError, LabelError, NotFittedError, RangeError
from robustlab.core.identity import model_identity
from robustlab.core.model import wrap
from robustlab.core.source import Source, SourceInfo
from robustlab.core.types import Batch, ImageSpec

CASES = [
    (TemperatureScaling, "binary"),
    (TemperatureScaling, "multiclass"),
    (TemperatureScaling, "multilabel"),
    (PlattScaling, "binary"),
    (PlattScaling, "multilabel"),
    (VectorScaling, "binary"),
    (VectorScaling, "multiclass"),
    (DirichletCalibration, "binary"),
    (DirichletCalibration, "multiclass"),
    (BetaCalibration, "binary"),
    (BetaCalibration, "multiclass"),
    (BetaCalibration, "multilabel"),
    (IsotonicCalibration, "binary"),
    (IsotonicCalibration, "multiclass"),
    (IsotonicCalibration, "multilabel"),
    (HistogramBinning, "binary"),
    (HistogramBinning, "multiclass"),
    (HistogramBinning, "multilabel"),
]
each = pytest.mark.parametrize(("method", "task"), CASES, ids=[f"{case[0].__name__}-{case[1]}" for case in CASES])
ONE_VS_REST = (BetaCalibration, IsotonicCalibration, HistogramBinning)
STEPS = (IsotonicCalibration, HistogramBinning)


class Numbered(Source):
    """One pixel an image, the sample's number."""

    def __init__(self, labels, task, total):
        count = len(labels)
        self.images = (torch.arange(count) / total).float().view(-1, 1, 1, 1)
        self.info = SourceInfo("numbered", ImageSpec(1, (1, 1), bits=None), torch.arange(count), labels, task)

    def pixels(self, index):
        return self.images[list(index)]


class LookUp(nn.Module):
    """Answers the sample's number with its row of logits."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("rows", logits.float())
        self.eval()

    def forward(self, x):
        return self.rows[(x.flatten() * len(self.rows)).round().long()]


def model(logits, task):
    return wrap(LookUp(logits), task=task, output="logits", num_classes=logits.shape[1])


def fitted(method, task, logits, labels, **options):
    return method(model(logits, task), **options).fit(None, Numbered(labels, task, len(labels)))


def answers(defense, logits):
    """Outputs for other logits, through the same map."""
    defense.base.modules()[0].rows = logits.float()
    count = len(logits)
    return defense((torch.arange(count) / count).float().view(-1, 1, 1, 1)).logits


def problem(task, count=3000, seed=0, classes=4):
    """Logits that are the log of the true probabilities, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    classes = 2 if task == "binary" else classes
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    if task == "multilabel":
        return logits, (torch.rand(logits.shape, generator=generator) < logits.sigmoid()).long()
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def nll(logits, labels, task):
    logits = logits.double()
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, labels.double()).item()
    return F.cross_entropy(logits, labels).item()


@each
@pytest.mark.parametrize("scale", [0.05, 0.083, 2.5, 10.0, 33.0, 100.0])
def test_repairs_logits_of_any_scale(method, task, scale):
    val, test = problem(task), problem(task, seed=1)
    defense = fitted(method, task, val[0] * scale, val[1])
    best, before = nll(*test, task), nll(test[0] * scale, test[1], task)
    after = nll(answers(defense, test[0] * scale), test[1], task)
    # a class's odds against the rest do not tell all that several classes' logits tell
    assert after < best + (0.1 if task == "multiclass" and method in ONE_VS_REST else 0.03)
    assert after < before - 0.05


@each
def test_leaves_a_calibrated_model_nearly_alone(method, task):
    val, test = problem(task), problem(task, seed=1)
    before = from_log_odds(log_odds(test[0], task), task) if task != "multiclass" else test[0].log_softmax(1)
    after = answers(fitted(method, task, *val), test[0]).double()
    p, q = (z.sigmoid() if task == "multilabel" else z.softmax(1) for z in (before, after))
    assert (p - q).abs().mean() < (0.03 if method in STEPS else 0.015)
    assert nll(after, test[1], task) < nll(before, test[1], task) + 0.015


@each
def test_separable_validation_data_give_a_finite_map(method, task):
    logits = problem(task, 400)[0]
    labels = (logits > 0).long() if task == "multilabel" else logits.argmax(1)
    for sign in (1, -1):
        defense = fitted(method, task, sign * logits, labels)
        after = answers(defense, sign * logits)
        assert torch.isfinite(after).all()
        assert torch.isfinite(answers(defense, sign * 1e4 * logits)).all()
        assert nll(after, labels, task) < nll(sign * logits, labels, task)


@pytest.mark.parametrize(
    ("method", "task"), [(PlattScaling, "binary"), (VectorScaling, "multiclass"), (BetaCalibration, "multilabel")]
)
def test_separable_validation_data_are_named_in_the_log(method, task, caplog):
    logits = problem(task, 400)[0]
    fitted(method, task, logits, (logits > 0).long() if task == "multilabel" else logits.argmax(1))
    assert "separated without error" in caplog.text
    caplog.clear()
    fitted(method, task, *problem(task))
    assert "separated" not in caplog.text


@each
def test_an_outcome_that_never_occurs_is_refused_where_the_map_needs_it(method, task):
    logits, labels = problem(task, 200)
    if task == "multilabel":
        labels[:, 2] = torch.where(torch.arange(200) % 2 == 0, 1, -1)
        words = "both outcomes of every label, got one outcome at most of labels 2.*TemperatureScaling"
    else:
        labels = torch.where(labels == 1, 0, labels)
        words = "every class, got no sample of classes 1.*TemperatureScaling"
    if method is TemperatureScaling:
        assert torch.isfinite(answers(fitted(method, task, logits, labels), logits)).all()
    else:
        with pytest.raises(LabelError, match=words):
            fitted(method, task, logits, labels)


@each
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_outputs_that_are_not_finite_stay_errors_and_do_not_enter_the_fit(method, task, value):
    logits, labels = problem(task, 600)
    whole = answers(fitted(method, task, logits[20:], labels[20:]), logits[20:])
    broken = logits.clone()
    broken[:20, 1] = value
    after = answers(fitted(method, task, broken, labels), broken)
    assert torch.equal(after[20:], whole)
    assert not torch.isfinite(after[:20]).all(1).any()


@each
def test_the_order_of_samples_decides_nothing_and_a_second_fit_forgets_the_first(method, task):
    logits, labels = problem(task, 600)
    first = fitted(method, task, logits, labels)
    wanted = answers(first, logits)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(2))
    turned = fitted(method, task, logits[order], labels[order])
    assert torch.allclose(answers(turned, logits), wanted, atol=1e-6)
    other = problem(task, 300, seed=5)
    first.base.modules()[0].rows = other[0].float()
    again = first.fit(None, Numbered(other[1], task, 300))
    assert torch.equal(answers(again, logits), answers(fitted(method, task, *other), logits))


@each
def test_single_precision_logits_give_the_same_map(method, task):
    logits, labels = problem(task, 600)
    maps = []
    for dtype in (torch.float32, torch.float64):
        maps.append(method(model(logits, task)))
        maps[-1].learn(logits.float().to(dtype), labels)
    assert torch.equal(answers(maps[0], logits), answers(maps[1], logits))


@pytest.mark.parametrize("method", [PlattScaling, BetaCalibration, IsotonicCalibration, HistogramBinning])
def test_annotation_gaps_are_left_out(method):
    logits, labels = problem("multilabel", 800)
    hidden = labels.clone()
    hidden[400:, 0] = -1
    part = fitted(method, "multilabel", logits[:400], labels[:400])
    whole = fitted(method, "multilabel", logits, hidden)
    a, b = answers(part, logits), answers(whole, logits)
    assert torch.allclose(a[:, 0], b[:, 0], atol=1e-6)
    assert not torch.allclose(a[:, 1], b[:, 1], atol=1e-6)


@each
def test_every_map_has_an_identity_of_its_own_and_answering_keeps_it(method, task):
    logits, labels = problem(task, 600)
    first, second = (fitted(method, task, logits[:count], labels[:count]) for count in (400, 600))
    second.base = first.base
    made = {model_identity(first.base), model_identity(first), model_identity(second)}
    assert None not in made
    assert len(made) == 3
    assert first.fingerprint() != second.fingerprint()
    held = model_identity(first), first.fingerprint()
    first(torch.zeros(3, 1, 1, 1))
    assert (model_identity(first), first.fingerprint()) == held


def test_who_keeps_the_offset_of_logits():
    kept = {(method, task): method(model(problem(task, 4)[0], task)).has_offset for method, task in CASES}
    assert {case for case, has in kept.items() if has} == {
        *((TemperatureScaling, task) for task in ("binary", "multiclass", "multilabel")),
        *((VectorScaling, task) for task in ("binary", "multiclass")),
        (PlattScaling, "multilabel"),
    }
    for method, task in CASES:
        probabilities = wrap(LookUp(problem(task, 4)[0]), task=task, output="probs")
        assert not method(probabilities).has_offset


@each
def test_log_probabilities_sum_to_one(method, task):
    defense = fitted(method, task, *problem(task))
    after = answers(defense, 20 * problem(task, seed=3)[0])
    if task != "multilabel" and not defense.has_offset:
        assert torch.allclose(after.double().exp().sum(1), torch.ones(len(after), dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1000.0])
def test_log_odds_are_exact_where_probabilities_have_rounded(classes, scale):
    logits = scale * torch.randn(300, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_(True)
    odds = log_odds(logits, "multiclass")
    full = logits if classes > 2 else logits[:, 1:]
    wanted = torch.stack(
        [
            full[:, k] - torch.logsumexp(torch.cat([logits[:, :j], logits[:, j + 1 :]], 1), 1)
            for k, j in enumerate(range(classes) if classes > 2 else [1])
        ],
        1,
    )
    assert torch.allclose(odds, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(odds.sum(), logits)
    (exact,) = torch.autograd.grad(wanted.sum(), logits)
    assert torch.allclose(gradient, exact, atol=1e-9)
    back = from_log_odds(odds.detach(), "multiclass").exp()
    assert torch.allclose(back, logits.detach().softmax(1), atol=1e-12)


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_step_functions_see_the_order_of_saturated_scores(method, task):
    logits, labels = problem(task)
    scaled = 2.0**7 * logits
    if task == "multiclass":  # the odds of several classes are not proportional to the logits
        assert nll(answers(fitted(method, task, scaled, labels), scaled), labels, task) < 1.0
        return
    plain = answers(fitted(method, task, logits, labels), logits)
    assert torch.equal(answers(fitted(method, task, scaled, labels), scaled), plain)


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_frequencies_are_kept_off_zero_and_one(method, task):
    logits = problem(task, 398)[0]
    labels = (logits > 0).long() if task == "multilabel" else logits.argmax(1)
    after = answers(
        fitted(method, task, logits, labels, **({"bins": 398} if method is HistogramBinning else {})), logits
    )
    p = (after.sigmoid() if task == "multilabel" else after.softmax(1)).double()
    assert p.min().item() == pytest.approx(1 / 400, rel=1e-5)
    assert p.max().item() == pytest.approx(399 / 400, rel=1e-5)


def test_isotonic_pools_ties_and_violators():
    x = torch.tensor([-2.0, -1.0, -1.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 0, 1, 0, 1])
    knots, values, count = fit_isotonic(torch.stack([torch.zeros_like(x), x], 1), y, "binary")
    assert count.tolist() == [7]
    assert knots.tolist() == [[-2, -2, -1, 0, 1, 2, 3, 3]]
    assert values[0].tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1, 1])


def test_isotonic_with_one_distinct_score_is_the_prevalence():
    logits = torch.tensor([[0.0, 1.5]]).repeat(8, 1)
    defense = fitted(IsotonicCalibration, "binary", logits, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]))
    p = answers(defense, torch.tensor([[0.0, -9.0], [0.0, 1.5], [0.0, 9.0]])).softmax(1)[:, 1]
    assert p.tolist() == pytest.approx([0.25] * 3)


def test_histogram_bins_hold_equally_many_and_keep_ties_together():
    x = torch.arange(30, dtype=torch.float64)
    y = (x >= 17).long()
    z = torch.stack([torch.zeros_like(x), x], 1)
    edges, values, count = fit_histogram(z, y, "binary", bins=3)
    assert edges.tolist() == [[9.5, 19.5]]
    assert values[0].tolist() == pytest.approx([0.0, 0.3, 1.0])
    assert count.tolist() == [30]
    tied = torch.where(x < 15, 4.0, x)
    edges, values, _ = fit_histogram(torch.stack([torch.zeros_like(x), tied], 1), y, "binary", bins=3)
    assert edges.tolist() == [[9.5, 19.5]]  # halfway between 4 and 15, and the cut at 20
    assert values[0].tolist() == pytest.approx([0.0, 0.6, 1.0])
    edges, values, _ = fit_histogram(z[:, :1].repeat(1, 2), y, "binary", bins=15)
    assert edges.shape == (1, 0)
    assert values[0].tolist() == pytest.approx([13 / 30])
    edges, values, _ = fit_histogram(z, y, "binary", bins=100)
    assert edges.shape == (1, 29)
    assert values[0].tolist() == y.tolist()


def test_histogram_fits_and_answers_with_one_rule():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (500,), generator=generator).double() / 3
    y = (torch.rand(500, generator=generator) < x.sigmoid()).long()
    z = torch.stack([torch.zeros_like(x), x], 1)
    p = answers(fitted(HistogramBinning, "binary", z, y, bins=4), z).softmax(1)[:, 1]
    for value in p.unique():
        assert y[p == value].double().mean().item() == pytest.approx(value.item(), abs=1e-6)


def test_histogram_keeps_its_rule_where_an_edge_falls_on_a_sample():
    first = torch.tensor(1.0, dtype=torch.float64)
    second = torch.nextafter(first, torch.tensor(2.0, dtype=torch.float64))
    for low, high in ((first, second), (second, torch.nextafter(second, 2 * first))):
        x = torch.stack([low, high]).repeat_interleave(10)
        y = torch.tensor([0, 1]).repeat_interleave(10)
        edges, values, _ = fit_histogram(torch.stack([torch.zeros_like(x), x], 1), y, "binary", bins=2)
        assert edges.item() in (low.item(), high.item())  # there is nothing between
        index = bins_of(x[:, None], edges)[:, 0]
        for k in index.unique():
            assert values[0, k].item() == y[index == k].double().mean().item()


@pytest.mark.parametrize("method", STEPS)
def test_a_row_of_classes_never_seen_keeps_its_probabilities_and_is_counted(method, caplog):
    pairs = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]).repeat(50, 1)
    p = torch.full((200, 4), 1e-6).scatter(1, pairs, torch.tensor([[0.6, 0.4]]).repeat(200, 1))
    options = {"bins": 4} if method is HistogramBinning else {}
    defense = fitted(method, "multiclass", p.log(), pairs[:, 0], **options)
    assert defense.fallback_rows == 0
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.6, 0.4, 1e-6, 1e-6], [0.22, 0.26, 0.28, 0.24]])
    with caplog.at_level(logging.WARNING):
        after = answers(defense, rows.log()).exp()
    assert defense.fallback_rows == 2
    assert "2 of 3 rows" in caplog.text
    assert torch.allclose(after[[0, 2]], rows[[0, 2]], atol=1e-6)
    assert after[1, 0] > 0.95


def test_vector_scaling_leaves_open_directions_at_the_temperature():
    logits, labels = problem("multiclass")
    weight, bias = fit_vector(3 * logits, labels, "multiclass")
    assert bias.sum().item() == pytest.approx(0, abs=1e-6)
    single = torch.stack([torch.zeros(3000, dtype=torch.float64), logits[:, 0]], 1)
    y = (torch.rand(3000, generator=torch.Generator().manual_seed(0)) < logits[:, 0].sigmoid()).long()
    weight, bias = fit_vector(single, y, "binary")
    slope, intercept = fit_platt(single, y, "binary")
    assert weight[1].item() == pytest.approx(slope.item(), rel=1e-6)
    assert (bias[1] - bias[0]).item() == pytest.approx(intercept.item(), abs=1e-6)
    assert weight[0].item() == pytest.approx(1.0, abs=0.1)


def test_more_freedom_gains_likelihood_where_classes_are_biased():
    logits, labels = problem("multiclass")
    logits = logits * torch.tensor([0.5, 1, 2, 3]) + torch.tensor([1.0, 0, -1, 0])
    loss = [
        nll(answers(fitted(method, "multiclass", logits, labels, **options), logits), labels, "multiclass")
        for method, options in (
            (TemperatureScaling, {}),
            (VectorScaling, {}),
            (DirichletCalibration, {"reg_lambda": 0, "reg_mu": 0}),
        )
    ]
    assert max(loss[1:]) < loss[0] - 0.05


def test_beta_weights_are_never_negative():
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(4000, generator=generator, dtype=torch.float64)
    z = torch.stack([torch.zeros_like(x), x], 1)
    for true, sign in ((x, 1), (-x, -1), (torch.where(x > 0, 3 * x, -x), 0)):
        y = (torch.rand(4000, generator=generator) < true.sigmoid()).long()
        a, b, c = fit_beta(z, y, "binary")[0].tolist()
        assert a >= 0
        assert b >= 0
        if sign > 0:
            assert (a, b) == pytest.approx((1, 1), abs=0.2)
        if sign < 0:  # a rising map of reversed scores is flat
            assert (a, b) == (0, 0)
            assert c == pytest.approx(torch.logit(y.double().mean()).item(), abs=1e-6)


def test_dirichlet_penalties_shrink_what_they_name():
    logits, labels = problem("multiclass")
    off = ~torch.eye(4, dtype=torch.bool)
    size = [
        (weight[off].abs().max().item(), bias.abs().max().item())
        for weight, bias in (
            fit_dirichlet(logits, labels, "multiclass", reg_lambda=a, reg_mu=b)
            for a, b in ((0, 0), (1e4, 0), (0, 1e4), (1e4, 1e4))
        )
    ]
    assert size[1][0] < 1e-3 < size[0][0]
    assert size[2][1] < 1e-3 < size[0][1]
    assert max(size[3]) < 1e-3


@pytest.mark.parametrize(
    ("attempt", "error", "words"),
    [
        (lambda z, y: fit_platt(z, y, "multiclass"), ConfigError, "two classes.*got 4 classes.*VectorScaling"),
        (lambda z, y: fit_vector(z, y, "multilabel"), ConfigError, "multi-label model.*PlattScaling"),
        (lambda z, y: fit_dirichlet(z, y, "multilabel"), ConfigError, "multi-label model.*BetaCalibration"),
        (lambda z, y: fit_dirichlet(z, y, "multiclass", reg_mu=-1), RangeError, "at least 0"),
        (lambda z, y: DirichletCalibration(model(z, "multiclass"), reg_lambda=-1), RangeError, "at least 0"),
        (lambda z, y: HistogramBinning(model(z, "multiclass"), bins=0), RangeError, "at least 1 bin, got 0"),
        (lambda z, y: fit_isotonic(z * torch.nan, y, "multiclass"), LabelError, "finite logits"),
        (lambda z, y: fit_beta(z, y + 1, "multiclass"), LabelError, "labels from 0 to 3"),
    ],
)
def test_what_makes_no_sense_is_refused(attempt, error, words):
    with pytest.raises(error, match=words):
        attempt(*problem("multiclass", 50))


@each
def test_is_refused_before_it_is_fitted(method, task, tmp_path):
    logits, labels = problem(task, 50)
    defense = method(model(logits, task))
    for attempt in (lambda: defense(torch.zeros(2, 1, 1, 1)), lambda: defense.save(tmp_path)):
        with pytest.raises(NotFittedError, match=f"a fitted {method.name}"):
            attempt()
    with pytest.raises(ConfigError, match="clean validation data"):
        defense.fit(Numbered(labels, task, 50), None)
    defense.base.answers_only = True
    with pytest.raises(ConfigError, match="answers only"):
        defense.fit(None, Numbered(labels, task, 50))


@each
def test_options_are_saved_and_another_network_is_refused(method, task, tmp_path):
    logits, labels = problem(task, 300)
    options = {DirichletCalibration: {"reg_lambda": 0.5, "reg_mu": 0.25}, HistogramBinning: {"bins": 3}}.get(method, {})
    defense = fitted(method, task, logits, labels, **options)
    wanted = defense(torch.full((1, 1, 1, 1), 7 / 300)).logits
    defense.save(tmp_path)
    loaded = method.load(tmp_path, model=model(torch.zeros_like(logits), task))
    assert loaded.settings() == defense.settings()
    assert torch.equal(loaded(torch.full((1, 1, 1, 1), 7 / 300)).logits, wanted)
    assert model_identity(loaded) == model_identity(defense)
    other = wrap(LookUp(logits), task=task, output="logits", num_classes=logits.shape[1], mean=0.4, std=1.0)
    with pytest.raises(ConfigError, match="mean"):
        method.load(tmp_path, model=other)


def test_an_attack_sees_values_and_the_gradient_before_a_step_function():
    logits, labels = problem("multiclass", 400)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    defense = HistogramBinning(wrap(net.eval(), task="multiclass", output="logits", num_classes=4))
    defense.learn(logits, labels)
    images = torch.rand(20, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    batch = Batch(images, None, torch.arange(20))
    seen = defense.for_attack().outputs(batch).logits
    assert torch.equal(seen, defense.outputs(batch).logits)
    upstream = torch.randn(seen.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(seen, images, upstream)
    (wanted,) = torch.autograd.grad(defense.base.outputs(batch).logits, images, upstream)
    assert torch.equal(gradient, wanted)

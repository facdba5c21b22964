"""The checklist beside adversarial results: broken defences raise their flag, honest networks raise none."""

import json

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn

from robustlab.core.errors import ConfigError, KindError, LabelError, RangeError
from robustlab.core.model import wrap
from robustlab.core.registry import ATTACKS
from robustlab.core.rng import SampleRng
from robustlab.core.types import Batch
from robustlab.evaluate import trust
from robustlab.evaluate import trust_checks as probes
from robustlab.evaluate.trust import TrustCheck, trust_checks
from robustlab.evaluate.trust_checks import Run, Subject

from .broken_defences import CLASSES, HONEST, SIDE, SPEC, ZOO, Detached, Noisy, Wrapped, samples

EPS = 6 / 255
BAD = ("warned", "failed")


def checked(model, batch, **options):
    return {check.name: check for check in trust_checks(model, batch, **{"norm": "linf", "eps": EPS} | options)}


def flags(checks):
    return {name: check.status for name, check in checks.items() if check.status in BAD}


@pytest.fixture(scope="module")
def net():
    return HONEST["mlp"]()


@pytest.fixture(scope="module")
def batch():
    return samples(40)


@pytest.fixture(scope="module")
def honest(net, batch):
    return checked(wrap(net, output="logits"), batch, spec=SPEC)


def subject(model, batch, *, norm="linf", eps=EPS, spec=None):
    return Subject(model, batch, norm=norm, eps=eps, spec=spec, seed=0)


class Scripted(Subject):
    """A subject whose attacks' results are written down, by name and budget or settings."""

    stuck = False

    def __init__(self, results, n=64, eps=0.1):
        def net(x):
            return x.flatten(1)[:, :3]

        images = SampleRng.make(0, "scripted", torch.arange(n)).uniform("x", (1, 2, 2))
        labels = net(images).argmax(1)
        model = wrap(net, output="logits")
        super().__init__(model, Batch(images, labels, torch.arange(n)), norm="linf", eps=eps, spec=None, seed=0)
        self.results = results

    def run(self, name, *, eps=None, rows=None, stop=False, seed=0, settings=None):
        for key, fooled in self.results.items():
            if key in ((name, eps), (name, *(settings or {}).values()), (name,)):
                success = torch.zeros(self.n, dtype=torch.bool)
                success[list(fooled)] = True
                return Run(success, torch.where(success, -1.0, 0.5 * self.margins))
        raise AssertionError(f"no result for {name} {eps} {settings}")


# the zoo


@pytest.mark.parametrize("name", HONEST)
def test_honest_networks_raise_no_flag(name):
    checks = checked(wrap(HONEST[name](), output="logits"), samples(48), spec=SPEC)
    assert flags(checks) == {}, [check.finding for check in checks.values() if check.status in BAD]
    assert {name for name, check in checks.items() if check.status != "passed"} == {"adaptive-attack"}
    assert 0.05 < checks["per-sample-worst"].value < 0.95, "attacks do something, and not everything"


@pytest.mark.parametrize("name", ZOO)
def test_broken_defences_raise_their_flags(name, net, batch):
    build, expected = ZOO[name]
    checks = checked(build(net), batch.select(torch.arange(24)), spec=SPEC)
    for check, (status, words) in expected.items():
        assert checks[check].status == status, checks[check].finding
        assert words in checks[check].finding
    assert all(check.finding.endswith(".") for check in checks.values())


def test_a_straight_through_quantiser_is_seen_by_its_steps_alone(net, batch):
    here = subject(ZOO["quantised-straight-through"][0](net), batch)
    assert probes.zero_gradients(here).status == "passed"
    assert "zero or missing (0) or 0.02 grey levels change nothing (40)" in probes.non_differentiable(here).finding


def test_searches_without_gradients_expose_a_detached_network(net, batch):
    checks = checked(wrap(Detached(net), output="logits"), batch, eps=8 / 255)
    assert checks["black-box"].status == "failed"
    assert "no gradient attack could be run" in checks["black-box"].finding
    assert checks["black-box"].value > 0.02
    for name in ("single-step", "iterations", "restarts", "two-losses", "budget-monotone", "huge-budget"):
        assert checks[name].status == "skipped", "what could not be run is not ticked"
        assert "gradients reach the input" in checks[name].finding


def test_noise_exposes_a_network_that_only_rough_images_confuse(net, batch):
    class Rough(Wrapped):
        def forward(self, x):
            rough = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)).detach()
            return self.net(x.detach() + 0 * x) * torch.where(rough > 0.135, -1, 1)[:, None]

    here = subject(wrap(Rough(net)), batch, eps=0.1)
    assert (here.margins > 0).all()
    verdict = trust.random_noise(here)
    assert (verdict.status, verdict.value) == ("failed", 1.0)
    assert trust.random_noise(subject(wrap(Rough(net)), batch, eps=0.005)).status == "passed"


# what is promised about each item


def test_the_list_is_complete_and_open_at_its_end(honest):
    assert list(honest)[:2] == ["clean-accuracy", "threat-model"]
    assert list(honest)[-1] == "adaptive-attack"
    assert honest["adaptive-attack"].status == "not automatable"
    assert len(honest) == 22
    assert len({check.question for check in honest.values()}) == 22


def test_items_are_json(honest):
    for check in honest.values():
        loaded = json.loads(json.dumps(check.to_dict(), allow_nan=False))
        assert TrustCheck(**loaded) == check
    assert TrustCheck("a", "A?", "passed", "B.", float("nan")).to_dict()["value"] is None


def test_every_finding_states_its_number_of_samples(honest):
    n = str(honest["threat-model"].finding.split("; ")[1].split(" of ")[0])
    for name, check in honest.items():
        assert f"{n}" in check.finding or name in ("clean-accuracy", "adaptive-attack"), check.finding
    assert "(40 of 40)" in honest["clean-accuracy"].finding


def test_the_threat_model_is_in_native_units(honest, net, batch):
    assert "L-infinity, eps 0.02353 (6 grey levels), untargeted" in honest["threat-model"].finding
    assert "L2, eps 0.5, untargeted" in trust._threat(subject(wrap(net), batch, norm="l2", eps=0.5), 40).finding


@pytest.mark.parametrize(("count", "runs"), [(9, False), (10, True)])
def test_with_few_right_samples_nothing_is_ticked(count, runs, net, batch):
    labels = batch.labels.clone()
    labels[count:] = (labels[count:] + 1) % CLASSES
    checks = checked(wrap(net), Batch(batch.images, labels, batch.ids))
    others = [check for name, check in checks.items() if name not in ("clean-accuracy", "threat-model")][:-1]
    assert checks["clean-accuracy"].value == count / 40
    assert any(check.status == "passed" for check in others) == runs
    if not runs:
        assert {(check.status, check.finding) for check in others} == {
            ("skipped", "The model gets only 9 samples right; 10 are needed.")
        }


def test_a_model_no_better_than_a_constant_is_noted(batch):
    constant = wrap(lambda images: 0 * images.flatten(1)[:, :CLASSES] + torch.eye(CLASSES)[1], output="logits")
    checks = checked(constant, batch)
    assert checks["clean-accuracy"].status == "warned"
    assert checks["clean-accuracy"].value == (batch.labels == 1).double().mean().item()
    assert checks["huge-budget"].status == "skipped", "samples of one class"
    assert checks["non-differentiable"].status == "skipped", "the output never moves"
    assert checks["zero-gradients"].status == "failed"


def test_what_gradients_cannot_tell_is_not_ticked(net, batch):
    here = subject(ZOO["zero-gradient"][0](net), batch)
    assert (here.pgd().margin < here.margins).any(), "a random start moves"
    for check in (trust.single_step, trust.iterations, trust.restarts, trust.two_losses, trust.budget_monotone):
        assert check(here).status == "skipped"
        assert "zero for 100.0 % (40 of 40)" in check(here).finding


@pytest.mark.parametrize(("only_fgsm", "only_pgd"), [(6, 0), (5, 0), (7, 1), (8, 1), (0, 6), (12, 3)])
def test_single_step_fails_by_the_exact_test(only_fgsm, only_pgd):
    both = range(20, 30)
    results = {
        ("fgsm",): [*range(only_fgsm), *both],
        ("pgd", probes.STEPS): [*range(40, 40 + only_pgd), *both],
    }
    verdict = trust.single_step(Scripted(results))
    p = binomtest(only_fgsm, only_fgsm + only_pgd, 0.5).pvalue
    assert verdict.status == ("failed" if only_fgsm > only_pgd and p < 0.05 else "passed")
    assert f"p = {p:.2g}" in verdict.finding
    assert verdict.value == pytest.approx((only_pgd - only_fgsm) / 64)


@pytest.mark.parametrize(("extra", "status"), [(0, "passed"), (1, "passed"), (2, "warned")])
def test_more_restarts_may_find_one_more_of_64(extra, status):
    results = {("pgd", probes.STEPS): range(10), ("pgd", probes.STEPS, 4): range(10, 10 + extra)}
    verdict = trust.restarts(Scripted(results))
    assert (verdict.status, verdict.value) == (status, extra / 64)
    assert f"({10 + extra} of 64)" in verdict.finding


@pytest.mark.parametrize(("extra", "status"), [(0, "passed"), (2, "warned")])
def test_more_steps_may_find_one_more_of_64(extra, status):
    results = {("pgd", probes.STEPS): range(10), ("pgd", 2 * probes.STEPS): range(10, 10 + extra)}
    assert trust.iterations(Scripted(results)).status == status


def test_more_steps_may_not_lower_margins_much():
    scripted = Scripted({("pgd", probes.STEPS): range(10), ("pgd", 2 * probes.STEPS): ()})
    run = scripted.run
    assert trust.iterations(scripted).status == "passed"

    def lower(name, **options):
        found = run(name, **options)
        again = options["settings"]["steps"] == 2 * probes.STEPS
        return Run(found.success, found.margin * 0.9) if again else found

    scripted.run = lower
    verdict = trust.iterations(scripted)
    assert verdict.status == "warned"
    assert verdict.value == 0


@pytest.mark.parametrize(("gap", "status"), [(5, "passed"), (6, "warned")])
def test_losses_must_agree(gap, status):
    results = {("apgd", "ce", 30): range(10), ("apgd", "margin", 30): range(10 + gap)}
    assert trust.two_losses(Scripted(results)).status == status


@pytest.mark.parametrize(("fewer", "status"), [(0, "passed"), (5, "passed"), (6, "failed")])
def test_more_budget_must_not_fool_significantly_fewer(fewer, status):
    results = {("pgd", 0.05): range(10), ("pgd", 0.1): range(20), ("pgd", 0.2): range(20 - fewer)}
    verdict = trust.budget_monotone(Scripted(results))
    assert (verdict.status, verdict.value) == (status, fewer / 64)


def test_huge_budget_is_held_against_the_most_frequent_class():
    scripted = Scripted({("pgd", 0.5): ()})
    assert trust.huge_budget(scripted).status == "failed"
    enough = range(64 - probes.majority(scripted))
    assert trust.huge_budget(Scripted({("pgd", 0.5): enough})).status == "passed"
    assert trust.huge_budget(Scripted({("pgd", 0.5): enough[1:]})).status == "failed"


def test_at_half_the_box_every_stored_image_can_be_the_same_grey(net, batch):
    for norm in ("linf", "l2"):
        here = subject(wrap(net), batch, norm=norm, spec=SPEC)
        extremes = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, SIDE, SIDE)
        delta = (128 / 255 - extremes).flatten(1)
        length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert length.max() == pytest.approx(here.half, rel=1e-5)
        assert here.half > here.box / 2


def test_a_curve_that_never_reaches_zero_is_truncated():
    scripted = Scripted(
        {("pgd", 0.05): (), ("pgd", 0.1): (), ("pgd", 0.2): (), ("pgd", 0.5): (), ("pgd", 1.0): range(60)}
    )
    scripted.results[("pgd",)] = ()
    verdict = trust.full_success(scripted)
    assert verdict.status == "warned"
    assert "curve truncated" in verdict.finding
    assert verdict.value == 4 / 64
    scripted.results[("pgd", 0.2)] = range(64)
    assert trust.full_success(scripted)[::2] == ("passed", 0.2)


def test_black_box_is_skipped_where_square_is_not_installed(monkeypatch, net, batch):
    ATTACKS.load()
    monkeypatch.delitem(ATTACKS._items, "square")
    verdict = trust.black_box(subject(wrap(net), batch))
    assert verdict.status == "skipped"
    assert "not installed" in verdict.finding


def test_the_worst_is_taken_sample_by_sample():
    scripted = Scripted({})
    for place, fooled in enumerate((range(10), range(5, 12), range(64))):
        success = torch.zeros(64, dtype=torch.bool)
        success[list(fooled)] = True
        scripted.runs["pgd", 0.1 if place < 2 else 0.2, str(place)] = Run(success, scripted.margins)
    verdict = trust.per_sample_worst(scripted)
    assert verdict.value == 52 / 64, "12 are broken by one or the other; other budgets do not count"
    assert "the strongest single attack 84.4 % (54 of 64)" in verdict.finding


# gradients


def linear_model(seed=0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval().requires_grad_(False)
    net[1].weight.copy_(SampleRng.make(seed, "w", torch.arange(3)).normal("w", (36,)))
    net[1].bias.zero_()
    images = SampleRng.make(seed, "x", torch.arange(20)).uniform("x", (1, 6, 6))
    return net, Batch(images, net(images).argmax(1), torch.arange(20))


@pytest.mark.parametrize(("wrong", "status"), [(1.0, "passed"), (1.1, "passed"), (1.3, "warned"), (-1.0, "warned")])
def test_finite_differences_measure_by_how_much_the_gradient_is_off(wrong, status):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope * wrong

    net, few = linear_model()
    verdict = probes.finite_differences(subject(wrap(lambda x: net(Scale.apply(x)), output="logits"), few))
    assert verdict.status == status
    assert verdict.value == (0.0 if status == "passed" else 1.0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_gradients_are_judged_whatever_the_scale_of_logits(scale):
    net, few = linear_model()
    here = subject(wrap(lambda x: scale * net(x), output="logits"), few)
    for check in (probes.finite_differences, probes.zero_gradients, probes.shattered_gradients):
        assert check(here).status == "passed"
    assert probes.shattered_gradients(here).value == pytest.approx(1)


@pytest.mark.parametrize("zero", [0, 1, 2, 11])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_the_share_of_zero_and_broken_gradients_is_counted(zero, value):
    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            slope = slope.clone()
            slope[:zero] = value
            return slope

    net, few = linear_model()
    verdict = probes.zero_gradients(subject(wrap(lambda x: net(Spoil.apply(x)), output="logits"), few))
    assert verdict.value == zero / 20
    assert verdict.status == ("failed" if zero > 10 else "warned" if zero > 1 else "passed")
    assert f"({zero} of 20)" in verdict.finding


@pytest.mark.parametrize(("place", "margin", "status"), [(-1, 12, "passed"), (10, 16, "warned"), (0, 20, "warned")])
def test_saturation_begins_where_float32_loses_the_gradient(place, margin, status):
    net, few = linear_model()
    scale = margin / subject(wrap(net), few).margins.sort().values[place]
    model = wrap(lambda x: scale * net(x), output="logits")
    logits = model.predict(few).logits.requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, few.labels, reduction="sum"), logits)
    verdict = probes.saturated_logits(subject(model, few))
    assert verdict.value == (slope.abs().amax(1) < 2**-23).double().mean().item()
    assert verdict.status == status


@pytest.mark.parametrize("how", ["grad", "backward", "method", "func"])
def test_autograd_inside_a_forward_pass_is_seen(how):
    net, few = linear_model()

    def forward(x):
        with torch.enable_grad():
            y = x.detach().clone().requires_grad_(True)
            total = net(y).square().sum()
            if how == "grad":
                from torch.autograd import grad

                (slope,) = grad(total, y)
            elif how == "func":
                slope = torch.func.grad(lambda z: net(z).square().sum())(x.detach())
            else:
                torch.autograd.backward(total) if how == "backward" else total.backward()
                slope = y.grad
        return net(x - 1e-3 * slope.detach())

    verdict = probes.optimisation(subject(wrap(forward, output="logits"), few))
    assert verdict.status == "warned"
    assert verdict.value == 1


def test_log_probabilities_are_fine_where_declared():
    net, few = linear_model()
    model = wrap(lambda x: net(x).log_softmax(1), output="log_probs")
    assert probes.probabilities(subject(model, few)).status == "passed"
    assert probes.one_hot(subject(model, few)).status == "passed"


def test_hard_answers_of_one_sigmoid_are_seen():
    net, few = linear_model()
    labels = (net(few.images)[:, 0] > 0).long()
    hard = wrap(lambda x: (net(x)[:, :1] > 0).float(), output="probs", task="binary")
    soft = wrap(lambda x: net(x)[:, :1].sigmoid(), output="probs", task="binary")
    few = Batch(few.images, labels, few.ids)
    assert probes.one_hot(subject(hard, few)).status == "failed"
    assert probes.one_hot(subject(soft, few)).status == "passed"


# tasks, norms, side effects, mistakes


def test_two_classes_and_several_labels():
    net, few = linear_model()
    logits = net(few.images)
    binary = Batch(few.images, (logits[:, 0] > 0).long(), few.ids)
    checks = checked(wrap(lambda x: net(x)[:, :1], output="logits", task="binary"), binary)
    assert checks["clean-accuracy"].value == 1
    assert checks["zero-gradients"].status == checks["full-success"].status == "passed"
    several = Batch(few.images, (logits > 0).long(), few.ids)
    checks = checked(wrap(net, output="logits", task="multilabel"), several)
    assert checks["clean-accuracy"].value == 1
    assert checks["two-losses"].status == checks["saturated-logits"].status == "skipped"
    assert checks["full-success"].status == "passed"


def test_l2_balls_raise_no_flag(net, batch):
    assert flags(checked(wrap(net), batch, norm="l2", eps=0.4)) == {}


def test_outputs_that_are_not_finite_are_counted_as_wrong(net, batch):
    bad = torch.arange(40) < 3
    model = wrap(
        lambda x: torch.where((bad if len(x) == 40 else bad[:0].new_zeros(len(x)))[:, None], torch.nan, net(x))
    )
    checks = checked(model, batch)
    assert checks["clean-accuracy"].value == 37 / 40
    assert "outputs of 3 are not finite" in checks["clean-accuracy"].finding


def test_only_so_many_right_samples_are_used(net, batch):
    checks = checked(wrap(net), batch, limit=12)
    assert "12 of 40 samples" in checks["threat-model"].finding
    assert "of 12)" in checks["iterations"].finding


def test_nothing_is_changed_and_runs_repeat_in_any_grad_mode(net, batch):
    few = batch.select(torch.arange(12))
    model = wrap(Noisy(net), output="logits")
    state, before = torch.get_rng_state(), few.images.clone()
    first = trust_checks(model, few, norm="linf", eps=EPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(few.images, before)
    assert trust_checks(model, few, norm="linf", eps=EPS) == first
    with torch.inference_mode():
        inside = Batch(few.images.clone(), few.labels.clone(), few.ids.clone())
        assert trust_checks(model, inside, norm="linf", eps=EPS) == first
    assert trust_checks(model, few, norm="linf", eps=EPS, seed=1) != first


def test_mistakes_are_named(net, batch):
    model = wrap(net)
    for options, kind, message in (
        ({"norm": "l1"}, ConfigError, "norm 'linf' or 'l2'"),
        ({"eps": 0.0}, RangeError, "positive eps"),
        ({"eps": 8.0}, RangeError, "Divide grey levels"),
        ({"eps": float("nan")}, RangeError, "positive eps"),
        ({"limit": 3}, RangeError, "limit of at least 10"),
        ({"seed": 0.5}, KindError, "seed as an integer"),
    ):
        with pytest.raises(kind, match=message):
            checked(model, batch, **options)
    with pytest.raises(KindError, match=r"robustlab\.wrap"):
        checked(net, batch)
    with pytest.raises(ConfigError, match="labelled batch"):
        checked(model, Batch(batch.images, None, batch.ids))
    with pytest.raises(LabelError, match="labels from 0 to 3"):
        checked(model, Batch(batch.images, batch.labels + 1, batch.ids))

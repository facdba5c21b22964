"""The doctor finds each planted mistake, and says nothing on healthy models, weak ones or untrained ones."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import robustlab
from robustlab.core.model import Capabilities, Model
from robustlab.core.types import ModelOutputs
from robustlab.data import HistologyPhantom, load_data, subset
from robustlab.evaluate import doctor_rules as rules
from robustlab.evaluate.diagnosis import Diagnosis, Finding
from robustlab.evaluate.doctor import examine_data, examine_model
from robustlab.train import fit

DATA = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"
FINE = Capabilities(batch_independent=True, deterministic=True, supports_grad=True)


class Bands(nn.Module):
    """Answers right by construction: class k has brightness (k + 1/2) / classes."""

    def __init__(self, classes=4, mean=0.0, std=1.0, step=0, sharp=200.0):
        super().__init__()
        self.register_buffer("centres", ((torch.arange(classes) + 0.5) / classes - mean) / std)
        self.step = step
        self.sharp = sharp * std**2
        self.seen = 0
        self.eval()

    def forward(self, x):
        self.seen += len(x)
        logits = -self.sharp * (x.mean((1, 2, 3))[:, None] - self.centres) ** 2
        return logits.roll(self.step, 1)


class Then(nn.Module):
    """A network with something after it."""

    def __init__(self, net, after):
        super().__init__()
        self.net, self.after = net, after
        self.eval()

    def forward(self, x):
        return self.after(self.net(x))


def bands(count=400, classes=4, seed=0, **options):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    bright = (labels + 0.5 + generator.normal(0, 0.2, count)) / classes * 255
    images = (bright[:, None, None] + generator.normal(0, 10, (count, 16, 16))).clip(0, 255).astype(np.uint8)
    return load_data(images, labels=labels, **options)


def names(diagnosis):
    return [finding.check for finding in diagnosis.findings]


def only(diagnosis, check):
    assert names(diagnosis) == [check], diagnosis.summary()
    (finding,) = diagnosis.findings
    assert finding.fix.endswith(".")
    assert any(character.isdigit() for character in finding.text) or check in ("train-mode", "class-names")
    return finding


def quick(model, source, **options):
    settings = {"was_training": False, "thorough": False} | options
    return examine_model(model, source, FINE, **settings)


# healthy


@pytest.fixture(scope="module")
def trained():
    """A small network trained for images normalised with mean 0.5 and std 0.25, and its data."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    train, test = HistologyPhantom(200, size=32, split="train"), HistologyPhantom(300, size=32)
    model = robustlab.wrap(net, task="binary", output="logits", mean=0.5, std=0.25)
    fit(model, train, epochs=8, batch_size=64, lr=1e-2, progress=False)
    return net, train, test


def test_a_trained_network_is_healthy(trained):
    net, train, test = trained
    val = HistologyPhantom(100, size=32, split="val")
    model = robustlab.wrap(net, task="binary", output="logits", mean=0.5, std=0.25)
    seen = robustlab.doctor(model, test, train=train, val=val, cluster="patient")
    assert seen.healthy, seen.summary()
    wanted = {"double-normalisation", "labels-off-by-one", "majority-class", "image-overlap-train", "batch-dependence"}
    assert wanted | {"patient-overlap-train", "patient-overlap-val", "train-mode", "class-count"} <= set(seen.passed)


@pytest.mark.parametrize("thorough", [False, True])
def test_normalisation_applied_twice_to_a_trained_network(trained, thorough):
    net, _, test = trained

    def normalised_inside(x):
        return net((x - 0.5) / 0.25)

    model = robustlab.wrap(normalised_inside, task="binary", output="logits", mean=0.5, std=0.25)
    finding = only(quick(model, test, thorough=thorough), "double-normalisation")
    assert "exact McNemar" in finding.text
    healthy = robustlab.wrap(normalised_inside, task="binary", output="logits")
    assert quick(healthy, test, thorough=thorough).healthy


@pytest.mark.parametrize("kind", ["logits", "assumed", "probs", "log_probs"])
def test_every_declared_kind_of_a_right_network_is_healthy(kind):
    after = {"probs": lambda z: z.softmax(1), "log_probs": lambda z: z.log_softmax(1)}.get(kind, lambda z: z)
    net = Then(Bands(), after)
    model = robustlab.wrap(net, output=None if kind == "assumed" else kind)
    seen = robustlab.doctor(model, bands(), train=bands(seed=1), val=bands(seed=2))
    assert seen.healthy, seen.summary()


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_a_single_output_is_healthy(kind):
    def net(x):
        z = (x.mean((1, 2, 3)) - 0.5)[:, None] * 20
        return z if kind == "logits" else z.sigmoid()

    seen = robustlab.doctor(robustlab.wrap(net, task="binary", output=kind), bands(classes=2))
    assert seen.healthy, seen.summary()


def several_labels(count=300, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (count, 3))
    images = generator.normal(60, 10, (count, 12, 12)) + 0.0
    for column in range(3):
        images[:, :, 4 * column : 4 * column + 4] += 120 * labels[:, column, None, None]
    return load_data(images.clip(0, 255).astype(np.uint8), labels=labels, task="multilabel")


def thirds(x):
    return torch.stack([x[..., 4 * k : 4 * k + 4].mean((1, 2, 3)) - 0.45 for k in range(3)], 1) * 40


def test_several_labels_are_healthy_and_what_does_not_apply_is_skipped():
    seen = robustlab.doctor(robustlab.wrap(thirds, task="multilabel", output="logits", mean=0.0), several_labels())
    assert seen.healthy, seen.summary()
    skipped = dict(seen.skipped)
    assert "several labels" in skipped["labels-off-by-one"]
    assert "several labels" in skipped["majority-class"]


def test_a_healthy_model_costs_48_images():
    for declared in ({}, {"mean": 0.5, "std": 0.25}):
        net = Bands(mean=declared.get("mean", 0.0), std=declared.get("std", 1.0))
        seen = quick(robustlab.wrap(net, output="logits", **declared), bands(1000))
        assert seen.healthy, seen.summary()
        assert net.seen <= (48 if declared else 32)


def test_batches_have_one_size_and_never_one_image():
    sizes = []

    def net(x):
        sizes.append(len(x))
        return Bands()(x)

    for count, wanted in ((1, {2}), (5, {5}), (33, {32}), (700, {32})):
        sizes.clear()
        quick(robustlab.wrap(net, output="logits"), bands(count), thorough=True)
        assert set(sizes) == wanted


def test_nothing_global_changes():
    net = nn.Sequential(nn.Dropout(0.5), Bands()).train()
    state, numbers = torch.get_rng_state(), random.getstate()
    seen = robustlab.doctor(robustlab.wrap(net, output="logits"), bands())
    assert names(seen) == ["train-mode"]
    assert "Dropout" in seen.findings[0].text
    assert net.training
    assert net[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == numbers
    net.eval()
    assert robustlab.doctor(robustlab.wrap(net, output="logits"), bands()).healthy


@pytest.mark.parametrize("kind", range(3))
def test_untrained_networks_raise_no_alarm_but_that_they_know_nothing(kind):
    source = load_data(DATA / "dsb2018_nuclei_64.npz") if (DATA / "dsb2018_nuclei_64.npz").is_file() else None
    if source is None:
        pytest.skip("needs ../shared/data")
    source = subset(source, range(0, len(source), 2))
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        body = [
            [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)],
            [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 3)],
            [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
             nn.Linear(128, 3)],
        ][kind]  # fmt: skip
        net = nn.Sequential(*body).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim > 1:
                    scale = parameter[0].numel() ** -0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        seen = quick(robustlab.wrap(net, output="logits", mean=0.5, std=0.25), source)
        assert set(names(seen)) <= {"majority-class"}, seen.summary()


# normalisation


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


class Holds(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(0.5))
        self.register_buffer("std", torch.tensor(0.25))
        self.eval()

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


@pytest.mark.parametrize("build", [lambda net: nn.Sequential(Normalize(), net).eval(), Holds])
def test_a_normalising_layer_and_declared_mean_and_std(build):
    net = build(Bands(mean=0.5, std=0.25))
    assert quick(robustlab.wrap(net, output="logits"), bands()).healthy
    finding = only(quick(robustlab.wrap(net, output="logits", mean=0.5, std=0.25), bands()), "double-normalisation")
    assert "layer" in finding.text
    labels = robustlab.wrap(nn.Sequential(Normalize(), Flat()).eval(), task="multilabel", output="logits", mean=0.5)
    assert names(quick(labels, several_labels())) == ["double-normalisation"]


class Flat(nn.Module):
    def forward(self, x):
        return thirds(x)


def test_a_network_trained_with_both_normalisations_is_left_alone():
    net = nn.Sequential(Normalize(), Bands(mean=0.0, std=0.0625)).eval()
    net[1].centres = ((torch.arange(4) + 0.5) / 4 - 0.5) / 0.25
    net[1].centres = (net[1].centres - 0.5) / 0.25
    assert quick(robustlab.wrap(net, output="logits", mean=0.5, std=0.25), bands()).healthy


def test_images_that_are_standardised_already():
    source = bands()
    pixels = (source.read(range(len(source))).images - 0.5) / 0.25
    stored = load_data(pixels, labels=source.info.labels, value_range=(-3.0, 5.0))
    net = Bands(mean=0.5, std=0.25)
    finding = only(quick(robustlab.wrap(net, output="logits", mean=0.5, std=0.25), stored), "double-normalisation")
    assert "bounds=(-3, 5)" in finding.fix
    assert quick(robustlab.wrap(net, output="logits", bounds=(-3.0, 5.0)), stored).healthy


def test_stated_normalisation_that_is_not_applied():
    net = Bands(mean=0.5, std=0.25)
    net.pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}
    assert quick(robustlab.wrap(net, output="logits"), bands()).healthy  # wrap reads it
    only(quick(robustlab.wrap(net, output="logits", mean=0.0, std=1.0), bands()), "missing-normalisation")
    other = Bands()  # states it, and was trained without
    other.pretrained_cfg = net.pretrained_cfg
    assert quick(robustlab.wrap(other, output="logits", mean=0.0, std=1.0), bands()).healthy


# labels


@pytest.mark.parametrize(("classes", "step"), [(4, 1), (4, -1), (10, 1), (2, 1)])
@pytest.mark.parametrize("thorough", [False, True])
def test_labels_off_by_one(classes, step, thorough):
    source = bands(classes=classes)
    finding = only(
        quick(robustlab.wrap(Bands(classes, step=step), output="logits"), source, thorough=thorough),
        "labels-off-by-one",
    )
    assert ("swapped" if classes == 2 else "raised" if step > 0 else "lowered") in finding.text


def test_a_background_class_first():
    class Background(nn.Module):
        def forward(self, x):
            return F.pad(Bands()(x), (1, 0), value=-100.0)

    seen = robustlab.doctor(robustlab.wrap(Background().eval(), output="logits"), bands(600))
    assert names(seen) == ["labels-off-by-one", "class-count"]
    assert "never occur" in seen.findings[1].text


def test_a_weak_network_is_left_alone():
    for seed in range(5):
        assert quick(robustlab.wrap(Bands(sharp=1.0), output="logits"), bands(seed=seed)).healthy
        noisy = bands(seed=seed)
        wrong = np.random.default_rng(seed).permutation(len(noisy))[:200]
        labels = noisy.info.labels.clone()
        labels[wrong] = labels[wrong][torch.randperm(200, generator=torch.Generator().manual_seed(seed))]
        weak = load_data(noisy.images[:, 0], labels=labels.numpy())
        assert quick(robustlab.wrap(Bands(), output="logits"), weak, thorough=True).healthy


# outputs


def test_probabilities_taken_for_logits():
    for output in (None, "logits"):
        model = robustlab.wrap(Then(Bands(), lambda z: z.softmax(1)), output=output)
        finding = only(robustlab.doctor(model, bands()), "probabilities-as-logits")
        assert "sum to one" in finding.text
        assert "512" not in finding.text
        assert ("not declared" in finding.text) == (output is None)


def test_single_and_several_probabilities_taken_for_logits():
    def single(x):
        return ((x.mean((1, 2, 3)) - 0.5)[:, None] * 20).sigmoid()

    only(quick(robustlab.wrap(single, task="binary", output="logits"), bands(classes=2)), "probabilities-as-logits")
    only(robustlab.doctor(single, bands(classes=2)), "probabilities-as-logits")
    several = robustlab.wrap(lambda x: thirds(x).sigmoid(), task="multilabel", output="logits")
    only(quick(several, several_labels()), "probabilities-as-logits")


@pytest.mark.parametrize("offset", [0.3, 0.4])  # the second crosses 1/2 between the classes
def test_small_logits_between_0_and_1_are_no_probabilities(offset):
    def untrained(x):
        return offset + 0.2 * x.mean((1, 2, 3))[:, None]

    seen = quick(robustlab.wrap(untrained, task="binary", output="logits"), bands(classes=2), thorough=True)
    assert "probabilities-as-logits" in seen.passed


@pytest.mark.parametrize(
    ("after", "output"),
    [
        (lambda z: z, "probs"),
        (lambda z: z, "log_probs"),
        (lambda z: z.softmax(1) * 0.9, "probs"),
        (lambda z: z - 1, "log_probs"),
    ],
)
def test_logits_taken_for_probabilities(after, output):
    model = robustlab.wrap(Then(Bands(sharp=20.0), after), output=output)
    assert "logits-as-probabilities" in names(robustlab.doctor(model, bands()))


def test_a_network_that_fails_is_a_finding():
    model = robustlab.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval(), channels=1)
    finding = only(robustlab.doctor(model, bands()), "forward-pass")
    assert "(1, 16, 16)" in finding.text
    only(robustlab.doctor(lambda x: Bands()(x) * torch.nan, bands()), "forward-pass")


def test_a_file_that_has_gone_is_an_error_and_no_finding(tmp_path):
    from PIL import Image

    for index in range(40):
        (tmp_path / str(index % 2)).mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16), 5 * index, np.uint8)).save(tmp_path / str(index % 2) / f"{index}.png")
    source = load_data(tmp_path)
    for file in (tmp_path / "1").iterdir():
        file.unlink()
    with pytest.raises(robustlab.core.errors.DataFileError, match="readable"):
        quick(robustlab.wrap(Bands(2), output="logits"), source)


# behaviour


def test_batch_dependence_with_its_size():
    def net(x):
        return Bands()(x) + x.mean()

    finding = only(robustlab.doctor(net, bands()), "batch-dependence")
    assert "others beside them" in finding.text


def test_nondeterminism_with_its_size():
    def net(x):
        return Bands()(x) + 0.01 * torch.randn(len(x), 1)

    seen = robustlab.doctor(net, bands())
    only(seen, "nondeterminism")
    assert "random part" in dict(seen.skipped)["batch-dependence"]


@pytest.mark.parametrize("seed", range(5))
def test_one_answer_for_everything(seed):
    model = robustlab.wrap(lambda x: Bands()(x) * 0 + torch.tensor([0.0, 3, 0, 0]), output="logits")
    finding = only(quick(model, bands(seed=seed)), "majority-class")
    assert "32 of 32 answers are class 1, and so are 64 of the answers to 64 images with another label" in finding.text
    few = load_data(bands().images[:40, 0], labels=np.arange(40) % 4 * (np.arange(40) < 20) + (np.arange(40) >= 20))
    assert "only 15 images" in dict(quick(model, few).skipped)["majority-class"]


def test_answers_worse_than_the_most_frequent_class():
    generator = np.random.default_rng(0)
    labels = (generator.random(400) < 0.2).astype(int)
    source = load_data(generator.integers(0, 255, (400, 16, 16)).astype(np.uint8), labels=labels)

    def net(x):
        z = ((x * 255).sum((1, 2, 3)).round() % 2)[:, None] * 4 - 2
        return torch.cat([z, -z], 1)

    finding = only(quick(robustlab.wrap(net, output="logits"), source), "majority-class")
    assert "most frequent class" in finding.text


def test_a_model_that_trades_accuracy_for_recall_is_healthy():
    generator = np.random.default_rng(0)
    labels = (generator.random(1000) < 0.1).astype(int)
    sick = generator.normal(115 + 60 * labels[:, None, None], 25, (1000, 1, 1)) + generator.normal(
        0, 10, (1000, 16, 16)
    )
    source = load_data(sick.clip(0, 255).astype(np.uint8), labels=labels)

    def net(x):
        z = (x.mean((1, 2, 3)) - 0.42)[:, None] * 30
        return torch.cat([-z, z], 1)

    seen = quick(robustlab.wrap(net, output="logits"), source, thorough=True)
    assert seen.healthy, seen.summary()


# data


def test_class_counts():
    def count(source, classes):
        return examine_data(source, val=None, train=None, cluster=None, num_classes=classes, thorough=False)

    assert count(bands(), 4).healthy
    assert "out of range" in only(count(bands(classes=6), 4), "class-count").text
    assert "never occur" in only(count(bands(600), 5), "class-count").text
    assert count(bands(20), 5).healthy  # too few to say
    assert "1000 outputs" in only(count(bands(60, classes=2), 1000), "class-count").text
    assert "998" in only(count(bands(150, classes=2, task="multiclass"), 1000), "class-count").text
    assert "names" not in names(count(bands(class_names="abcd"), 4))
    assert "background" in only(count(bands(class_names="abcd"), 5), "class-count").fix
    shifted = load_data(bands().images[:, 0], labels=bands().info.labels.numpy() + 1)
    assert "start at 1" in only(count(shifted, 4), "class-count").fix
    assert only(count(several_labels(), 4), "class-count")
    assert count(several_labels(), 3).healthy


def test_declared_counts_and_names():
    model = robustlab.wrap(Bands(), output="logits", num_classes=5)
    assert "class-count" in names(robustlab.doctor(model, bands()))
    named = robustlab.wrap(Bands(), output="logits", class_names="abdc")
    only(robustlab.doctor(named, bands(class_names="abcd")), "class-names")
    seen = robustlab.doctor(Bands(), bands(class_names="abcd"), train=bands(seed=1, class_names="dcba"))
    only(seen, "class-names")
    assert "class-count" in names(robustlab.doctor(robustlab.wrap(thirds, task="multilabel"), bands(classes=3)))


def test_shared_patients_are_compared_by_name_and_not_told():
    def patients(names, seed):
        return bands(40, seed=seed, groups={"patient": np.repeat(names, 40 // len(names))})

    a = patients(["anna", "bert", "carl", "dora"], 0)
    b = patients(["eric", "fred", "gina", "hans"], 1)  # the same codes
    shared = patients(["bert", "dora", "eric", "fred", "gina"], 2)
    assert robustlab.doctor(Bands(), a, train=b, cluster="patient").healthy
    for cluster in ("patient", None):
        finding = only(robustlab.doctor(Bands(), a, train=shared, cluster=cluster), "patient-overlap-train")
        assert "2 of 4 units" in finding.text
        assert "20 of 40 images" in finding.text
        assert "bert" not in finding.text
    seen = robustlab.doctor(Bands(), a, train=b, val=shared)
    only(seen, "patient-overlap-val")
    skipped = robustlab.doctor(Bands(), a, train=bands(40, seed=1)).skipped
    assert ("patient-overlap-train", "train has no column 'patient'") in skipped


def test_equal_images_with_other_labels():
    source = bands(60)
    images, labels = source.images[:, 0].copy(), source.info.labels.numpy().copy()
    images[7] = images[3]
    images[9] = images[4]
    labels[7], labels[9] = (labels[3] + 1) % 4, labels[4]
    images[50:] = 0
    finding = only(robustlab.doctor(Bands(), load_data(images, labels=labels)), "contradictory-labels")
    assert "positions: 3 and 7." in finding.text


def test_large_sets_are_sampled_and_that_is_said(monkeypatch):
    monkeypatch.setattr("robustlab.evaluate.doctor_data.MEMORY_IMAGES", 50)
    source = bands(120)
    seen = examine_data(source, val=None, train=bands(80, seed=1), cluster=None, num_classes=4, thorough=False)
    text = {reason.split(" were")[0] for _, reason in seen.skipped}
    assert "only 50 of the 120 images of the data" in text
    assert "only 50 of the 80 images of train" in text
    whole = examine_data(source, val=None, train=source, cluster=None, num_classes=4, thorough=True)
    assert "120 of 120 images recur in train" in whole.findings[0].text
    assert not [reason for _, reason in whole.skipped if "only" in reason]


# other models and the result


class Foreign(Model):
    """A model that is no wrapped network."""

    task, num_classes = "multiclass", 4

    def outputs(self, batch):
        return ModelOutputs(logits=Bands()(batch.images), task=self.task)

    def modules(self):
        return ()

    def settings(self):
        return {}


def test_other_models_are_examined_as_far_as_it_goes():
    seen = robustlab.doctor(Foreign(), bands())
    assert seen.healthy
    assert "wrap()" in dict(seen.skipped)["double-normalisation"]
    assert "labels-off-by-one" in seen.passed


def test_unlabelled_data():
    seen = robustlab.doctor(Bands(), load_data(bands().images[:, 0]))
    assert seen.healthy
    assert dict(seen.skipped)["majority-class"] == "the data has no labels"


def test_unknown_columns_and_devices_are_refused():
    with pytest.raises(robustlab.RobustlabError, match="site"):
        robustlab.doctor(Bands(), bands(), cluster="site")
    with pytest.raises(robustlab.RobustlabError, match="device"):
        robustlab.doctor(Bands(), bands(), device="cuda:77")


def test_diagnosis_round_trip_and_merge():
    a = Diagnosis((Finding("x", "1 thing.", "Do."),), ("y", "z"), (("w", "why"),))
    b = Diagnosis((Finding("y", "2 things.", "Do."),), ("x", "v"), (("w", "why"),))
    assert Diagnosis.from_dict(json.loads(json.dumps(a.to_dict()))) == a
    both = a.merged(b)
    assert names(both) == ["x", "y"]
    assert both.passed == ("z", "v")
    assert both.skipped == (("w", "why"),)
    assert not both.healthy
    assert Diagnosis().healthy
    text = both.summary()
    assert "2 problems" in text
    assert "! x: 1 thing." in text
    assert "Passed: z, v." in text
    assert "nothing" in Diagnosis().summary()


# rules: false alarms on the edge of what each calls healthy

RUNS = 4000
MOST = 12  # Poisson with mean 4 = RUNS * ALPHA exceeds it with probability 0.0003


def test_false_alarms_of_the_paired_test():
    generator = np.random.default_rng(0)
    for n, discordant in ((16, 0.5), (256, 0.1), (256, 0.6)):
        pairs = generator.binomial(n, discordant, RUNS)
        gained = generator.binomial(pairs, 0.5)
        alarms = sum(rules.p_paired(int(g), int(p - g)) <= rules.ALPHA for g, p in zip(gained, pairs, strict=True))
        assert alarms <= MOST
    assert rules.p_paired(10, 0) == pytest.approx(2**-10)
    assert rules.p_paired(0, 0) == 1.0


def test_false_alarms_of_the_constant_rule():
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(RUNS):  # just the recall that still counts
        moved = torch.rand(64, generator=generator) < rules.LITTLE_RECALL
        alarms += rules.is_constant(int(moved.sum()), 64)
    assert alarms <= MOST
    assert not rules.is_constant(0, 30)
    assert rules.is_constant(0, 31)
    assert not rules.is_constant(0, 0)


def test_false_alarms_of_the_majority_rule():
    generator = torch.Generator().manual_seed(1)
    alarms = 0
    for _ in range(RUNS // 4):
        labels = (torch.rand(256, generator=generator) < 0.3).long()
        flipped = torch.rand(256, generator=generator) < 0.3  # as right as the majority class
        alarms += rules.below_majority(labels ^ flipped.long(), labels) is not None
    assert alarms <= 6


def test_false_alarms_of_classes_that_never_occur():
    generator = np.random.default_rng(2)
    for classes, n in ((5, 400), (10, 700), (10, 2000)):
        share = np.full(classes, (1 - rules.RARE / classes) / (classes - 1))
        share[-1] = rules.RARE / classes  # the rarest that should be seen
        labels = generator.choice(classes, (RUNS // 4, n), p=share)
        alarms = sum(bool(rules.never_occurring(torch.from_numpy(row), classes)) for row in labels)
        assert alarms <= 6
    assert rules.never_occurring(torch.arange(916) % 9, 10) == ()  # 10 (1 - 1/100)^n is at most 0.001 from n = 917 on
    assert rules.never_occurring(torch.arange(917) % 9, 10) == (9,)
    assert rules.never_occurring(torch.zeros(0), 3) == ()
    assert rules.never_occurring(torch.arange(500) % 4 + 1, 5) == (0,)
    assert rules.never_occurring(torch.arange(500) % 3 * 2, 5) == (1, 3)


def test_a_better_reading_must_also_be_good():
    labels = torch.arange(200) % 2
    one = rules.Comparison.of(labels, labels == 9, labels == 0, torch.full((200,), 0.9), 2)  # always class 0
    assert one.p < 1e-9
    assert not one.second_is_right()
    good = rules.Comparison.of(labels, labels == 9, labels >= 0, torch.full((200,), 0.9), 2)
    assert good.second_is_right()
    flat = rules.Comparison.of(labels, labels == 9, labels >= 0, torch.full((200,), 0.52), 2)
    assert not flat.second_is_right()


def test_what_shows_on_other_labelled_sets_only_is_found_there(trained):
    net, train, test = trained

    def normalised_inside(x):
        return net((x - 0.5) / 0.25)

    model = robustlab.wrap(normalised_inside, task="binary", output="logits", mean=0.5, std=0.25)
    few = subset(test, range(4))
    assert robustlab.doctor(model, few).healthy
    finding = only(robustlab.doctor(model, few, train=train), "double-normalisation")
    assert finding.text.startswith("On train: ")

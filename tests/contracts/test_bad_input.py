"""The mistakes that users make: each is refused early, with who, what was expected, what came, and what to do."""

import builtins
import pickle
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import robustlab
from corruptions import JPEG, PGD, Compose, GaussianNoise, OneOf, StainShift
from defenses import DeepEnsemble, Energy, TemperatureScaling
from robustlab.core.errors import (
    ConfigError,
    DataFileError,
    DuplicateNameError,
    KindError,
    LabelError,
    ModelError,
    NotFittedError,
    RangeError,
    RobustlabError,
    ShapeError,
    UnknownNameError,
)
from robustlab.train import fit

COUNT = 64
PATIENCE = 20
"""Images that a model may have seen when a mistake is reported: one small batch, not the test set."""

TENSOR = torch.linspace(0, 1, 2 * 8 * 8).reshape(2, 1, 8, 8)


class Net(nn.Module):
    """A linear network that counts the images it has seen."""

    def __init__(self, classes=2, drop=0, then=lambda z: z):
        super().__init__()
        self.drop, self.then, self.rows = drop, then, 0
        self.scale = nn.Parameter(torch.linspace(-1, 1, classes))

    def forward(self, x):
        self.rows += len(x)
        z = (x.mean((1, 2, 3))[:, None] - 0.4) * 9 * self.scale + 0.3
        return self.then(z[: len(x) - self.drop])


class Words(Dataset):
    """Items that hold no image."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return "an image?", 0


@dataclass
class Desk:
    """What a user has at hand: a folder, images, labels and a network."""

    path: Path
    nets: list[Net] = field(default_factory=list)

    @cached_property
    def images(self):
        return np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)

    @property
    def labels(self):
        return (self.images.mean((1, 2)) > 127).astype(np.int64)

    def net(self, *args, **options):
        self.nets.append(Net(*args, **options).eval())
        return self.nets[-1]

    def data(self, **options):
        return robustlab.load_data(self.images, **{"labels": self.labels, **options})

    def load(self, images=None, **options):
        return robustlab.load_data(self.images if images is None else images, **options)

    def evaluate(self, net=None, data=None, **options):
        settings = {"shifts": "gaussian-noise", "severities": (3,), "progress": False, "replicates": 100} | options
        return robustlab.evaluate_under_shift(
            self.net() if net is None else net, self.data() if data is None else data, **settings
        )

    def npz(self, name="set.npz", **arrays):
        np.savez(self.path / name, **arrays)
        return self.path / name

    def files(self, *sizes):
        for place, size in enumerate(sizes):
            folder = self.path / "images" / "ab"[place % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full(size, 99, np.uint8)).save(folder / f"{place}.png")
        return self.path / "images"

    def broken_file(self):
        (self.path / "images" / "a").mkdir(parents=True)
        (self.path / "images" / "a" / "x.png").write_bytes(b"this is no image")
        return self.path / "images"

    def text(self, name):
        (self.path / name).write_text("no archive")
        return self.path / name

    def pickled(self):
        np.savez(self.path / "p.npz", test_images=np.array([self.images[0], None], dtype=object))
        return self.path / "p.npz"

    def floats(self, bad=None):
        images = self.images / np.float32(255)
        if bad is not None:
            images[5, 0, 0] = bad
        return images

    def write(self, source=None, shifts=None, severities=(1,), **options):
        shifts = (JPEG(),) if shifts is None else shifts
        return robustlab.write_corrupted(
            self.data() if source is None else source, shifts, severities, self.path / "out", progress=False, **options
        )


def unlabelled(desk):
    return desk.load()


def multilabel(desk):
    return desk.load(labels=np.stack([desk.labels, 1 - desk.labels, desk.labels], 1))


def reports_on_two_data_sets(desk):
    first, second = desk.evaluate(), desk.evaluate(data=desk.data(ids=np.arange(COUNT) + 7))
    for net in desk.nets:
        net.rows = 0
    return first, second


def report(desk):
    return reports_on_two_data_sets(desk)[0]


def damaged_report(desk):
    report(desk).save(desk.path / "run")
    (desk.path / "run" / "predictions.safetensors").write_bytes(b"zero")
    return desk.path / "run"


def fitted_elsewhere(desk):
    TemperatureScaling(desk.net(), temperature=2.0).save(desk.path / "saved")
    return DeepEnsemble.load(desk.path / "saved", build=desk.net)


# (what was done, the mistake, the error's class, what the message must say)
DATA = [
    ("nothing there", lambda d: d.load(d.path / "nowhere.npz"), DataFileError, "Check the path"),
    ("empty folder", lambda d: d.load(d.path), DataFileError, "in class subfolders, got no such file"),
    ("only unreadable files", lambda d: d.load(d.broken_file()), DataFileError, "1 unreadable files"),
    ("images of mixed sizes", lambda d: d.load(d.files((8, 8), (8, 8), (9, 8))), ShapeError, "2 are grey.*Resize"),
    ("value_range for files", lambda d: d.load(d.files((8, 8)), value_range=(0, 9)), ConfigError, "leave it out"),
    (
        "class names of other folders",
        lambda d: d.load(d.files((8, 8), (8, 8)), class_names=("a", "c")),
        ConfigError,
        "no b",
    ),
    ("text called npz", lambda d: d.load(d.text("x.npz")), DataFileError, "a readable NPZ file"),
    ("a csv file", lambda d: d.load(d.text("x.csv")), DataFileError, r"a file \.csv"),
    ("pickled arrays", lambda d: d.load(d.pickled()), DataFileError, "without pickled objects"),
    ("missing split", lambda d: d.load(d.npz(train_images=d.images)), DataFileError, "split='train'"),
    ("missing key", lambda d: d.load(d.npz(images=d.images)), DataFileError, "MedMNIST layout"),
    ("unknown scheme", lambda d: d.load("medminst:pneumoniamnist"), UnknownNameError, "medmnist:"),
    ("unknown phantom", lambda d: d.load("phantom:histologie"), UnknownNameError, "histology, radiograph"),
    ("a list of arrays", lambda d: d.load(list(d.images)), KindError, r"numpy\.stack"),
    ("data forgotten", lambda d: robustlab.load_data(None), KindError, "NoneType"),
    ("grey levels as floats", lambda d: d.load(d.images.astype(np.float32)), RangeError, "divide by 255"),
    ("NaN pixels", lambda d: d.load(d.floats(np.nan)), RangeError, "first at index 5"),
    ("infinite pixels", lambda d: d.load(d.floats(np.inf)), RangeError, "infinite pixels in 1 image"),
    ("int64 pixels", lambda d: d.load(d.images.astype(np.int64)), KindError, "value_range="),
    ("one flat image", lambda d: d.load(d.images[0]), ShapeError, r"images\[None\]"),
    ("one colour image", lambda d: d.load(np.zeros((9, 9, 3), np.uint8)), ShapeError, r"images\[None\]"),
    ("channels first", lambda d: d.load(np.zeros((4, 3, 9, 9), np.uint8)), ShapeError, "at most 4 channels"),
    ("no image at all", lambda d: d.load(d.images[:0]), ShapeError, "at least one image"),
    ("items without images", lambda d: d.load(Words()), KindError, "Pillow images"),
    ("one label short", lambda d: d.load(labels=d.labels[1:]), ShapeError, "64 labels.*got 63"),
    ("one-hot labels", lambda d: d.load(labels=np.eye(2, dtype=int)[d.labels]), LabelError, r"argmax\(1\)"),
    ("labels as words", lambda d: d.load(labels=["cat"] * COUNT), LabelError, r"numpy\.unique"),
    ("labels as floats", lambda d: d.load(labels=d.labels / 2), LabelError, r"astype\(int\)"),
    ("negative labels", lambda d: d.load(labels=d.labels - 1), LabelError, "label -1"),
    (
        "labels from 1 with names",
        lambda d: d.load(labels=d.labels + 1, class_names=("a", "b")),
        LabelError,
        "Subtract 1",
    ),
    ("task misspelt", lambda d: d.load(labels=d.labels, task="multi-class"), ConfigError, "task among binary"),
    ("labels twice", lambda d: d.load((d.images, d.labels), labels=d.labels), ConfigError, "Leave one out"),
    ("one id twice", lambda d: d.load(ids=[3, 3, *range(4, COUNT + 2)]), DuplicateNameError, "id 3 twice"),
    ("one name twice", lambda d: d.load(ids=["p"] * COUNT), DuplicateNameError, "'p' and 'p'"),
    ("float ids", lambda d: d.load(ids=np.arange(COUNT) / 2), KindError, r"str\(i\)"),
    ("short column", lambda d: d.load(groups={"sex": ["F"] * 9}), ShapeError, "group column 'sex'.*64 values"),
]
MODEL = [
    ("a name as the model", lambda d: robustlab.wrap("resnet18"), KindError, "Load the network first"),
    ("a class as the model", lambda d: robustlab.wrap(Net), KindError, "Net.*Make an instance"),
    ("wrap: task misspelt", lambda d: robustlab.wrap(d.net(), task="multi_class"), ConfigError, "task among"),
    ("wrap: output misspelt", lambda d: robustlab.wrap(d.net(), output="prob"), ConfigError, "probs"),
    ("std of 0", lambda d: robustlab.wrap(d.net(), mean=0.5, std=0), RangeError, "positive std"),
    ("bounds reversed", lambda d: robustlab.wrap(d.net(), bounds=(255, 0)), RangeError, "Swap"),
    ("size as text", lambda d: robustlab.wrap(d.net(), size="224"), ConfigError, r"size .*'224'"),
    ("size of 0", lambda d: robustlab.wrap(d.net(), size=0), ConfigError, "positive"),
    (
        "probabilities taken for logits",
        lambda d: d.evaluate(d.net(then=lambda z: z.softmax(1))),
        ModelError,
        "output='probs'",
    ),
    (
        "logits declared as probs",
        lambda d: d.evaluate(robustlab.wrap(d.net(), output="probs")),
        ModelError,
        "output='logits'",
    ),
    (
        "logits declared as log_probs",
        lambda d: d.evaluate(robustlab.wrap(d.net(), output="log_probs")),
        ModelError,
        "output='logits'",
    ),
    ("one row too few", lambda d: d.evaluate(d.net(drop=1)), ModelError, r"\(8, classes\).*\(7, 2\)"),
    ("text as output", lambda d: d.evaluate(d.net(then=lambda z: "benign")), ModelError, "got str"),
    ("a map as output", lambda d: d.evaluate(d.net(then=lambda z: z[..., None])), ModelError, r"\(8, 2, 1\)"),
    ("other classes", lambda d: d.evaluate(robustlab.wrap(d.net(), num_classes=5)), ModelError, "5 classes"),
    (
        "channels that do not fit",
        lambda d: d.evaluate(
            robustlab.wrap(d.net(), channels=3),
            d.load(np.zeros((9, 8, 8, 4), np.uint8), labels=[0, 1, 0] * 3),
        ),
        ShapeError,
        "3 or 1 channels",
    ),
    (
        "layers that do not fit the size",
        lambda d: d.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(784, 2)).eval()),
        ModelError,
        "mat1 and mat2.*size=",
    ),
]
CALL = [
    ("labels from 1", lambda d: d.evaluate(data=d.data(labels=d.labels + 1)), LabelError, "subtract 1"),
    ("too few classes", lambda d: d.evaluate(data=d.data(labels=np.arange(COUNT) % 5)), LabelError, "2 classes"),
    ("no labels", lambda d: d.evaluate(data=unlabelled(d)), ConfigError, "labels="),
    (
        "several labels, one answer",
        lambda d: d.evaluate(robustlab.wrap(d.net(3), task="multiclass"), multilabel(d)),
        ConfigError,
        "task 'multilabel'",
    ),
    ("label columns", lambda d: d.evaluate(d.net(4), multilabel(d)), ShapeError, r"\(N, 4\)"),
    ("val without labels", lambda d: d.evaluate(val=unlabelled(d)), ConfigError, "labelled val"),
    ("val labels from 1", lambda d: d.evaluate(val=d.data(labels=d.labels + 1)), LabelError, "^val"),
    (
        "two labels for a network of five outputs",
        lambda d: d.evaluate(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(5)).eval(), data=d.data()),
        LabelError,
        "num_classes=2",
    ),
    ("shift misspelt", lambda d: d.evaluate(shifts="gausian-noise"), UnknownNameError, "Did you mean 'gaussian-noise'"),
    ("suite misspelt", lambda d: d.evaluate(shifts="standart"), UnknownNameError, "Did you mean .*'standard'"),
    ("a class as the shift", lambda d: d.evaluate(shifts=GaussianNoise), KindError, "GaussianNoise.*instance"),
    ("a function as the shift", lambda d: d.evaluate(shifts=(abs,)), KindError, "FromAlbumentations"),
    ("attack misspelt", lambda d: d.evaluate(attacks="pdg"), UnknownNameError, "Did you mean 'pgd'"),
    ("a shift as the attack", lambda d: d.evaluate(attacks=GaussianNoise()), KindError, "into shifts="),
    ("a class as the attack", lambda d: d.evaluate(attacks=PGD), KindError, "PGD.*instance"),
    ("detector misspelt", lambda d: d.evaluate(detectors=("enrgy",)), UnknownNameError, "Did you mean 'energy'"),
    ("a class as the detector", lambda d: d.evaluate(detectors=Energy), KindError, "Energy.*instance"),
    ("metric misspelt", lambda d: d.evaluate(metrics="acuracy"), UnknownNameError, "Did you mean .*'accuracy'"),
    ("no metrics", lambda d: d.evaluate(metrics=None), KindError, "default"),
    (
        "group misspelt",
        lambda d: d.evaluate(data=d.data(groups={"sex": ["F", "M"] * 32}), groups="sexe"),
        UnknownNameError,
        "among: sex, got 'sexe'",
    ),
    ("cluster misspelt", lambda d: d.evaluate(cluster="patient"), UnknownNameError, "none at all"),
    ("severity 7", lambda d: d.evaluate(severities=(1, 7)), RangeError, r"from 0 to 5, got 7.*\.at\(\)"),
    ("severity 0", lambda d: d.evaluate(severities=(0, 1)), ConfigError, "always there"),
    ("severity twice", lambda d: d.evaluate(severities=(2, 2)), ConfigError, r"\(2, 2\)"),
    ("a lone severity", lambda d: d.evaluate(severities=3), KindError, r"severities=\(3,\)"),
    ("severity as text", lambda d: d.evaluate(severities=("mild",)), KindError, "a number from 0 to 5, got 'mild'"),
    ("referral 2", lambda d: d.evaluate(referral=2), RangeError, "10 % is 0.1"),
    ("referral as text", lambda d: d.evaluate(referral="10%"), KindError, "referral.*'10%'"),
    ("plausible 6", lambda d: d.evaluate(plausible=6), RangeError, "3 is the default"),
    ("margin in points", lambda d: d.evaluate(margin=2), RangeError, "0.02"),
    ("seed as text", lambda d: d.evaluate(seed="0"), KindError, "seed .*'0'"),
    ("batch_size 1", lambda d: d.evaluate(batch_size=1), RangeError, "at least 2"),
    ("replicates 3", lambda d: d.evaluate(replicates=3), RangeError, "1000 is the default"),
    ("a list of OOD sets", lambda d: d.evaluate(ood=[d.images]), KindError, "near/.*far/"),
    ("an OOD set misspelt", lambda d: d.evaluate(ood={"far/x": "phantom:cats"}), UnknownNameError, "radiograph"),
    ("detector data missing", lambda d: d.evaluate(fit=d.path / "no.npz"), DataFileError, "Check the path"),
    ("no such device", lambda d: d.evaluate(device="gpu"), ConfigError, "device 'cpu'.*got 'gpu'"),
]
PARTS = [
    ("eps in grey levels", lambda d: PGD(eps=(4, 8)), RangeError, "255"),
    ("negative eps", lambda d: PGD(eps=(-0.1,)), RangeError, "positive budgets"),
    ("a lone eps", lambda d: PGD(eps=8 / 255), KindError, r"eps=\(0\.03"),
    ("norm misspelt", lambda d: PGD(norm="l_inf"), ConfigError, "'linf' or 'l2'"),
    ("integer tensor", lambda d: GaussianNoise()((TENSOR * 255).int()), KindError, "uint8 images or float"),
    ("a NumPy array", lambda d: GaussianNoise()(TENSOR.numpy()), KindError, "from_numpy"),
    ("one image", lambda d: GaussianNoise()(TENSOR[0]), ShapeError, r"images\[None\]"),
    ("grey levels in a tensor", lambda d: GaussianNoise()(TENSOR * 255), RangeError, r"\[0, 255\].*Divide by 255"),
    ("NaN in a tensor", lambda d: GaussianNoise()(TENSOR / 0), RangeError, "finite pixels"),
    ("severity 6", lambda d: GaussianNoise()(TENSOR, 6), RangeError, "0 is the identity"),
    ("negative severity", lambda d: GaussianNoise()(TENSOR, -1), RangeError, "got -1"),
    ("a list of ids", lambda d: GaussianNoise()(TENSOR, ids=[1, 2]), KindError, "int64"),
    ("one id too few", lambda d: GaussianNoise()(TENSOR, ids=torch.tensor([1])), ShapeError, "2 ids"),
    ("unknown parameter", lambda d: GaussianNoise.at(strength=1), ConfigError, "among sigma"),
    ("negative noise", lambda d: GaussianNoise.at(sigma=-0.1), RangeError, "sigma at least 0"),
    ("a number for levels", lambda d: GaussianNoise(sigma=0.1), KindError, r"GaussianNoise\.at\(sigma=0\.1\)"),
    ("text for a number", lambda d: GaussianNoise.at(sigma="much"), KindError, "'much'"),
    ("stain of grey images", lambda d: StainShift()(TENSOR), ConfigError, "3 channels"),
    ("nothing to compose", lambda d: Compose([]), ConfigError, "at least one shift"),
    ("names to choose from", lambda d: OneOf(["jpeg"]), KindError, "'jpeg'"),
    (
        "data sets compared",
        lambda d: robustlab.compare(*reports_on_two_data_sets(d)),
        ConfigError,
        "on one data set",
    ),
    ("folders compared", lambda d: robustlab.compare("runs/a", "runs/b"), KindError, r"Report\.load"),
    ("no report there", lambda d: robustlab.Report.load(d.path), DataFileError, "a folder that Report.save wrote"),
    ("a damaged report", lambda d: robustlab.Report.load(damaged_report(d)), DataFileError, "damaged"),
    ("no such number", lambda d: report(d).value("acuracy"), UnknownNameError, "metric is one of.*'accuracy'"),
    ("temperature without val", lambda d: TemperatureScaling(d.net()).fit(None, None), ConfigError, "Pass val="),
    ("val without labels", lambda d: TemperatureScaling(d.net()).fit(None, unlabelled(d)), LabelError, "with labels"),
    ("val as arrays", lambda d: TemperatureScaling(d.net()).fit(None, d.images), KindError, "load_data"),
    ("not fitted", lambda d: d.evaluate(TemperatureScaling(d.net())), NotFittedError, r"fit\(None, val\)"),
    ("another defence", fitted_elsewhere, ConfigError, "'deep-ensemble'"),
    ("an empty ensemble", lambda d: DeepEnsemble([]), ConfigError, "member"),
    ("training without labels", lambda d: fit(d.net(), unlabelled(d), epochs=1), LabelError, "label"),
    ("no epoch", lambda d: fit(d.net(), d.data(), epochs=0), RobustlabError, "epochs"),
    ("format misspelt", lambda d: d.write(format="jpeg"), ConfigError, "'npz' or 'png'"),
    ("names to write", lambda d: d.write(shifts=("jpeg",)), KindError, r"GaussianNoise\(\)"),
    ("one shift to write", lambda d: d.write(shifts=JPEG()), KindError, "shifts"),
    ("written at severity 7", lambda d: d.write(severities=(7,)), RangeError, "from 0 to 5"),
    ("a path to write", lambda d: d.write(source=d.path), KindError, "load_data"),
]
TABLE = [
    pytest.param(*row[1:], id=f"{part}: {row[0]}")
    for part, rows in (("load_data", DATA), ("wrap", MODEL), ("evaluate", CALL), ("parts", PARTS))
    for row in rows
]


@pytest.mark.parametrize(("mistake", "kind", "says"), TABLE)
def test_mistakes_get_four_parts_early(mistake, kind, says, tmp_path):
    desk = Desk(tmp_path)
    with pytest.raises(kind, match=says) as caught:
        mistake(desk)
    error = caught.value
    assert isinstance(error, RobustlabError)
    parts = (error.who, error.expected, error.got, error.fix)
    assert all(isinstance(part, str) and part.strip() for part in parts)
    assert str(error) == "{}: expected {}, got {}. {}".format(*parts)
    assert error.fix.rstrip("'\"").endswith((".", "?", ")", "]")), "sentences"
    own = {cls for cls in type(error).__mro__ if cls.__module__ == "builtins"} - {Exception, BaseException, object}
    assert any(getattr(builtins, cls.__name__, None) is cls for cls in own), "also a builtin kind"
    assert sum(net.rows for net in desk.nets) <= PATIENCE
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error)), "survives the way back from a worker process"


def test_the_table_is_long_and_every_call_is_right_without_its_mistake(tmp_path):
    assert len(TABLE) >= 30
    desk = Desk(tmp_path)
    found = desk.evaluate(
        data=desk.data(groups={"sex": ["F", "M"] * 32}),
        val=robustlab.load_data(desk.images[::-1].copy(), labels=desk.labels[::-1].copy()),
        groups="sex",
        ood={"far/x": desk.images},
        attacks=PGD(steps=1, eps=(0.1,)),
    )
    assert found.value("accuracy", group="sex=F").n == 32
    assert desk.nets[0].rows > PATIENCE, "the count counts"
    assert desk.write().is_dir()

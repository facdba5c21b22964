"""Every registered detector that looks at features: solves a planted problem, sees nothing in identical data, keeps."""

import dataclasses

import pytest
import torch

from defenses.detectors import MDS, load_detector, save_detector
from robustlab.core.detector import Head
from robustlab.core.errors import ConfigError, DataFileError, LabelError, NotFittedError, ShapeError
from robustlab.core.registry import DETECTORS
from robustlab.core.rng import SampleRng
from robustlab.core.types import ModelOutputs

NAMES = [name for name in DETECTORS.names() if hasattr(DETECTORS.get(name), "fit_outputs")]
NARROW = {"ash": {"percentile": 0.65}}  # of 24 units the usual share leaves two
CLASSES, WIDTH = 4, 24


def head(classes=CLASSES, width=WIDTH):
    rng = SampleRng.make(5, "head", torch.arange(classes))
    return Head(rng.normal("w", (width,)), rng.normal("b", ()) * 0.1)


def features(count, seed, *, foreign=False, classes=CLASSES, width=WIDTH):
    """Activations after a ReLU around the weights of the class; foreign ones lie elsewhere, and nearer to 0."""
    rng = SampleRng.make(seed, "features", torch.arange(count))
    labels = rng.integers("label", classes)
    noise = rng.normal("noise", (width,))
    if foreign:
        other = SampleRng.make(99, "elsewhere", torch.arange(1)).normal("centre", (width,)).abs()
        return (0.3 * other + 0.35 * noise).clamp_min(0), labels
    return (1.5 * head(classes, width).weight[labels] + 0.3 * noise).clamp_min(0), labels


def outputs(h, last=None):
    last = last or head(h.shape[1] and CLASSES, h.shape[1])
    logits = h.float() @ last.weight.T + last.bias
    return ModelOutputs(logits=logits, features={"penultimate": h})


def made(name, **fields):
    return DETECTORS.get(name)(**NARROW.get(name, {}) | fields)


def fitted(name, count=600, **fields):
    h, labels = features(count, 1)
    return made(name, **fields).fit_outputs(outputs(h), labels, head())


def auroc(inside, outside):
    wins = (outside[:, None] > inside[None]).double() + 0.5 * (outside[:, None] == inside[None]).double()
    return wins.mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_problem_is_solved(name):
    detector = fitted(name)
    inside, outside = (
        detector.score(outputs(features(300, 2)[0])),
        detector.score(outputs(features(300, 3, foreign=True)[0])),
    )
    assert inside.shape == (300,)
    assert torch.isfinite(inside).all()
    assert auroc(inside, outside) > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_seen_in_identical_data(name):
    detector = fitted(name)
    scores = [detector.score(outputs(features(1200, seed)[0])) for seed in (2, 3)]
    assert 0.45 < auroc(*scores) < 0.55


@pytest.mark.parametrize("name", NAMES)
def test_scores_belong_to_samples(name):
    detector, whole = fitted(name), outputs(features(60, 2)[0])
    score = detector.score(whole)
    assert torch.allclose(detector.score(whole.head(7)), score[:7], rtol=1e-5, atol=1e-6)
    turned = ModelOutputs(logits=whole.logits.flip(0), features={"penultimate": whole.features["penultimate"].flip(0)})
    assert torch.allclose(detector.score(turned), score.flip(0), rtol=1e-5, atol=1e-6)
    assert detector.score(whole.head(0)).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_fitting_again_forgets_and_blocks_do_not_matter(name, monkeypatch):
    h, labels = features(600, 1)
    probe = outputs(features(40, 2)[0])
    detector = fitted(name)
    first = detector.score(probe)
    other, others = features(100, 8)
    detector.fit_outputs(outputs(other * 3), others, head())
    detector.fit_outputs(outputs(h), labels, head())
    assert torch.equal(detector.score(probe), first)
    monkeypatch.setattr("defenses.detectors.base.BLOCK", 37)
    detector.fit_outputs(outputs(h), labels, head())
    assert torch.allclose(detector.score(probe), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_unfitted_detector_says_so(name):
    detector = DETECTORS.get(name)()
    if detector.learns:
        with pytest.raises(NotFittedError, match="fit"):
            detector.score(outputs(features(5, 2)[0]))
    else:
        detector.score(outputs(features(5, 2)[0]))


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_scores_are_the_same_bits(name, tmp_path):
    detector, probe = fitted(name), outputs(features(40, 2)[0])
    loaded = load_detector(save_detector(detector, tmp_path / "kept" / "detector.safetensors"))
    assert loaded == detector
    assert torch.equal(loaded.score(probe), detector.score(probe))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["detector.safetensors"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_features(name, kind):
    h, labels = features(600, 1)
    detector = made(name).fit_outputs(outputs(h.to(kind)), labels, head())
    inside, outside = (
        detector.score(outputs(x.to(kind))) for x in (features(300, 2)[0], features(300, 3, foreign=True)[0])
    )
    assert inside.dtype in (torch.float32, torch.float64)
    assert auroc(inside, outside) > 0.9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "fault", ["class without samples", "dead units", "few samples", "duplicates", "one class", "one row"]
)
def test_degenerate_data(name, fault):
    h, labels = features(600, 1)
    if fault == "class without samples":
        h, labels = h[labels != 2], labels[labels != 2]
    elif fault == "dead units":
        h[:, 5:9] = 0
    elif fault == "few samples":
        h, labels = h[:10], labels[:10]
    elif fault == "duplicates":
        h = h.index_select(1, torch.arange(WIDTH) // 2)
    elif fault == "one class":
        h, labels = h[labels == 1], labels[labels == 1]
    elif fault == "one row":
        h, labels = h[:1], labels[:1]
    detector = made(name).fit_outputs(outputs(h), labels, head())
    score = detector.score(outputs(features(50, 2)[0]))
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_have_no_score_and_teach_nothing(name, value):
    h, labels = features(600, 1)
    spoiled = torch.cat((h, torch.full((3, WIDTH), value)))
    last = head()
    logits = torch.cat((h @ last.weight.T + last.bias, torch.full((3, CLASSES), value)))
    taught = ModelOutputs(logits=logits, features={"penultimate": spoiled})
    detector = made(name).fit_outputs(taught, torch.cat((labels, labels[:3])), last)
    probe = features(6, 2)[0]
    plain = fitted(name).score(outputs(probe))
    broken = probe.clone()
    broken[2, 1] = value
    score = detector.score(outputs(broken))
    assert torch.isnan(score).tolist() == [False, False, True, False, False, False]
    kept = torch.arange(6) != 2
    assert torch.allclose(score[kept], plain[kept], rtol=1e-4, atol=1e-5)


INVARIANT = {
    "mds": "linear", "mds-layers": "linear", "rmd": "linear", "knn": "length", "nnguide": "turn", "vim": "turn",
    "residual": "turn", "she": "turn", "fdbd": "turn", "gmm": "scale", "gradnorm": "order", "kl-matching": "linear",
    "react": "order", "dice": "order", "ash": "order", "scale": "order",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_must_not_matter_does_not(name):
    """Maps of the feature space, with the last layer mapped along, under which a score must keep its order."""
    kind = INVARIANT[name]
    h, labels = features(600, 1)
    probe, last = features(80, 2)[0].double(), head()
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    if kind == "linear":
        change = mixed
    elif kind == "turn":
        change = torch.linalg.qr(mixed).Q
    elif kind == "order":
        change = torch.eye(WIDTH, dtype=torch.float64)[torch.randperm(WIDTH, generator=generator)]
    else:
        change = 7.0 * torch.eye(WIDTH, dtype=torch.float64)
    moved = Head(last.weight.double() @ torch.linalg.inv(change), last.bias.double())
    fields = {"shrinkage": 0.0} if name in ("mds", "mds-layers", "rmd") else {}
    pair = [made(name, **fields) for _ in range(2)]
    plain = Head(last.weight.double(), last.bias.double())

    def seen(x, layer, like):
        return (
            ModelOutputs(logits=like.double() @ plain.weight.T + plain.bias, features={"penultimate": x})
            if layer
            else None
        )

    scores = []
    for detector, matrix, layer in zip(pair, (torch.eye(WIDTH).double(), change), (plain, moved), strict=True):
        detector.fit_outputs(seen(h.double() @ matrix.T, layer, h), labels, layer)
        scores.append(detector.score(seen(probe @ matrix.T, layer, probe)))
    if kind == "scale":
        scores[1] = scores[1] - WIDTH * torch.log(torch.tensor(7.0, dtype=torch.float64))
    assert torch.allclose(scores[0], scores[1], rtol=1e-6, atol=1e-6)


def test_the_map_of_invariances_names_every_detector():
    assert set(INVARIANT) == set(NAMES)


def test_what_is_missing_is_said():
    h, labels = features(30, 1)
    with pytest.raises(LabelError, match="one label a sample"):
        MDS().fit_outputs(outputs(h))
    with pytest.raises(ConfigError, match="last layer"):
        DETECTORS.get("vim")().fit_outputs(outputs(h), labels)
    with pytest.raises(ShapeError, match="features 'layer4'"):
        MDS(tap="layer4").fit_outputs(outputs(h), labels)
    with pytest.raises(ShapeError, match="30 labels"):
        MDS().fit_outputs(outputs(h), labels[:3])


def test_a_damaged_file_is_refused(tmp_path):
    path = save_detector(fitted("mds"), tmp_path / "d.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataFileError, match="other ones"):
        load_detector(path)
    with pytest.raises(DataFileError):
        load_detector(tmp_path / "none.safetensors")
    with pytest.raises(NotFittedError):
        save_detector(MDS(), tmp_path / "e.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_configuration_alone_makes_detectors_equal(name):
    assert fitted(name) == made(name)
    assert dataclasses.replace(fitted(name)) == fitted(name)

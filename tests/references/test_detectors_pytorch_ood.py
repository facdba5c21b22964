"""pytorch-ood's detectors through our adapter: the bits that it gives by itself, and the ranks that ours give."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import robustlab
from defenses.detectors import (
    FDBD,
    GEN,
    KNN,
    MDS,
    MSP,
    ODIN,
    RMD,
    SHE,
    Energy,
    Entropy,
    FromPytorchOOD,
    KLMatching,
    MaxLogit,
    NNGuide,
    ReAct,
    ViM,
)
from robustlab.core.detector import Head
from robustlab.core.errors import NotFittedError
from robustlab.core.model import wrap
from robustlab.core.taps import TappedModel
from tests.contracts.toys import SIZE, source

d = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed")

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)


class Body(nn.Module):
    """Feature maps (N, 12, 1, 1), so that what is pooled before and after the shaping is the same."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, x):
        bright = x[:, :, : SIZE // 2].mean((1, 2, 3), keepdim=True)
        return torch.relu(self.conv(x + bright)).mean((2, 3), keepdim=True)


def network():
    head = nn.Linear(12, 3)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 12, generator=torch.Generator().manual_seed(9)) * 0.8)
        head.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    net = nn.Sequential(Body(), nn.Flatten(), nn.Dropout(0.2), head)
    return net.eval()


@pytest.fixture(scope="module")
def model():
    return wrap(network(), mean=MEAN, std=STD, num_classes=3)


@pytest.fixture(scope="module")
def seen(model):
    """Outputs on data to fit on, their labels as the network has them, and outputs on data to score."""
    tapped = TappedModel(model)
    parts = [tapped.predict(data.read(range(len(data)))) for data in (source(count=120, seed=4), source(count=80))]
    return parts[0], parts[0].logits.argmax(1), parts[1]


def head_of(model):
    return model.net[3]


EVERYTHING = 1 << 30
ON_FEATURES = {
    "KNN": (lambda head: d.KNN(None, k=5), KNN(k=5, bank=EVERYTHING)),
    "Mahalanobis": (lambda head: d.Mahalanobis(None), MDS(shrinkage=0.0)),
    "RMD": (lambda head: d.RMD(None), RMD(shrinkage=0.0)),
    "ViM": (lambda head: d.ViM(None, d=4, w=head.weight, b=head.bias), ViM(dim=4)),
    "SHE": (lambda head: d.SHE(nn.Identity(), head), SHE()),
    "NNGuide": (lambda head: d.NNGuide(nn.Identity(), head, k=5), NNGuide(k=5, bank=EVERYTHING)),
    "fDBD": (lambda head: d.fDBD(nn.Identity(), head), FDBD()),
    "NCI": (lambda head: d.NCI(nn.Identity(), head), None),
    "GMM": (lambda head: d.GMM(None), None),
}
ON_LOGITS = {
    "MaxSoftmax": (lambda: d.MaxSoftmax(None), MSP()),
    "EnergyBased": (lambda: d.EnergyBased(None), Energy()),
    "MaxLogit": (lambda: d.MaxLogit(None), MaxLogit()),
    "Entropy": (lambda: d.Entropy(None), Entropy()),
    "GEN": (lambda: d.GEN(None, gamma=0.1), GEN()),
    "KLMatching": (lambda: d.KLMatching(None), KLMatching()),
}


@pytest.mark.parametrize("name", ON_FEATURES)
def test_features(name, model, seen):
    fit, labels, data = seen
    make, ours = ON_FEATURES[name]
    theirs = make(head_of(model))
    adapted = FromPytorchOOD(make(head_of(model))).fit_outputs(fit, labels)
    found = adapted.score(data)
    with torch.no_grad():
        theirs.fit_features(fit.features["penultimate"], labels)
        wanted = theirs.predict_features(data.features["penultimate"])
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    assert torch.equal(found, FromPytorchOOD(make(head_of(model))).fit_outputs(fit, labels).score(data))
    if ours is not None:
        head = Head(head_of(model).weight.detach(), head_of(model).bias.detach())
        own = ours.fit_outputs(fit, labels, head).score(data)
        assert spearmanr(own.numpy(), found.numpy()).statistic > 0.9999


@pytest.mark.parametrize("name", ON_LOGITS)
def test_logits(name, seen):
    fit, labels, data = seen
    make, ours = ON_LOGITS[name]
    theirs = make()
    if theirs.requires_fit:
        theirs.fit_logits(fit.logits, labels)
    found = FromPytorchOOD(make()).fit_outputs(fit, labels).score(data)
    assert torch.equal(found, theirs.predict_logits(data.logits))
    if hasattr(ours, "fit_outputs"):
        ours.fit_outputs(fit, labels)
    assert spearmanr(ours.score(data).numpy(), found.numpy()).statistic > 0.9999


def test_images(model):
    """ODIN, ReAct on feature maps and dropout run the network on images as it takes them."""
    net = model.net
    body, rest = net[0], nn.Sequential(net[1], net[2], net[3])
    train, data = source(count=120, seed=4), source(count=60)
    batch = data.read(range(len(data)))
    images = model.prepare(batch.images)
    batches = [train.read(range(start, min(start + 64, 120))) for start in range(0, 120, 64)]
    loader = [(model.prepare(part.images), part.labels) for part in batches]
    makers = {
        "odin": lambda: d.ODIN(net, eps=0.002, norm_std=list(STD)),
        "re-act": lambda: d.ReAct(body, rest, percentile=0.9),
        "grad-norm": lambda: d.GradNorm(net, param_filter=lambda name: name.startswith("3.")),
        "scale": lambda: d.SCALE(body, rest, percentile=0.85),
    }
    found = {}
    for name, make in makers.items():
        theirs = make()
        theirs.fit(loader)
        detector = FromPytorchOOD(make())
        assert detector.name == f"pytorch-ood:{name}"
        assert detector.skip_reason(model) is None
        if detector.learns:
            with pytest.raises(NotFittedError, match="pytorch-ood:re-act"):
                detector.score_in_pass(model, batch, model.predict(batch))
        detector.fit(model, train)
        found[name] = detector.score_in_pass(model, batch, model.predict(batch))
        assert torch.equal(found[name], theirs.predict(images).detach()), name
        assert all(weight.grad is None for weight in net.parameters())
    react = ReAct(quantile=0.9).fit(model, train)
    own = react.score(TappedModel(model).predict(batch))
    assert spearmanr(own.numpy(), found["re-act"].numpy()).statistic > 0.999
    odin = ODIN(eps=0.002).score_in_pass(model, batch, model.predict(batch))
    assert spearmanr(odin.numpy(), found["odin"].numpy()).statistic > 0.9
    dropout = FromPytorchOOD(d.MCD(net, samples=3))
    score = dropout.score_in_pass(model, batch, model.predict(batch))
    assert score.std() > 0
    assert torch.equal(score, dropout.score_in_pass(model, batch, model.predict(batch)))
    assert not net.training


def test_a_report_compares_them_with_ours(model):
    train = source(count=120, seed=4)
    report = robustlab.ood_report(
        model,
        source(count=60),
        ood={"far/x": source(count=40, seed=2)},
        fit=train,
        detectors=(
            KNN(k=5),
            FromPytorchOOD(d.KNN(None, k=5)),
            FromPytorchOOD(d.EnergyBased(None), name="theirs"),
        ),
        progress=False,
    )
    row = report.value("auroc-ood-difference", scorer="pytorch-ood:knn", target="knn", data="ID vs far/x")
    assert row.value == pytest.approx(0, abs=1e-3)
    assert not torch.isnan(report.predictions["clean"].scores["theirs"]).any()

"""A zoo for the checklist: three honest networks, and defences that look robust because they break the attack."""

import torch
import torch.nn.functional as F
from torch import nn

from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.core.types import Batch, ImageSpec
from robustlab.train import seeded_init

CLASSES, SIDE = 4, 28
SPEC = ImageSpec(channels=1, size=(SIDE, SIDE))


def samples(count, seed=0):
    """Grey 8-bit images of waves; the class is their direction."""
    rng = SampleRng.make(seed, "waves", torch.arange(count))
    labels = rng.integers("label", CLASSES)
    angle = labels * (torch.pi / CLASSES)
    place = torch.linspace(-1, 1, SIDE)
    along = torch.cos(angle)[:, None, None] * place[None, :, None] + torch.sin(angle)[:, None, None] * place
    phase = 2 * rng.uniform("phase") - 1
    images = (
        0.5 + 0.06 * torch.sin(9 * along + phase[:, None, None])[:, None] + 0.1 * rng.normal("noise", (1, SIDE, SIDE))
    )
    return Batch(images=(images.clamp(0, 1) * 255).round() / 255, labels=labels, ids=torch.arange(count) + 100)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 49, CLASSES),
    )


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))


def trained(build, *, steps=100, rate=3e-3, eps=0.0):
    """Train in eval mode, on 1024 images, on those of two gradient steps within a growing ``eps`` where it is not 0."""
    net = seeded_init(build, 0).eval()
    train = samples(1024, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(train)
        clean, labels = train.images[rows], train.labels[rows]
        images, radius = clean, eps * min(1.0, 2 * step / steps)
        for _ in range(2 if eps else 0):
            images = images.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(net(images), labels, reduction="sum"), images)
            images = (clean + (images - clean + 0.7 * radius * slope.sign()).clamp(-radius, radius)).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(net(images.detach()), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.requires_grad_(False)


HONEST = {
    "cnn": lambda: trained(cnn),
    "mlp": lambda: trained(mlp, steps=150),
    "linear": lambda: trained(linear, steps=150, rate=1e-2),
    "adversarially-trained-cnn": lambda: trained(cnn, steps=200, eps=6 / 255),
}
"""Name to what trains the network."""


class Wrapped(nn.Module):
    """A defence around a network."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()


class Detached(Wrapped):
    def forward(self, x):
        return self.net(x.detach())


class ZeroGradient(Wrapped):
    """Autograd reaches the input, and brings nothing."""

    def forward(self, x):
        return self.net(x.detach() + 0 * x)


class HardSign(Wrapped):
    """Black or white by comparison with the mean of the surroundings, whose gradient is zero."""

    def forward(self, x):
        contrast = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False) - 0.5
        return self.net(0.5 + 0.1 * torch.sign(contrast))


class Sharp(Wrapped):
    def forward(self, x):
        return 1e4 * self.net(x)


class Quantised(Wrapped):
    """Rounds its input to a number of levels."""

    def __init__(self, net, levels=16, straight=False):
        super().__init__(net)
        self.levels = levels
        self.straight = straight

    def forward(self, x):
        rounded = (x * (self.levels - 1)).round() / (self.levels - 1)
        return self.net(x + (rounded - x).detach() if self.straight else rounded)


class Noisy(Wrapped):
    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


class Argmax(Wrapped):
    def forward(self, x):
        return F.one_hot(self.net(x).argmax(1), CLASSES).float()


class StraightArgmax(Wrapped):
    """One-hot outputs with the gradient of the softmax."""

    def forward(self, x):
        soft = self.net(x).softmax(1)
        return F.one_hot(soft.argmax(1), CLASSES) + (soft - soft.detach())


class Softmax(Wrapped):
    def forward(self, x):
        return self.net(x).softmax(1)


class Shattered(Wrapped):
    """Adds a wave too fine to see, whose slope hides the one that matters."""

    def forward(self, x):
        fine = torch.sin(2e4 * x).mean((1, 2, 3))
        return self.net(x) + fine[:, None] * torch.linspace(-1, 1, CLASSES)


class _Lie(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope.flip(-1) * 3


class WrongGradient(Wrapped):
    def forward(self, x):
        return self.net(_Lie.apply(x))


class Purified(Wrapped):
    """Moves its input towards what it takes for the truth before it answers."""

    def forward(self, x):
        with torch.enable_grad():
            y = x.detach().clone().requires_grad_(True)
            sure = self.net(y).logsumexp(1).sum()
            sure.backward()
        return self.net(x + 0.01 * y.grad.sign())


class Numpy(Wrapped):
    """Leaves torch on the way, which only a tensor without gradients can."""

    def forward(self, x):
        return self.net(torch.from_numpy(x.numpy().copy()))


_NO_GRADIENT = {
    "zero-gradients": ("failed", "zero for 100.0 %"),
    "non-differentiable": ("warned", "(BPDA, for_attack)"),
    "huge-budget": ("failed", "PGD leaves"),
}

ZOO = {
    "detached": (lambda net: wrap(Detached(net)), {"zero-gradients": ("failed", "No gradient reaches the input")}),
    "zero-gradient": (lambda net: wrap(ZeroGradient(net)), _NO_GRADIENT),
    "hard-sign": (lambda net: wrap(HardSign(net)), _NO_GRADIENT),
    "sharp": (
        lambda net: wrap(Sharp(net)),
        {"saturated-logits": ("warned", "flat in float32"), "two-losses": ("warned", "take the worst of both")},
    ),
    "quantised-8-bit": (lambda net: wrap(Quantised(net, 256)), _NO_GRADIENT),
    "quantised-4-bit": (lambda net: wrap(Quantised(net, 16)), _NO_GRADIENT),
    "quantised-straight-through": (
        lambda net: wrap(Quantised(net, 16, straight=True)),
        {"non-differentiable": ("warned", "(BPDA, for_attack)")},
    ),
    "noisy": (lambda net: wrap(Noisy(net)), {"randomised": ("warned", "use draws=20")}),
    "argmax": (
        lambda net: wrap(Argmax(net), output="logits"),
        {
            "one-hot": ("failed", "tell the answer only"),
            "probabilities": ("failed", "mere answers"),
            "zero-gradients": ("failed", "No gradient reaches the input"),
        },
    ),
    "straight-argmax": (
        lambda net: wrap(StraightArgmax(net), output="probs"),
        {"one-hot": ("failed", "tell the answer only"), "probabilities": ("warned", "Softmax given; converted")},
    ),
    "softmax": (
        lambda net: wrap(Softmax(net), output="probs"),
        {"probabilities": ("warned", "Softmax given; converted")},
    ),
    "softmax-as-logits": (
        lambda net: wrap(Softmax(net), output="logits"),
        {"probabilities": ("failed", "declare output='probs'")},
    ),
    "shattered": (lambda net: wrap(Shattered(net)), {"shattered-gradients": ("warned", "mean cosine")}),
    "wrong-gradient": (lambda net: wrap(WrongGradient(net)), {"finite-differences": ("warned", "is not the slope")}),
    "purified": (lambda net: wrap(Purified(net)), {"optimisation": ("warned", "optimises while it predicts")}),
    "numpy": (lambda net: wrap(Numpy(net)), {"zero-gradients": ("failed", "numpy()")}),
}
"""Name to (what builds the defence around a network, check to (status, words in the finding) that it must raise)."""

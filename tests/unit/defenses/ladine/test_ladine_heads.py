"""Stacked, folded and cached member heads against the released layout: one member, one draw, one step at a time."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses.ladine.heads import BayesSkipHeads, EpsHeads, GaussianHeads, SoftmaxHeads
from defenses.ladine.samplers import Ancestral, Multistep
from defenses.ladine.schedule import LabelSchedule
from robustlab.core.errors import ConfigError

K, B, M, A, PIXELS, WIDTH = 3, 5, 4, 3, 48, 16
SCHEDULE = LabelSchedule(steps=60)


class Released(nn.Module):
    """The released network for one member: BatchNorm1d, Embedding gates, pixels in every call."""

    def __init__(self):
        super().__init__()
        sizes = (PIXELS, WIDTH, WIDTH, WIDTH)
        self.image = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.image_norm = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))
        self.layers = nn.ModuleList([nn.Linear(2 * A, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.gates = nn.ModuleList(nn.Embedding(SCHEDULE.steps + 1, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, A)

    def forward(self, images, y, steps, guess):
        x = images.flatten(1)
        for place in range(3):
            x = self.image_norm[place](self.image[place](x))
            if place < 2:
                x = F.softplus(x)
        h = torch.cat([y, guess], 1)
        for place in range(3):
            h = F.softplus(self.norms[place](self.gates[place](steps - 1) * self.layers[place](h)))
            if place == 0:
                h = x * h
        return self.last(h)


def copied(heads, member):
    """Return the released network with the parameters and statistics of one member."""
    net = Released().to(next(heads.parameters()).dtype)

    def linear(target, source):
        target.weight.copy_(source.weight[member].T)
        target.bias.copy_(source.bias[member, 0])

    def norm(target, source):
        part = slice(member * WIDTH, (member + 1) * WIDTH)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(target, name).copy_(getattr(source.norm, name)[part])

    with torch.no_grad():
        for place in range(3):
            linear(net.image[place], heads.embedding.layers[place])
            norm(net.image_norm[place], heads.embedding.norms[place])
            linear(net.layers[place], (heads.trunk.first, heads.trunk.second, heads.trunk.third)[place])
            norm(net.norms[place], heads.trunk.norms[place])
            net.gates[place].weight[: SCHEDULE.steps].copy_(heads.trunk.gates[place][:, member])
        linear(net.last, heads.trunk.last)
    net.train(heads.training)
    return net


def problem(kind=EpsHeads, dtype=torch.float64, dialect="released"):
    """Return heads with statistics of their own, images and latents."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        heads = kind(K, A, PIXELS, width=WIDTH, schedule=SCHEDULE, dialect=dialect).to(dtype)
        for name, buffer in heads.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    images = torch.rand(B, 3, 4, 4, generator=generator, dtype=dtype)
    latents = torch.randn(K, B, A, generator=generator, dtype=dtype)
    return heads, images, latents


def draws(dtype=torch.float64, images=B):
    """Return normal numbers by name, keyed so that they are the same for every sampler."""
    kept = {}

    def draw(name):
        if name not in kept:
            seed = sum(map(ord, name)) + 1000 * int("".join(filter(str.isdigit, name)) or 0)
            kept[name] = torch.randn(K, B, M, A, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return kept[name][:, :images].to(dtype)

    return draw


def one_at_a_time(heads, images, latents, draw):
    """Return samples as the released code draws them: y-form, every step, pixels in every call, member by member."""
    guesses = latents.softmax(-1)
    found = torch.empty(K, B, M, A, dtype=latents.dtype)
    for k in range(K):
        net = copied(heads, k)
        for m in range(M):
            y = draw("start")[k, :, m] + guesses[k]
            for step in range(SCHEDULE.steps, 0, -1):
                kept = SCHEDULE.kept[step]
                noise = net(images, y, torch.full((B,), step), guesses[k])
                label = (y - (1 - math.sqrt(kept)) * guesses[k] - math.sqrt(1 - kept) * noise) / math.sqrt(kept)
                a, b, c, variance = SCHEDULE.posterior(step)
                if step == 1:
                    y = label
                else:
                    y = a * y + b * label + c * guesses[k] + math.sqrt(variance) * draw(f"step {step}")[k, :, m]
            found[k, :, m] = y
    return found


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_cached_folded_batched_samples_are_those_of_the_released_layout(dtype, bound):
    heads, images, latents = problem(dtype=dtype)
    heads.eval()
    with torch.no_grad():
        expected = one_at_a_time(heads, images, latents, draws(dtype))
        found = heads.sample(heads.condition(images, latents), Ancestral(), draws(dtype))
    assert float((found - expected).abs().max()) <= bound
    assert float(expected.std()) > 0.1


def test_training_passes_and_one_step_are_those_of_single_members():
    heads, images, latents = problem()
    heads.train()
    singles = [copied(heads, k) for k in range(K)]
    labels, steps = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([1, 7, 20, 33, 60])
    noise = torch.randn(K, B, A, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    # not Adam: it makes steps of the rounding of gradients that are 0, as of biases before a normalisation
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0)
    condition = heads.condition(images, latents)
    losses = heads.loss(condition, labels, steps, noise)
    losses.sum().backward()
    optimizer.step()
    for k, net in enumerate(singles):
        own = torch.optim.SGD(net.parameters(), lr=1.0)
        guess = latents[k].softmax(-1)
        y = SCHEDULE.noisy(F.one_hot(labels, A).double(), guess, steps, noise[k])
        loss = (noise[k] - net(images, y, steps, guess)).square().mean()
        assert float((loss - losses[k]).detach().abs()) < 1e-10
        loss.backward()
        own.step()
        after = copied(heads, k)
        for (name, mine), (_, theirs) in zip(after.named_parameters(), net.named_parameters(), strict=True):
            if "gates" in name:  # the released table has a last row that is never used
                mine, theirs = mine[: SCHEDULE.steps], theirs[: SCHEDULE.steps]
            assert float((mine - theirs).detach().abs().max()) < 1e-10, name
        for (name, mine), (_, theirs) in zip(after.named_buffers(), net.named_buffers(), strict=True):
            if "num_batches" not in name:
                assert float((mine - theirs).abs().max()) < 1e-10, name


@pytest.mark.parametrize("kind", [EpsHeads, BayesSkipHeads])
@pytest.mark.parametrize("dialect", ["released", "paper"])
def test_samples_of_an_image_do_not_depend_on_the_others(kind, dialect):
    heads, images, latents = problem(kind, dialect=dialect)
    heads.eval()
    with torch.no_grad():
        whole = heads.sample(heads.condition(images, latents), Multistep(8), draws())
        alone = heads.sample(heads.condition(images[:1], latents[:, :1]), Multistep(8), draws(images=1))
    assert torch.allclose(whole[:, :1], alone, atol=1e-12)


def test_images_are_embedded_once_and_never_seen_by_the_steps(monkeypatch):
    heads, images, latents = problem()
    heads.eval()
    calls = []
    forward = heads.embedding.forward
    monkeypatch.setattr(heads.embedding, "forward", lambda x: calls.append(len(x)) or forward(x))
    with torch.no_grad():
        heads.sample(heads.condition(images, latents), Ancestral(), draws())
    assert calls == [B]


def test_half_precision_products_change_little():
    heads, images, latents = problem(dtype=torch.float32)
    heads.eval()
    low = copy.deepcopy(heads)
    low.dtype = torch.bfloat16
    with torch.no_grad():
        a, b = (
            h.sample(h.condition(images, latents), Multistep(20), draws(torch.float32)).mean(2) for h in (heads, low)
        )
    assert 0 < float((a - b).abs().max()) < 0.05 * float(a.std())


def test_the_paper_adds_the_image_to_the_prior_mean_and_starts_without():
    heads, images, latents = problem(dialect="paper")
    heads.eval()
    with torch.no_grad():
        condition = heads.condition(images, latents)
        assert torch.equal(condition.mean, latents)
        assert torch.equal(condition.guess, latents)
        heads.to_mean.weight.normal_(generator=torch.Generator().manual_seed(0))
        moved = heads.condition(images, latents)
    assert float((moved.mean - latents).abs().min()) > 0
    loss = heads.loss(
        heads.condition(images, latents), torch.zeros(B).long(), torch.full((B,), 30), torch.zeros(K, B, A).double()
    )
    loss.sum().backward()
    assert float(heads.to_mean.weight.grad.abs().max()) > 0


def test_with_the_true_logits_the_exact_term_samples_the_classes():
    """A network that says log p(class | x) and nothing else: the rest of the head is the oracle."""
    heads = BayesSkipHeads(1, 2, 4, width=8).double().eval()
    probs = torch.tensor([0.7, 0.3], dtype=torch.float64)
    with torch.no_grad():
        heads.trunk.last.weight.zero_()
        heads.trunk.last.bias.copy_(probs.log())
        count = 50_000
        start = torch.randn(1, 1, count, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        condition = heads.condition(torch.rand(1, 1, 2, 2).double(), torch.tensor([[[0.1, 0.9]]]).double().log())
        y = heads.sample(condition, Multistep(20), lambda name: start)[0, 0]
    assert abs(float((y[:, 0] > y[:, 1]).double().mean()) - 0.7) < 0.003 + 2 * math.sqrt(0.21 / count)
    assert float((y - y.round()).abs().max()) < 1e-3


def test_the_loss_of_the_exact_term_is_least_at_the_true_logits():
    heads = BayesSkipHeads(1, 2, 4, width=8).double().eval()
    generator = torch.Generator().manual_seed(3)
    count = 20_000
    labels = (torch.rand(count, generator=generator) > 0.7).long()
    noise = torch.randn(1, count, 2, generator=generator, dtype=torch.float64)
    steps = torch.randint(1, 1001, (count,), generator=generator)
    images, latents = torch.zeros(count, 1, 2, 2).double(), torch.zeros(1, count, 2).double()

    def loss(share):
        with torch.no_grad():
            heads.trunk.last.weight.zero_()
            heads.trunk.last.bias.copy_(torch.tensor([share, 1 - share]).double().log())
            return float(heads.loss(heads.condition(images, latents), labels, steps, noise))

    assert loss(0.7) < min(loss(0.6), loss(0.8))


def test_the_loss_of_the_exact_term_is_that_of_the_class_posterior():
    """Bayes' rule for one noisy label: prior times the density of y_t under each class, whatever the prior mean is."""
    heads = BayesSkipHeads(1, 3, 4, width=8).double().eval()
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    with torch.no_grad():
        heads.trunk.last.weight.zero_()
        heads.trunk.last.bias.copy_(prior.log())
        latents = torch.tensor([[[2.0, -1.0, 0.3]]], dtype=torch.float64)
        condition = heads.condition(torch.zeros(1, 1, 2, 2).double(), latents)
        noise = torch.tensor([[[0.4, -1.1, 0.2]]], dtype=torch.float64)
        found = heads.loss(condition, torch.tensor([1]), torch.tensor([400]), noise)
    kept, lost = heads.schedule.kept[400], heads.schedule.lost[400]
    mean = latents[0, 0].softmax(-1)
    centres = math.sqrt(kept) * torch.eye(3).double() + (1 - math.sqrt(kept)) * mean
    y = centres[1] + math.sqrt(lost) * noise[0, 0]
    posterior = (prior.log() - (y - centres).square().sum(1) / (2 * lost)).softmax(0)
    assert float(found) == pytest.approx(-math.log(float(posterior[1])), abs=1e-10)


def test_ablations_draw_what_they_say():
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(K, B, A, generator=generator)
    samples = SoftmaxHeads().sample(SoftmaxHeads().condition(None, latents), Multistep(), draws(torch.float32))
    assert samples.shape == (K, B, M, A)
    assert torch.equal(samples[:, :, 0], latents.softmax(-1))
    assert torch.equal(samples[:, :, 0], samples[:, :, 3])
    heads = GaussianHeads(K, A)
    with torch.no_grad():
        condition = heads.condition(None, latents)
        start = torch.randn(K, B, 20_000, A, generator=generator)
        drawn = heads.sample(condition, Multistep(), lambda name: start)
    assert torch.allclose(drawn.mean(2), condition.mean, atol=0.1)
    assert torch.allclose(drawn.std(2), (0.5 * condition.guess).exp(), rtol=0.05)
    labels = torch.tensor([0, 1, 2, 1, 0])
    density = torch.distributions.Normal(condition.mean, (0.5 * condition.guess).exp())
    expected = -density.log_prob(F.one_hot(labels, A).float()).sum(-1).mean(1) - A * 0.5 * math.log(2 * math.pi)
    assert torch.allclose(heads.loss(condition, labels, labels, labels), expected, atol=1e-5)


def test_an_unknown_dialect_is_refused():
    with pytest.raises(ConfigError, match="dialect"):
        EpsHeads(1, 2, 4, dialect="v1")

"""fit: learns, repeats, goes on after a kill with the same bits, and touches nothing global."""

import importlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from robustlab.core.errors import ConfigError, DataFileError, KindError, LabelError, ModelError, RangeError
from robustlab.core.model import wrap
from robustlab.core.rng import SampleRng
from robustlab.core.source import Source, SourceInfo
from robustlab.core.types import Batch, ImageSpec
from robustlab.train import fit, scoped_seed, seeded_init
from robustlab.train.losses import task_loss

CLASSES = 3


class Toy(Source):
    """Grey noise whose class, or labels, are given by fixed projections."""

    def __init__(self, count, *, seed=0, task="multiclass", labelled=True):
        rng = SampleRng.make(seed, "toy", torch.arange(count))
        self.images = rng.uniform("x", (1, 6, 6))
        directions = SampleRng.make(9, "directions", torch.arange(CLASSES)).normal("d", (36,))
        scores = (self.images.flatten(1) - 0.5) @ directions.T
        labels = (scores > 0).long() if task == "multilabel" else scores.argmax(1)
        ids = torch.arange(count) + 1000 * seed
        spec = ImageSpec(channels=1, size=(6, 6), bits=None)
        self.info = SourceInfo("toy", spec, ids, labels if labelled else None, task)
        self.reads = 0

    def pixels(self, index):
        self.reads += 1
        return self.images[list(index)]


def build():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES)
    )


def trained(*, train=None, val=None, net=None, **options):
    net = seeded_init(build, 0) if net is None else net
    settings = {"epochs": 4, "batch_size": 32, "lr": 1e-2, "progress": False, **options}
    return net, fit(net, train or Toy(150), val, **settings)


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_learns_and_ends_in_eval_mode():
    net, result = trained(epochs=15, train=Toy(600))
    test = Toy(300, seed=5)
    accuracy = (net(test.images).argmax(1) == test.info.labels).double().mean()
    assert accuracy > 0.85
    assert result.history[-1].train_loss < result.history[0].train_loss / 2
    assert [record.epoch for record in result.history] == list(range(15))
    assert result.best_epoch == 14
    assert result.seconds > 0
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("broken", [1, 2, 3])
def test_a_killed_run_goes_on_with_the_same_bits(optimizer, broken, tmp_path):
    options = {"optimizer": optimizer, "val": Toy(60, seed=1), "batch_size": 20}

    def noisy(batch, epoch):
        return batch.replace(
            batch.images + 0.01 * SampleRng.make(0, "a", batch.ids, epoch=epoch).normal("n", (1, 6, 6))
        )

    def augment(batch, epoch):
        return noisy(batch, epoch)

    whole, expected = trained(augment=augment, checkpoint=tmp_path / "whole", **options)
    calls = 0

    def augment_killed(batch, epoch):
        nonlocal calls
        calls += epoch == broken
        if calls == 3:
            raise KeyboardInterrupt
        return noisy(batch, epoch)

    augment_killed.__qualname__ = augment.__qualname__
    with pytest.raises(KeyboardInterrupt):
        trained(augment=augment_killed, checkpoint=tmp_path / "cut", **options)
    torch.rand(7)  # whatever happened to the global generator in between
    seen = []

    def augment_again(batch, epoch):
        seen.append(epoch)
        return noisy(batch, epoch)

    augment_again.__qualname__ = augment.__qualname__
    other = seeded_init(build, 77)
    _, result = trained(net=other, augment=augment_again, checkpoint=tmp_path / "cut", **options)
    assert same(whole, other)
    assert result.history == expected.history
    assert result.best_epoch == expected.best_epoch
    assert min(seen) == broken, "finished epochs are not trained again"
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint.safetensors"]


def test_a_finished_run_is_not_trained_again(tmp_path):
    train = Toy(150)
    first, expected = trained(train=train, checkpoint=tmp_path, val=Toy(60, seed=1))

    def never(batch, epoch):
        raise AssertionError(epoch)

    options = {"checkpoint": tmp_path, "val": Toy(60, seed=1)}
    with pytest.raises(ConfigError, match="other augment"):
        trained(train=train, augment=never, **options)
    second, result = trained(train=train, net=seeded_init(build, 3), **options)
    assert same(first, second)
    assert (result.history, result.best_epoch) == (expected.history, expected.best_epoch)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    trained(checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="other settings"):
        trained(checkpoint=tmp_path, lr=2e-2)
    with pytest.raises(ConfigError, match="other train"):
        trained(checkpoint=tmp_path, train=Toy(151))
    with pytest.raises(ConfigError, match="other parameters"):
        trained(checkpoint=tmp_path, net=nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)))
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half a file")
    with pytest.raises(DataFileError, match="Delete it"):
        trained(checkpoint=tmp_path)


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    first, _ = trained()
    torch.manual_seed(2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 - looked at, not used
    second, _ = trained()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002 - looked at, not used
    assert same(first, second)
    other, _ = trained(seed=1)
    assert not same(first, other)


def test_seeded_init_and_scoped_seed_put_the_state_back_even_after_an_error():
    state = torch.get_rng_state()
    assert same(seeded_init(build, 3), seeded_init(build, 3))
    assert not same(seeded_init(build, 3), seeded_init(build, 4))
    with pytest.raises(ZeroDivisionError), scoped_seed("x", 1):
        torch.rand(int(1 / 0) if torch.rand(3).numel() else 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_differs_between_epochs():
    masks = []

    class Spy(nn.Module):
        def forward(self, x):
            masks.append(nn.functional.dropout(torch.ones(20), 0.5, self.training))
            return x

    trained(net=nn.Sequential(Spy(), seeded_init(build, 0)), epochs=3, batch_size=200)
    assert len({tuple(mask.tolist()) for mask in masks}) == 3


def test_ends_with_the_weights_of_the_best_epoch():
    val = Toy(80, seed=1)
    train = Toy(40)
    train.info.labels[:20] = (train.info.labels[:20] + 1) % CLASSES  # learning these by heart makes val worse
    net, result = trained(train=train, val=val, epochs=30, lr=0.1, schedule="constant", batch_size=10)
    losses = [record.val_loss for record in result.history]
    assert result.best_epoch == int(np.argmin(losses))
    assert result.best_epoch < 29, "the last epoch must not be the best one for this test to mean something"
    again = task_loss(net(val.images), val.info.labels, "multiclass").item()
    assert again == pytest.approx(min(losses), rel=1e-5)


def test_early_stopping_waits_for_its_patience():
    options = {"train": Toy(40), "val": Toy(80, seed=1), "epochs": 40, "lr": 0.1, "batch_size": 10}
    _, result = trained(early_stopping=3, **options)
    assert len(result.history) - 1 - result.best_epoch == 3
    assert len(result.history) < 40


def test_schedule_falls_along_a_cosine():
    _, result = trained(epochs=4, batch_size=150)
    expected = [0.5e-2 * (1 + np.cos(np.pi * i / 4)) for i in range(4)]
    assert [record.lr for record in result.history] == pytest.approx(expected)
    _, constant = trained(epochs=2, schedule="constant")
    assert [record.lr for record in constant.history] == [1e-2, 1e-2]


def test_every_sample_is_seen_once_an_epoch_in_an_order_that_changes():
    seen = []

    def spy(batch, epoch):
        seen.append((epoch, batch.ids.tolist()))
        return batch

    trained(train=Toy(65), augment=spy, epochs=2, batch_size=32)
    epochs = [[i for e, ids in seen if e == epoch for i in ids] for epoch in range(2)]
    assert [sorted(order) for order in epochs] == [list(range(65))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(65))
    assert {len(ids) for _, ids in seen} == {21, 22}, "no batch of one sample is left over for batch norm"


def test_small_sources_are_decoded_once_and_large_ones_by_batch(monkeypatch):
    train = Toy(150)
    cached, _ = trained(train=train)
    assert train.reads <= 4
    monkeypatch.setattr(importlib.import_module("robustlab.train.fit"), "_CACHE_BYTES", 0)
    train = Toy(150)
    streamed, _ = trained(train=train)
    assert train.reads > 4 * 4
    assert same(cached, streamed)


def test_wrapped_models_train_through_their_preprocessing():
    net = seeded_init(build, 0)
    shapes = []
    net[0].register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0]))
    fit(wrap(net, task="multiclass", mean=0.5, std=0.25), Toy(40), epochs=1, batch_size=40, progress=False)
    assert torch.allclose(shapes[0].mean(), torch.tensor(0.0), atol=0.1)
    assert shapes[0].min() < -1.5
    with pytest.raises(ConfigError, match="task='multiclass' as wrapped"):
        fit(wrap(net, task="multiclass"), Toy(40), epochs=1, task="multilabel", progress=False)


def test_multilabel_learns_and_skips_labels_that_are_not_annotated():
    train = Toy(400, task="multilabel")
    train.info.labels[::3, 1] = -1
    net, _ = trained(train=train, epochs=20)
    test = Toy(200, seed=2, task="multilabel")
    assert ((net(test.images) > 0) == test.info.labels).double().mean() > 0.85
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    labels = torch.tensor([[1, -1], [0, 1]])
    kept = nn.functional.binary_cross_entropy_with_logits(logits[labels >= 0], torch.tensor([1.0, 0.0, 1.0]))
    assert task_loss(logits, labels, "multilabel").item() == pytest.approx(kept.item())
    assert task_loss(logits, torch.full((2, 2), -1), "multilabel").item() == 0


def test_a_loss_of_ones_own_and_mixed_precision_are_used():
    def doubled(logits, labels):
        assert logits.dtype == torch.float32
        return 2 * nn.functional.cross_entropy(logits, labels)

    _, first = trained(epochs=1, batch_size=200)
    _, second = trained(epochs=1, batch_size=200, loss=doubled)
    assert second.history[0].train_loss == pytest.approx(2 * first.history[0].train_loss)
    half, third = trained(epochs=1, batch_size=200, amp=True)
    assert third.history[0].train_loss == pytest.approx(first.history[0].train_loss, rel=0.05)
    assert third.history[0].train_loss != first.history[0].train_loss
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_frozen_parameters_stay():
    net = seeded_init(build, 0)
    net[1].weight.requires_grad_(False)
    before = net[1].weight.clone()
    trained(net=net)
    assert torch.equal(net[1].weight, before)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epochs": 0}, RangeError, "epochs of at least 1"),
        ({"batch_size": 0}, RangeError, "batch_size of at least 1"),
        ({"lr": 0.0}, RangeError, "positive lr"),
        ({"optimizer": "adam"}, ConfigError, "optimizer among adamw, sgd"),
        ({"schedule": "step"}, ConfigError, "schedule among cosine, constant"),
        ({"early_stopping": 3}, ConfigError, "val for early_stopping"),
        ({"train": Toy(20, labelled=False)}, LabelError, "labelled train data"),
        ({"net": lambda images: images}, KindError, "a torch module"),
        ({"net": nn.Flatten()}, ConfigError, "parameters that require gradients"),
        ({"net": nn.Sequential(nn.Flatten(), nn.Linear(36, 2))}, LabelError, "labels from 0 to 1"),
        ({"lr": 1e30}, ModelError, "finite training loss"),
    ],
)
def test_mistakes_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        trained(**options)


def test_an_augmentation_that_loses_labels_is_named():
    def lose(batch, epoch):
        return Batch(images=batch.images, labels=None, ids=batch.ids)

    with pytest.raises(LabelError, match="must keep the labels"):
        trained(augment=lose)

"""``check_corruption`` passes honest corruptions and names what a broken one breaks."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from corruptions import GaussianNoise
from robustlab.core.corruption import Corruption
from robustlab.core.errors import ContractError
from robustlab.core.levels import Levels
from robustlab.core.registry import CORRUPTIONS
from robustlab.testing import check_corruption, textured

STEPS = Levels((0.1, 0.2, 0.3, 0.4, 0.5), identity=0.0, unit="of full range")


@pytest.fixture(scope="module", autouse=True)
def registered():
    before = dict(CORRUPTIONS._items)
    yield
    CORRUPTIONS._items.clear()
    CORRUPTIONS._items.update(before)


def named(name, **members):
    """Return a registered corruption class with the given members over an honest one that darkens."""

    def apply(self, images, draws, values):
        return images * (1 - values["amount"])

    body = {"__doc__": "Darkness.", "__annotations__": {"amount": Levels}, "amount": STEPS, "apply": apply, **members}
    body["__module__"] = __name__
    kind = dataclass(frozen=True)(type(f"Test{name.title()}", (Corruption,), body))
    globals()[kind.__name__] = kind  # where pickle looks for it
    return CORRUPTIONS.register(f"test-{name}")(kind)


@pytest.mark.parametrize("name", CORRUPTIONS.names())
def test_every_registered_corruption_passes(name):
    check_corruption(CORRUPTIONS.get(name))


def test_an_honest_corruption_passes():
    check_corruption(named("honest"))
    check_corruption(GaussianNoise())


def in_place(self, images, draws, values):
    return images.mul_(1 - values["amount"])


def batch_mean(self, images, draws, values):
    return images * (1 - values["amount"]) + 0.001 * images.mean()


def global_noise(self, images, draws, values):
    return images + values["amount"] * torch.randn_like(images)


def flat(self, images, draws, values):
    return images * 0.5


def smaller(self, images, draws, values):
    return images[..., :1] * (1 - values["amount"])


def infinite(self, images, draws, values):
    return images / (images - images)


def seeded_by_call(self, rng, shape):
    return {"z": torch.full((len(rng), *shape), random.random())}


def of_position(self, rng, shape):
    return {"z": torch.arange(len(rng), dtype=torch.float32)[:, None, None, None].expand(-1, *shape)}


def uses_z(self, images, draws, values):
    return images * (1 - values["amount"]) + 0.01 * draws["z"]


def of_global_numpy(self, rng, shape):
    return {"z": torch.full((len(rng), 1, 1, 1), float(np.random.get_state()[1][0] % 7))}  # noqa: NPY002


def other_bytes(self, pixels, draws, values):
    return (pixels.float() * (1 - values["amount"])).to(torch.uint8)


BROKEN = {
    "in-place": ({"apply": in_place}, "left alone"),
    "batch mates": ({"apply": batch_mean}, "in any batch"),
    "global noise": ({"apply": global_noise}, "in any batch|global random state|again"),
    "position": ({"draw": of_position, "apply": uses_z}, "in any batch"),
    "global python state": ({"draw": seeded_by_call, "apply": uses_z}, "in any batch|draws that do not see|global"),
    "global numpy state": ({"draw": of_global_numpy, "apply": uses_z}, "another seed|global random state"),
    "no effect of severity": ({"apply": flat}, "rises strictly"),
    "shape": ({"apply": smaller}, r"\(2, 1, 1, 1\)"),
    "infinite": ({"apply": infinite}, "finite"),
    "truncating bytes": ({"apply_bytes": other_bytes}, "same stored bytes"),
    "stage": ({"stage": "afterwards"}, "a stage among"),
    "no parameter": (
        {"amount": 0.5, "__annotations__": {"amount": float}, "apply": flat},
        "a field of type Levels",
    ),
    "error": ({"apply": lambda self, images, draws, values: images + values["missing"]}, "KeyError"),
}


@pytest.mark.parametrize("fault", list(BROKEN))
def test_a_broken_one_is_told_what_it_breaks(fault):
    members, words = BROKEN[fault]
    with pytest.raises(ContractError, match=words):
        check_corruption(named(fault.replace(" ", "-"), **members))


def test_an_unregistered_one_is_refused():
    class Plain(GaussianNoise):
        """Not registered."""

    with pytest.raises(ContractError, match="registered"):
        check_corruption(Plain)
    with pytest.raises(ContractError, match="Subclass"):
        check_corruption("gaussian-noise")


def test_textured_images_are_bytes_in_float_and_differ():
    images = textured(3, 1, 40, 30)
    assert images.shape == (3, 1, 40, 30)
    assert torch.equal((images * 255).round() / 255, images)
    assert images.std() > 0.1
    assert not torch.equal(images[0], images[1])

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
from robustlab.core.shift import from_bytes, to_bytes
from robustlab.testing import check_corruption, check_form, textured

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


def darker(pixels, values):
    return to_bytes(from_bytes(pixels) * (1 - values["amount"]))


def first_black_unless_three(self, pixels, draws, values):
    changed = darker(pixels, values)
    if len(pixels) != 3:
        changed[0] = 0
    return changed


def strided_inverted(self, pixels, draws, values):
    changed = darker(pixels, values)
    return changed if pixels.is_contiguous() else 255 - changed


def strided_window_inverted(self, pixels, draws, values):
    dense = pixels.is_contiguous() or pixels.is_contiguous(memory_format=torch.channels_last)
    return darker(pixels, values) if dense else 255 - darker(pixels, values)


def bytes_in_place(self, pixels, draws, values):
    return pixels.copy_(darker(pixels, values))


def large_not_finite(self, images, draws, values):
    return images * (1 - values["amount"] if images.shape[2] <= 400 else float("nan"))


def large_bytes_in_place(self, pixels, draws, values):
    return darker(pixels, values) if pixels.shape[2] < 31 else bytes_in_place(self, pixels, draws, values)


def of_threads(self, images, draws, values):
    return images * (1 - values["amount"]) + 0.01 * (torch.get_num_threads() > 1)


def bytes_of_threads(self, pixels, draws, values):
    return darker(pixels, values) + (torch.get_num_threads() > 1)


def shade(self, rng, shape):
    return {"z": rng.uniform("z", (1, 1, 1))}


def blind_to_ids(self, batch, ctx):
    return self.draw(ctx.rng(self.name, self.version, torch.zeros_like(batch.ids)), tuple(batch.images.shape[1:]))


def blind_to_epochs(self, batch, ctx):
    return self.draw(ctx.still().rng(self.name, self.version, batch.ids), tuple(batch.images.shape[1:]))


def of_places(self, batch, ctx):
    return self.draw(ctx.rng(self.name, self.version, torch.arange(len(batch))), tuple(batch.images.shape[1:]))


def unused_of_places(self, rng, shape):
    return {**shade(self, rng, shape), "unused": torch.arange(len(rng))}


def draws_in_place(self, images, draws, values):
    return images * (1 - values["amount"]) + 0.01 * draws["z"].add_(1)


def own_range(self, images, draws, values):
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low) * (1 - values["amount"])


def jump(self, images, draws, values):
    return images * (1 - 0.2 - values["amount"])


def hard_coded(self, images, draws, values):
    field = torch.linspace(0, 1, 224).expand(224, 224)[: images.shape[2], : images.shape[3]]
    return images * (1 - values["amount"] * field)


BROKEN = {
    "own range": ({"apply": own_range, "min_size": 8}, r"grey level 0 .*finite"),
    "jump at the start": ({"apply": jump}, r"severity 0.0001: .*a mean change of at most"),
    "wrong identity": ({"amount": Levels((0.1, 0.2, 0.3, 0.4, 0.5), identity=0.08, unit="x")}, "identity="),
    "field of 224 px": ({"apply": hard_coded}, r"check form|233"),
    "in-place": ({"apply": in_place}, "left alone"),
    "in-place if not storable": (
        {"apply": in_place, "storable": property(lambda self: False)},
        r"float.*left alone",
    ),
    "batch mates": ({"apply": batch_mean}, "in any batch"),
    "global noise": ({"apply": global_noise}, "in any batch|global random state|again"),
    "position": ({"draw": of_position, "apply": uses_z}, "in any batch"),
    "global python state": ({"draw": seeded_by_call, "apply": uses_z}, "in any batch|draws that do not see|global"),
    "global numpy state": ({"draw": of_global_numpy, "apply": uses_z}, "another seed|global random state"),
    "no effect of severity": ({"apply": flat}, "rises strictly"),
    "shape": ({"apply": smaller}, r"\(2, 1, 1, 1\)"),
    "infinite": ({"apply": infinite}, "finite"),
    "truncating bytes": ({"apply_bytes": other_bytes}, "same stored bytes"),
    "first bytes unless three": ({"apply_bytes": first_black_unless_three}, r"uint8.*in any batch"),
    "channels last bytes": ({"apply_bytes": strided_inverted}, r"uint8.*channels_last"),
    "window bytes": ({"apply_bytes": strided_window_inverted}, r"uint8.*a window"),
    "bytes in place": ({"apply_bytes": bytes_in_place}, r"uint8.*left alone"),
    "bytes in place if not storable": (
        {"apply_bytes": large_bytes_in_place, "storable": property(lambda self: False)},
        r"uint8.*left alone",
    ),
    "bytes of mates if not storable": (
        {"apply_bytes": first_black_unless_three, "storable": property(lambda self: False)},
        r"uint8.*in any batch",
    ),
    "large ones only": ({"apply": large_not_finite, "min_size": 300}, "finite"),
    "threads": ({"apply": of_threads}, "any number of threads"),
    "threads in bytes": ({"apply_bytes": bytes_of_threads}, r"uint8.*any number of threads"),
    "blind to ids": ({"draw": shade, "prepare": blind_to_ids, "apply": uses_z}, "for other ids"),
    "blind to epochs": ({"draw": shade, "prepare": blind_to_epochs, "apply": uses_z}, "another epoch"),
    "draws of places": ({"draw": shade, "prepare": of_places, "apply": uses_z}, "in any batch"),
    "unseen draws of places": ({"draw": unused_of_places, "apply": uses_z}, "same draws for an id"),
    "draws changed": ({"draw": shade, "apply": draws_in_place}, "same result again"),
    "severity zero": (
        {"on": lambda self, batch, severity, ctx: batch.replace(batch.images.sqrt())},
        "severity 0 to change nothing",
    ),
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


def test_a_step_may_come_first_where_that_is_said():
    check_corruption(named("stepped", apply=jump, gradual=False))


def test_one_that_applies_to_nothing_is_told_so():
    kind = named("nowhere", skip_reason=lambda self, spec: "for nothing")
    with pytest.raises(ContractError, match="to apply to some images"):
        check_form(kind())
    with pytest.raises(ContractError, match="to none"):
        check_corruption(kind)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check_corruption(named("restores"))
        assert torch.get_num_threads() == 3
        with pytest.raises(ContractError):
            check_corruption(named("does-not", apply=of_threads))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


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

"""Parts under the corruptions: resampling taps, the guard of the facade, context of compositions."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import corruptions
import robustlab.corruptions
from corruptions import Compose, GaussianNoise, OneOf
from corruptions._resample import area_down, box_resize, linear_up
from robustlab._siblings import check_sibling
from robustlab.core.errors import ShadowError
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("size", [1, 2, 28, 219])
@pytest.mark.parametrize("pitch", [1.0, 1.3, 2.0, 5.7, 300.0])
def test_every_output_row_is_an_average_of_input_rows(size, pitch):
    for taps in (area_down(size, pitch), linear_up(size, pitch), box_resize(size, max(1, int(size / pitch)))):
        assert torch.allclose(taps.weight.sum(0), torch.ones(taps.weight.shape[1]), atol=1e-6)
        assert taps.weight.min().item() >= 0
    assert area_down(size, pitch).index.max().item() == size - 1


def test_a_pitch_of_one_pixel_is_the_identity():
    images = torch.linspace(0, 1, 35).reshape(1, 1, 7, 5)
    assert torch.equal(linear_up(7, 1.0).rows(area_down(7, 1.0).rows(images)), images)


def test_facade_and_package_are_the_same_objects():
    assert robustlab.corruptions.GaussianNoise is corruptions.GaussianNoise
    assert set(robustlab.corruptions.__all__) == set(corruptions.__all__)
    assert all(hasattr(robustlab.corruptions, name) for name in corruptions.__all__)


def test_the_guard_names_both_places():
    check_sibling(corruptions)
    foreign = types.ModuleType("corruptions")
    foreign.__file__ = "/elsewhere/corruptions.py"
    with pytest.raises(ShadowError, match=r"own package 'corruptions' at .*got /elsewhere/corruptions\.py.*Rename"):
        check_sibling(foreign)
    with pytest.raises(ImportError):
        check_sibling(types.ModuleType("corruptions"))


def test_a_users_module_of_that_name_gives_the_message(tmp_path):
    (tmp_path / "corruptions.py").write_text("mine = 1\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import robustlab.corruptions"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ShadowError: robustlab: expected its own package 'corruptions'" in done.stderr.splitlines()[-1]


def test_one_of_hands_device_keys_and_order_to_its_branches():
    shift = OneOf([GaussianNoise(), Compose([GaussianNoise()])])
    batch = Batch(torch.full((20, 1, 4, 4), 0.5), None, torch.arange(20))
    ctx = ShiftContext(device_keys=torch.arange(20) // 5)
    changed = shift.on(batch, 3, ctx).images
    reverse = torch.arange(19, -1, -1)
    assert torch.equal(shift.on(batch.select(reverse), 3, ctx.select(reverse)).images, changed[reverse])
    assert bool((changed != 0.5).flatten(1).any(1).all())

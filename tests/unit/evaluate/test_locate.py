"""locate: planted levels are found on real images, and what cannot be seen is said."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import robustlab
from robustlab.core.errors import ConfigError, UnknownNameError
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.shift import ShiftContext, to_bytes
from robustlab.data import subset
from robustlab.evaluate.image_statistics import image_statistics

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real image sets (../shared/data) are not there")
FEW = ("gaussian-noise", "gaussian-blur", "contrast-loss")


def real(name, split, count, **options):
    source = robustlab.load_data(DATA / f"{name}.npz", split=split, **options)
    return subset(source, range(min(count, len(source))))


def planted(source, *shifts):
    """Return images as stored after corruptions (name, severity, signs) that move all of them the same way."""
    batch = source.read(range(len(source)))
    for name, severity, *signs in shifts:
        axis, ctx = CORRUPTIONS.get(name)(), ShiftContext(seed=7)
        draws = axis.prepare(batch, ctx)
        if signs:
            draws = {key: torch.tensor(signs).to(value).expand_as(value) for key, value in draws.items()}
        batch = axis.perform(batch, draws, severity, ctx)
    return robustlab.load_data(to_bytes(batch.images).permute(0, 2, 3, 1).squeeze(-1).numpy())


def chest(site=50, reference=100):
    return real("nih_cxr_patients_96", "train", site), real("nih_cxr_patients_96", "test", reference)


@needs_data
@pytest.mark.parametrize(
    ("name", "severity"),
    [("gaussian-noise", 1.0), ("gaussian-noise", 3.5), ("gaussian-blur", 3.0), ("contrast-loss", 2.0)],
)
def test_a_planted_level_is_found_within_half_a_step(name, severity):
    site, reference = chest()
    found = robustlab.locate(planted(site, (name, severity)), reference, axes=FEW)
    place = found[name]
    assert place.status == "seen"
    assert abs(place.severity - severity) <= 0.5
    assert 0 < place.severity - place.low == pytest.approx(place.high - place.severity, abs=1e-9)
    assert place.high - place.low < 1
    amount, unit = next(iter(CORRUPTIONS.get(name)().parameters(place.severity).values()))
    assert (place.amount, place.unit) == (pytest.approx(amount), unit)
    assert all(found[other].status != "seen" for other in FEW if other != name)
    assert found.unexplained > 0.001


@needs_data
def test_two_levels_at_once_are_told_apart():
    site, reference = chest()
    found = robustlab.locate(planted(site, ("gaussian-noise", 2.0), ("contrast-loss", 2.0)), reference, axes=FEW)
    assert abs(found["gaussian-noise"].severity - 2) <= 0.5
    assert abs(found["contrast-loss"].severity - 2) <= 0.5


@needs_data
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1)])
def test_stronger_and_weaker_stains_are_found(signs):
    site, reference = (real("oral_he_400x_96", split, count) for split, count in (("train", 50), ("test", 100)))
    found = robustlab.locate(planted(site, ("stain-shift", 3.0, *signs)), reference, axes=("stain-shift",))
    place = found["stain-shift"]
    assert place.low <= 3 <= place.high
    assert abs(place.severity - 3) <= 1
    assert place.direction == f"haematoxylin {'up' if signs[0] > 0 else 'down'}, eosin up"


@needs_data
def test_where_nothing_was_planted_nothing_is_seen():
    site, reference = chest()
    found = robustlab.locate(site, reference, axes=(*FEW, "stain-shift"))
    assert {place.status for place in found.places} <= {"not seen", "cannot be seen"}
    assert found["gaussian-noise"].status == "not seen"
    assert found["gaussian-noise"].high <= 1
    assert math.isnan(found["stain-shift"].severity)
    assert "channels" in found["stain-shift"].reason
    again = robustlab.locate(site, reference, axes=(*FEW, "stain-shift"))
    assert again.to_json() == found.to_json()
    rows = json.loads(found.to_json())["places"]
    assert rows[3]["severity"] is None
    assert found.to_frame()["axis"].tolist() == [*FEW, "stain-shift"]
    assert "not seen" in found.summary()


@needs_data
def test_less_noise_than_the_reference_is_no_severity():
    site, reference = chest()
    found = robustlab.locate(
        site, planted(reference, ("gaussian-noise", 2.0)), axes=("gaussian-noise", "contrast-loss")
    )
    place = found["gaussian-noise"]
    assert place.status == "cannot be seen"
    assert math.isnan(place.severity)
    assert "less of it" in place.reason


@needs_data
def test_another_part_of_the_body_is_not_explained():
    _, reference = chest()
    found = robustlab.locate(real("busi_96", "train", 50), reference, axes=FEW)
    assert found.unexplained < 0.001
    assert "none of these axes explains" in found.summary()


@needs_data
def test_two_axes_that_do_the_same_are_named():
    site, reference = chest()
    found = robustlab.locate(
        planted(site, ("down-up-sampling", 1.0)), reference, axes=("gaussian-blur", "down-up-sampling")
    )
    seen = [place for place in found.places if place.status == "seen"]
    other = [place for place in found.places if place.status != "seen"]
    assert len(seen) == len(other) == 1
    assert other[0].axis in seen[0].reason
    assert other[0].reason == f"it cannot be told from {seen[0].axis}"


@needs_data
def test_a_strong_blur_is_no_coarse_detector():
    """Half-way between two simulated factors a coarser detector would fit better, if it changed as smoothly as that."""
    site, reference = (real("busi_96", split, count) for split, count in (("train", 50), ("test", 200)))
    moved = planted(site, ("gaussian-blur", 4.0))
    found = robustlab.locate(moved, reference, axes=("gaussian-blur", "down-up-sampling"))
    assert found["gaussian-blur"].status == "seen"
    assert abs(found["gaussian-blur"].severity - 4) <= 0.5


@needs_data
def test_fewer_independent_images_widen_the_interval():
    site, reference = chest()
    moved = planted(site, ("contrast-loss", 2.0))
    images = moved.read(range(50)).images.permute(0, 2, 3, 1).squeeze(-1).mul(255).round().byte().numpy()
    grouped = robustlab.load_data(images, groups={"patient": [f"p{i // 10}" for i in range(50)]})
    wide = robustlab.locate(grouped, reference, axes=("contrast-loss",), cluster="patient")["contrast-loss"]
    plain = robustlab.locate(moved, reference, axes=("contrast-loss",))["contrast-loss"]
    assert wide.high - wide.low > 1.3 * (plain.high - plain.low)
    with pytest.raises(UnknownNameError, match="patient"):
        robustlab.locate(moved, reference, axes=("contrast-loss",), cluster="patient")


@needs_data
def test_other_sizes_are_resized_and_said_to_be():
    site, reference = chest()
    half = site.read(range(50)).images[:, :, ::2, ::2].permute(0, 2, 3, 1).squeeze(-1).mul(255).byte().numpy()
    found = robustlab.locate(half, reference, axes=("gaussian-noise",))
    assert any("48 x 48 to 96 x 96" in note for note in found.notes)


@needs_data
def test_colour_images_are_seen_as_grey_ones_beside_a_grey_reference():
    site, reference = chest()
    moved = planted(site, ("contrast-loss", 2.0)).read(range(50)).images.mul(255).round().byte()
    coloured = moved.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    found = [robustlab.locate(images, reference, axes=("contrast-loss",)) for images in (moved[:, 0].numpy(), coloured)]
    assert found[0]["contrast-loss"].severity == pytest.approx(found[1]["contrast-loss"].severity, abs=0.02)


def test_bad_input_is_refused():
    images = np.zeros((30, 32, 32), np.uint8)
    with pytest.raises(ConfigError, match="20 images"):
        robustlab.locate(images[:10], images)
    with pytest.raises(ConfigError, match="reference"):
        robustlab.locate(images, images[:10])
    with pytest.raises(ConfigError, match="once"):
        robustlab.locate(images, images, axes=("gamma", "gamma"))
    with pytest.raises(UnknownNameError, match="gaussian-noise"):
        robustlab.locate(images, images, axes=("gaussian-nois",))


def test_noise_is_measured_in_its_own_units_and_structure_hardly_counts():
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 1, 64, 64)
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for sigma in (0.02, 0.1):
        level = float(image_statistics(ramp + sigma * noise)[0, 0].exp()) - 0.5 / 255
        assert level == pytest.approx(sigma, rel=0.1)
    assert float(image_statistics(ramp)[0, 0].exp()) < 1 / 255


def test_statistics_belong_to_images():
    images = torch.rand(5, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    whole = image_statistics(images)
    assert torch.allclose(whole[2:3], image_statistics(images[2:3]))
    assert torch.isfinite(image_statistics(torch.zeros(1, 3, 5, 5))).all()

"""Weather operators: any size, batch independence, borders of their parameters, frost pictures."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch

from corruptions.reference._frost import PUBLISHED, pictures, stacked, stacked_on
from corruptions.reference.spatter import RefSpatter, smooth
from corruptions.reference.weather import RefFog, RefFrost, RefSnow, plasma, plasma_side
from corruptions.suites import imagenet_c
from robustlab.core.corruption import STAGES
from robustlab.core.errors import DataFileError, KindError, RangeError
from robustlab.core.shift import ShiftContext, from_bytes
from robustlab.core.spec import canonical_json, fingerprint, from_dict, to_dict
from robustlab.core.types import Batch

SHIFTS = [RefFog(), RefSnow(), RefFrost(), RefSpatter()]


def pixels_of(count, channels, height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((count, channels, 6, 6)))
    grown = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (grown * 255).to(torch.uint8)


@pytest.fixture(params=SHIFTS, ids=lambda shift: shift.name)
def shift(request):
    return request.param


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (31, 33), (64, 64), (221, 219)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_both_numbers_of_channels(shift, size, channels):
    pixels = pixels_of(2, channels, *size)
    before = pixels.clone()
    for severity in (0.3, 3, 3.6, 5):
        out = shift(pixels, severity, ids=torch.arange(2))
        assert out.dtype == torch.uint8
        assert out.shape == pixels.shape
    assert torch.equal(pixels, before)
    assert torch.equal(shift(pixels, 0, ids=torch.arange(2)), pixels)


@pytest.mark.parametrize("size", [(45, 38), (224, 200)], ids=str)
@pytest.mark.parametrize("severity", [2, 4.5])
def test_batch_order_and_layout_change_no_bit(shift, size, severity):
    pixels, ids = pixels_of(13, 3, *size), torch.arange(50, 63)  # more than are worked on at once
    whole = shift(pixels, severity, ids=ids)
    order = torch.tensor([7, 2, 9, 0, 10, 1, 12, 8, 3, 11, 6, 5, 4])
    parts = [shift(pixels[part], severity, ids=ids[part]) for part in (order[:1], order[1:6], order[6:])]
    assert torch.equal(torch.cat(parts), whole[order])
    assert torch.equal(shift(pixels.to(memory_format=torch.channels_last), severity, ids=ids), whole)
    assert len(torch.unique(whole.flatten(1), dim=0)) == 13


def test_grey_images_equal_the_luma_of_three_equal_channels(shift):
    pixels, ids = pixels_of(3, 1, 40, 40), torch.arange(3)
    grey = shift(pixels, 3, ids=ids)[:, 0].to(torch.float64)
    red, green, blue = shift(pixels.expand(-1, 3, -1, -1), 3, ids=ids).to(torch.float64).unbind(1)
    assert (grey - (0.299 * red + 0.587 * green + 0.114 * blue)).abs().max() < 0.51


def test_floats_are_bytes_over_255(shift):
    pixels, ids = pixels_of(2, 3, 30, 30), torch.arange(2)
    assert torch.equal(shift(from_bytes(pixels), 3, ids=ids), from_bytes(shift(pixels, 3, ids=ids)))


def test_one_preparation_serves_every_severity(shift):
    batch, ctx = Batch(pixels_of(3, 3, 33, 40), None, torch.arange(3)), ShiftContext(seed=2)
    draws = shift.prepare(batch, ctx)
    for severity in (5, 1, 5):
        assert torch.equal(shift.perform(batch, draws, severity, ctx).images, shift.on(batch, severity, ctx).images)


def test_metadata_and_round_trip(shift):
    assert (shift.family, shift.mode, shift.label_safety, shift.seen_in) == ("weather", "reference", "conditional", ())
    assert shift.stage in STAGES
    assert from_dict(json.loads(canonical_json(shift))) == shift


def test_values_out_of_range_are_refused(shift):
    for name, levels in shift.levels().items():
        beyond = -1.0 if levels.values[4] > levels.values[0] else 1e6
        with pytest.raises(RangeError, match=name):
            type(shift).at(**{name: beyond})


def test_fog_keeps_black_images_black_and_full_white_where_clouds_are_thickest():
    black = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    assert torch.equal(RefFog()(black, 5, ids=torch.arange(2)), black)
    assert torch.equal(RefFog.at(amount=0)(black, 5, ids=torch.arange(2)), black)
    white = RefFog()(black + 255, 3, ids=torch.arange(2))
    assert white.amax().item() == 255
    assert [plasma_side(*size) for size in ((1, 1), (2, 2), (3, 1), (32, 32), (33, 5), (224, 224))] == [
        2, 2, 4, 32, 64, 256,
    ]  # fmt: skip


def test_rougher_clouds_have_more_between_neighbours():
    uniforms = torch.from_numpy(np.random.default_rng(0).random((6, 64 * 64 - 1)))
    rough, even = (plasma(uniforms, decay).diff(dim=2).abs().mean() for decay in (1.4, 3.0))
    assert rough > 2 * even


def test_plasma_leaves_its_numbers_alone():
    uniforms = torch.from_numpy(np.random.default_rng(0).random((2, 63)))
    before = uniforms.clone()
    plasma(uniforms, 2.0)
    assert torch.equal(uniforms, before)


def test_snow_is_the_same_upside_down_and_only_brightens():
    black, ids = torch.zeros(4, 3, 40, 40, dtype=torch.uint8), torch.arange(4)
    snow = RefSnow.at(mix=1.0)(black, 3, ids=ids)
    assert torch.equal(snow, snow.flip(2, 3))
    assert snow.amax().item() > 60
    pixels = pixels_of(4, 3, 40, 40)
    assert (RefSnow()(pixels, 3, ids=ids) >= pixels).all()


def test_water_adds_light_and_mud_hides():
    pixels, ids = pixels_of(4, 3, 64, 64) // 4 + 100, torch.arange(4)
    assert (RefSpatter()(pixels, 2, ids=ids) >= pixels).all()
    muddy = RefSpatter()(pixels, 5, ids=ids).double()
    colour = torch.tensor([63, 42, 20]).view(3, 1, 1)
    hidden = (muddy < pixels).all(1, keepdim=True)
    assert 0.05 < hidden.double().mean() < 0.9
    left = (muddy - colour).abs() <= 0.2 * (pixels - colour).abs() + 1
    assert (left | ~hidden).all()
    assert ((muddy == pixels) | hidden).all()


@pytest.mark.parametrize("severity", [2, 5])
def test_spatter_without_any_liquid_leaves_the_image(severity):
    pixels = pixels_of(3, 3, 30, 30)
    assert torch.equal(RefSpatter.at(threshold=90.0)(pixels, severity, ids=torch.arange(3)), pixels)


def test_smoothing_at_sigma_zero_does_nothing():
    plane = np.random.default_rng(0).random((9, 8))
    assert np.array_equal(smooth(plane, 0), plane)


def test_our_frost_has_the_look_that_was_asked_for():
    drawn = pictures("")
    assert len(drawn) == len(PUBLISHED)
    greys = [picture.mean() for picture in drawn]
    assert all(120 < grey < 210 for grey in greys)
    for picture in drawn:
        assert picture.shape == (512, 768, 3)
        assert 15 < picture.std(axis=(0, 1)).mean() < 50
        assert picture[..., 2].mean() > picture[..., 0].mean(), "ice is bluish"
    assert len({picture.tobytes() for picture in drawn}) == 5
    again = pictures.__wrapped__("")
    assert all(np.array_equal(first, second) for first, second in zip(drawn, again, strict=True))


@pytest.mark.parametrize(("scale", "size"), [(1.0, (600, 700)), (0.2, (102, 40)), (0.2, (101, 153)), (1.0, (512, 10))])
def test_frost_is_enlarged_where_the_picture_is_not_larger_than_the_image(scale, size):
    stack, sides = stacked("", scale, *size)
    assert (sides > torch.tensor(size)).all()
    assert stack.shape[2:] == tuple(sides.amax(0).tolist())
    pixels = torch.zeros(2, 3, *size, dtype=torch.uint8)
    assert (RefFrost.at(frost_share=1.0, image_share=1.0)(pixels, 1, ids=torch.arange(2)) > 0).double().mean() > 0.9


def test_frost_pictures_that_cannot_be_read_are_named(tmp_path):
    pixels = pixels_of(1, 3, 20, 20)
    with pytest.raises(DataFileError, match=r"frost1\.png.*leave textures empty"):
        RefFrost(textures=str(tmp_path / "nowhere"))(pixels, 3)
    for name in PUBLISHED[:3]:
        cv2.imwrite(str(tmp_path / name), np.zeros((40, 40, 3), np.uint8))
    (tmp_path / PUBLISHED[3]).write_bytes(b"no picture")
    with pytest.raises(DataFileError, match=r"no readable frost4\.jpg"):
        RefFrost(textures=str(tmp_path))(pixels, 3)


@pytest.mark.parametrize("scale", [0.0, 1.5, float("nan")])
def test_frost_scale_out_of_range_is_refused(scale):
    with pytest.raises(RangeError, match="scale"):
        RefFrost(scale=scale)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"scale": "1"}, "scale as a number"), ({"scale": True}, "scale as a number"), ({"textures": None}, "a string")],
)
def test_frost_arguments_of_another_kind_are_refused(wrong, message):
    with pytest.raises(KindError, match=message):
        RefFrost(**wrong)


def test_frost_pictures_are_kept_on_their_device():
    first, again = (stacked_on(torch.device("cpu"), "", 0.2, 20, 20) for _ in range(2))
    assert all(one is other for one, other in zip(first, again, strict=True))


def frost_folder(folder, colours):
    folder.mkdir()
    for name, colour in zip(PUBLISHED, colours, strict=True):
        cv2.imwrite(str(folder / name), np.full((40, 50, 3), colour, np.uint8))
    return str(folder)


def test_published_frost_is_known_by_its_pictures(tmp_path):
    same, again = (RefFrost(textures=frost_folder(tmp_path / name, range(5))) for name in ("a", "b"))
    assert same.content == again.content != ""
    swapped = RefFrost(textures=frost_folder(tmp_path / "c", (0, 1, 3, 2, 4)))
    assert swapped.content != same.content
    before = fingerprint(same)
    cv2.imwrite(str(tmp_path / "a" / PUBLISHED[0]), np.full((40, 50, 3), 9, np.uint8))
    assert fingerprint(RefFrost(textures=same.textures)) != before
    (tmp_path / "b" / PUBLISHED[2]).unlink()
    assert from_dict(to_dict(again)) == again, "a stored shift is read where its pictures are not"
    assert RefFrost(content="x").content == ""


def test_drawn_frost_is_called_drawn(tmp_path):
    published = {shift.name: shift.label for shift in imagenet_c(textures=frost_folder(tmp_path / "a", range(5)))}
    drawn = {shift.name: shift.label for shift in imagenet_c()}
    assert (published["ref:frost"], drawn["ref:frost"]) == ("frost", "frost (drawn)")
    assert RefFrost().label == "ref:frost (drawn)"
    assert published.keys() == drawn.keys()


def test_frost_scale_and_textures_are_part_of_the_identity():
    plain = RefFrost()
    assert plain != dataclasses.replace(plain, scale=0.3)
    assert canonical_json(plain) != canonical_json(dataclasses.replace(plain, textures="a"))

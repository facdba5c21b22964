"""Weather operators against compositions of NumPy, SciPy, OpenCV and scikit-image from the same draws."""

import math

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.filters import gaussian

from corruptions.reference.spatter import RefSpatter
from corruptions.reference.weather import RefFog, RefFrost, RefSnow, _grey, magnified, plasma
from robustlab.core.rng import SampleRng


def textured(count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 7, 6, 3)).astype(np.uint8)
    smooth = np.stack([cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR) for image in coarse])
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def run(shift, images, severity):
    """Return (draws as float64 arrays, values, our result) for uint8 images (N, H, W, 3)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    draws = shift.draw(SampleRng.make(4, "weather", torch.arange(len(images))), tuple(pixels.shape[1:]))
    values = {name: levels.at(severity) for name, levels in shift.levels().items()}
    out = shift.change(pixels, draws, values).permute(0, 2, 3, 1).numpy()
    return {name: each.double().numpy() for name, each in draws.items()}, values, out


def clouds(uniforms, side, decay):
    """Diamond-square on a torus, point by point."""
    heights, taken = {(0, 0): 0.0}, iter(uniforms.tolist())
    step, wibble = side, 100.0

    def rough(neighbours):
        level = sum(heights[row % side, column % side] for row, column in neighbours) / 4
        return level + wibble * (-wibble + 2 * wibble * next(taken))

    while step > 1:
        half, corners = step // 2, range(0, side, step)
        new = {}
        for row in corners:
            for column in corners:
                square = [(row + i, column + j) for i in (0, step) for j in (0, step)]
                new[row + half, column + half] = rough(square)
        heights.update(new)
        for down, right in ((0, half), (half, 0)):
            new = {}
            for row in corners:
                for column in corners:
                    here = row + down, column + right
                    diamond = [(here[0] + i, here[1] + j) for i, j in ((half, 0), (-half, 0), (0, half), (0, -half))]
                    new[here] = rough(diamond)
            heights.update(new)
        step, wibble = half, wibble / decay
    assert next(taken, None) is None
    grid = np.array([[heights[row, column] for column in range(side)] for row in range(side)])
    grid -= grid.min()
    return grid / grid.max()


@pytest.mark.parametrize("side", [2, 4, 32])
@pytest.mark.parametrize("decay", [1.4, 2.0, 3.0])
def test_plasma_follows_the_recurrence(side, decay):
    uniforms = np.random.default_rng(side).random((3, side * side - 1))
    maps = plasma(torch.from_numpy(uniforms), decay).numpy()
    for row, ours in zip(uniforms, maps, strict=True):
        assert np.abs(ours - clouds(row, side, decay)).max() < 1e-12
        assert (ours.min(), ours.max()) == (0, 1)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_fog_bytes(severity):
    images = textured(3, 32, 27)
    images[1] //= 3  # so that the brightest pixel is not white
    draws, values, ours = run(RefFog(), images, severity)
    for image, uniforms, out in zip(images, draws["plasma"], ours, strict=True):
        x = image / 255.0
        top = x.max()
        x += values["amount"] * clouds(uniforms, 32, values["decay"])[:32, :27, None]
        expected = np.clip(x * top / (top + values["amount"]), 0, 1) * 255
        assert np.array_equal(out, expected.astype(np.uint8))


def zoomed(plane, zoom):
    cut = []
    for size in plane.shape:
        crop = math.ceil(size / zoom)
        cut.append(slice((size - crop) // 2, (size - crop) // 2 + crop))
    grown = ndimage.zoom(plane[tuple(cut)], zoom, order=1)
    trim = [(after - before) // 2 for after, before in zip(grown.shape, plane.shape, strict=True)]
    return grown[trim[0] : trim[0] + plane.shape[0], trim[1] : trim[1] + plane.shape[1]]


@pytest.mark.parametrize("zoom", [1, 1.25, 1.75, 2, 2.25, 2.5, 3, 3.7, 4, 4.5, 11])
@pytest.mark.parametrize("shape", [(224, 224), (64, 64), (33, 47), (5, 1)], ids=str)
def test_magnification_equals_scipy(zoom, shape):
    planes = np.random.default_rng(0).normal(size=(2, *shape))
    ours = magnified(torch.from_numpy(planes), zoom).numpy()
    assert np.abs(ours - np.stack([zoomed(plane, zoom) for plane in planes])).max() < 1e-12


def test_magnification_loses_the_last_row_where_scipy_does():
    lost = 0
    for size in range(2, 60):
        planes = np.ones((1, size, size))
        expected = zoomed(planes[0], 1.75)
        lost += int((expected == 0).any())
        assert np.array_equal(magnified(torch.from_numpy(planes), 1.75)[0].numpy() == 0, expected == 0), size
    assert lost > 0


@pytest.mark.parametrize("width", [256, 219])
def test_grey_equals_opencv_to_the_last_digit(width):
    colours = np.random.default_rng(0).integers(0, 256, (300, width, 3)).astype(np.float32) / np.float32(255)
    ours = _grey(torch.from_numpy(colours).permute(2, 0, 1)[None])[0, 0].numpy()
    assert np.array_equal(ours, cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY))


def streaked(layer, radius, sigma, angle):
    """ImageMagick's motion blur of an 8-bit plane: rounded to 16 bits, truncated to 8."""
    count = 2 * math.ceil(radius) + 1
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    total = np.zeros(layer.shape)
    height, width = layer.shape
    for step, weight in enumerate(weights):
        down = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
        right = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
        rows, columns = np.arange(height) + down, np.arange(width) + right
        total += weight * 257 * layer[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
    return np.floor(np.floor(total + 0.5) / 257)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(64, 64), (50, 41)], ids=str)
def test_snow_bytes(severity, size):
    images = textured(3, *size, seed=1)
    draws, values, ours = run(RefSnow(), images, severity)
    for image, normal, uniform, out in zip(images, draws["layer"], draws["angle"], ours, strict=True):
        layer = zoomed(values["mean"] + values["std"] * normal, values["zoom"])
        layer[layer < values["threshold"]] = 0
        layer = (np.clip(layer, 0, 1) * 255).astype(np.uint8)
        snow = streaked(layer, values["radius"], values["sigma"], -135 + 90 * uniform)[..., None] / 255.0
        x, mix = image.astype(np.float32) / np.float32(255), values["mix"]
        grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None]
        x = np.float32(mix) * x + np.float32(1 - mix) * np.maximum(x, grey * np.float32(1.5) + np.float32(0.5))
        expected = np.clip(x + snow + np.rot90(snow, 2), 0, 1) * 255
        assert np.array_equal(out, expected.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("frost")
    for number, name in enumerate(("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")):
        assert cv2.imwrite(str(place / name), textured(1, 150 + 7 * number, 190 - 9 * number, seed=number)[0])
    return place


@pytest.mark.parametrize(("scale", "size"), [(1, (60, 51)), (0.3, (32, 32)), (0.2, (28, 20))])
@pytest.mark.parametrize("severity", [1, 4])
def test_frost_bytes(folder, scale, size, severity):
    images = textured(12, *size, seed=2)
    draws, values, ours = run(RefFrost(textures=str(folder), scale=scale), images, severity)
    names = sorted(folder.iterdir())
    assert len(set(draws["picture"].tolist())) == 5
    for image, number, place, out in zip(images, draws["picture"], draws["place"], ours, strict=True):
        frost = cv2.imread(str(names[int(number)]))
        if scale != 1:
            frost = cv2.resize(frost, (0, 0), fx=scale, fy=scale)
        row, column = (int(place[axis] * (frost.shape[axis] - size[axis])) for axis in (0, 1))
        frost = frost[row : row + size[0], column : column + size[1], ::-1]
        expected = np.clip(values["image_share"] * image + values["frost_share"] * frost, 0, 255)
        assert np.array_equal(out, expected.astype(np.uint8))


def watered(image, liquid, strength):
    level = (liquid * 255).astype(np.uint8)
    edges = cv2.Canny(level, 50, 150)
    distance = cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5)
    distance = cv2.threshold(distance, 20, 20, cv2.THRESH_TRUNC)[1]
    distance = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    distance = cv2.filter2D(distance, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    light = level * cv2.blur(distance, (3, 3)).astype(np.float32)
    light = light / light.max() * np.float32(strength)
    colour = (np.array([175, 238, 238]) / 255).astype(np.float32)
    return image + light[..., None] * colour


def muddied(image, liquid, threshold, sigma):
    opacity = gaussian((liquid > threshold).astype(np.float32), sigma)
    opacity[opacity < 0.8] = 0
    colour = (np.array([63, 42, 20]) / 255).astype(np.float32)
    return image * (1 - opacity[..., None]) + colour * opacity[..., None]


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(224, 210), (70, 83)], ids=str)
def test_spatter_bytes(severity, size):
    images = textured(4, *size, seed=3)
    draws, values, ours = run(RefSpatter(), images, severity)
    for image, normal, out in zip(images, draws["layer"], ours, strict=True):
        liquid = gaussian(values["mean"] + values["std"] * normal, values["sigma"])
        liquid[liquid < values["threshold"]] = 0
        assert liquid.any(), "nothing to compare"
        x = image.astype(np.float32) / np.float32(255)
        wet = values["mud"] == 0
        x = (
            watered(x, liquid, values["strength"])
            if wet
            else muddied(x, liquid, values["threshold"], values["strength"])
        )
        assert x.dtype == np.float32
        assert np.array_equal(out, (np.clip(x, 0, 1) * 255).astype(np.uint8))

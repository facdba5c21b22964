"""Physical blurs against SciPy and closed forms."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from corruptions.blur import DefocusBlur, GaussianBlur, disc_kernel, gaussian_kernel, image_by_image, separable
from corruptions.motion import MotionBlur, gather_along, line_taps
from robustlab.core.shift import ShiftContext
from robustlab.core.types import Batch

BLURS = [GaussianBlur(), MotionBlur()]


def gaussian(pixels, images):
    """Return the blur of a standard deviation in pixels."""
    return GaussianBlur.at(sigma=100 * pixels / images.shape[2])


def motion(pixels, images):
    """Return the blur of a length in pixels."""
    return MotionBlur.at(length=100 * pixels / images.shape[2])


def texture(count, channels, height, width, seed=0):
    noise = torch.rand((count, channels, height, width), generator=torch.Generator().manual_seed(seed))
    return (noise * 255).to(torch.uint8)


def angles_of(count, seed=0):
    batch = Batch(torch.zeros(count, 1, 1, 1), None, torch.arange(count))
    return MotionBlur().prepare(batch, ShiftContext(seed=seed))["angle"]


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.25, 0.3, 0.5, 0.8, 1.0, 1.7, 2.6, 4.0, 12.3])
def test_the_gaussian_kernel_has_the_variance_it_is_named_after(sigma):
    kernel = gaussian_kernel(sigma)
    place = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert (kernel * place**2).sum() == pytest.approx(sigma**2, rel=1e-9)
    np.testing.assert_array_equal(kernel, kernel[::-1])
    # a normal distribution: the logarithm is a parabola
    assert np.ptp(np.diff(np.log(kernel[kernel > 1e-200]), 2)) < 1e-6 * abs(np.log(kernel[0] / kernel.max()))


def test_gaussian_kernels_move_smoothly_also_where_the_reach_grows():
    def padded(sigma):
        kernel = gaussian_kernel(sigma)
        return np.pad(kernel, 40 - len(kernel) // 2)

    sigmas = np.arange(0.002, 5, 0.002)
    jumps = [np.abs(padded(low) - padded(low + 0.002)).max() for low in sigmas]
    assert max(jumps) < 0.004


@pytest.mark.parametrize("sigma", [1.0, 1.7, 2.6, 4.0])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gaussian_blur_is_scipys_on_mirrored_borders(sigma, channels):
    images = torch.rand((2, channels, 41, 33), generator=torch.Generator().manual_seed(1))
    ours = gaussian(sigma, images)(images, 1).numpy()
    theirs = scipy.ndimage.gaussian_filter(images.numpy().astype(np.float64), (0, 0, sigma, sigma), mode="reflect")
    # the width of the cut kernel is raised by half a thousandth, so that its variance is sigma^2
    assert np.abs(ours - theirs).max() < 3e-4
    kernel = gaussian_kernel(sigma)
    exact = images.numpy().astype(np.float64)
    for axis in (2, 3):
        exact = scipy.ndimage.correlate1d(exact, kernel, axis=axis, mode="reflect")
    assert np.abs(ours - exact).max() < 1e-6


def test_gaussian_blur_keeps_the_mean_and_adds_variances():
    images = torch.rand((2, 1, 50, 60), generator=torch.Generator().manual_seed(2))
    blurred = gaussian(7.0, images)(images, 1)
    assert blurred.mean((1, 2, 3)).tolist() == pytest.approx(images.mean((1, 2, 3)).tolist(), abs=1e-6)
    twice = gaussian(2.4, images)(gaussian(1.8, images)(images, 1), 1)
    once = gaussian(3.0, images)(images, 1)
    assert (twice - once).abs().max().item() < 3e-4


def test_what_other_devices_run_is_the_same_blur():
    images = torch.rand((3, 3, 30, 21), generator=torch.Generator().manual_seed(3))
    for sigma in (0.2, 1.1, 4.0):
        assert torch.allclose(separable(images, gaussian_kernel(sigma)), gaussian(sigma, images)(images, 1), atol=1e-6)
    for length in (0.4, 3.0, 13.0):
        taps = line_taps(angles_of(3), length)
        ids = torch.arange(3)
        assert torch.allclose(gather_along(images, *taps), motion(length, images)(images, 1, ids=ids), atol=1e-6)


@pytest.mark.parametrize("blur", BLURS, ids=repr)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (4, 9, 2), (3, 45, 50), (1, 64, 61)], ids=str)
def test_bytes_become_what_floats_would_be_stored_as(blur, shape):
    pixels = texture(5, *shape)
    ids = torch.arange(5)
    for severity in (0.2, 1, 3, 5):
        stored = (blur(pixels.float() / 255, severity, ids=ids) * 255).round().to(torch.uint8)
        assert torch.equal(blur(pixels, severity, ids=ids), stored)


@pytest.mark.parametrize("blur", BLURS, ids=repr)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_neither_batch_nor_memory_layout_changes_a_bit(blur, channels):
    pixels = texture(7, channels, 43, 38)
    for images in (pixels, pixels.float() / 255):
        ids = torch.arange(7)
        whole = blur(images, 3.3, ids=ids)
        assert torch.equal(blur(images.to(memory_format=torch.channels_last), 3.3, ids=ids), whole)
        assert torch.equal(blur(images.flip(0), 3.3, ids=ids.flip(0)).flip(0), whole)
        parts = [blur(images[index : index + 1], 3.3, ids=ids[index : index + 1]) for index in range(7)]
        assert torch.equal(torch.cat(parts), whole)
        transposed = images.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(blur(transposed, 3.3, ids=ids), whole)


def test_threads_change_no_bit():
    # large enough to be worth a thread
    pixels, before = texture(5, 3, 80, 80), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([blur(pixels, 4, ids=torch.arange(5)) for blur in BLURS])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_come_one_by_one_with_their_place(channels):
    images = texture(4, channels, 6, 5).float()
    places = []

    def keep(place, image, scratch):
        places.append(place)
        assert image.flags.c_contiguous
        assert scratch.shape == image.shape
        return image + place

    done = image_by_image(keep, images)
    assert torch.equal(done, images + torch.arange(4).view(4, 1, 1, 1))
    assert sorted(places) == sorted(list(range(4)) * (1 if channels == 3 else channels))


def moments(rows, columns, weights):
    """Mass, centroid and covariance of taps, each (N,)."""
    rows, columns = rows.double(), columns.double()
    mean = [(weights * each).sum(1) for each in (rows, columns)]
    second = [(weights * a * b).sum(1) for a, b in ((rows, rows), (rows, columns), (columns, columns))]
    return weights.sum(1), mean, second


@pytest.mark.parametrize("length", [0.01, 0.7, 3.0, 8.0, 20.0])
def test_the_line_weighs_one_does_not_move_and_has_the_moments_of_a_line(length):
    angle = torch.linspace(0, 180, 181)
    mass, mean, second = moments(*line_taps(angle, length))
    assert (mass - 1).abs().max().item() < 1e-9
    assert max(each.abs().max().item() for each in mean) < 1e-9
    # a line of uniform mass has variance length^2 / 12 along itself; interpolation adds at most a quarter of a pixel
    theta = angle.double() * math.pi / 180
    right, up = torch.cos(theta), torch.sin(theta)
    along = second[2] * right**2 + second[0] * up**2 - 2 * second[1] * right * up
    across = second[2] * up**2 + second[0] * right**2 + 2 * second[1] * right * up
    # interpolation adds f (1 - f) <= 1/4 along the longer axis, and as much across
    assert (along - length**2 / 12).min().item() > -1e-9
    assert (along - length**2 / 12).max().item() < 0.5
    assert across.min().item() > -1e-9
    assert across.max().item() < 0.5


def test_a_level_or_upright_line_is_the_closed_form_of_a_box():
    impulse = torch.zeros(1, 1, 31, 31)
    impulse[0, 0, 15, 15] = 1
    for angle, axis in ((0.0, 1), (90.0, 0), (180.0, 1)):
        rows, columns, weights = line_taps(torch.tensor([angle]), 6.5)
        spread = gather_along(impulse.double(), rows, columns, weights)[0, 0]
        line = spread.sum(1 - axis)
        inner = torch.full((5,), 1 / 6.5, dtype=torch.float64)
        # the hat of the pixel k = 3 lies inside the half line 3.25 but for its last 3/4 px
        third, fourth = (1 - 0.75**2 / 2) / 6.5, 0.25**2 / 2 / 6.5
        ends = torch.tensor([fourth, third], dtype=torch.float64)
        expected = torch.cat([torch.zeros(11), ends, inner, ends.flip(0), torch.zeros(11)])
        assert torch.allclose(line, expected.double(), atol=1e-12)


def test_lines_turn_and_grow_without_jumps():
    def kernel(angle, length):
        rows, columns, weights = line_taps(torch.tensor([angle], dtype=torch.float64), length)
        total = torch.zeros(31, 31, dtype=torch.float64)
        total.index_put_((rows[0] + 15, columns[0] + 15), weights[0], accumulate=True)
        return total

    for angle in [*np.arange(0, 180, 3.7).tolist(), 45.0, 90.0, 135.0]:
        assert (kernel(angle - 0.005, 17.3) - kernel(angle + 0.005, 17.3)).abs().max().item() < 1e-3
    for length in [*np.arange(0.005, 20, 0.37).tolist(), 2.0, 4.0, 14.142]:
        assert (kernel(33.0, length - 0.004) - kernel(33.0, length + 0.004)).abs().max().item() < 3e-3


def test_a_point_is_smeared_along_the_drawn_direction():
    images = torch.zeros(40, 1, 33, 33)
    images[:, :, 16, 16] = 1
    ids = torch.arange(40)
    smeared = motion(15.0, images)(images, 1, ids=ids)[:, 0].double()
    place = torch.arange(33).double() - 16
    rows = (smeared * place[:, None]).sum((1, 2))
    columns = (smeared * place[None, :]).sum((1, 2))
    assert max(rows.abs().max().item(), columns.abs().max().item()) < 1e-5
    yy, xx, xy = (
        (smeared * weight).sum((1, 2))
        for weight in (place[:, None] ** 2, place[None, :] ** 2, -place[:, None] * place[None, :])
    )
    measured = torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy)) % 180
    off = (measured - angles_of(40) + 90) % 180 - 90
    assert off.abs().max().item() < 3


def test_angles_are_uniform_over_the_half_turn():
    angles = angles_of(4000, seed=4).double()
    assert 0 <= angles.min().item() < 1
    assert 179 < angles.max().item() < 180
    assert angles.mean().item() == pytest.approx(90, abs=4 * 180 / math.sqrt(12 * 4000))
    counts = torch.histc(angles, 12, 0, 180)
    assert ((counts - 4000 / 12) ** 2 / (4000 / 12)).sum().item() < 31.3  # chi-square, 11 degrees, p = 0.001


@pytest.mark.parametrize("radius", [0.2, 0.7, 1.6, 3.0, 7.9])
def test_the_disc_has_the_second_moment_of_a_disc(radius):
    kernel = disc_kernel(radius)
    place = np.arange(len(kernel)) - len(kernel) // 2
    moment = (kernel * place[None, :] ** 2).sum()
    # radius^2 / 4 along each axis; interpolation adds the mean of f (1 - f), at most a quarter, 1/6 on wide discs
    assert radius**2 / 4 <= moment <= radius**2 / 4 + 0.25
    if radius > 3:
        assert moment == pytest.approx(radius**2 / 4 + 1 / 6, abs=0.02)


def test_tiny_blurs_do_almost_nothing_and_zero_nothing():
    images = texture(2, 3, 12, 12).float() / 255
    for blur, name in ((GaussianBlur, "sigma"), (MotionBlur, "length"), (DefocusBlur, "radius")):
        assert torch.equal(blur.at(**{name: 0.0})(images, 1), images)
        harm = [(blur.at(**{name: value})(images, 1) - images).abs().max().item() for value in (1e-4, 1e-2, 0.1)]
        assert harm[0] < 1e-3
        assert harm[0] <= harm[1] < harm[2]


@pytest.mark.parametrize("kind", [GaussianBlur, DefocusBlur])
def test_gradients_pass_through(kind):
    images = texture(2, 3, 24, 20).float().div_(320).add_(0.1).requires_grad_(True)
    blurred = kind()(images, 3, ids=torch.arange(2))
    assert torch.allclose(blurred, kind()(images.detach(), 3, ids=torch.arange(2)), atol=1e-5)
    (gradient,) = torch.autograd.grad(blurred.sum(), images)
    assert gradient.sum().item() == pytest.approx(images.numel(), rel=1e-4)

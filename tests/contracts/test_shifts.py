"""What every registered corruption, and compositions of them, must hold."""

import dataclasses
import itertools
import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corruptions import (
    JPEG,
    Compose,
    DefocusBlur,
    FromAlbumentations,
    Gamma,
    GaussianNoise,
    OneOf,
    PoissonNoise,
    SomeOf,
)
from robustlab.core.corruption import STAGES, Corruption
from robustlab.core.errors import ConfigError, KindError, RangeError, UnknownNameError
from robustlab.core.registry import COMBINATORS, CORRUPTIONS, SUITES
from robustlab.core.rng import SampleRng
from robustlab.core.shift import Shift, ShiftContext, quantize, to_bytes
from robustlab.core.spec import canonical_json, fingerprint, from_dict, to_dict
from robustlab.core.types import Batch, ImageSpec

CORRUPTION_NAMES = CORRUPTIONS.names()
FAMILIES = (
    "noise",
    "resolution",
    "blur",
    "staining",
    "contrast",
    "compression",
    "artifacts",
    "geometry",
    "weather",
)
MIX = {
    "compose": Compose([DefocusBlur(), PoissonNoise(), JPEG()]),
    "one-of": OneOf([GaussianNoise(), Gamma(), JPEG()]),
    "nested": Compose([OneOf([GaussianNoise(), DefocusBlur()]), Gamma()]),
}
SHIFTS: dict[str, Shift] = {name: CORRUPTIONS.get(name)() for name in CORRUPTION_NAMES} | MIX


def smooth(count, channels, height, width, seed=0):
    """Textured images with structure at several scales, on 8-bit levels like a decoded file."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, channels, height, width)
    for cells in (3, 9, 27):
        coarse = torch.rand(count, channels, cells, cells, generator=generator)
        total += torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    images = (total / 3 - 0.5) * 1.6 + 0.55 + 0.03 * torch.rand(total.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round() / 255


def batch_of(count, channels, height, width, seed=0):
    return Batch(smooth(count, channels, height, width, seed), None, torch.arange(100, 100 + count))


def applies(shift, channels, size=(224, 224)):
    return shift.skip_reason(ImageSpec(channels, size)) is None


def channels_of(shift):
    return next(channels for channels in (3, 1) if applies(shift, channels))


def fitting(shift, height, width):
    """Return the size, or the smallest one that the shift can work on."""
    least = getattr(shift, "min_size", 1)
    return max(height, least), max(width, least)


def physical(shift):
    return getattr(shift, "mode", "physical") == "physical"


@pytest.fixture(params=list(SHIFTS), ids=list(SHIFTS))
def shift(request):
    return SHIFTS[request.param]


@pytest.fixture(params=CORRUPTION_NAMES)
def corruption(request):
    return CORRUPTIONS.get(request.param)()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_severity_zero_is_the_identity_bit_for_bit(shift, dtype):
    images = smooth(2, channels_of(shift), *fitting(shift, 20, 17)).to(dtype)
    assert torch.equal(shift(images, 0), images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_shape_dtype_range_are_kept_and_the_input_is_unchanged(shift, dtype):
    images = smooth(3, channels_of(shift), *fitting(shift, 31, 33)).to(dtype)
    before = images.clone()
    changed = shift(images, 4)
    assert changed.shape == images.shape
    assert changed.dtype == dtype
    assert changed.device == images.device
    assert bool(torch.isfinite(changed).all())
    assert not shift.storable or 0 <= changed.min().item() <= changed.max().item() <= 1
    assert torch.equal(images, before)
    assert not torch.equal(changed, images)


@pytest.mark.parametrize("height_width", [(1, 1), (31, 33), (28, 28), (64, 64), (221, 219)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_size_and_number_of_channels(shift, channels, height_width):
    batch = batch_of(2, channels, *height_width)
    if not applies(shift, channels, height_width):
        with pytest.raises(ConfigError, match=r"channels|at least"):
            shift.on(batch, 3, ShiftContext())
        return
    for severity in (0.3, 3, 5):
        images = shift.on(batch, severity, ShiftContext()).images
        assert images.shape == batch.images.shape
        assert bool(torch.isfinite(images).all())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(7)),
    cut=st.integers(1, 6),
    size=st.sampled_from([(1, 1), (9, 14), (31, 33)]),
    severity=st.floats(0.1, 5),
)
def test_split_order_and_padding_of_the_batch_change_no_bit(order, cut, size, severity):
    for shift in SHIFTS.values():
        batch = batch_of(7, channels_of(shift), *fitting(shift, *size))
        whole = shift.on(batch, severity, ShiftContext(seed=3)).images
        index = torch.tensor(order)
        shuffled = batch.select(index)
        parts = [shuffled.select(part) for part in (torch.arange(cut), torch.arange(cut, 7))]
        padded = [part.select(torch.tensor([*range(len(part)), 0, 0])) for part in parts]
        for group in (parts, padded):
            done = [
                shift.on(part, severity, ShiftContext(seed=3)).images[: len(real)]
                for part, real in zip(group, parts, strict=True)
            ]
            assert torch.equal(torch.cat(done), whole[index]), repr(shift)


def test_one_large_sample_alone_equals_the_batch_bit_for_bit(shift):
    batch = batch_of(3, channels_of(shift), *fitting(shift, 224, 200))
    whole = shift.on(batch, 3.3, ShiftContext()).images
    alone = shift.on(batch.select(torch.tensor([1])), 3.3, ShiftContext()).images
    assert torch.equal(whole[1], alone[0])
    strided = dataclasses.replace(batch, images=batch.images.to(memory_format=torch.channels_last))
    assert torch.equal(shift.on(strided, 3.3, ShiftContext()).images, whole)


def test_seeds_and_ids_decide_the_draws(shift):
    batch = batch_of(6, channels_of(shift), *fitting(shift, 16, 16))
    first = shift.on(batch, 3, ShiftContext(seed=1)).images
    assert torch.equal(shift.on(batch, 3, ShiftContext(seed=1)).images, first)
    draws = shift.prepare(batch, ShiftContext())
    if isinstance(shift, Corruption) and not draws:
        assert torch.equal(shift.on(batch, 3, ShiftContext(seed=2)).images, first)
        return
    if getattr(shift, "keyed_by", "sample") == "device":  # one scanner took all images, at any time
        assert not torch.equal(shift.on(batch, 3, ShiftContext(seed=2)).images, first)
        assert torch.equal(shift.on(batch, 3, ShiftContext(seed=1, epoch=1)).images, first)
        return
    for other in (ShiftContext(seed=2), ShiftContext(seed=1, epoch=1), ShiftContext(seed=1, step=1)):
        assert not torch.equal(shift.on(batch, 3, other).images, first)
    renamed = dataclasses.replace(batch, ids=batch.ids + 1000)
    assert not torch.equal(shift.on(renamed, 3, ShiftContext(seed=1)).images, first)


def test_one_preparation_serves_every_severity(shift):
    batch, ctx = batch_of(4, channels_of(shift), *fitting(shift, 16, 19)), ShiftContext(seed=5)
    draws = shift.prepare(batch, ctx)
    for severity in (4, 0.5, 2.5, 4):
        assert torch.equal(shift.perform(batch, draws, severity, ctx).images, shift.on(batch, severity, ctx).images)


def test_draws_do_not_see_pixels(corruption):
    batch = batch_of(4, channels_of(corruption), *fitting(corruption, 12, 12))
    other = batch.replace(1 - batch.images)
    first, second = (corruption.prepare(each, ShiftContext()) for each in (batch, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [28, 64])
def test_harm_rises_strictly(shift, size):
    if not physical(shift):
        pytest.skip("published as it is; the cases that are not monotone are listed in docs/validation.md")
    batch = batch_of(6, channels_of(shift), *fitting(shift, size, size), seed=2)
    harm = [
        (shift.on(batch, severity, ShiftContext()).images - batch.images).abs().mean().item()
        for severity in (0, 1, 2, 3, 4, 5)
    ]
    assert all(low < high for low, high in itertools.pairwise(harm)), harm


def test_parameters_move_without_jumps(corruption):
    batch, ctx = batch_of(3, channels_of(corruption), *fitting(corruption, 40, 40)), ShiftContext()
    if corruption.name in ("pixelate", "jpeg", "poisson-noise") or not physical(corruption):
        pytest.skip("counts whole pixels, quality steps, photons or grey levels")
    for severity in (0.0, 1.0, 2.0, 3.7):
        low, high = (corruption.on(batch, at, ctx).images for at in (severity, severity + 1e-4))
        assert (high - low).abs().mean().item() < 1e-3


def test_json_pickle_and_repr_bring_it_back(shift):
    again = from_dict(json.loads(canonical_json(shift)))
    assert again == shift
    assert fingerprint(again) == fingerprint(shift)
    assert pickle.loads(pickle.dumps(shift)) == shift
    assert type(shift).__name__ in repr(shift)
    batch = batch_of(3, channels_of(shift), *fitting(shift, 16, 16))
    assert torch.equal(again.on(batch, 2, ShiftContext()).images, shift.on(batch, 2, ShiftContext()).images)


def test_every_parameter_matters_and_at_fixes_it(corruption):
    batch, ctx = batch_of(4, channels_of(corruption), *fitting(corruption, 40, 40)), ShiftContext()
    plain = corruption.on(batch, 2, ctx).images
    for name, levels in corruption.levels().items():
        fixed = type(corruption).at(**{name: levels.at(5)})
        assert fixed.parameters(1)[name] == fixed.parameters(5)[name] == (levels.at(5), levels.unit)
        assert fingerprint(fixed) != fingerprint(corruption)
        values = (levels.at(5), levels.at(1), 0.3 * levels.at(2))  # published tables repeat values
        assert any(
            not torch.equal(type(corruption).at(**{name: value}).on(batch, 2, ctx).images, plain) for value in values
        ), name
        assert torch.equal(fixed.on(batch, 0, ctx).images, batch.images)
    with pytest.raises(ConfigError, match="Check the spelling"):
        type(corruption).at(nonsense=1.0)


def test_parameters_outside_their_range_are_refused(corruption):
    for name, levels in corruption.levels().items():
        away = levels.values[4] > levels.values[0] or levels.identity == float("inf")
        beyond = -1.0 if away else 1e6
        with pytest.raises(RangeError, match=name):
            type(corruption).at(**{name: beyond})


def test_metadata_is_complete(corruption):
    assert corruption.family in FAMILIES
    assert corruption.label_safety in ("safe", "conditional", "unsafe")
    assert corruption.stage in STAGES
    assert corruption.levels(), "no physical parameter"
    assert all(levels.unit for levels in corruption.levels().values())
    assert (type(corruption).__doc__ or "").splitlines()[0].endswith(".")


@pytest.mark.parametrize(
    "name",
    ["brightness", "down-up-sampling", "glass-blur", "ref:glass-blur", "ref:ladine-noise", "ref:ladine-resolution"],
)
def test_what_may_hide_the_finding_says_so(name):
    assert CORRUPTIONS.get(name).label_safety == "conditional"


def test_the_validation_page_has_a_row_for_it(corruption):
    page = (Path(__file__).resolve().parents[2] / "docs" / "validation.md").read_text()
    named = rf"^\|[^|]*(?<![\w:-]){re.escape(corruption.name)}(?![\w-])[^|]*\|"
    assert re.search(named, page, flags=re.MULTILINE), "no row has it in its first column"


def test_global_random_state_is_neither_read_nor_changed(shift):
    batch = batch_of(4, channels_of(shift), *fitting(shift, 16, 16))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        results.append(shift.on(batch, 3, ShiftContext()).images)
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert torch.equal(*results)


def test_quantised_output_equals_what_a_file_would_hold(shift):
    if not shift.storable:
        pytest.skip("its values leave [0, 1]; no file holds them")
    channels = channels_of(shift)
    images = shift(smooth(2, channels, *fitting(shift, 20, 20)), 3)
    stored = np.round(images.numpy() * np.float32(255)).astype(np.uint8)
    read = torch.from_numpy(stored).to(torch.float32) / 255
    assert torch.equal(quantize(images, ImageSpec(channels, (20, 20))), read)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("channels", "size"), [(3, (224, 224)), (1, (65, 47))], ids=str)
def test_the_number_of_threads_changes_no_bit(corruption, channels, size, threads):
    size = fitting(corruption, *size)
    if not applies(corruption, channels, size):
        pytest.skip(corruption.skip_reason(ImageSpec(channels, size)))
    floats = batch_of(5, channels, *size)
    for batch in (floats, floats.replace(to_bytes(floats.images))):
        results = []
        for count in (1, 2):
            threads(count)
            results.append(corruption.on(batch, 3.3, ShiftContext()).images)
        assert torch.equal(*results), batch.images.dtype


def stage_of(name):
    return STAGES.index(CORRUPTIONS.get(name).stage)


def pairs():
    """Each registered corruption as first part, and as last, of a pair in physical order; the partner is drawn."""
    chosen = random.Random(0)
    found = []
    for name in CORRUPTION_NAMES:
        others = [other for other in CORRUPTION_NAMES if other != name]
        after = [other for other in others if stage_of(other) >= stage_of(name)]
        before = [other for other in others if stage_of(other) <= stage_of(name)]
        found += [(name, chosen.choice(after)), (chosen.choice(before), name)]
    return sorted(set(found))


@pytest.mark.parametrize(("first", "last"), pairs())
def test_compositions_make_the_same_stored_bytes_of_bytes_and_floats(first, last):
    parts = [CORRUPTIONS.get(name)() for name in (first, last)]
    least = max(part.min_size for part in parts)
    size = max(37, least), max(40, least)
    kinds = [Compose(parts), OneOf(parts), SomeOf(parts, 2), SomeOf(parts, 1), Compose([OneOf(parts), parts[1]])]
    channels = [count for count in (3, 1) if applies(kinds[0], count, size)]
    if not channels:
        pytest.skip(kinds[0].skip_reason(ImageSpec(3, size)))
    for count, severity in itertools.product(channels, (3, 5)):
        floats = batch_of(5, count, *size)
        for shift in kinds:
            if shift.storable:
                wanted = to_bytes(shift.on(floats, severity, ShiftContext()).images)
                got = shift.on(floats.replace(to_bytes(floats.images)), severity, ShiftContext()).images
                assert torch.equal(got, wanted), f"{shift!r} at severity {severity}, {count} channels"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("whole", [False, True], ids=["floats", "bytes"])
def test_cuda_agrees_with_the_cpu(shift, whole):
    batch = batch_of(4, channels_of(shift), *fitting(shift, 64, 61))
    if whole:
        batch = batch.replace(to_bytes(batch.images))
    for severity in (1, 3, 5):
        here = shift.on(batch, severity, ShiftContext(seed=1)).images
        there = shift.on(batch.to("cuda"), severity, ShiftContext(seed=1)).images
        assert there.device.type == "cuda"
        agree(shift, here, there.cpu())


def agree(shift, here, there):
    """In reference mode what is stored is equal bit for bit; else at most 0.1 % of levels differ, and by one."""
    assert here.dtype == there.dtype
    if not physical(shift) and (shift.storable or here.dtype == torch.uint8):
        assert torch.equal(here, there)
        return
    first, second = (
        images.to(torch.int64) if images.dtype == torch.uint8 else (images.double() * 255).round()
        for images in (here, there)
    )
    off = (first - second).abs()
    assert off.max().item() <= 1
    assert (off > 0).float().mean().item() <= 1e-3


def test_agreement_sees_one_level_on_a_few_pixels():
    exact, close = CORRUPTIONS.get("ref:gaussian-blur")(), CORRUPTIONS.get("gaussian-blur")()
    images = smooth(4, 3, 64, 61) * 0.9
    for here, step in ((images, 1 / 255), (to_bytes(images), 1)):
        one, many, far = here.clone(), here.clone(), here.clone()
        one.view(-1)[7] += step
        many.view(-1)[::900] += step
        far.view(-1)[7] += 2 * step
        agree(close, here, one)
        for shift, there in ((exact, one), (close, many), (close, far)):
            with pytest.raises(AssertionError):
                agree(shift, here, there)


def test_two_equal_noise_stages_are_independent():
    batch = Batch(torch.full((8, 1, 64, 64), 0.5), None, torch.arange(8))
    sigma = 0.05
    noise = GaussianNoise.at(sigma=sigma)
    twice = Compose([noise, noise]).on(batch, 1, ShiftContext()).images
    assert (twice - 0.5).std().item() == pytest.approx(sigma * 2**0.5, rel=0.02)


def test_one_of_takes_each_branch_about_equally_for_each_sample():
    shift = OneOf([GaussianNoise(), Gamma.at(exponent=3.0), JPEG.at(quality=1)])
    count = 3000
    batch = Batch(smooth(1, 1, 8, 8).expand(count, 1, 8, 8), None, torch.arange(count))
    branches = shift.prepare(batch, ShiftContext())
    sizes = [len(index) for _, index, _ in branches]
    assert sum(sizes) == count
    assert all(abs(size - count / 3) < 4.5 * (count * 2 / 9) ** 0.5 for size in sizes)
    images = shift.on(batch, 3, ShiftContext()).images
    for place, index, _ in branches:
        child = shift.shifts[place]
        alone = child.on(batch.select(index), 3, ShiftContext().child(place)).images
        assert torch.equal(images[index], alone)


def test_a_composition_merges_labels_parameters_and_reasons():
    shift = Compose([GaussianNoise(), OneOf([CORRUPTIONS.get("stain-shift")(), JPEG()])])
    assert shift.label == "gaussian-noise+stain-shift|jpeg"
    assert list(shift.parameters(3)) == [
        "1.gaussian-noise.sigma",
        "2.stain-shift|jpeg.1.stain-shift.alpha",
        "2.stain-shift|jpeg.1.stain-shift.beta",
        "2.stain-shift|jpeg.2.jpeg.quality",
    ]
    assert shift.parameters(3)["1.gaussian-noise.sigma"] == (0.10, "of full range")
    assert "stain-shift needs 3 channels" in (shift.skip_reason(ImageSpec(1, (8, 8))) or "")
    assert shift.skip_reason(ImageSpec(3, (8, 8), modality="histology")) is None


@pytest.mark.parametrize("kind", [Compose, OneOf])
@pytest.mark.parametrize(
    ("argument", "error"),
    [([], ConfigError), ([GaussianNoise], KindError), (["jpeg"], KindError), (GaussianNoise(), KindError)],
)
def test_compositions_refuse_what_is_no_shift(kind, argument, error):
    with pytest.raises(error, match=kind.__name__):
        kind(argument)


def test_registries_hold_what_the_package_exports():
    assert {"compose", "one-of"} <= set(COMBINATORS.names())
    names = [shift.name for shift in SUITES.get("standard")()]
    assert len(names) == len(set(names)) == 11
    assert set(names) <= set(CORRUPTION_NAMES)
    with pytest.raises(UnknownNameError, match="gaussian-noise"):
        CORRUPTIONS.get("gausian-noise")


def test_an_opaque_shift_is_known_by_name_and_version_only():
    shift = FromAlbumentations(lambda severity: None, name="mine", version=4)
    assert to_dict(shift) == {"type": "opaque", "name": "mine", "version": 4, "fields": {}}
    with pytest.raises(ConfigError, match="mine"):
        from_dict(to_dict(shift))


def test_draws_differ_between_corruptions_of_one_seed():
    keys = torch.arange(4)
    first, second = (ShiftContext().rng(name, 1, keys) for name in ("gaussian-noise", "poisson-noise"))
    assert isinstance(first, SampleRng)
    assert not torch.equal(first.normal("z", (5,)), second.normal("z", (5,)))

"""Contract kit: checks for people who write their own corruption."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from robustlab.core.corruption import STAGES, Corruption, Draws
from robustlab.core.errors import ContractError
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng
from robustlab.core.shift import ShiftContext, from_bytes, to_bytes
from robustlab.core.spec import canonical_json, from_dict
from robustlab.core.types import Batch, ImageSpec

__all__ = ["ContractError", "check_corruption", "textured"]

SIZES = ((1, 1), (1, 7), (28, 28), (31, 33), (64, 64), (233, 229))  # the last above 224, the usual field
_LEAST = 1e-4  # severity at which nearly nothing may change
_BEGINNING = 0.1  # of the change at severity 1; whole pixels and photons need a few percent
DTYPES = (torch.float16, torch.float32, torch.float64)


def textured(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return images with structure at several scales, on 8-bit levels like a decoded file.

    Args:
        count: Number of images.
        channels: Channels of each.
        height: In pixels.
        width: In pixels.
        seed: Of the texture.

    Returns:
        float32 (count, channels, height, width) in [0, 1].
    """
    rng = SampleRng.make(seed, "textured", torch.arange(count))
    total = 0.03 * rng.uniform("fine", (channels, height, width))
    for cells in (3, 9, 27):
        coarse = rng.uniform(f"cells {cells}", (channels, cells, cells))
        total = total + interpolate(coarse, (height, width), mode="bicubic") * (1.6 / 3)
    return from_bytes(to_bytes(total - 0.25))


def check_corruption(corruption: Corruption | type[Corruption]) -> None:
    """Check what every corruption promises; returns if all holds.

    Severity 0 is the identity bit for bit; shape, dtype and [0, 1] are kept at every size from 1 x 1 to 233 x 229 and
    on images of one value, and the input, floats or bytes, is left alone; a sample's result depends on neither its
    batch, its order, the memory layout nor the number of threads; draws are keyed by seed, epoch and id (those of a
    device: by seed), and know neither pixels nor severity; global random state is neither read nor changed; bytes in
    give the rounded result of floats in; parameters can be fixed by ``at``; the configuration survives JSON and pickle;
    in physical mode the mean absolute change begins near 0 (unless the class says ``gradual = False``) and rises
    strictly over severities 1 to 5. While it runs, it changes torch's number of threads.

    Args:
        corruption: An instance, or a class that can be made without arguments.

    Raises:
        ContractError: Something does not hold; the message says what, where, and what to do.
    """
    made = corruption() if isinstance(corruption, type) else corruption
    if not isinstance(made, Corruption):
        raise ContractError("check_corruption", "a corruption", repr(corruption), "Subclass robustlab.Corruption.")
    for check in CHECKS:
        try:
            check(made)
        except ContractError:
            raise
        except Exception as error:
            raise ContractError(
                f"{made!r}, {_words(check)}",
                "no error",
                f"{type(error).__name__}: {error}",
                "Run that check alone: it is a function of robustlab.testing.",
            ) from error


def check_metadata(corruption: Corruption) -> None:
    """Registered name, documented, parameters with units, a known stage and label safety."""
    kind = type(corruption)
    who = repr(corruption)
    if corruption.name not in CORRUPTIONS or CORRUPTIONS.get(corruption.name) is not kind:
        raise ContractError(
            who, "a registered class", repr(corruption.name), 'Decorate it: @register_corruption("my-name").'
        )
    if not (kind.__doc__ or "").strip():
        raise ContractError(who, "a docstring", "none", "Say in one sentence what the corruption does.")
    if not corruption.levels():
        raise ContractError(
            who, "a field of type Levels", "none", "Give the physical parameter as Levels of five values."
        )
    if any(not levels.unit for levels in corruption.levels().values()):
        raise ContractError(who, "a unit for every parameter", "an empty one", "Pass unit= to Levels.")
    if corruption.stage and corruption.stage not in STAGES:
        raise ContractError(who, f"a stage among {', '.join(STAGES)}", repr(corruption.stage), "Check the spelling.")


def check_identity(corruption: Corruption) -> None:
    """Severity 0 returns the input bit for bit, in every dtype; the base class sees to it, unless overridden."""
    images = textured(2, _channels(corruption), *_size(corruption, (20, 17)))
    for dtype in DTYPES:
        given = images.to(dtype)
        if not torch.equal(corruption(given, 0), given):
            raise ContractError(repr(corruption), "severity 0 to change nothing", f"changed {dtype} pixels", _CORE)
    if not torch.equal(corruption(to_bytes(images), 0), to_bytes(images)):
        raise ContractError(repr(corruption), "severity 0 to change nothing", "changed bytes", _CORE)


def check_form(corruption: Corruption) -> None:
    """Shape, dtype and range are kept, the input is left alone, at every size, channel count and dtype."""
    least = _size(corruption, (31, 33))
    sizes = dict.fromkeys((*SIZES, least, (2 * least[0] + 1, 2 * least[1] + 3)))  # some that it does apply to
    ran = False
    for (height, width), channels in itertools.product(sizes, (1, 3, 4)):
        if _reason(corruption, channels, (height, width)):
            continue
        images = textured(2, channels, height, width)
        for dtype in (*DTYPES, torch.uint8) if (height, width) == least else DTYPES[1:2]:
            given = to_bytes(images) if dtype == torch.uint8 else images.to(dtype)
            batch = Batch(given, None, torch.arange(70, 72))
            for severity in (0.3, 3.0, 5.0):
                where = f"{corruption!r} on {tuple(given.shape)} {dtype} at severity {severity:g}"
                _form(where, given, _run(corruption, batch, severity), corruption.storable)
                ran = True
    if not ran:
        raise ContractError(
            repr(corruption),
            "to apply to some images of 1, 3 or 4 channels",
            f"to none, up to {2 * least[0] + 1} x {2 * least[1] + 3} px",
            "Mend min_size, channels or skip_reason.",
        )


def check_constant(corruption: Corruption) -> None:
    """Images of one value, black, grey or white, stay images: nothing is divided by an image's own range or spread."""
    least = _size(corruption, (16, 19))
    for level, dtype in itertools.product((0, 128, 255), (torch.float32, torch.uint8)):
        given = torch.full((2, _channels(corruption), *least), level, dtype=torch.uint8)
        batch = Batch(given if dtype == torch.uint8 else from_bytes(given), None, torch.arange(70, 72))
        for severity in (0.3, 3.0, 5.0):
            where = f"{corruption!r} on {dtype} images of grey level {level} at severity {severity:g}"
            _form(where, batch.images, _run(corruption, batch, severity), corruption.storable)


def check_batch(corruption: Corruption) -> None:
    """A sample's result depends on neither its mates, their order, the layout in memory, nor the threads; bytes too."""
    small, large = _size(corruption, (9, 14)), _size(corruption, (65, 47))
    for (size, severity), whole in itertools.product(((small, 1.0), (small, 3.7), (large, 3.7)), (False, True)):
        images = textured(5, _channels(corruption), *size)
        batch = Batch(to_bytes(images) if whole else images, None, torch.arange(70, 75))
        where = f"{corruption!r} on {batch.images.dtype} {tuple(batch.images.shape)} at severity {severity:g}"
        with _threads(1):
            wanted = _run(corruption, batch, severity)
            _same_in_any_batch(where, corruption, batch, severity, wanted)
        with _threads(2):
            if not torch.equal(_run(corruption, batch, severity), wanted):
                raise ContractError(
                    where,
                    "the same pixels for any number of threads",
                    "others with two than with one",
                    "Do not ask for the number; sum in a fixed order (whole sums, matmul and conv may split).",
                )
            _same_in_any_batch(where, corruption, batch, severity, wanted)


def check_draws(corruption: Corruption) -> None:
    """Draws are keyed by seed, epoch and id (a device's: by seed), repeat, and know neither pixels nor severity.

    Draws and pixels are left alone by ``apply``.
    """
    size = _size(corruption, (16, 19))
    batch = Batch(textured(6, _channels(corruption), *size), None, torch.arange(6))
    ctx = ShiftContext(seed=1)
    draws = corruption.prepare(batch, ctx)
    if not _equal(draws, corruption.prepare(batch.replace(1 - batch.images), ctx)):
        raise ContractError(repr(corruption), "draws that do not see pixels", "others for other pixels", _DRAW)
    if any(len(value) != len(batch) for value in draws.values()):
        raise ContractError(repr(corruption), "draws with one row a sample", "another length", _DRAW)
    results = {severity: _run(corruption, batch, severity, ctx) for severity in (3.0, 5.0)}
    for severity in (3.0, 5.0, 3.0):
        if not torch.equal(corruption.perform(batch, draws, severity, ctx).images, results[severity]):
            raise ContractError(repr(corruption), "the same result again", "another one", _DRAW)
    given = batch.images.clone()  # on() may hand over a copy; others who call apply need not
    corruption.apply(given, draws, {name: levels.at(3.0) for name, levels in corruption.levels().items()})
    if not torch.equal(given, batch.images):
        raise ContractError(repr(corruption), "the input left alone", "changed in place", "Work on a copy in apply.")
    order = torch.tensor([5, 0, 3])
    mates = dataclasses.replace(batch, ids=torch.tensor([5, 90, 0, 91, 92, 3]))
    among = {name: value[[0, 2, 5]] for name, value in corruption.prepare(mates, ctx).items()}
    if not _equal(among, {name: value[order] for name, value in draws.items()}):
        raise ContractError(repr(corruption), "the same draws for an id in any batch", "others", _DRAW)
    if not draws:
        return
    if torch.equal(_run(corruption, batch, 5.0, ShiftContext(seed=2)), results[5.0]):
        raise ContractError(repr(corruption), "other pixels for another seed", "the same", _DRAW)
    if corruption.keyed_by != "sample":
        return
    if torch.equal(_run(corruption, dataclasses.replace(batch, ids=batch.ids + 1000), 5.0, ctx), results[5.0]):
        raise ContractError(repr(corruption), "other pixels for other ids", "the same", f"{_DRAW} {_DEVICE}")
    if _equal(draws, corruption.prepare(batch, ShiftContext(seed=1, epoch=1))):
        raise ContractError(repr(corruption), "other draws in another epoch", "the same", f"{_DRAW} {_DEVICE}")


def check_global_state(corruption: Corruption) -> None:
    """Global random state is neither read nor changed."""
    batch = Batch(textured(3, _channels(corruption), *_size(corruption, (16, 16))), None, torch.arange(3))
    saved = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    results = []
    try:
        for seed in (1, 2):
            torch.manual_seed(seed)  # noqa: TID251 - to see whether anything reads it; restored below
            np.random.seed(seed)  # noqa: NPY002, TID251
            random.seed(seed)
            before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
            results.append(_run(corruption, batch, 3.0))
            after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
            if not torch.equal(before[0], after[0]) or before[1:] != after[1:]:
                raise ContractError(repr(corruption), "global random state left alone", "changed", _DRAW)
    finally:
        torch.set_rng_state(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002
        random.setstate(saved[2])
    if not torch.equal(*results):
        raise ContractError(repr(corruption), "no use of global random state", "it changes the result", _DRAW)


def check_bytes(corruption: Corruption) -> None:
    """Bytes in give bytes out: what floats in give, rounded half to even."""
    if not corruption.storable:
        return
    for count, size in ((3, (33, 40)), (1, (15, 12)), (4, (15, 12))):
        images = textured(count, _channels(corruption), *_size(corruption, size))
        ids = torch.arange(count)
        for severity in (0.4, 2.0, 5.0):
            floats = to_bytes(corruption(images, severity, ids=ids))
            if not torch.equal(corruption(to_bytes(images), severity, ids=ids), floats):
                raise ContractError(
                    f"{corruption!r} at severity {severity:g}",
                    "the same stored bytes for byte and float images",
                    f"others in a batch of {count}",
                    "Mend apply_bytes, or leave it to the base class.",
                )


def check_parameters(corruption: Corruption) -> None:
    """``at`` fixes a parameter and matters; the configuration survives JSON and pickle."""
    batch = Batch(textured(3, _channels(corruption), *_size(corruption, (40, 40))), None, torch.arange(3))
    for name, levels in corruption.levels().items():
        fixed = type(corruption).at(**{name: levels.at(5)})
        if fixed.parameters(1)[name] != (levels.at(5), levels.unit):
            raise ContractError(repr(corruption), f"at({name}=...) to fix it", f"{fixed.parameters(1)}", _CORE)
    again = from_dict(json.loads(canonical_json(corruption)))
    for copy in (again, pickle.loads(pickle.dumps(corruption))):
        if copy != corruption or not torch.equal(_run(copy, batch, 2.0), _run(corruption, batch, 2.0)):
            raise ContractError(
                repr(corruption),
                "an equal corruption back from JSON and pickle",
                f"{copy!r}",
                "Make it a frozen dataclass whose fields are numbers, strings, Levels, or tuples of them.",
            )
    if not dataclasses.is_dataclass(corruption):
        raise ContractError(repr(corruption), "a frozen dataclass", type(corruption).__name__, "Decorate it.")


def check_beginning(corruption: Corruption) -> None:
    """In physical mode a severity close to 0 changes close to nothing: ``identity`` is where the levels begin."""
    if corruption.mode == "reference" or not corruption.gradual:
        return
    images = textured(6, _channels(corruption), *_size(corruption, (64, 64)), seed=2)
    least, first = ((corruption(images, at) - images).abs().mean().item() for at in (_LEAST, 1))
    if least > _BEGINNING * first:
        raise ContractError(
            f"{corruption!r} at severity {_LEAST:g}",
            f"a mean change of at most {_BEGINNING * first:.3g}, {_BEGINNING:.0%} of that at severity 1",
            f"{least:.3g}",
            "Set identity= of each Levels to what changes nothing; where a step comes first, set gradual = False.",
        )


def check_harm(corruption: Corruption) -> None:
    """In physical mode the mean absolute change rises strictly over severities 0 to 5."""
    if corruption.mode == "reference":
        return
    images = textured(6, _channels(corruption), *_size(corruption, (64, 64)), seed=2)
    harm = [(corruption(images, at) - images).abs().mean().item() for at in range(6)]
    if any(low >= high for low, high in itertools.pairwise(harm)):
        raise ContractError(
            repr(corruption),
            "a mean change that rises strictly with severity",
            ", ".join(f"{value:.3g}" for value in harm),
            "Order the levels by harm, and use the same draws at all severities.",
        )


CHECKS: tuple[Callable[[Corruption], None], ...] = (
    check_metadata,
    check_identity,
    check_form,
    check_constant,
    check_batch,
    check_draws,
    check_global_state,
    check_bytes,
    check_parameters,
    check_harm,
    check_beginning,
)

_CORE = "Leave on(), perform() and at() to the base class."
_DRAW = "Make everything random in draw(), and only through rng."
_DEVICE = 'Where all images of a device share the draws, set keyed_by = "device".'


def _words(check: Callable[[Corruption], None]) -> str:
    return check.__name__.replace("_", " ")


def _run(corruption: Corruption, batch: Batch, severity: float, ctx: ShiftContext | None = None) -> Tensor:
    """Return the changed images, after a look at the given ones."""
    before = batch.images.clone()
    changed = corruption.on(batch, severity, ctx or ShiftContext()).images
    if not torch.equal(batch.images, before):
        raise ContractError(
            f"{corruption!r} on {tuple(before.shape)} {before.dtype} at severity {severity:g}",
            "the input left alone",
            "changed in place",
            f"Work on a copy in {'apply_bytes' if before.dtype == torch.uint8 else 'apply'}.",
        )
    return changed


def _same_in_any_batch(where: str, corruption: Corruption, batch: Batch, severity: float, wanted: Tensor) -> None:
    """Compare ``wanted``, the result for a contiguous batch of five, with those for parts of it and other layouts."""
    for order in ([3, 0, 4], [2]):
        index = torch.tensor(order)
        if not torch.equal(_run(corruption, batch.select(index), severity), wanted[index]):
            raise ContractError(
                where,
                "the same pixels for a sample in any batch",
                f"others for samples {order} of five",
                "Draw only through rng; sum in a fixed order (matmul, conv and mean may differ with the batch).",
            )
    layouts = {
        "channels_last images": batch.images.to(memory_format=torch.channels_last),
        "a window of larger images": torch.nn.functional.pad(batch.images, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
    }
    for layout, images in layouts.items():
        if not torch.equal(_run(corruption, batch.replace(images), severity), wanted):
            raise ContractError(
                where, "the same pixels for any layout in memory", f"others for {layout}", "Call contiguous() first."
            )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _equal(first: Draws, second: Draws) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _reason(corruption: Corruption, channels: int, size: tuple[int, int]) -> str | None:
    return corruption.skip_reason(ImageSpec(channels, size))


def _size(corruption: Corruption, size: tuple[int, int]) -> tuple[int, int]:
    return max(size[0], corruption.min_size), max(size[1], corruption.min_size)


def _channels(corruption: Corruption) -> int:
    side = max(64, corruption.min_size)
    for channels in (3, 1, 4):
        if not _reason(corruption, channels, (side, side)):
            return channels
    raise ContractError(
        repr(corruption), "to apply to images of 1, 3 or 4 channels", "to none of them", "Mend channels."
    )


def _form(who: str, given: Tensor, changed: Tensor, bounded: bool) -> None:
    if changed.shape != given.shape or changed.dtype != given.dtype or changed.device != given.device:
        raise ContractError(
            who,
            f"{given.dtype} {tuple(given.shape)} on {given.device}",
            f"{changed.dtype} {tuple(changed.shape)} on {changed.device}",
            "Return images of the same shape from apply.",
        )
    if not bool(torch.isfinite(changed).all()):
        raise ContractError(who, "finite pixels", "NaN or infinite ones", "Guard divisions and logarithms.")
    low, high = changed.aminmax()
    if bounded and changed.is_floating_point() and not (low >= 0 and high <= 1):
        raise ContractError(who, "pixels in [0, 1]", f"[{low.item():.4g}, {high.item():.4g}]", _CORE)

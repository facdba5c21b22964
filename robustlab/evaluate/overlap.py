"""Images of one set that recur in another: bit-identical ones, and copies that were re-encoded or brightened a little.

A near-duplicate shows in what is left of an image after a 5 x 5 mean is taken away: edges and texture, which other
images of the same organ do not share. Candidates are the 8 nearest by correlation of 16 x 16 thumbnails; of those with
a thumbnail correlation of at least 0.98, the correlations of pixels (``full``) and of edges (``edges``) are taken at
the smaller native size, at most 128 pixels. A pair is a near-duplicate if ``full`` is at least 0.95 and either
``edges`` is at least 0.99, or ``edges`` is at least 0.94 and 1 - ``edges`` is at most 0.08 of its median over the
candidates (a ratio test as in Lowe, 2004): silhouettes that all look alike do not pass the second. Rotated, flipped,
cropped or shifted copies are out of scope. The thresholds lie between the true and the false pairs of 14 real sets.

References:
    Lowe, Distinctive image features from scale-invariant keypoints, 2004 (the ratio test).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustlab.core.rng import content_ids
from robustlab.core.shift import luma
from robustlab.core.source import Source

THUMBNAIL = 16
CANDIDATES = 8
LARGEST = 128
SMALLEST = 8
NEAR_THUMBNAIL = 0.98
NEAR_FULL = 0.95
SURE_EDGES = 0.99
NEAR_EDGES = 0.94
RATIO = 0.08
FLAT = 2 / 255

_READ_BYTES = 64 << 20
_QUERY_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Overlap:
    """Images of a set that recur in another one, each with its best partner.

    Args:
        rows: int64 (M,) positions in the first set, increasing.
        partners: int64 (M,) positions in the second set.
        exact: bool (M,), the two are bit-identical.
        searched: Images of the first and of the second set that were looked at.
        flat: Images of the first set without contrast, which were left out.
    """

    rows: Tensor
    partners: Tensor
    exact: Tensor
    searched: tuple[int, int]
    flat: int

    def __len__(self) -> int:
        return len(self.rows)


def spread(count: int, limit: int | None) -> Tensor:
    """Return int64 positions from 0 to ``count - 1``: all, or ``limit`` of them, evenly spread."""
    if limit is None or count <= limit:
        return torch.arange(count)
    return torch.arange(limit) * (count - 1) // max(limit - 1, 1)


def find_overlap(data: Source, other: Source, *, limits: tuple[int | None, int | None] = (None, None)) -> Overlap:
    """Find the images of ``data`` that recur in ``other``.

    Memory grows by about 0.7 KB an image of ``data`` and 8 bytes an image of ``other``; no images are kept.

    Args:
        data: The set whose images are searched for.
        other: The set that is searched.
        limits: Look only at so many images of either set, evenly spread; None takes all.
    """
    mine, theirs = spread(len(data), limits[0]), spread(len(other), limits[1])
    queries = _Described.collect(data, mine)
    partners = torch.full((len(mine),), -1)
    best = torch.full((len(mine), CANDIDATES), -2.0)
    index = torch.full((len(mine), CANDIDATES), -1)
    same_form = data.info.spec.channels == other.info.spec.channels and data.info.spec.size == other.info.spec.size
    hashes = torch.sort(queries.hashes)
    small = min(*data.info.spec.size, *other.info.spec.size) < SMALLEST
    done = 0
    for part in _describe(other, theirs):
        positions = theirs[done : done + len(part.hashes)]
        done += len(part.hashes)
        if same_form:
            _match(hashes, queries.flat, part, positions, partners)
        if not small:
            _nearest(queries.thumbnails, part.thumbnails, positions, best, index)
    exact = partners >= 0
    if not small:
        _verify(data, other, mine, best, index, partners)
    rows = (partners >= 0).nonzero()[:, 0]
    return Overlap(mine[rows], partners[rows], exact[rows], (len(mine), len(theirs)), int(queries.flat.sum()))


def find_contradictions(data: Source, limit: int | None = None) -> tuple[Tensor, int]:
    """Find bit-identical images inside a set whose labels differ.

    Returns:
        int64 (M, 2) positions, the first and another image with the same pixels; and the number of images looked at.
    """
    rows = spread(len(data), limit)
    labels = data.info.labels
    if labels is None:
        return torch.empty((0, 2), dtype=torch.int64), 0
    described = _Described.collect(data, rows, thumbnails=False)
    keep = (~described.flat).nonzero()[:, 0]
    values, group = torch.unique(described.hashes[keep], return_inverse=True)
    first = torch.full((len(values),), len(rows)).scatter_reduce(0, group, keep, "amin")[group]
    differ = labels[rows[keep]] != labels[rows[first]]
    differ = differ.any(1) if differ.ndim == 2 else differ
    return torch.stack([rows[first[differ]], rows[keep[differ]]], 1), len(rows)


@dataclass(frozen=True, eq=False)
class _Described:
    """Hashes (N,), thumbnails (N, 256) with mean 0 and length 1, and whether images are without contrast (N,)."""

    hashes: Tensor
    thumbnails: Tensor
    flat: Tensor

    @staticmethod
    def collect(source: Source, rows: Tensor, *, thumbnails: bool = True) -> _Described:
        # filled in place: many small arrays kept between large ones that come and go would scatter the heap
        side = THUMBNAIL * THUMBNAIL if thumbnails else 0
        whole = _Described(
            torch.empty(len(rows), dtype=torch.int64),
            torch.empty((len(rows), side), dtype=torch.float16),
            torch.empty(len(rows), dtype=torch.bool),
        )
        start = 0
        for part in _describe(source, rows, thumbnails=thumbnails):
            place = slice(start, start + len(part.flat))
            whole.hashes[place], whole.flat[place] = part.hashes, part.flat
            whole.thumbnails[place] = part.thumbnails
            start = place.stop
        return whole


def _describe(source: Source, rows: Tensor, *, thumbnails: bool = True) -> Iterator[_Described]:
    """Read a source block by block and describe its images."""
    spec = source.info.spec
    block = max(1, min(512, _READ_BYTES // (8 * spec.channels * spec.size[0] * spec.size[1])))
    for start in range(0, len(rows), block):
        images = source.pixels(rows[start : start + block].tolist())
        low, high = images.flatten(1).aminmax(dim=1)
        small = _resized(_grey(images), (THUMBNAIL, THUMBNAIL)) if thumbnails else images.new_zeros((len(images), 0))
        yield _Described(content_ids(images), _standardised(small), high - low <= FLAT)


def _match(hashes: tuple[Tensor, Tensor], flat: Tensor, part: _Described, positions: Tensor, partners: Tensor) -> None:
    """Note at each query the first position with the same hash."""
    order = torch.argsort(part.hashes, stable=True)
    known = part.hashes[order]
    values, back = hashes
    place = torch.searchsorted(known, values).clamp_max(len(known) - 1)
    same = (known[place] == values) & ~flat[back] & (partners[back] < 0)
    partners[back[same]] = positions[order[place[same]]]


def _nearest(queries: Tensor, thumbnails: Tensor, positions: Tensor, best: Tensor, index: Tensor) -> None:
    """Merge a block of the other set into each query's nearest thumbnails."""
    count = min(CANDIDATES, len(thumbnails))
    for start in range(0, len(queries), _QUERY_ROWS):
        rows = slice(start, start + _QUERY_ROWS)
        values, found = (queries[rows].float() @ thumbnails.T).topk(count, dim=1)
        merged, choice = torch.cat([best[rows], values], 1).topk(CANDIDATES, dim=1)
        index[rows] = torch.cat([index[rows], positions[found]], 1).gather(1, choice)
        best[rows] = merged


def _verify(data: Source, other: Source, mine: Tensor, best: Tensor, index: Tensor, partners: Tensor) -> None:
    """Look at the candidates' pixels and note the partner of each near-duplicate."""
    size = (
        min(data.info.spec.size[0], other.info.spec.size[0], LARGEST),
        min(data.info.spec.size[1], other.info.spec.size[1], LARGEST),
    )
    largest = max(
        source.info.spec.channels * source.info.spec.size[0] * source.info.spec.size[1] for source in (data, other)
    )
    block = max(1, min(64, _READ_BYTES // (4 * largest * CANDIDATES)))
    open_rows = ((partners < 0) & (best[:, 0] >= NEAR_THUMBNAIL)).nonzero()[:, 0]
    for start in range(0, len(open_rows), block):
        rows = open_rows[start : start + block]
        asked = _detail(data, mine[rows], size)
        full, edges = _compare(asked, other, index[rows], best[rows] >= NEAR_THUMBNAIL, size)
        unsure = ((edges >= NEAR_EDGES) & (full >= NEAR_FULL)).any(1) & (edges.amax(1) < SURE_EDGES)
        if bool(unsure.any()):
            part = (asked[0][unsure], asked[1][unsure])
            full[unsure], edges[unsure] = _compare(part, other, index[rows[unsure]], best[rows[unsure]] > -2, size)
        near, choice = _is_near(full, edges)
        partners[rows[near]] = index[rows[near]].gather(1, choice[near, None])[:, 0]


def _is_near(full: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows (N, K) hold a near-duplicate, bool (N,), and the column of the best candidate.

    Correlations of -2 mark candidates that do not exist or were not compared; the ratio test needs at least 4.
    """
    value, choice = edges.max(1)
    compared = edges > -2
    missing = torch.where(compared, edges, torch.nan)
    typical = missing.nanmedian(1).values
    apart = (1 - value <= RATIO * (1 - typical)) & (compared.sum(1) >= CANDIDATES // 2)
    alike = full.gather(1, choice[:, None])[:, 0] >= NEAR_FULL
    return alike & ((value >= SURE_EDGES) | ((value >= NEAR_EDGES) & apart)), choice


def _compare(
    asked: tuple[Tensor, Tensor], other: Source, index: Tensor, wanted: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the correlations (N, K) of pixels and of edges with the wanted candidates, -2 for the others."""
    where = wanted.nonzero()
    positions, back = torch.unique(index[wanted], return_inverse=True)
    pixels, edges = _detail(other, positions, size)
    out = []
    for mine, theirs in ((asked[0], pixels), (asked[1], edges)):
        values = torch.full(wanted.shape, -2.0)
        values[where[:, 0], where[:, 1]] = (mine[where[:, 0]] * theirs[back]).sum(1)
        out.append(values)
    return out[0], out[1]


def _detail(source: Source, positions: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return pixels and edges of some images (N, H * W), with mean 0 and length 1."""
    images = _resized(_grey(source.pixels(positions.tolist())), size)
    edges = images - F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), 5, 1)
    return _standardised(images), _standardised(edges)


def _grey(images: Tensor) -> Tensor:
    return luma(images) if images.shape[1] == 3 else images.mean(1, keepdim=True)


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def _standardised(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    flat = flat - flat.mean(1, keepdim=True) if flat.shape[1] else flat
    length = flat.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-4, flat / length.clamp_min(1e-4), 0.0)

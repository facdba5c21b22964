"""locate: where images of one's own site lie on the axes of the shifts, so that a severity means something there."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from robustlab.core.corruption import Corruption
from robustlab.core.errors import ConfigError, KindError
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.source import Source
from robustlab.data import load_data, subset

from .overlap import spread
from .placement import Found, Placement
from .units import adapt

if TYPE_CHECKING:
    import pandas as pd

AXES = (
    "gaussian-noise",
    "gaussian-blur",
    "down-up-sampling",
    "contrast-loss",
    "contrast-gain",
    "brightness",
    "stain-shift",
)
_MOST = 200
_FEWEST = 20

Status = Literal["seen", "not seen", "cannot be seen"]


@dataclass(frozen=True)
class Place:
    """Where the images lie on one axis.

    Args:
        axis: Registered name of the corruption.
        status: ``"seen"``: it differs from the reference. ``"not seen"``: less than one severity step.
            ``"cannot be seen"``: these images do not tell.
        severity: From 0 to 5; NaN where it cannot be seen.
        low: Lower end of the 95 % interval.
        high: Upper end; where nothing is seen, what could have been missed.
        amount: The first physical parameter at that severity.
        unit: Of the amount.
        direction: Which way it moved, for corruptions that go both ways.
        reason: Why it cannot be seen, or what it could be as well.
    """

    axis: str
    status: Status
    severity: float
    low: float
    high: float
    amount: float
    unit: str
    direction: str
    reason: str


@dataclass(frozen=True)
class Location:
    """Where images of a site lie on the axes of the shifts.

    Args:
        site: Name of the site's images.
        reference: Name of the images that they are compared with.
        n: Images of the site.
        n_reference: Images of the reference.
        places: One for each axis.
        unexplained: p-value of the differences that no axis explains.
        notes: What was done to the images before.
    """

    site: str
    reference: str
    n: int
    n_reference: int
    places: tuple[Place, ...]
    unexplained: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, axis: str) -> Place:
        for place in self.places:
            if place.axis == axis:
                return place
        raise KeyError(axis)

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each axis."""
        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(place) for place in self.places])

    def to_json(self) -> str:
        """Return all of it as JSON; NaN is null."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return json.dumps(plain(dataclasses.asdict(self)), indent=1)

    def summary(self) -> str:
        """Return a table and, where there is one, a warning, as text."""
        lines = [f"{self.site} ({self.n} images) beside {self.reference} ({self.n_reference} images)", ""]
        for place in self.places:
            if place.status == "seen":
                way = f", {place.direction}" if place.direction else ""
                what = f"severity {place.severity:.1f} ({place.low:.1f} to {place.high:.1f}): {place.amount:.3g} "
                what += f"{place.unit}{way}"
            elif place.status == "not seen":
                what = f"not seen, below {place.high:.1f}"
            else:
                what = "cannot be seen"
            lines.append(f"  {place.axis:18} {what}{f'; {place.reason}' if place.reason else ''}")
        if self.unexplained < 0.001:
            lines += ["", "The images also differ in a way that none of these axes explains: look at them."]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def locate(
    images: Any,
    reference: Any,
    *,
    axes: Sequence[str | Corruption] = AXES,
    cluster: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Location:
    """Place images of one's own site on the axes of corruptions, relative to images on which a model was evaluated.

    Each corruption is applied to the reference at severities from 0 to 5. A few numbers of every image (level of the
    finest details, power by spatial frequency, grey levels, optical densities) then move along a curve for each axis.
    The site's means are explained by as few axes as will do, at the severities that fit best, weighted by how much
    these numbers vary from image to image. Where axes act together, the reference is corrupted with all of them.

    No labels are used. The reference has to be of the same kind: what differs for another reason, such as another part
    of the body, is either reported as unexplained or, if it looks like one of the axes, taken for it.

    Args:
        images: Images of the site, about 50 or more: a source, or what ``load_data`` takes.
        reference: Images like those the model was evaluated on, 100 or more; at most 200 are used.
        axes: Names of corruptions, or corruptions.
        cluster: Column of the independent unit in both, e.g. ``"patient"``.
        seed: Seed of the corruptions and of the resampling behind the intervals.
        device: Where to work.

    Returns:
        A ``Location``.

    Raises:
        ConfigError: Too few images, or an axis twice.
        KindError: Something is no corruption.
        UnknownNameError: There is no such corruption.

    References:
        Own design. The level of noise follows Donoho, Johnstone 1994; simulated curves as in indirect inference,
        Gourieroux, Monfort, Renault 1993.
    """
    site, known = (_few(_source(data)) for data in (images, reference))
    for name, source in (("images", site), ("reference", known)):
        if len(source) < _FEWEST:
            raise ConfigError(f"locate, {name}", f"{_FEWEST} images or more", f"{len(source)}", "50 are usual.")
    chosen = [axis if isinstance(axis, Corruption) else CORRUPTIONS.get(axis)() for axis in axes]
    odd = [axis for axis in chosen if not isinstance(axis, Corruption)]
    if odd:
        raise KindError("locate, axes", "corruptions", repr(odd[0]), "See robustlab list corruptions.")
    names = [axis.name for axis in chosen]
    if len(set(names)) < len(names) or not names:
        raise ConfigError("locate, axes", "each corruption once", ", ".join(names) or "none", "Leave some out.")
    spec = known.info.spec
    whole = known.read(range(len(known)))
    own = adapt(site.read(range(len(site))), site.info.spec, spec)
    where = torch.device("cpu" if device is None else device)
    skipped = {axis.name: axis.skip_reason(spec) for axis in chosen}
    usable = [axis for axis in chosen if skipped[axis.name] is None]
    sizes = [_units(source, cluster) for source in (site, known)]
    placement = Placement(whole.to(where), usable, sizes[1], seed)
    rows, unexplained = placement.place(own.images.to(where), len(torch.unique(sizes[0])))
    found = {item.axis: item for item in rows}
    places = tuple(_place(axis, found.get(axis.name), skipped[axis.name]) for axis in chosen)
    notes: tuple[str, ...] = ()
    if site.info.spec.size != spec.size:
        old, new = (f"{size[0]} x {size[1]}" for size in (site.info.spec.size, spec.size))
        notes = (f"The images were resized from {old} to {new} pixels, which itself moves sharpness.",)
    return Location(site.info.name, known.info.name, len(site), len(known), places, unexplained, notes)


def _source(data: Any) -> Source:
    return data if isinstance(data, Source) else load_data(data)


def _few(source: Source) -> Source:
    """Return at most 200 of the images, spread over all of them."""
    return source if len(source) <= _MOST else subset(source, spread(len(source), _MOST))


def _units(source: Source, cluster: str | None) -> torch.Tensor:
    if cluster is None:
        return torch.arange(len(source))
    units: torch.Tensor = torch.unique(source.column(cluster), return_inverse=True)[1]
    return units


def _place(axis: Corruption, found: Found | None, skipped: str | None) -> Place:
    nan = math.nan
    unit = next((unit for _, unit in axis.parameters(1.0).values()), "")
    if found is None:
        return Place(axis.name, "cannot be seen", nan, nan, nan, nan, unit, "", skipped or "")
    amount = next((value for value, _ in axis.parameters(found.severity).values()), nan) if found.seen else nan
    if found.seen:
        status: Status = "seen"
    else:
        status = "not seen" if found.high <= 1 and not found.reason else "cannot be seen"
    severity = nan if status == "cannot be seen" else found.severity
    return Place(axis.name, status, severity, found.low, found.high, amount, unit, found.direction, found.reason)

"""Phantoms: generated images whose true class probabilities are known.

Both sets follow one model. A patient has a class y (each with probability 1/2); each of the patient's images has
latents theta ~ N(+-mu, I) with the sign of y, partly shared between the patient's images, so P(y = 1 | theta) =
sigmoid(2 mu . theta) exactly, and the best possible accuracy is Phi(|mu|). The latents are rendered; everything else in
an image is nuisance that does not depend on y. All randomness is keyed by the sample's id: sample i is the same
whatever the count.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlab.core.errors import ConfigError, RangeError, UnknownNameError
from robustlab.core.rng import SampleRng
from robustlab.core.source import Source, SourceInfo
from robustlab.core.types import ImageSpec

from .assemble import Request
from .histology import render_histology
from .pixels import Scale
from .radiograph import render_radiograph

BAYES_ACCURACY = 0.93
SHARED = 0.3
"""Share of a latent's variance inside a class that the images of one patient have in common."""

SPLIT_START = {"train": 0, "val": 1 << 40, "test": 2 << 40}
DEFAULT_COUNT = {"train": 2000, "val": 500, "test": 1000}

_DISTANCE = 1.4757910281791705  # Phi of this is 0.93
_PATIENT_SIZES = (1, 2, 3, 4)
_BLOCK = 16


@dataclass(frozen=True, eq=False)
class Samples:
    """What is drawn of some samples before rendering.

    Args:
        rng: Generator of the samples.
        theta: float32 (N, K) latents.
        marker: bool (N,), a laterality marker is in the picture.
    """

    rng: SampleRng
    theta: Tensor
    marker: Tensor

    def select(self, rows: Tensor) -> Samples:
        """Return the samples at positions ``rows``."""
        return Samples(self.rng.select(rows), self.theta[rows], self.marker[rows])


class _Phantom(Source):
    """Images drawn from a generator when first read; see the module for the model.

    Pictures are made in blocks of fixed size and place, so that no sample depends on how many are asked for.
    """

    def __init__(self, info: SourceInfo, samples: Samples) -> None:
        self.info = info
        self._samples = samples
        self._done: set[int] = set()
        self._images = torch.zeros((len(samples.theta), info.spec.channels, *info.spec.size), dtype=torch.uint8)

    @abstractmethod
    def render(self, samples: Samples) -> Tensor:
        """Return pictures (N, C, H, W) in [0, 1]."""

    def pixels(self, index: Sequence[int]) -> Tensor:
        for block in sorted({i // _BLOCK for i in index} - self._done):
            rows = torch.arange(block * _BLOCK, (block + 1) * _BLOCK)
            self._images[rows] = torch.round(self.render(self._samples.select(rows)).mul_(255)).to(torch.uint8)
            self._done.add(block)
        return Scale(0.0, 255.0).to_unit(self._images[torch.as_tensor(list(index), dtype=torch.int64)].numpy())


class HistologyPhantom(_Phantom):
    """Tiles that look like H&E sections; malignant ones have more, larger and rounder nuclei.

    Colours come from stain concentrations through Beer-Lambert absorbance. Group columns: patient, sex, site; sex and
    site have no influence on anything.

    Args:
        count: Number of tiles.
        seed: Seed of the generator.
        size: Height and width in pixels.
        split: ``"train"``, ``"val"`` or ``"test"``: disjoint samples and patients.

    Raises:
        RangeError: ``count`` or ``size`` is too small.
        ConfigError: Unknown split.
    """

    def __init__(self, count: int, seed: int = 0, size: int = 64, *, split: str = "test") -> None:
        weights = (0.66, 0.6, 0.45)
        setup = _Setup(count, seed, size, split, weights, 3, "histology", ("benign", "malignant"))
        info, samples = _describe("phantom-histology", setup)
        super().__init__(info, samples)

    def render(self, samples: Samples) -> Tensor:
        return render_histology(samples.rng, samples.theta, self.info.spec.size[0])


class RadiographPhantom(_Phantom):
    """Images that look like chest radiographs; those with a finding have an opacity and nodules.

    Group columns: patient, sex, site (no influence on anything), and marker if markers are asked for. The posterior
    takes the marker into account; where ``marker_with_label`` equals ``marker_without`` it tells nothing.

    Args:
        count: Number of images.
        seed: Seed of the generator.
        size: Height and width in pixels.
        split: ``"train"``, ``"val"`` or ``"test"``: disjoint samples and patients.
        marker_with_label: Share of images with a finding that carry a bright letter in a corner (a shortcut).
        marker_without: Share of images without a finding that carry it.

    Raises:
        RangeError: ``count`` or ``size`` is too small, or a share lies outside [0, 1].
        ConfigError: Unknown split.
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        size: int = 64,
        *,
        split: str = "test",
        marker_with_label: float = 0.0,
        marker_without: float = 0.0,
    ) -> None:
        setup = _Setup(count, seed, size, split, (0.78, 0.62), 1, "xray", ("normal", "finding"))
        setup = replace(setup, marker=(marker_without, marker_with_label))
        info, samples = _describe("phantom-radiograph", setup)
        super().__init__(info, samples)

    def render(self, samples: Samples) -> Tensor:
        return render_radiograph(samples.rng, samples.theta, samples.marker, self.info.spec.size[0])


@dataclass(frozen=True)
class _Setup:
    count: int
    seed: int
    size: int
    split: str
    weights: tuple[float, ...]
    channels: int
    modality: str
    class_names: tuple[str, str]
    marker: tuple[float, float] = (0.0, 0.0)


def _describe(name: str, setup: _Setup) -> tuple[SourceInfo, Samples]:
    """Draw everything but the pictures; the samples are filled up to whole blocks."""
    if setup.count < 1 or setup.size < 16:
        raise RangeError(
            name,
            "at least one image of at least 16 pixels",
            f"count={setup.count}, size={setup.size}",
            "Ask for more images, or for larger ones.",
        )
    if setup.split not in SPLIT_START:
        raise ConfigError(name, f"split among {', '.join(SPLIT_START)}", repr(setup.split), "Check the spelling.")
    if not all(0 <= share <= 1 for share in setup.marker):
        raise RangeError(name, "marker shares from 0 to 1", f"{setup.marker}", "They are probabilities.")
    blocks = -(-setup.count // _BLOCK)
    samples, drawn = _draw(name, setup, torch.arange(blocks * _BLOCK))
    table = {key: value[: setup.count] for key, value in drawn.items()}
    posterior = table.pop("posterior")
    labels, ids = table.pop("label"), table.pop("id")
    levels = {
        "patient": tuple(f"{setup.split}-{i:05d}" for i in range(int(table["patient"].max()) + 1)),
        "sex": ("F", "M"),
        "site": ("site-a", "site-b", "site-c"),
        "marker": ("absent", "present"),
    }
    if setup.marker == (0.0, 0.0):
        table.pop("marker")
    info = SourceInfo(
        name=name,
        spec=ImageSpec(channels=setup.channels, size=(setup.size, setup.size), modality=setup.modality),
        ids=ids,
        labels=labels,
        task="binary",
        class_names=setup.class_names,
        groups=table,
        group_levels={key: levels[key] for key in table},
        posterior=posterior,
        notes=("Generated images; the true class probabilities are known.",),
    )
    return info, samples


def _draw(name: str, setup: _Setup, position: Tensor) -> tuple[Samples, dict[str, Tensor]]:
    """Draw patients, labels, latents and attributes of the samples at some positions of the split."""
    ids = position + SPLIT_START[setup.split]
    sizes = torch.tensor(_PATIENT_SIZES)
    within = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    patient = position // len(within) * len(sizes) + within[position % len(within)]
    rng = SampleRng.make(setup.seed, f"{name}/1", ids)
    owner = SampleRng.make(setup.seed, f"{name}/patient/1", patient + SPLIT_START[setup.split])
    label = owner.integers("label", 2)
    scale = _DISTANCE / math.sqrt(sum(w * w for w in setup.weights))
    mu = torch.tensor(setup.weights, dtype=torch.float64) * scale
    k = (len(mu),)
    noise = owner.normal("theta", k).double() * SHARED**0.5 + rng.normal("theta", k).double() * (1 - SHARED) ** 0.5
    theta = noise + (2 * label - 1)[:, None] * mu
    share = torch.tensor(setup.marker, dtype=torch.float64)
    marker = rng.uniform("marker").double() < share[label]
    logit = 2 * (theta * mu).sum(1) + _marker_evidence(setup.marker, marker)
    positive = torch.sigmoid(logit)
    drawn = {
        "id": ids,
        "label": label,
        "posterior": torch.stack([torch.sigmoid(-logit), positive], 1),
        "patient": patient,
        "sex": owner.integers("sex", 2),
        "site": owner.integers("site", 3),
        "marker": marker.to(torch.int64),
    }
    return Samples(rng.child("picture"), theta.float(), marker), drawn


def _marker_evidence(shares: tuple[float, float], marker: Tensor) -> Tensor:
    """Return log P(marker | finding) - log P(marker | none)."""
    without, with_label = shares

    def ratio(a: float, b: float) -> float:
        if a == b:
            return 0.0
        return math.inf if b == 0 else -math.inf if a == 0 else math.log(a / b)

    values = torch.tensor([ratio(1 - with_label, 1 - without), ratio(with_label, without)], dtype=torch.float64)
    return values[marker.to(torch.int64)]


def load_phantom(kind: str, request: Request) -> Source:
    """Return the phantom ``"histology"`` or ``"radiograph"`` with the default count of a split (seed 0).

    Raises:
        UnknownNameError: No such phantom.
        ConfigError: An option that generated data cannot have, or an unknown split.
    """
    phantoms: dict[str, Callable[..., _Phantom]] = {"histology": HistologyPhantom, "radiograph": RadiographPhantom}
    if kind not in phantoms:
        raise UnknownNameError(request.who, f"one of {', '.join(phantoms)}", repr(kind), "Check the spelling.")
    given = [
        key
        for key in ("labels", "ids", "groups", "task", "class_names", "modality", "value_range")
        if getattr(request, key) is not None
    ]
    if given:
        raise ConfigError(request.who, "a phantom alone", f"also {', '.join(given)}", "Phantoms bring their own.")
    if request.split not in DEFAULT_COUNT:
        raise ConfigError(
            request.who, f"split among {', '.join(DEFAULT_COUNT)}", repr(request.split), "Check the spelling."
        )
    source = phantoms[kind](DEFAULT_COUNT[request.split], split=request.split)
    if request.name is not None:
        source.info = replace(source.info, name=request.name)
    return source

"""Real images for the benchmarks, from the project's shared folder of small image sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustlab.core.registry import SUITES
from robustlab.core.shift import Shift

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"

Array = np.ndarray[Any, np.dtype[np.uint8]]

# MedMNIST-C set -> (file, labels to keep or None). Where no set of that modality is at hand, photographs (dermoscopy,
# fundus) and ultrasound (OCT) stand in: the operators do not look at what a picture shows.
STAND_INS: dict[str, tuple[str, tuple[int, ...] | None]] = {
    "pathmnist": ("oral_he_400x_96", None),
    "bloodmnist": ("bccd_cells_40", None),
    "dermamnist": ("cifar10_jpeg_subset", None),
    "retinamnist": ("cifar10_jpeg_subset", None),
    "tissuemnist": ("dsb2018_nuclei_64", (0,)),
    "octmnist": ("busi_96", None),
    "breastmnist": ("busi_96", None),
    "chestmnist": ("nih_cxr_patients_96", None),
    "pneumoniamnist": ("chestxray_kermany_test_96", None),
    "organamnist": ("mednist_64", (0,)),
    "organcmnist": ("mednist_64", (0,)),
    "organsmnist": ("mednist_64", (3,)),
}
RGB_SETS = ("pathmnist", "bloodmnist", "dermamnist", "retinamnist")


def stored(file: str, count: int, labels: tuple[int, ...] | None = None) -> Array:
    """Return images as they are stored, uint8 (N, H, W) or (N, H, W, 3): those of the test split come first."""
    with np.load(DATA / f"{file}.npz", allow_pickle=False) as held:
        splits = [split for split in ("test", "train", "val") if f"{split}_images" in held]
        images = np.concatenate([held[f"{split}_images"] for split in splits])
        if labels is not None:
            kept = np.concatenate([held[f"{split}_labels"] for split in splits]).ravel()
            images = images[np.isin(kept, labels)]
    result: Array = images[:count]
    return result


def enlarged(file: str, count: int, *, colour: bool, labels: tuple[int, ...] | None = None, size: int = 224) -> Array:
    """Return images enlarged by Pillow's bicubic filter, uint8 (N, size, size, 3), or (N, size, size) for grey ones."""
    mode = "RGB" if colour else "L"
    pictures = (Image.fromarray(image).convert(mode) for image in stored(file, count, labels))
    return np.stack([np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures])


def stand_in(dataset: str, count: int) -> Array:
    """Return 224 px images for a set of MedMNIST-C."""
    file, labels = STAND_INS[dataset]
    return enlarged(file, count, colour=dataset in RGB_SETS, labels=labels)


def as_tensor(images: Array) -> Tensor:
    """Return uint8 (N, C, H, W) whose memory is that of the array, as a loader hands it on."""
    pixels = torch.from_numpy(images)
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


def as_array(pixels: Tensor) -> Array:
    """Return (N, H, W, 3), or (N, H, W) for one channel, of uint8 (N, C, H, W)."""
    held = pixels.cpu()
    array: Array = held[:, 0].numpy() if held.shape[1] == 1 else held.permute(0, 2, 3, 1).numpy()
    return array


DRAWN = " (drawn)"  # how frost is called without the published pictures


def suite_of(name: str) -> Mapping[str, Shift]:
    """Return published name to shift."""
    return {shift.label.removesuffix(DRAWN): shift for shift in SUITES.get(name)()}

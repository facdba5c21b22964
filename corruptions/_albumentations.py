"""The albumentations transform behind ``as_albumentations``; importing this module imports albumentations."""

from __future__ import annotations

from typing import Any

import albumentations
import numpy as np
import torch

from robustlab.core.shift import Shift

from .bridges import run_keyed


class CorruptionTransform(albumentations.ImageOnlyTransform):  # type: ignore[misc]
    """A shift as an image-only transform.

    Args:
        shift: Any corruption.
        severity: (low, high), from 0 to 5.
        p: Probability that an image is changed.
    """

    def __init__(self, shift: Shift, severity: tuple[float, float], p: float) -> None:
        super().__init__(p=p)
        self.shift = shift
        self.severity = severity

    def get_params(self) -> dict[str, Any]:
        """Draw the key and the severity of one image from albumentations' generator."""
        return {"key": self.py_random.getrandbits(62), "severity": self.py_random.uniform(*self.severity)}

    def apply(self, img: np.ndarray[Any, Any], key: int, severity: float, **params: Any) -> np.ndarray[Any, Any]:
        """Return the changed image."""
        del params
        image = torch.from_numpy(np.ascontiguousarray(img))
        images = image[None, None] if image.ndim == 2 else image.permute(2, 0, 1)[None].contiguous()
        changed = run_keyed(self.shift, images, severity, torch.tensor([key]))[0]
        return (changed[0] if img.ndim == 2 else changed.permute(1, 2, 0)).contiguous().numpy()

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        """Return the constructor's arguments, for the transform's repr."""
        return ("shift", "severity")

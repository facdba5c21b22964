"""The albumentations transform behind ``as_albumentations``; importing this module imports albumentations."""

from __future__ import annotations

from typing import Any

import albumentations
import numpy as np
import torch

from robustlab.core.shift import Shift, ShiftContext
from robustlab.core.types import Batch


class CorruptionTransform(albumentations.ImageOnlyTransform):  # type: ignore[misc]
    """A shift as an image-only transform.

    Args:
        shift: Any corruption.
        severity: 0 to 5.
        p: Probability that an image is changed.
    """

    def __init__(self, shift: Shift, severity: float, p: float) -> None:
        super().__init__(p=p)
        self.shift = shift
        self.severity = severity

    def get_params(self) -> dict[str, Any]:
        """Draw the key of one image from albumentations' generator."""
        return {"key": self.py_random.getrandbits(62)}

    def apply(self, img: np.ndarray[Any, Any], key: int, **params: Any) -> np.ndarray[Any, Any]:
        """Return the changed image."""
        del params
        bytes_in = img.dtype == np.uint8
        image = torch.from_numpy(np.ascontiguousarray(img)).to(torch.float32)
        images = image[None, None] if image.ndim == 2 else image.permute(2, 0, 1)[None].contiguous()
        batch = Batch(images.div(255) if bytes_in else images, labels=None, ids=torch.tensor([key]))
        changed = self.shift.on(batch, self.severity, ShiftContext(seed=0)).images[0]
        if bytes_in:
            changed = changed.mul(255).round_().to(torch.uint8)
        return (changed[0] if img.ndim == 2 else changed.permute(1, 2, 0)).contiguous().numpy()

    def get_transform_init_args_names(self) -> tuple[str, ...]:
        """Return the constructor's arguments, for the transform's repr."""
        return ("shift", "severity")

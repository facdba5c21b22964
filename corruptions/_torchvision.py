"""The torchvision transform behind ``as_torchvision``; importing this module imports torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]

from robustlab.core.checks import check_images
from robustlab.core.errors import ShapeError
from robustlab.core.shift import Shift

from .bridges import run_keyed


class CorruptionTransform(v2.Transform):  # type: ignore[misc]
    """A shift as a transform of images.

    Args:
        shift: Any corruption.
        severity: (low, high), from 0 to 5.
        p: Probability that an image is changed.
    """

    _transformed_types = (Image.Image, tv_tensors.Image, v2.functional.is_pure_tensor)

    def __init__(self, shift: Shift, severity: tuple[float, float], p: float) -> None:
        super().__init__()
        self.shift = shift
        self.severity = severity
        self.p = p

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw keys, severities and choices for the largest batch among the inputs from torch's global generator."""
        images = [item for item in flat_inputs if isinstance(item, (Tensor, Image.Image))]
        count = max((item.shape[:-3].numel() for item in images if isinstance(item, Tensor)), default=1)
        low, high = self.severity
        return {
            "keys": torch.empty(count, dtype=torch.int64).random_(),
            "severities": torch.empty(count, dtype=torch.float64).uniform_(low, high) if high > low else None,
            "chosen": torch.empty(count).uniform_() < self.p,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return the changed image, or images."""
        if isinstance(inpt, Image.Image):
            return _to_pillow(self._changed(_from_pillow(inpt), params)[0])
        if inpt.ndim < 3:
            raise ShapeError(
                "as_torchvision", "images of shape (..., C, H, W)", f"shape {tuple(inpt.shape)}", "Use image[None]."
            )
        images = inpt.as_subclass(Tensor).reshape(-1, *inpt.shape[-3:])
        check_images(images, "as_torchvision", bytes_too=True)
        changed = self._changed(images, params).reshape(inpt.shape)
        if not isinstance(inpt, tv_tensors.TVTensor):
            return changed
        return tv_tensors.wrap(changed, like=inpt)  # pyright: ignore[reportCallIssue]

    def _changed(self, images: Tensor, params: dict[str, Any]) -> Tensor:
        rows = params["chosen"][: len(images)].nonzero().squeeze(1)
        if not len(rows):
            return images
        keys, place = params["keys"].to(images.device), rows.to(images.device)
        out = images.clone()
        if params["severities"] is None:
            out[place] = run_keyed(self.shift, images[place], self.severity[0], keys[place])
            return out
        for row in rows.tolist():  # each at a severity of its own
            here = slice(row, row + 1)
            out[here] = run_keyed(self.shift, images[here], float(params["severities"][row]), keys[here])
        return out

    def extra_repr(self) -> str:
        """Return the arguments, for the module's repr."""
        return f"{self.shift!r}, severity={self.severity}, p={self.p}"


def _from_pillow(image: Image.Image) -> Tensor:
    if image.mode not in ("L", "RGB"):
        raise ShapeError(
            "as_torchvision", "grey or RGB images of 8 bits", f"mode {image.mode!r}", "Use image.convert('RGB')."
        )
    pixels = torch.from_numpy(np.array(image))
    return pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None].contiguous()


def _to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).contiguous().numpy())

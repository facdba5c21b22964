"""medmnistc, image by image as its DatasetManager runs the corruptors: to RGB, apply, and luma for grey sets."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from _worker import serve
from medmnistc.corruptions import filter as filters
from medmnistc.corruptions.registry import CORRUPTIONS_DS, DATASET_RGB
from PIL import Image


def _decode(data: np.ndarray, flags: int) -> np.ndarray:
    """Decode a picture as ``cv2.imdecode``, but grey ones to three channels unless they are 224 x 224.

    Motion blur compares the decoded shape with a literal (224, 224) to tell grey from colour; at any other size it
    would index three columns of a grey image where it means its channels.
    """
    image = cv2.imdecode(data, flags)
    return image if image.ndim == 3 or image.shape == (224, 224) else np.stack([image] * 3, axis=-1)


filters.cv2 = SimpleNamespace(**{**vars(cv2), "imdecode": _decode})


def prepare(images: np.ndarray, name: str, severity: int, request: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the body of the loop in ``DatasetManager.create_single_dataset``."""
    del images
    dataset = request["dataset"]
    corruptor, colour = CORRUPTIONS_DS[dataset][name], DATASET_RGB[dataset]
    if name == "impulse_noise":
        corruptor.rng = np.random.default_rng(request.get("seed", 0))  # as the manager injects it

    def call(image: np.ndarray) -> np.ndarray:
        changed = corruptor.apply(Image.fromarray(image).convert("RGB"), severity - 1)
        return np.array(changed if colour else Image.fromarray(changed).convert("L"))

    return call


serve(("medmnistc", "scikit-image", "scipy", "opencv-python-headless", "Wand"), prepare)

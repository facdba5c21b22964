"""imagecorruptions, image by image through ``corrupt`` as in its README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _worker import serve
from imagecorruptions import corrupt, corruptions
from skimage.filters import gaussian


def _gaussian(image: np.ndarray, sigma: Any, multichannel: bool = False, **options: Any) -> np.ndarray:
    """Take the keyword that scikit-image renamed: no release for Python 3.11 and later knows the old one."""
    return gaussian(image, sigma=sigma, channel_axis=-1 if multichannel else None, **options)


corruptions.gaussian = _gaussian
vars(np)["float_"] = np.float64  # fog asks for the name that numpy 2 took away


def prepare(images: np.ndarray, name: str, severity: int, request: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the function of one image that users of the package call."""
    del images, request
    return lambda image: corrupt(image, corruption_name=name, severity=severity)


serve(("imagecorruptions", "scikit-image", "scipy", "opencv-python-headless"), prepare)

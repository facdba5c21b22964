"""imagecorruptions, image by image through ``corrupt`` as in its README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _worker import serve
from imagecorruptions import corrupt


def prepare(images: np.ndarray, name: str, severity: int, request: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the function of one image that users of the package call."""
    del images, request
    return lambda image: corrupt(image, corruption_name=name, severity=severity)


serve(("imagecorruptions", "scikit-image", "scipy", "opencv-python-headless"), prepare)

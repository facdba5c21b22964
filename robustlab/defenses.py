"""Defences and out-of-distribution detectors: the package ``defenses`` under its documented name."""

from __future__ import annotations

import defenses

from ._siblings import check_sibling

check_sibling(defenses)

from defenses import *  # noqa: E402, F403 - a facade, checked above

__all__: list[str] = []
__all__ += defenses.__all__

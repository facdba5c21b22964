"""Shifts, attacks and suites: the package ``corruptions`` under its documented name."""

from __future__ import annotations

import corruptions

from ._siblings import check_sibling

check_sibling(corruptions)

from corruptions import *  # noqa: E402, F403 - a facade, checked above

__all__: list[str] = []
__all__ += corruptions.__all__

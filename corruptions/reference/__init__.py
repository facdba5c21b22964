"""Published corruptions in reference mode; the suites ``imagenet-c`` and ``medmnist-c/...`` are made of them."""

from __future__ import annotations

__all__: list[str] = []

"""Named sets of shifts."""

from __future__ import annotations

from . import ladine, medmnist_c
from .imagenet_c import cifar_10_c, imagenet_c, tiny_imagenet_c
from .standard import standard

__all__ = ["cifar_10_c", "imagenet_c", "ladine", "medmnist_c", "standard", "tiny_imagenet_c"]

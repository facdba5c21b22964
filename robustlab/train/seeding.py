"""Torch's global generators, borrowed for a while and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from robustlab.core.rng import stable_hash

M = TypeVar("M")


@contextmanager
def scoped_seed(*key: str | int) -> Iterator[None]:
    """Seed torch's global generators (CPU, and CUDA where it is in use) inside a block and restore them afterwards.

    Layers such as dropout draw from the global generators and cannot be given another one.

    Args:
        key: Strings and integers that name the seed.
    """
    seed = stable_hash(*key) & 0xFFFFFFFF  # torch's CPU generator keeps 32 bits of a seed
    generators = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        generators += torch.cuda.default_generators
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def seeded_init(build: Callable[[], M], seed: int) -> M:
    """Return ``build()`` with reproducible initial weights; global random state is left as it was.

    Args:
        build: Makes a module or model, e.g. ``lambda: resnet18(num_classes=2)``.
        seed: Any integer.
    """
    with scoped_seed("seeded_init", seed):
        return build()

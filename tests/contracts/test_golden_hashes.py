"""Bytes that may not move: a change of these results needs a new ``version`` of the corruption and a line in CHANGELOG.

Corruptions whose arithmetic gives the same bits on every processor are known by a hash. Of the others a sample of the
resulting grey levels is stored. ``python tests/contracts/test_golden_hashes.py`` writes both files anew.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import corruptions  # noqa: F401 - fills the registry
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

HASHES = Path(__file__).parent / "golden_hashes.json"
LEVELS = Path(__file__).parent / "golden_levels.json"
GOLDEN, SAMPLED = json.loads(HASHES.read_text()), json.loads(LEVELS.read_text())
OURS = tuple(name for name, kind in CORRUPTIONS.items() if kind.__module__.startswith("corruptions."))
SETTINGS = ((1, 0), (3.5, 7))  # severity and seed
COUNT = 256  # grey levels stored of each result


def images_for(kind):
    """Return four RGB images of noise and ramps, 64 x 56 px or as large as the corruption needs."""
    ids = torch.arange(40, 44)
    height, width = max(64, kind.min_size), max(56, kind.min_size)
    noise = SampleRng.make(0, "golden images", ids).integers("pixels", 256, (3, height, width))
    ramp = (torch.arange(height)[:, None] * 2 + torch.arange(width) * 2) % 256
    pixels = torch.where(ids[:, None, None, None] % 2 == 0, noise, ramp.expand(4, 3, height, width))
    return pixels.to(torch.uint8), ids


def changed(name, severity, seed):
    kind = CORRUPTIONS.get(name)
    pixels, ids = images_for(kind)
    return kind()(pixels, severity, seed, ids).contiguous()


def digest(name, severity, seed):
    return hashlib.sha256(changed(name, severity, seed).numpy().tobytes()).hexdigest()[:32]


def sample(pixels):
    """Return grey levels spread evenly over images, uint8 (256,)."""
    flat = pixels.contiguous().flatten()
    return flat[torch.arange(COUNT) * (len(flat) - 1) // (COUNT - 1)].numpy()


def stored(text):
    return np.frombuffer(bytes.fromhex(text), dtype=np.uint8)


@pytest.mark.parametrize("case", GOLDEN)
def test_bytes_do_not_move(case):
    name, severity, seed, version = case.split(" ")
    assert CORRUPTIONS.get(name).version == int(version)
    assert digest(name, float(severity), int(seed)) == GOLDEN[case]


@pytest.mark.parametrize("case", SAMPLED)
def test_grey_levels_move_by_no_more_than_one(case):
    name, severity, seed, version = case.split(" ")
    assert CORRUPTIONS.get(name).version == int(version)
    away = np.abs(sample(changed(name, float(severity), int(seed))).astype(int) - stored(SAMPLED[case]))
    # one value may lie next to a step: a photon count, a mask's edge
    assert (away > 1).sum() <= 1, away


def test_every_corruption_is_guarded():
    wanted = {
        f"{name} {severity} {seed} {CORRUPTIONS.get(name).version}" for name in OURS for severity, seed in SETTINGS
    }
    assert set(GOLDEN) | set(SAMPLED) == wanted
    assert not set(GOLDEN) & set(SAMPLED)


def test_every_sample_holds_changed_pixels():
    for name in {case.split(" ")[0] for case in SAMPLED}:
        before = sample(images_for(CORRUPTIONS.get(name))[0]).astype(int)
        moved = [np.abs(stored(text) - before) > 1 for case, text in SAMPLED.items() if case.startswith(f"{name} ")]
        assert np.any(moved, axis=0).sum() >= 4, name


def write():
    exact = {case.split(" ")[0] for case in GOLDEN}
    hashes, levels = {}, {}
    for name in OURS:
        for severity, seed in SETTINGS:
            case = f"{name} {severity} {seed} {CORRUPTIONS.get(name).version}"
            if name in exact:
                hashes[case] = digest(name, severity, seed)
            else:
                levels[case] = sample(changed(name, severity, seed)).tobytes().hex()
    for path, values in ((HASHES, hashes), (LEVELS, levels)):
        path.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    write()

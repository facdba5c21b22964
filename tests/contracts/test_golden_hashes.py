"""Bytes that may not move: a change of these results needs a new ``version`` of the corruption and a line in CHANGELOG.

Only corruptions whose arithmetic gives the same bits on every processor are listed.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from robustlab.core.registry import CORRUPTIONS
from robustlab.core.rng import SampleRng

GOLDEN = json.loads((Path(__file__).parent / "golden_hashes.json").read_text())


def digest(name, severity, seed):
    """Return the hash of four 64 x 56 RGB images of noise and ramps after a corruption."""
    ids = torch.arange(40, 44)
    noise = SampleRng.make(0, "golden images", ids).integers("pixels", 256, (3, 64, 56))
    ramp = torch.arange(64)[:, None] * 2 + torch.arange(56) * 2
    pixels = torch.where(ids[:, None, None, None] % 2 == 0, noise, ramp.expand(4, 3, 64, 56)).to(torch.uint8)
    changed = CORRUPTIONS.get(name)()(pixels, severity, seed, ids)
    return hashlib.sha256(changed.contiguous().numpy().tobytes()).hexdigest()[:32]


@pytest.mark.parametrize("case", GOLDEN)
def test_bytes_do_not_move(case):
    name, severity, seed, version = case.split(" ")
    assert CORRUPTIONS.get(name).version == int(version)
    assert digest(name, float(severity), int(seed)) == GOLDEN[case]


def test_the_list_covers_noise_tone_and_shapes():
    families = {CORRUPTIONS.get(case.split(" ")[0]).family for case in GOLDEN}
    assert {"noise", "contrast", "resolution", "artifacts", "blur"} <= families
    assert len(GOLDEN) >= 20

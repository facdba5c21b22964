"""Where the harm of published corruptions does not rise from one severity to the next, measured on real images."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import corruptions  # noqa: F401 - fills the registries
from corruptions.suites.medmnist_c import DATASETS
from robustlab.core.registry import SUITES

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".." / "shared" / "data"
STEPS = ("1-2", "2-3", "3-4", "4-5")

# "-": the mean absolute change does not rise over this step; "?": too close to call, or decided by the pictures
NOT_RISING = {
    "cifar-10-c": {
        "elastic_transform": "----",
        "frost (drawn)": "++--",
        "glass_blur": "+-+-",
        "motion_blur": "++-+",
    },
    "cifar-10-c-extra": {"saturate": "+-++", "spatter": "++-+"},
    "tiny-imagenet-c": {
        "elastic_transform": "-?--",
        "frost (drawn)": "+-++",
        "glass_blur": "-+-+",
        "pixelate": "+++?",
    },
    "tiny-imagenet-c-extra": {"saturate": "+?++", "spatter": "++-+"},
    "imagenet-c": {
        "elastic_transform": "+-++",
        "fog": "++?+",
        "frost (drawn)": "++-+",
        "glass_blur": "?+-+",
        "snow": "+-++",
    },
    "imagenet-c-extra": {"saturate": "+?++"},
    "medmnist-c/bloodmnist": {"stain_deposit": "++-+"},
    "medmnist-c/dermamnist": {"black_corner": "+++-", "motion_blur": "?+++"},
    "medmnist-c/pathmnist": {"motion_blur": "+?++"},
    "medmnist-c/tissuemnist": {"jpeg_compression": "?++?"},
}
PHOTOS, SLIDES, SCANS = "cifar10_jpeg_subset.npz", "oral_he_400x_96.npz", "mednist_64.npz"
LIKE = {
    "path": SLIDES,
    "blood": "bccd_cells_40.npz",
    "derma": SLIDES,
    "retina": SLIDES,
    "tissue": "dsb2018_nuclei_64.npz",
    "oct": "busi_96.npz",
    "breast": "busi_96.npz",
    "chest": "chestxray_kermany_test_96.npz",
    "pneumonia": "chestxray_kermany_test_96.npz",
}
COLOUR = ("path", "blood", "derma", "retina")
CASES = [
    *(
        (suite, file, 32, 100)
        for suite in ("cifar-10-c", "cifar-10-c-extra")
        for file in (PHOTOS, "kodak_patches_32.npz")
    ),
    *((suite, file, 64, 40) for suite in ("tiny-imagenet-c", "tiny-imagenet-c-extra") for file in (PHOTOS, SLIDES)),
    *((suite, PHOTOS, 224, 12) for suite in ("imagenet-c", "imagenet-c-extra")),
    *((f"medmnist-c/{name}mnist", LIKE.get(name, SCANS), 224, 12) for name in DATASETS),
]


def pictures(file, side, count, *, colour):
    """Return test images of a set, brought to a side, uint8."""
    array = np.load(DATA / file)["test_images"]
    array = array[:: len(array) // count][:count]
    images = torch.from_numpy(array if array.ndim == 4 else array[..., None]).permute(0, 3, 1, 2)
    images = images.expand(-1, 3, -1, -1) if colour else images[:, :1]
    if images.shape[2] == side:
        return images.contiguous()
    sized = torch.nn.functional.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
    return sized.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("suite", "file", "side", "count"), CASES)
@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_only_the_listed_steps_do_not_rise(suite, file, side, count):
    name = suite.removeprefix("medmnist-c/").removesuffix("mnist")
    images = pictures(file, side, count, colour=name == suite or name in COLOUR)
    for shift in SUITES.get(suite)():
        changed = (shift(images, severity, ids=torch.arange(count)) for severity in (1, 2, 3, 4, 5))
        harm = [(each.int() - images.int()).abs().to(torch.float64).mean().item() for each in changed]
        seen = "".join("-" if high <= low else "+" for low, high in itertools.pairwise(harm))
        wanted = NOT_RISING.get(suite, {}).get(shift.label, "++++")
        assert all(mark in ("?", got) for mark, got in zip(wanted, seen, strict=True)), (shift.label, seen, harm)


def test_the_table_in_the_docs_is_this_one():
    text = (ROOT / "docs" / "validation.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9/-]+)` \| (.*) \|$", text, flags=re.MULTILINE))
    for suite, shifts in NOT_RISING.items():
        cells = []
        for label, pattern in shifts.items():
            steps = [step + mark.strip("-") for step, mark in zip(STEPS, pattern, strict=True) if mark != "+"]
            cells.append(f"{label} ({', '.join(steps)})")
        assert rows[suite] == "; ".join(cells)

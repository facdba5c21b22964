"""A multi-label chest X-ray study with patient ids: intervals by patient, tables by sex and view.

    python examples/nih_multilabel.py --data ../shared/data --out runs/nih

The set is small and case-control (237 training images), and the view is a shortcut in it: the point is the analysis,
not the network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import robustlab
from robustlab.train import fit, seeded_init

LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural thickening", "Hernia",
)  # fmt: skip


def network() -> nn.Module:
    """Return a small convolutional network for 96 px grey images and 14 labels."""

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), *block(16, 32), *block(32, 64), *block(64, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(LABELS)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the NPZ files")
    parser.add_argument("--out", type=Path, default=Path("runs/nih"))
    parser.add_argument("--fast", action="store_true", help="one epoch, one severity")
    options = parser.parse_args()

    file = options.data / "nih_cxr_patients_96.npz"
    train, val, test = (
        robustlab.load_data(file, split=split, modality="xray", class_names=LABELS)
        for split in ("train", "val", "test")
    )
    model = robustlab.wrap(
        seeded_init(network, seed=0), task="multilabel", output="logits", mean=0.5, std=0.25, name="small-cnn"
    )
    fit(model, train, val, epochs=1 if options.fast else 15, batch_size=32, lr=1e-3, seed=0)
    report = robustlab.evaluate_under_shift(
        model,
        test,
        val=val,
        severities=(3,) if options.fast else (1, 2, 3, 4, 5),
        groups=("sex", "view"),
        cluster="patient",
    )
    report.save(options.out)
    page = report.to_html(options.out / "report.html")
    print(report.summary())
    print(f"\nReport: {page}")


if __name__ == "__main__":
    main()

"""Does a chest X-ray network notice what it was never meant for? Every detector, near and far sets, intervals.

Trains a small network on PneumoniaMNIST and shows it radiographs of adults (another site), other kinds of medical
images, and what has no place in a hospital; the test images themselves, corrupted, should not be flagged.

    python examples/ood_chest.py --data ../shared/data --out runs/ood_chest
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pneumonia import CLASSES, MEAN, STD, small_cnn

import robustlab
from robustlab.core.registry import DETECTORS
from robustlab.data import pasted_artefact, subset
from robustlab.train import fit, seeded_init

MEMBERS = ("mutual-information", "disagreement")  # need the members of an ensemble
CHEST_X_RAY = 2  # of MedNIST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the NPZ files")
    parser.add_argument("--out", type=Path, default=Path("runs/ood_chest"))
    parser.add_argument("--fast", action="store_true", help="one epoch, 100 images a set, one severity")
    options = parser.parse_args()

    def load(name: str, split: str = "test") -> robustlab.Source:
        source = robustlab.load_data(options.data / f"{name}.npz", split=split)
        return subset(source, range(min(100, len(source)))) if options.fast else source

    train, val, test = (
        robustlab.load_data(options.data / "pneumoniamnist.npz", split=split, modality="xray", class_names=CLASSES)
        for split in ("train", "val", "test")
    )
    model = robustlab.wrap(
        seeded_init(small_cnn, seed=0), task="multiclass", output="logits", mean=MEAN, std=STD, name="small-cnn"
    )
    fit(model, train, val, epochs=1 if options.fast else 12, batch_size=128, lr=2e-3, seed=0)
    mednist = load("mednist_64")
    other = mednist.info.labels != CHEST_X_RAY  # chest radiographs of adults are a set of their own
    foreign = {
        "shift/adult-chest-x-ray": load("nih_cxr_patients_96"),
        "near/pasted-artefact": pasted_artefact(test, seed=0),
        "near/breast-ultrasound": load("breastmnist"),
        "near/ct-mri-hand": subset(mednist, torch.as_tensor(other)),
        "far/blood-cells": load("bccd_cells_40"),
        "far/photos": load("kodak_patches_32"),
        "far/fashion": load("fashionmnist_subset"),
    }
    report = robustlab.ood_report(
        model,
        test,
        val=val,
        fit=train,
        ood=foreign,
        detectors=("msp", *(name for name in DETECTORS.names() if name not in ("msp", *MEMBERS))),
        shifts=("gaussian-noise", "gaussian-blur", "contrast-loss"),
        severities=(3,) if options.fast else (1, 3, 5),
        gallery=True,
        cache=options.out,
    )
    report.save(options.out)
    page = report.to_html(options.out / "report.html")
    print(report.summary())
    print(ranking(report))
    print(f"\nReport: {page}")


def ranking(report: robustlab.Report) -> str:
    """Return the detectors by their mean AUROC over the near and over the far sets."""
    lines = []
    for group in ("near", "far"):
        rows = [
            row for row in report.rows
            if row.data == f"ID vs {group}/*" and row.metric == "auroc-ood" and not row.group and row.value == row.value
        ]  # fmt: skip
        lines.append(f"\nmean AUROC, {group} sets")
        for row in sorted(rows, key=lambda row: -row.value):
            lines.append(f"  {row.scorer:22} {row.value:.3f} ({row.low:.3f} to {row.high:.3f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""A chest X-ray study on the official PneumoniaMNIST file, end to end on a CPU.

Trains a small network, evaluates the test images under the standard suite at five severities, PGD at three budgets and
two foreign sets, and writes a report; then prints the command that gives the same numbers from the shell.

    python examples/pneumonia.py --data ../shared/data --out runs/pneumonia
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

import robustlab
from robustlab.corruptions import PGD
from robustlab.train import fit, seeded_init

MEAN, STD = 0.5, 0.25
CLASSES = ("normal", "pneumonia")


def small_cnn(width: int = 32) -> nn.Module:
    """Return a small convolutional network for 28 px grey images and two classes."""

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * width, 2),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the NPZ files")
    parser.add_argument("--out", type=Path, default=Path("runs/pneumonia"))
    parser.add_argument("--fast", action="store_true", help="one epoch, two severities")
    options = parser.parse_args()

    file = options.data / "pneumoniamnist.npz"
    train, val, test = (
        robustlab.load_data(file, split=split, modality="xray", class_names=CLASSES)
        for split in ("train", "val", "test")
    )
    net = seeded_init(small_cnn, seed=0)
    model = robustlab.wrap(net, task="multiclass", output="logits", mean=MEAN, std=STD, name="small-cnn")
    fit(model, train, val, epochs=1 if options.fast else 12, batch_size=128, lr=2e-3, seed=0)
    options.out.mkdir(parents=True, exist_ok=True)
    weights = options.out / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, weights)

    foreign = {
        "far/fashion": options.data / "fashionmnist_subset.npz",
        "near/breast-ultrasound": options.data / "breastmnist.npz",
    }
    report = robustlab.evaluate_under_shift(
        model,
        test,
        val=val,
        severities=(1, 5) if options.fast else (1, 2, 3, 4, 5),
        attacks=PGD(norm="linf", eps=(1 / 255, 2 / 255, 4 / 255), steps=5 if options.fast else 40),
        ood=foreign,
        gallery=True,
    )
    report.save(options.out)
    page = report.to_html(options.out / "report.html")
    print(report.summary())
    print(f"\nReport: {page}\nThe same from the shell:\n" + shell_command(file, weights, foreign, options.out / "cli"))


def shell_command(file: Path, weights: Path, foreign: dict[str, Path], out: Path) -> str:
    """Return the command line that evaluates the saved weights the same way."""
    sets = " ".join(f"--ood {name}={path}" for name, path in foreign.items())
    return (
        f"robustlab evaluate {Path(__file__)}:small_cnn {file} --weights {weights} --output logits --mean {MEAN} "
        f"--std {STD} --attack pgd:linf:1/255,2/255,4/255 {sets} --name small-cnn --out {out}"
    )


if __name__ == "__main__":
    main()

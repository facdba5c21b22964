"""How well ``locate`` recovers planted severities on real images: levels, intervals, false findings.

    python -m benchmarks.locate --data ../shared/data [--sets chest ...] [--json FILE]

Fifty images of one part of a set are corrupted at known severities, stored as bytes, and placed beside clean images of
another part (other patients where they are known). Stains and exposure move all images the same way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from robustlab.core.corruption import Corruption
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.shift import ShiftContext, from_bytes, to_bytes
from robustlab.core.types import Batch
from robustlab.data import load_data, subset
from robustlab.evaluate.locate import AXES
from robustlab.evaluate.placement import Placement

SETS = {"chest": "nih_cxr_patients_96", "ultrasound": "busi_96", "histology": "oral_he_400x_96"}
SEVERITIES = (1.0, 2.0, 3.0, 4.0)


def planted(batch: Batch, axis: Corruption, severity: float) -> torch.Tensor:
    """Return the images with a corruption, as stored, all moved the same way."""
    ctx = ShiftContext(seed=7)
    draws = axis.prepare(batch, ctx)
    if draws and all(bool((value.abs() == 1).all()) for value in draws.values()):
        draws = {name: torch.ones_like(value) for name, value in draws.items()}
    return from_bytes(to_bytes(axis.perform(batch, draws, severity, ctx).images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.sets:
        reference, site = (load_data(options.data / f"{SETS[name]}.npz", split=part) for part in ("test", "train"))
        known = subset(reference, range(min(200, len(reference))))
        batch = subset(site, range(options.images)).read(range(options.images))
        axes = [
            axis for axis in (CORRUPTIONS.get(item)() for item in AXES) if axis.skip_reason(known.info.spec) is None
        ]
        placement = Placement(known.read(range(len(known))), axes, torch.arange(len(known)))
        found, left = placement.place(batch.images, len(batch))
        seen = [item.axis for item in found if item.seen]
        print(f"{name}: nothing planted: seen {seen or 'nothing'}, unexplained p = {left:.3f}", flush=True)
        for axis in axes:
            for severity in SEVERITIES:
                found, left = placement.place(planted(batch, axis, severity), len(batch))
                own = next(item for item in found if item.axis == axis.name)
                row = {
                    "set": name, "axis": axis.name, "planted": severity, "seen": own.seen,
                    "found": round(own.severity, 2), "low": round(own.low, 2), "high": round(own.high, 2),
                    "covered": own.low <= severity <= own.high, "reason": own.reason,
                    "others": [item.axis for item in found if item.seen and item.axis != axis.name],
                }  # fmt: skip
                rows.append(row)
                print(row, flush=True)
    seen_rows = [row for row in rows if row["seen"]]
    close = sum(abs(row["found"] - row["planted"]) <= 0.5 for row in seen_rows)
    print(
        f"{len(rows)} planted, {len(seen_rows)} seen, {close} of those within half a step, "
        f"{sum(row['covered'] for row in seen_rows)} intervals cover; "
        f"{sum(bool(row['others']) for row in rows)} with another axis seen"
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""The shifts under which LaDiNE was evaluated.

References:
    X. Shen et al., "Improving robustness and reliability in medical image classification with latent-guided diffusion
    and nested-ensembles", 2023, 2310.15952.
"""

from __future__ import annotations

from corruptions.reference.ladine import RefLadineContrast, RefLadineNoise, RefLadineResolution
from robustlab.core.registry import SUITES
from robustlab.core.shift import Shift


@SUITES.register("ladine")
def ladine() -> tuple[Shift, ...]:
    """Return unclipped noise, low resolution and low contrast as in LaDiNE's tables and figures.

    Published values: noise 0.1 (severity 1), 0.5 (4), 1.0 (5); w = 4 (3), 8 (5); contrast 0.7 (3).
    """
    return (RefLadineNoise(), RefLadineResolution(), RefLadineContrast())

"""Attacks: one module a family, registered by name."""

from __future__ import annotations

from .adapters import FromFoolbox, FromTorchattacks
from .apgd import APGD, TargetedAPGD
from .bpda import BPDA, with_substitutes
from .detection import DetectorAttack
from .ensembles import (
    AutoAttack,
    BinaryEnsemble,
    MultilabelEnsemble,
    RandomEnsemble,
    StandardEnsemble,
    ThreeClassEnsemble,
)
from .fab import FAB
from .medical import BiasField, GammaWindow, StainAttack
from .minimal import DDN, FMN
from .pgd import FGSM, PGD
from .square import Square
from .transfer import Transfer

__all__ = [
    "APGD",
    "BPDA",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "PGD",
    "AutoAttack",
    "BiasField",
    "BinaryEnsemble",
    "DetectorAttack",
    "FromFoolbox",
    "FromTorchattacks",
    "GammaWindow",
    "MultilabelEnsemble",
    "RandomEnsemble",
    "Square",
    "StainAttack",
    "StandardEnsemble",
    "TargetedAPGD",
    "ThreeClassEnsemble",
    "Transfer",
    "with_substitutes",
]

"""Detectors: scores that are larger for what looks more out of distribution; one module a family."""

from __future__ import annotations

from .adapter import FromPytorchOOD
from .boundaries import FDBD, GradNorm
from .distances import MDS, RMD, SHE
from .ensembles import Disagreement, MutualInformation
from .files import load_detector, save_detector
from .gradients import ODIN
from .layers import LayerMDS
from .logits import GEN, MSP, Energy, Entropy, MaxLogit
from .mixtures import GMM
from .neighbours import KNN, NNGuide
from .posteriors import KLMatching
from .shaping import ASH, DICE, SCALE, ReAct
from .subspaces import Residual, ViM

__all__ = [
    "ASH",
    "DICE",
    "FDBD",
    "GEN",
    "GMM",
    "KNN",
    "MDS",
    "MSP",
    "ODIN",
    "RMD",
    "SCALE",
    "SHE",
    "Disagreement",
    "Energy",
    "Entropy",
    "FromPytorchOOD",
    "GradNorm",
    "KLMatching",
    "LayerMDS",
    "MaxLogit",
    "MutualInformation",
    "NNGuide",
    "ReAct",
    "Residual",
    "ViM",
    "load_detector",
    "save_detector",
]

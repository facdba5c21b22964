"""Sources of images, the embedded phantoms, the writer of corrupted data sets, and saved predictions."""

from .artefact import ArtefactSource, pasted_artefact
from .load import load_data
from .phantoms import HistologyPhantom, RadiographPhantom
from .predictions import SavedPredictions, load_predictions
from .protocols import HeldOut, held_out_classes, hold_out
from .sources import ArraySource, FolderSource, SubsetSource, subset
from .torch_data import DatasetSource
from .writer import write_corrupted

__all__ = [
    "ArraySource",
    "ArtefactSource",
    "DatasetSource",
    "FolderSource",
    "HeldOut",
    "HistologyPhantom",
    "RadiographPhantom",
    "SavedPredictions",
    "SubsetSource",
    "held_out_classes",
    "hold_out",
    "load_data",
    "load_predictions",
    "pasted_artefact",
    "subset",
    "write_corrupted",
]

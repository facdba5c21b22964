"""Sources of images, the embedded phantoms, the writer of corrupted data sets, and saved predictions."""

from .load import load_data
from .phantoms import HistologyPhantom, RadiographPhantom
from .predictions import SavedPredictions, load_predictions
from .sources import ArraySource, FolderSource, SubsetSource, subset
from .torch_data import DatasetSource
from .writer import write_corrupted

__all__ = [
    "ArraySource",
    "DatasetSource",
    "FolderSource",
    "HistologyPhantom",
    "RadiographPhantom",
    "SavedPredictions",
    "SubsetSource",
    "load_data",
    "load_predictions",
    "subset",
    "write_corrupted",
]

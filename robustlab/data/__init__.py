"""Sources of images, the embedded phantoms, and the writer of corrupted data sets."""

from .load import load_data
from .phantoms import HistologyPhantom, RadiographPhantom
from .sources import ArraySource, FolderSource, SubsetSource, subset
from .torch_data import DatasetSource
from .writer import write_corrupted

__all__ = [
    "ArraySource",
    "DatasetSource",
    "FolderSource",
    "HistologyPhantom",
    "RadiographPhantom",
    "SubsetSource",
    "load_data",
    "subset",
    "write_corrupted",
]

"""What an evaluation found: frozen rows and a manifest, and their views as text, files and HTML."""

from .compare import Comparison, ComparisonRow, compare
from .report import Picture, Report
from .rows import Row

__all__ = ["Comparison", "ComparisonRow", "Picture", "Report", "Row", "compare"]

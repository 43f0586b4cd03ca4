"""Reports as one self-contained page, `report.html`: scans in a viewer, tables and figures. No torch here."""

from .page import Column, Figure, Layer, ScanView, Section, Table, write_report


__all__ = ["Column", "Figure", "Layer", "ScanView", "Section", "Table", "write_report"]

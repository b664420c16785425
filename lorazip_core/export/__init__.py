"""Adapters taken out of a bundle as ordinary PEFT adapters, which any engine that serves LoRA can load."""

from .exporter import ExportedAdapter, ExportReport, export, not_of_export

__all__ = ["ExportReport", "ExportedAdapter", "export", "not_of_export"]

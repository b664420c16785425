"""Compress collections of LoRA adapters into shared-basis bundles, prove the loss and export them again."""

__version__ = "0.10.1"

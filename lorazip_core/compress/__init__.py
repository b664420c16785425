"""Compress a collection of adapters on disk into a bundle."""

"""What a compression would take, before any weight is read."""

from .plan import CompressOptions

__all__ = ["CompressOptions"]

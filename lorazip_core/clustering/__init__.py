"""Say which adapters of a collection on disk share a basis, and how many bases are worth it."""

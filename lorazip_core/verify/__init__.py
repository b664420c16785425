"""Whether a bundle is sound, its claims true, and its errors small enough."""

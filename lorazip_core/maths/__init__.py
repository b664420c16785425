"""Tensors in, tensors out: factored matrices, stacks of them, and the decompositions that share a basis."""

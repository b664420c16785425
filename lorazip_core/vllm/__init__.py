"""A bundle in vLLM: `versions` says in which releases; `launch` makes the command that serves it, on a base model whose
weights `base_weights` has held against it; `capacity` tells how many adapters the memory of a GPU holds.
"""

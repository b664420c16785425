"""A bundle in vLLM: `versions` says in which releases; `launch` makes the command that serves it, on a base model whose
weights `base_weights` has held against it; `capacity` tells how many adapters the memory of a GPU holds.

In the engine itself:

- `plugin`: what vLLM calls first, and which of its names are given another value;
- `source`: which bundle a request means;
- `layers`: which layers of the model hold its modules, and adding ΔŴ x behind them;
- `manager`: all adapters in a worker, in place of vLLM's own manager;
- `frontend`, `prefix_cache`: what is refused and told before the engine, and a cache that takes no adapter for another.
"""

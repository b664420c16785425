"""A bundle in memory, to be served: `resident` has what a device holds of it, and the reference of what is computed.

`resident_size` counts its bytes without holding it. `servable` says which adapters can be served exactly. `attach` puts
a bundle on a loaded Transformers model, which is `served` then: each row of a batch with its own adapter.

For engines the same lies in tables, whose tensors keep their addresses:

- `layers`: which modules an engine computes together, and which rows and columns of them;
- `vectors`: codes and floats of any width in one array of bytes; `spans`: which parts of an array are free;
- `terms`, `cores`: the tables of adapters that share nothing, and of those that share bases;
- `tiles`: which tokens of a batch are worked on together;
- `operators`: y += ΔŴ x out of these tables, as operators of PyTorch, which are `kernels` on a GPU;
- `store`: all of it for a bundle: what is read, and what comes and goes later.
"""

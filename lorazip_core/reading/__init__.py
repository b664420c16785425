"""The weights of a whole collection, read once: digests, energies, and the stacked updates of one module at a time.

What the modules do, each with the help of those above it:

- `groups`: adapters of one layout, which are handled together;
- `placement`, `packs`, `memory`: decided from sizes alone before a weight is read, where bytes go, what is worked on
  together, and how much fits into the memory there is;
- `contents`, `buffers`, `blocks`: every file read once, its digest and its tensors from the same bytes, by several
  threads and in blocks of adapters of one layout;
- `norms`, `first_pass`, `scan`: what that first pass tells: ‖ΔW‖² of every update, NaN and Inf, files that are not
  those of the lock. On a GPU the tensors stay in one array a layout, if all of them fit;
- `runs`, `sources`, `stacks`: the factors of one module, out of these arrays or read again from the files, as a stack;
- `module_groups`: one adapter by itself, its modules stacked by shape;
- `updates`: what the later steps see: norms, weights, and a stack for the asking.
"""

"""A bundle in vLLM. `versions` says in which releases; `launch` makes the command that serves it, on a base model whose
weights `base_weights` has held against it, out of vLLM's `options` and those in its `options_file`, but for those that
are `forbidden`; `capacity` tells how many adapters the memory of a GPU holds.

vLLM's processes are where the rest runs. `plugin` is called first, and `configuration` where an engine is asked for: if
this vLLM has what it `needs`, if the adapters are `servable`. `source` is what a request says of where its adapter
is, `admission` refuses wrong ones in the `frontend`. In a worker, `manager` holds the adapters, behind the `layers` of
the model. `prefix_cache` tells adapters of one name apart.
"""

"""A bundle in memory, to be served: `resident` has what a device holds of it, and the reference of what is computed.

`servable` says which adapters can be served exactly. `attach` puts a bundle on a loaded Transformers model, which is
`served` then: each row of a batch with its own adapter.
"""

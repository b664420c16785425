"""A bundle in memory, to be served: `resident` has what a device holds of it, and the reference of what is computed."""

"""The weights of a whole collection, read once: digests, energies, and the stacked updates of one module at a time.

Adapters that are laid out alike are handled together. On a GPU their files land in one array, of which a module is a
strided view, if all of them fit there; else in turns, and a module is read from the files when it is wanted.
"""

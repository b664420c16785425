"""Adapters come and go, and the bundle that has them stays: no basis is fitted anew, and no other adapter is touched.

What the modules do, each with the help of those above it:

- `carry`: what a bundle has of adapters that stay, taken over into another one: files as they are, or what is left of
  them;
- `successor`: the manifest of that other bundle;
- `projection`: adapters that join on bases that are there, each on those that serve it best;
- `manner`: how those that no basis serves well enough are kept on their own;
- `addition`: those that join, from what was read of them to the files and the manifest of the new bundle;
- `remove`, `add`: the verbs.
"""

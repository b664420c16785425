"""The operators of `operators` as Triton kernels: two launches each, whatever the adapters of the batch are.

The first one writes what is between the two sides, the products of x with V or v̂, for all slices of a layer and in
parts: some programs share the columns of x. The second one sums the parts, multiplies with U or û and adds to y.
There are no atomics, so results are the same in every run, and nothing is filled beforehand: what was not written is
not read.

The grid is made for the most tiles that so many tokens can have, so that a captured CUDA graph is right for any batch
of its size; programs without a tile end at once. Tokens beyond the batch, with which graphs are padded, are in no tile.
What differs from batch to batch is nothing that kernels are compiled for, but whether it is of few tokens or of many.

A batch of few tokens, as in decoding, is made of tokens that hardly share adapters: each is a tile where adapters share
nothing, and a program has one term at a time. In one of many, tiles are wide and tensor cores multiply with V and v̂.
"""

from .cores import add_cores
from .terms import add_terms

__all__ = ["add_cores", "add_terms"]

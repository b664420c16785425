"""The weights of a whole collection, read once: digests, energies, and the stacked updates of one module at a time.

Adapters that are laid out alike are handled together. On a GPU their files land in one array, of which a module is a
strided view, if all of them fit there; else in turns, and a module is read from the files when it is wanted.
"""

from .blocks import Block, in_blocks
from .groups import by_layout
from .intake import Intake, Verify, take_in
from .placement import HOST, Placement, pass_through, place, stays
from .runs import MOST_HELD
from .stacks import Files, Resident, Stacks

__all__ = [
    "HOST",
    "MOST_HELD",
    "Block",
    "Files",
    "Intake",
    "Placement",
    "Resident",
    "Stacks",
    "Verify",
    "by_layout",
    "in_blocks",
    "pass_through",
    "place",
    "stays",
    "take_in",
]

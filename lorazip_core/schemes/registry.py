"""The schemes that there are. One more is a file beside this one and a line in `SCHEMES`."""

from __future__ import annotations

from .coded import Coded
from .diag import Diag
from .joint import Joint
from .original import Original
from .scheme import IndividualScheme, PackedScheme, Scheme, SharedScheme, SteppedScheme
from .svd import Svd

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Joint(),
        Diag(),
        Svd(),
        Coded(),
        Original(),
    )
}
AUTO = "auto"
"""The method of those who name none: see `default_method`."""
EXACT = Original.name
"""The scheme that loses nothing, whatever the values are."""
FALLBACKS = (Svd.name, EXACT)
"""What an adapter gets that its method serves too badly, or cannot hold: the first of these that is good enough."""


def methods() -> list[str]:
    """The schemes that can be asked for."""
    return [scheme.name for scheme in SCHEMES.values() if scheme.is_method]


def shared_scheme(name: str) -> SharedScheme:
    """The scheme of a cluster."""
    scheme = SCHEMES[name]
    assert isinstance(scheme, SharedScheme)
    return scheme


def individual_scheme(name: str) -> IndividualScheme:
    """The scheme of an adapter on its own."""
    scheme = SCHEMES[name]
    assert isinstance(scheme, IndividualScheme)
    return scheme


def packed_scheme(name: str) -> PackedScheme | None:
    """The scheme of an adapter that shares a file with others; None if it has one of its own, or none."""
    scheme = SCHEMES[name]
    return scheme if isinstance(scheme, PackedScheme) else None


def default_method(*, shares: bool) -> str:
    """What serves those best who name no method; ``shares``: who ask for bases, by their rank or their number."""
    return Joint.name if shares else Coded.name


def stepped_schemes() -> list[SteppedScheme]:
    """The methods whose sizes and errors can be planned."""
    return [scheme for name in methods() if isinstance(scheme := SCHEMES[name], SteppedScheme)]

"""Tiles: every token that has an adapter is in one, and so many as they can be there is room for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip_core.serving.tiles import FEW, FIELDS, HEAD, WIDE, Grouped, batch, most_ints, most_tiles

NARROW = st.sampled_from([1, 16])


@st.composite
def batches(draw: st.DrawFn) -> list[Grouped]:
    """Tokens are of one kind each, or of none."""
    tokens = draw(st.one_of(st.integers(0, 60), st.integers(FEW - 2, FEW + 200)))
    kinds, groups, seed = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 70])), draw(st.integers(0, 999))
    generator = np.random.default_rng(seed)
    kind_of = generator.integers(-1, kinds, tokens)
    group, adapter = (generator.integers(0, most, tokens).astype(np.int32) for most in (groups, 10_000))
    return [
        Grouped(np.where(kind_of == kind, group, -1).astype(np.int32), adapter, draw(NARROW)) for kind in range(kinds)
    ]


def tiles(array: np.ndarray, kind: int) -> list[tuple[list[int], list[int], int]]:
    """The tokens, adapters and group of each, as kernels read them."""
    count, first, tokens, adapters = array[HEAD * kind : HEAD * (kind + 1)].tolist()
    found = []
    for place, places, group in array[first : first + FIELDS * count].reshape(-1, FIELDS).tolist():
        own = slice(place, place + places)
        found.append((array[tokens:][own].tolist(), array[adapters:][own].tolist(), group))
    return found


@settings(deadline=None)
@given(batches())
def test_every_token_with_an_adapter_is_in_one_tile_of_its_group(kinds: list[Grouped]) -> None:
    array = batch(kinds)
    assert array.dtype == np.int32
    for number, kind in enumerate(kinds):
        found = tiles(array, number)
        seen = [token for tokens, _, _ in found for token in tokens]
        assert sorted(seen) == np.flatnonzero(kind.group >= 0).tolist()
        width = WIDE if len(kind.group) > FEW else kind.narrow
        for tokens, adapters, group in found:
            assert 1 <= len(tokens) <= width
            assert {int(kind.group[token]) for token in tokens} == {group}
            assert [int(kind.adapter[token]) for token in tokens] == adapters
        # No more tiles than a group needs.
        for group in {group for _, _, group in found}:
            assert sum(each == group for _, _, each in found) == -(-int((kind.group == group).sum()) // width)


@settings(deadline=None)
@given(batches(), st.integers(0, 600))
def test_there_is_room_for_any_batch_however_it_is_padded(kinds: list[Grouped], padding: int) -> None:
    tokens = len(kinds[0].group)
    array = batch(kinds)
    assert len(array) <= most_ints(tokens, len(kinds)) <= most_ints(tokens + padding, len(kinds))
    for number, kind in enumerate(kinds):
        groups = int(kind.group.max(initial=-1)) + 1
        assert len(tiles(array, number)) <= most_tiles(tokens + padding, groups, kind.narrow)


@pytest.mark.parametrize("narrow", [1, 16])
@pytest.mark.parametrize(("tokens", "groups"), [(0, 3), (1, 3), (40, 3), (FEW, 5), (FEW + 1, 5), (3000, 7)])
def test_there_is_not_much_more_room_than_that(tokens: int, groups: int, narrow: int) -> None:
    """All groups but one are of one token; programs that a kernel starts without a tile do cost a little."""
    group = np.zeros(tokens, np.int32)
    group[: groups - 1] = np.arange(1, groups)[:tokens]
    found, most = len(tiles(batch([Grouped(group, group, narrow)]), 0)), most_tiles(tokens, groups, narrow)
    assert found <= most
    if tokens <= FEW:
        assert most - 1 <= found
    assert most <= min(tokens, -(-FEW // narrow) + groups + tokens // WIDE)
    alone = np.arange(tokens, dtype=np.int32)
    assert len(batch([Grouped(alone, alone, narrow)])) == most_ints(tokens, 1) or tokens > FEW

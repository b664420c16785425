"""A table of terms whose adapters come and go: what fits by the numbers does, and all that is held stays right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lorazip_core.base.errors import LocalError
from lorazip_core.schemes.scheme import Size
from lorazip_core.serving.terms import PackedTerms, TermsTable

CPU = torch.device("cpu")
MODULES = 12
MOST = 16
"""The most terms of a module."""


def made(random: np.random.Generator, terms: float, size: float) -> PackedTerms:
    """An adapter of about, and at most, so many terms and bytes; vectors are of 8 to 100 bytes."""
    counts, vectors, total = np.zeros(MODULES, np.int64), list[tuple[int, int]](), 0
    while len(vectors) + 1 <= terms:
        module, (u, v) = random.integers(MODULES), 4 * random.integers(2, 26, 2)
        if total + u + v > size or counts[module] == MOST:
            break
        counts[module] += 1
        vectors.append((u, v))
        total += u + v
    sizes = np.array(vectors, np.int64).reshape(-1, 2)
    order = random.permutation(sizes.size)  # where they lie is not the order of the terms
    at = np.zeros(sizes.size, np.int64)
    at[order] = np.cumsum(sizes.ravel()[order]) - sizes.ravel()[order]
    modules = np.flatnonzero(counts)
    return PackedTerms(
        modules,
        counts[modules],
        at.reshape(-1, 2),
        random.integers(0, 256, sizes.shape, np.uint8),
        torch.from_numpy(random.standard_normal(len(sizes)).astype(np.float32)),
        random.integers(0, 256, total, np.uint8),
    )


def check(table: TermsTable, held: dict[int, PackedTerms]) -> None:
    """Every vector of every adapter is where the table says, and nobody else has terms."""
    index, at, forms, data = (each.numpy() for each in (table.index, table.at, table.forms, table.data))
    for row, adapter in held.items():
        assert index[:, row, 1].sum() == len(adapter.scale)
        firsts, counts = index[adapter.modules, row].T
        assert (counts == adapter.counts).all()
        own = np.concatenate([np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)])
        assert torch.equal(table.scale[own], adapter.scale)
        assert (forms[own] == adapter.forms).all()
        assert not (at[own] % 4).any()
        begins = adapter.at.ravel()
        ends = np.append(np.sort(begins), len(adapter.data))[np.argsort(np.argsort(begins)) + 1]
        for there, begin, end in zip(at[own].ravel().tolist(), begins.tolist(), ends.tolist(), strict=True):
            assert (data[there : there + end - begin] == adapter.data[begin:end]).all()
    others = np.delete(index, list(held), 1)
    assert not others[:, :, 1].any()


def sums(adapters: list[PackedTerms]) -> np.ndarray:
    """Terms and bytes of all of them."""
    return np.array([[len(each.scale), len(each.data)] for each in adapters]).sum(0)


@pytest.mark.parametrize("terms", [12, 48])
@pytest.mark.parametrize(("count", "spare"), [(8, 2), (8, 8), (8, 40), (40, 4)])
def test_what_was_promised_room_has_it_after_any_swaps(count: int, spare: int, terms: int) -> None:
    """Of 0.4 to 1.5 times the average, and often of all 1.5; anyone may go, until there is room by the numbers."""
    random = np.random.default_rng(count + spare + terms)
    first = [made(random, share * terms, share * 110 * terms) for share in random.uniform(0.4, 1.6, count)]
    table = TermsTable(first, [Size(1, 1)] * MODULES, CPU, spare)
    held, average = dict(enumerate(first)), sums(first) / count
    promised = sums(first) + 1.5 * spare * average
    for turn in range(1500):
        share = 1.5 if turn // 100 % 2 else random.uniform(0.4, 1.5)
        adapter = made(random, *share * average)
        while len(held) == count + spare or (sums([adapter, *held.values()]) > promised).any():
            gone = int(random.choice(list(held)))
            table.remove(gone)
            del held[gone]
        held[table.add(adapter)] = adapter
        if turn % 100 == 99:
            check(table, held)
    for row in held:
        table.remove(row)
    assert table.add(first[0]) == 0
    assert table.at[:2].tolist() == first[0].at[:2].tolist()  # at the start of all room, which is in one piece again


def test_who_does_not_fit_is_told_what_is_free_and_nothing_is_taken() -> None:
    """Two of three go that are not side by side: one as large as both lies in two pieces, and one larger does not."""
    random = np.random.default_rng(0)
    first = [made(random, 20, 2000) for _ in range(3)]
    table = TermsTable(first, [Size(1, 1)] * 2 * MODULES, CPU)
    for row in (0, 2):
        table.remove(row)
    terms, size = sums([first[0], first[2]]).tolist()
    before = [tensor.clone() for tensor in (table.index, table.at, table.forms, table.scale, table.data)]
    larger = first[0]._replace(data=np.zeros(size + 4, np.uint8))
    said = f"no room for an adapter of {len(larger.scale)} terms and {size + 4:,} bytes: 2 rows, {terms} terms and "
    for _ in range(3):
        with pytest.raises(LocalError, match=re.escape(f"{said}{size:,} bytes are free")):
            table.add(larger)
    after = (table.index, table.at, table.forms, table.scale, table.data)
    assert all(map(torch.equal, before, after))
    held = {1: first[1]} | {table.add(first[number]): first[number] for number in (0, 2)}
    check(table, held)
    for row in (0, 2):
        table.remove(row)
    both = joined(first[0], first[2])
    row = table.add(both)
    assert len(table._held[row].data) == len(table._held[row].terms) == 2
    check(table, {1: first[1], row: both})


def joined(one: PackedTerms, other: PackedTerms) -> PackedTerms:
    """One adapter with all of both, each with modules of its own."""
    return PackedTerms(
        np.append(one.modules, other.modules + MODULES),
        np.append(one.counts, other.counts),
        np.concatenate([one.at, other.at + len(one.data)]),
        np.concatenate([one.forms, other.forms]),
        torch.cat([one.scale, other.scale]),
        np.append(one.data, other.data),
    )

"""A scheme is one file and one line of the registry: everything else takes it from there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from testing import random_adapters as ra
from torch import Tensor

from lorazip_cli.main import main
from lorazip_core.maths.factored import Factors, squared_distance
from lorazip_core.maths.stack import ScaledStack
from lorazip_core.schemes.joined import Joined
from lorazip_core.schemes.registry import FALLBACKS, SCHEMES, individual_scheme, methods, shared_scheme
from lorazip_core.schemes.scheme import (
    ANY,
    Encoding,
    IndividualScheme,
    ModuleGroup,
    PackedScheme,
    Problems,
    Shape,
    ShapeOf,
    SharedScheme,
    Size,
    Solution,
    Target,
    TensorSpec,
    working_dtype,
)


class Sign(IndividualScheme):
    """B and A as their signs and one scale each."""

    name: ClassVar[str] = "sign"
    about: ClassVar[str] = "the signs of its factors"
    own: ClassVar[tuple[str, ...]] = ("signs_b", "signs_a", "size")

    def encodings(self, groups: Sequence[ModuleGroup], target: Target, dtype: torch.dtype) -> Iterable[Encoding]:
        encoding = Encoding({}, {})
        for group in groups:
            for name, b, a in zip(group.names, *group.exact, strict=True):
                own = {"signs_b": b.sign().to(torch.int8), "signs_a": a.sign().to(torch.int8)}
                own["size"] = (b.abs().mean() * a.abs().mean()).float()
                encoding.tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in own.items()})
                encoding.squared_errors[name] = float(squared_distance((b, a), self.decode(own, torch.float64)))
        yield encoding

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        scaled = tensors["signs_b"].to(dtype) * tensors["size"].to(dtype)[..., None, None]
        return scaled, tensors["signs_a"].to(dtype)

    def resident(self, adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {f"{suffix}.{place}": own[suffix] for place, own in enumerate(adapters) for suffix in self.own}

    def resident_bytes(self, resident: Mapping[str, Tensor], size: Size) -> list[int]:
        adapters = len(resident) // len(self.own)
        return [sum(resident[f"{suffix}.{place}"].nbytes for suffix in self.own) for place in range(adapters)]

    def apply(self, resident: Mapping[str, Tensor], size: Size, x: Tensor, places: Tensor) -> Tensor:
        def applied(x: Tensor, place: int) -> Tensor:
            own = {suffix: resident[f"{suffix}.{place}"] for suffix in self.own}
            b, a = self.decode(own, working_dtype(x))
            return b @ (a @ x.to(a.dtype))

        return torch.stack([applied(*each) for each in zip(x, places.tolist(), strict=True)])

    def decoded_rank(self, shape_of: ShapeOf) -> int:
        return shape_of("signs_a")[0]

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        most = range(1, (rank or max(size)) + 1)
        return {
            "signs_b": TensorSpec((size.d_out, most), ("I8",)),
            "signs_a": TensorSpec((most, size.d_in), ("I8",)),
            "size": TensorSpec((), ("F32",)),
        }


class Signs(PackedScheme):
    """The same, of several adapters in one file."""

    name: ClassVar[str] = "signs"
    about: ClassVar[str] = "the signs of its factors, of rank {rank}"
    own: ClassVar[tuple[str, ...]] = Sign.own
    has_own_rank: ClassVar[bool] = True

    def encodings(self, groups: Sequence[ModuleGroup], target: Target, dtype: torch.dtype) -> Iterable[Encoding]:
        ranks = {name: group.rank for group in groups for name in group.names}
        for encoding in Sign().encodings(groups, target, dtype):
            own = encoding.tensors
            joined = {suffix: Joined.of([own[f"{name}.{suffix}"] for name in sorted(ranks)]) for suffix in self.own}
            yield encoding._replace(tensors={}, ranks=ranks, joined=joined)

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return Sign().decode(tensors, dtype)

    def resident(self, adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return Sign().resident(adapters)

    def resident_bytes(self, resident: Mapping[str, Tensor], size: Size) -> list[int]:
        return Sign().resident_bytes(resident, size)

    def apply(self, resident: Mapping[str, Tensor], size: Size, x: Tensor, places: Tensor) -> Tensor:
        return Sign().apply(resident, size, x, places)

    def decoded_rank(self, shape_of: ShapeOf) -> int:
        return Sign().decoded_rank(shape_of)

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        return Sign().own_tensors(size, rank)

    def typical_bytes(self, size: Size) -> int:
        return 4 * sum(size)

    def stored_rank(self, own: Mapping[str, Joined]) -> int:
        return int(own["signs_a"].shapes[:, 0].max())

    def file_tensors(self, adapters: int) -> dict[str, TensorSpec]:
        return {
            "ranks": TensorSpec((ANY,), ("U8",)),
            "signs": TensorSpec((ANY,), ("I8",)),
            "sizes": TensorSpec((ANY,), ("F32",)),
        }

    def pack(self, adapters: Sequence[Mapping[str, Joined]]) -> dict[str, Tensor]:
        ranks = np.concatenate([adapter["signs_a"].shapes[:, 0] for adapter in adapters])
        return {
            "ranks": torch.from_numpy(ranks).to(torch.uint8),
            "signs": torch.cat([adapter[side].flat for adapter in adapters for side in ("signs_b", "signs_a")]),
            "sizes": torch.cat([adapter["size"].flat for adapter in adapters]),
        }

    def unpack(self, tensors: Mapping[str, Tensor], sizes: Sequence[Sequence[Size]]) -> list[dict[str, Joined]]:
        left = tensors["signs"]
        found = iter(zip(tensors["ranks"].tolist(), tensors["sizes"], strict=True))
        adapters = []
        for adapter in sizes:
            ranks, scales = zip(*(next(found) for _ in adapter), strict=True)
            b = np.array([(size.d_out, rank) for size, rank in zip(adapter, ranks, strict=True)])
            a = np.array([(rank, size.d_in) for size, rank in zip(adapter, ranks, strict=True)])
            flat_b, flat_a, left = left.split(
                [most := int(b.prod(1).sum()), other := int(a.prod(1).sum()), len(left) - most - other]
            )
            adapters.append({"signs_b": Joined(flat_b, b), "signs_a": Joined(flat_a, a), "size": Joined.of(scales)})
        return adapters


class Mean(SharedScheme):
    """A cluster shares a pair of factors of rank 1, and each adapter has how much of it it is."""

    name: ClassVar[str] = "mean"
    about: ClassVar[str] = "a share of what {adapters} adapters have in common, at rank {rank}"
    shared: ClassVar[tuple[str, ...]] = ("left", "right")
    own: ClassVar[tuple[str, ...]] = ("amount",)
    default_rank: ClassVar[int | None] = 1

    def encode(self, problems: Problems, rank: int, *, dtype: torch.dtype, seed: int, share: object) -> list[Solution]:
        found: dict[int, Solution] = {}
        for stack, owner in zip(problems.stacks, problems.owners, strict=True):
            for problem in sorted(set(owner.tolist()) - {-1}):
                members = [m for m, own in zip(stack.adapters, owner.tolist(), strict=True) if own == problem]
                updates = dict(self._updates(stack.select(set(members)).exact()))
                dense = torch.stack([updates[member] for member in sorted(members)])
                u, _, vh = torch.linalg.svd(dense.mean(0))
                shared = {"left": u[:, :1].to(dtype), "right": vh[:1].to(dtype)}
                found[problem] = self.project(stack.select(set(members)), shared)
        return [found[problem] for problem in range(problems.total)]

    def project(self, stack: ScaledStack, shared: Mapping[str, Tensor]) -> Solution:
        updates = dict(self._updates(stack.exact()))
        dense = torch.stack([updates[member] for member in sorted(updates)])
        common = shared["left"].double() @ shared["right"].double()
        amounts = (dense * common).sum((1, 2)).to(shared["left"].dtype)
        errors = (dense - amounts.double()[:, None, None] * common).square().sum((1, 2))
        return Solution(dict(shared), {"amount": amounts[:, None]}, tuple(sorted(updates)), errors)

    def _updates(self, stack: object) -> Iterable[tuple[int, Tensor]]:
        for b, a, positions in stack.factors():  # type: ignore[attr-defined]
            yield from zip(stack.adapters[positions], b @ a, strict=True)  # type: ignore[attr-defined]

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Factors:
        return tensors["left"].to(dtype) * tensors["amount"].to(dtype)[..., None], tensors["right"].to(dtype)

    def apply(self, resident: Mapping[str, Tensor], size: Size, x: Tensor, places: Tensor) -> Tensor:
        left, right, amounts = (resident[name].to(working_dtype(x)) for name in ("left", "right", "amount"))
        return x.to(right.dtype) @ right.mT * amounts[places] @ left.mT

    def decoded_rank(self, shape_of: ShapeOf) -> int:
        return shape_of("right")[0]

    def stored_rank(self, shared: Mapping[str, Shape]) -> int:
        return shared["left"][1]

    def shared_tensors(self, size: Size, rank: int) -> dict[str, TensorSpec]:
        return {"left": TensorSpec((size.d_out, 1)), "right": TensorSpec((1, size.d_in))}

    def own_tensors(self, size: Size, rank: int, shared: Mapping[str, Shape] | None = None) -> dict[str, TensorSpec]:
        return {"amount": TensorSpec((1,))}

    def working_bytes(self, pack: object, rank: int) -> int:
        return 2**20

    def working_bytes_of_update(self, rank: int) -> int:
        return 0


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, object]:
    code = main([*map(str, argv), "--json", "-q"])
    out, err = capsys.readouterr()
    assert code == 0, err
    told: dict[str, object] = json.loads(out)
    return told


@pytest.mark.parametrize("scheme", [Sign(), Signs(), Mean()], ids=lambda scheme: scheme.name)
def test_a_new_scheme_goes_through_every_command(
    scheme: Sign | Signs | Mean, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = ra.write_collection(tmp_path / "adapters", ra.MIXED)
    monkeypatch.setitem(SCHEMES, scheme.name, scheme)
    bundle, exported = tmp_path / "bundle", tmp_path / "exported"
    planned = run(capsys, "compress", adapters, "--method", scheme.name, "--dry-run")
    chosen = planned["schemes"][0]  # type: ignore[index]
    assert (chosen["method"], chosen["chosen"]) == (scheme.name, True)
    made = run(capsys, "compress", adapters, "-o", bundle, "--method", scheme.name)
    assert made["method"] == scheme.name
    real = made["summary"]["bytes_bundle"]  # type: ignore[index]
    assert chosen["bytes_bundle"] == pytest.approx(real, rel=0.2)
    told = run(capsys, "info", bundle, "--resident")
    assert {adapter["scheme"] for adapter in told["adapters"]} == {scheme.name}  # type: ignore[attr-defined]
    own = sum(adapter["bytes_resident"] for adapter in told["adapters"])  # type: ignore[attr-defined]
    assert 0 < own < told["resident"]["bytes"]  # type: ignore[index]
    assert run(capsys, "verify", bundle, "--against", adapters)["ok"] is True
    assert run(capsys, "export", bundle, "-o", exported, "--dtype", "f32")["adapters"]
    more = ra.write_collection(tmp_path / "more", (ra.Recipe("b/x", 3), ra.Recipe("i", 2, (ra.Q, ra.EMBED))))
    longer, shorter = tmp_path / "longer", tmp_path / "shorter"
    added = run(capsys, "add", bundle, more, "-o", longer, "--max-error", "1")["added"]
    assert {each["scheme"] for each in added} == {scheme.name}  # type: ignore[attr-defined]
    options = ["--adapter", "b/x", "--adapter", "i"]
    assert run(capsys, "verify", longer, "--against", more, *options)["ok"] is True
    run(capsys, "remove", longer, "b/x", "b/d", "-o", shorter)
    assert run(capsys, "verify", shorter)["ok"] is True
    cards, weights = list(exported.rglob("README.md")), list(exported.rglob("adapter_model.safetensors"))
    assert len(cards) == len(weights) == len(ra.MIXED)
    assert all(scheme.about.split("{")[0] in card.read_text() for card in cards)
    for path in weights:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_who_does_not_know_a_scheme_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = ra.write_collection(tmp_path / "adapters", ra.MIXED)
    with monkeypatch.context() as patch:
        patch.setitem(SCHEMES, "sign", Sign())
        run(capsys, "compress", adapters, "-o", tmp_path / "bundle", "--method", "sign")
    assert main(["verify", str(tmp_path / "bundle")]) == 5
    assert "'sign'" in capsys.readouterr().err
    assert main(["compress", str(adapters), "-o", str(tmp_path / "other"), "--method", "sign"]) == 2


def test_what_an_adapter_falls_back_on_is_there() -> None:
    assert all(individual_scheme(name) for name in FALLBACKS)
    assert individual_scheme(FALLBACKS[-1]).keeps_factors
    assert all(shared_scheme(name).shared for name in methods() if SCHEMES[name].shared)
    assert {scheme.name for scheme in SCHEMES.values()} == set(SCHEMES)

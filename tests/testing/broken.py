"""Broken bundles: what is done to a sound one (of random_bundle.py), and the findings that it must give.

The damages below RESEALED have every size and digest made right again: only the content gives them away.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorazip_core.base.digests import sha256_file
from testing.random_bundle import PACKED, load_manifest, store_manifest

BASIS, DIAG_BASIS = "bases/000.safetensors", "bases/001.safetensors"
CORES, DIAG_CORES = "cores/000-000.safetensors", "cores/001-000.safetensors"


class Broken(NamedTuple):
    name: str
    damage: Callable[[Path], Any]
    kinds: set[str]


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and give it the digest of what it says now."""
    fields = load_manifest(bundle)
    edit(fields)
    store_manifest(bundle, fields)


def reseal(bundle: Path) -> None:
    """Make every size and digest in the manifest, and each file of cores' digest of its basis, right again."""

    def edit(fields: dict[str, Any]) -> None:
        for cluster in fields["clusters"]:
            digest = sha256_file(bundle / cluster["basis"])
            for shard in cluster["shards"]:
                shard["basis_sha256"] = digest
                path = bundle / shard["path"]
                save_file(load_file(path), path, metadata={"basis_sha256": digest})
        for entry in fields["files"]:
            entry["size_bytes"] = (bundle / entry["path"]).stat().st_size
            entry["sha256"] = sha256_file(bundle / entry["path"])

    edit_manifest(bundle, edit)


def find(bundle: Path, pattern: str) -> str:
    """The one file of the bundle that matches, as the manifest writes it."""
    (path,) = bundle.glob(pattern)
    return path.relative_to(bundle).as_posix()


def flip(path: Path, position: int = -1, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def link(bundle: Path, name: str) -> None:
    elsewhere = bundle.with_name("elsewhere")
    (bundle / name).rename(elsewhere)
    (bundle / name).symlink_to(elsewhere)


def tensors(path: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A damage to the tensors of one file (a glob), with the bundle resealed."""

    def damage(bundle: Path) -> None:
        file = bundle / find(bundle, path)
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        content = load_file(file)
        edit(content)
        save_file(content, file, metadata=metadata)
        reseal(bundle)

    return damage


def data(path: str, content: bytes) -> Callable[[Path], None]:
    """A file (a glob) replaced by these bytes, with the bundle resealed."""

    def damage(bundle: Path) -> None:
        (bundle / find(bundle, path)).write_bytes(content)
        reseal(bundle)

    return damage


def manifest(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda bundle: edit_manifest(bundle, edit)


def wrong_basis_metadata(bundle: Path) -> None:
    path = bundle / CORES
    save_file(load_file(path), path, metadata={"basis_sha256": "0" * 64})

    def edit(fields: dict[str, Any]) -> None:
        entry = next(entry for entry in fields["files"] if entry["path"] == CORES)
        entry.update(size_bytes=path.stat().st_size, sha256=sha256_file(path))

    edit_manifest(bundle, edit)


def two_owners(bundle: Path) -> None:
    """A file of extras that is the factors of another adapter, too."""
    edit_manifest(bundle, lambda fields: fields["adapters"][1].update(extras=fields["adapters"][5]["individual"]))


def one_of_several(bundle: Path) -> None:
    own = find(bundle, "individual/g-*")

    def edit(fields: dict[str, Any]) -> None:
        fields["adapters"][5]["individual"] = PACKED
        fields["files"] = [entry for entry in fields["files"] if entry["path"] != own]

    edit_manifest(bundle, edit)


def no_adapters(bundle: Path) -> None:
    edit_manifest(bundle, lambda fields: fields.update(adapters=[], clusters=[], files=[], modules=[], module_sets=[]))


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda content: content.update({name: change(content[name]).contiguous()})


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


def deflated(content: bytes) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return encoder.compress(content) + encoder.flush()


def streams(tensor: torch.Tensor) -> list[bytearray]:
    """What the deflate streams of a tensor inflate to, one after another."""
    found, data = [], tensor.numpy().tobytes()
    while data:
        decoder = zlib.decompressobj(-15)
        found.append(bytearray(decoder.decompress(data)))
        data = decoder.unused_data
    return found


def packed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """A damage to one tensor of the file of several adapters."""
    return tensors(PACKED, _set(name, change))


def of_bytes(change: Callable[[bytes], bytes]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.tensor(list(change(tensor.numpy().tobytes())), dtype=torch.uint8)


def of_streams(change: Callable[[list[bytearray]], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        found = streams(tensor)
        change(found)
        return torch.tensor(list(b"".join(map(deflated, found))), dtype=torch.uint8)

    return changed


def _put(number: int, place: int, byte: int) -> Callable[[list[bytearray]], Any]:
    return lambda found: found[number].__setitem__(place, byte)


def _garbage(content: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(content))


def _bomb(number: int) -> Callable[[list[bytearray]], Any]:
    return lambda found: found.__setitem__(number, bytearray(2**26))


Q, V = "layers.0.q_proj", "layers.0.v_proj"

FILES = [
    Broken("no manifest", lambda b: (b / "manifest.json").unlink(), {"manifest"}),
    Broken("an empty manifest", lambda b: (b / "manifest.json").write_bytes(b""), {"manifest"}),
    Broken("a manifest that is a list", lambda b: (b / "manifest.json").write_bytes(b"[]\n"), {"manifest"}),
    Broken("a bit of the manifest", lambda b: flip(b / "manifest.json", 500), {"manifest"}),
    Broken("a basis that is missing", lambda b: (b / BASIS).unlink(), {"missing-file"}),
    Broken("a bit of a core", lambda b: flip(b / CORES), {"wrong-digest"}),
    Broken("a basis cut short", lambda b: os.truncate(b / BASIS, 100), {"wrong-size"}),
    Broken("a basis emptied", lambda b: os.truncate(b / BASIS, 0), {"wrong-size"}),
    Broken("a file too many", lambda b: (b / "cores" / "more.safetensors").write_bytes(b""), {"unlisted-file"}),
    Broken("a hidden file", lambda b: (b / ".DS_Store").write_bytes(b""), {"unlisted-file"}),
    Broken(
        "a file with a name that is no text",
        lambda b: Path(os.fsdecode(bytes(b) + b"/\xff")).touch(),
        {"unlisted-file"},
    ),
    Broken("an empty folder", lambda b: (b / "extras" / "more").mkdir(), {"unlisted-file"}),
    Broken("a link in place of a file", lambda b: link(b, BASIS), {"not-a-file"}),
    Broken("a link in place of the manifest", lambda b: link(b, "manifest.json"), {"not-a-file"}),
    Broken(
        "a folder in place of a file",
        lambda b: ((b / BASIS).unlink(), (b / BASIS).mkdir()),
        {"missing-file", "unlisted-file"},
    ),
    Broken("a link in place of a folder", lambda b: link(b, "bases"), {"missing-file", "unlisted-file"}),
    Broken("two bases swapped", lambda b: swap(b / BASIS, b / DIAG_BASIS), {"wrong-size"}),
]

RESEALED = [
    Broken("extras that are no safetensors file", data("extras/a-*", b"\x08\0\0\0\0\0\0\0nonsense"), {"unreadable"}),
    Broken("individual factors that are no safetensors file", data("individual/g-*", b"nonsense"), {"unreadable"}),
    Broken("a configuration that is no JSON", data("configs/a-*", b"{"), {"unreadable"}),
    Broken("a configuration that is a list", data("configs/a-*", b"[1]"), {"unreadable"}),
    Broken("a tensor is missing", tensors(BASIS, lambda t: t.pop(f"{Q}.U")), {"missing-tensor"}),
    Broken("a tensor too many", tensors(BASIS, lambda t: t.update(more=torch.zeros(1))), {"unexpected-tensor"}),
    Broken("a basis of another height", tensors(BASIS, _set(f"{Q}.U", lambda t: t[:-1])), {"wrong-shape"}),
    Broken(
        "a basis of higher rank", tensors(BASIS, _set(f"{Q}.U", lambda t: torch.eye(24, 11).to(t))), {"wrong-shape"}
    ),
    Broken("a basis less a column", tensors(BASIS, _set(f"{Q}.V", lambda t: t[:, 1:])), {"wrong-shape"}),
    Broken("a core less a row", tensors(CORES, _set(f"{Q}.core", lambda t: t[1:])), {"wrong-shape"}),
    Broken(
        "a core for a module that no adapter has",
        tensors(CORES, lambda t: t.update({"x.core": torch.zeros(1)})),
        {"unexpected-tensor"},
    ),
    Broken("a flat core", tensors(CORES, _set(f"{Q}.core", lambda t: t[..., 0])), {"wrong-shape"}),
    Broken("a square core of a diagonal", tensors(DIAG_CORES, _set(f"{Q}.core", torch.diag_embed)), {"wrong-shape"}),
    Broken("U and V of unequal rank", tensors(DIAG_BASIS, _set(f"{Q}.V", lambda t: t[:, 1:])), {"wrong-shape"}),
    Broken("a core of another dtype", tensors(CORES, _set(f"{Q}.core", torch.Tensor.double)), {"wrong-dtype"}),
    Broken("factors of another dtype", tensors("individual/g-*", _set(f"{Q}.A", torch.Tensor.double)), {"wrong-dtype"}),
    Broken(
        "original factors that are integers",
        tensors("individual/h-*", _set(f"{V}.A", torch.Tensor.int)),
        {"wrong-dtype"},
    ),
    Broken(
        "a scale of another dtype", tensors("individual/h-*", _set(f"{V}.scale", torch.Tensor.float)), {"wrong-dtype"}
    ),
    Broken(
        "a scale that is a vector",
        tensors("individual/h-*", _set(f"{V}.scale", lambda t: t.reshape(1))),
        {"wrong-shape"},
    ),
    Broken("a scale that is missing", tensors("individual/h-*", lambda t: t.pop(f"{V}.scale")), {"missing-tensor"}),
    Broken("A and B of unequal rank", tensors("individual/h-*", _set(f"{V}.A", lambda t: t[1:])), {"wrong-shape"}),
    Broken(
        "factors above their rank",
        tensors("individual/g-*", _set(f"{V}.A", lambda t: torch.cat([t, t]))),
        {"wrong-shape"},
    ),
    Broken("NaN in a basis", tensors(BASIS, _set(f"{Q}.U", _nan)), {"not-finite"}),
    Broken("NaN in a core", tensors(CORES, _set(f"{Q}.core", _nan)), {"not-finite"}),
    Broken("NaN in factors", tensors("individual/g-*", _set(f"{Q}.B", _nan)), {"not-finite"}),
    Broken(
        "a basis that is not orthogonal",
        tensors(BASIS, _set(f"{Q}.U", lambda t: t[:, :1].expand(t.shape))),
        {"not-orthonormal"},
    ),
    Broken("a basis a little too long", tensors(BASIS, _set(f"{Q}.V", lambda t: t * 1.01)), {"not-orthonormal"}),
    Broken("diagonal columns too long", tensors(DIAG_BASIS, _set(f"{Q}.U", lambda t: t * 1.01)), {"not-unit-norm"}),
    Broken("cores of another basis", wrong_basis_metadata, {"wrong-basis"}),
]


LOW, HIGH, STREAM, APART = range(4)  # columns of an index: those of counts, of û, of v̂ less û
PACKS = [
    *(
        Broken(f"{name} {what}", packed(name, of_bytes(change)), {"unreadable"})
        for name in ("index", "codes")
        for what, change in {
            "empty": lambda content: b"",
            "cut short": lambda content: content[:-1],
            "with a byte more": lambda content: content + b"\0",
            "with a stream more": lambda content: content + deflated(b"more"),
            "of garbage": _garbage,
            "that begins later": lambda content: content[1:],
        }.items()
    ),
    *(
        Broken(f"{name} whose stream {number} is a bomb", packed(name, of_streams(_bomb(number))), {"unreadable"})
        for name, number in (("index", LOW), ("index", APART), ("index", -1), ("codes", 0), ("codes", -1))
    ),
    Broken("more components than there are", packed("index", of_streams(_put(LOW, 0, 5))), {"unreadable"}),
    Broken("fewer components than there are", packed("index", of_streams(_put(LOW, 0, 2))), {"unreadable"}),
    Broken("more components than there can be", packed("index", of_streams(_put(LOW, 0, 7))), {"unreadable"}),
    Broken("very many components", packed("index", of_streams(_put(HIGH, 0, 255))), {"unreadable"}),
    Broken("a stream that is not there", packed("index", of_streams(_put(STREAM, 0, 255))), {"unreadable"}),
    Broken("another stream of v̂ that is not there", packed("index", of_streams(_put(APART, 0, 100))), {"unreadable"}),
    *(
        Broken(f"byte {byte} in stream {stream}", packed("codes", of_streams(_put(stream, 0, byte))), {"unreadable"})
        for stream, byte in ((0, 243), (1, 125), (2, 225), (3, 255))
    ),
    Broken(
        "codes that are one stream",
        packed("codes", of_streams(lambda s: s.insert(0, s.pop(0) + s.pop(0)))),
        {"unreadable"},
    ),
    *(
        Broken(f"a kind {kind}", packed("kinds", lambda t, kind=kind: t * 0 + kind), {"unreadable"})  # type: ignore[misc]
        for kind in (0, 4, 5, 255)
    ),
    Broken("a kind less", packed("kinds", lambda t: t[:-1]), {"unreadable"}),
    Broken("no kinds", packed("kinds", lambda t: t[:0]), {"unreadable"}),
    Broken("a kind more", packed("kinds", lambda t: torch.cat([t, t[-1:]])), {"unreadable"}),
    Broken("more kinds than there can be", packed("kinds", lambda t: t[:1].expand(257)), {"wrong-shape"}),
    Broken("kinds of another dtype", packed("kinds", torch.Tensor.bfloat16), {"wrong-dtype"}),
    Broken("an index of another dtype", packed("index", lambda t: t.to(torch.int8)), {"wrong-dtype"}),
    Broken("codes in rows", packed("codes", lambda t: t[None]), {"wrong-shape"}),
    Broken("a base less", packed("bases", lambda t: t[:1]), {"wrong-shape"}),
    Broken("bases in rows", packed("bases", lambda t: t[:, None]), {"wrong-shape"}),
    Broken("bases that are no integers", packed("bases", torch.Tensor.half), {"wrong-dtype"}),
    Broken("a scale out of range", packed("bases", lambda t: t * 0 - 2**15), {"unreadable"}),
    *(
        Broken(
            f"a file of several without {name}", tensors(PACKED, lambda t, name=name: t.pop(name)), {"missing-tensor"}
        )  # type: ignore[misc]
        for name in ("bases", "kinds", "index", "codes")
    ),
    Broken(
        "a tensor too many in a file of several",
        tensors(PACKED, lambda t: t.update(more=torch.zeros(1))),
        {"unexpected-tensor"},
    ),
    Broken("a file of several that is none", data(PACKED, b"nonsense"), {"unreadable"}),
    Broken("a wrong rank", manifest(lambda m: m["adapters"][8].update(rank=5)), {"wrong-rank"}),
    Broken(
        "modules of another size", manifest(lambda m: m["modules"][0].update(d_in=41)), {"wrong-shape", "unreadable"}
    ),
    Broken(
        "a module beyond all sizes",
        manifest(lambda m: m["modules"][0].update(d_in=2**70)),
        {"wrong-shape", "unreadable"},
    ),
]


def rename(fields: dict[str, Any], path: str) -> None:
    """A configuration of a path that ends in a line feed, wherever the manifest names it."""
    for entry in (*fields["files"], *fields["adapters"]):
        for field, value in entry.items():
            if value == path:
                entry[field] = path + "\n"


MANIFESTS = [
    Broken("a field is missing", manifest(lambda m: m.pop("modules")), {"manifest"}),
    Broken("a field of another type", manifest(lambda m: m.update(adapters={})), {"manifest"}),
    Broken("another format", manifest(lambda m: m.update(format="zip")), {"manifest"}),
    Broken("a negative error", manifest(lambda m: m["adapters"][0].update(squared_error=-1.0)), {"manifest"}),
    Broken("a path that leads outside", manifest(lambda m: m["files"][0].update(path="../secret")), {"manifest"}),
    Broken(
        "a line feed behind a digest",
        manifest(lambda m: m["adapters"][0]["files"][0].update(sha256="0" * 64 + "\n")),
        {"manifest"},
    ),
    Broken("a line feed behind a path", manifest(lambda m: rename(m, m["adapters"][0]["config"])), {"manifest"}),
    Broken("a file listed twice", manifest(lambda m: m["files"].append(m["files"][0])), {"manifest"}),
    Broken("an adapter less", manifest(lambda m: m["adapters"].pop()), {"manifest"}),
    Broken("an adapter of another cluster", manifest(lambda m: m["adapters"][0].update(cluster=1)), {"manifest"}),
    Broken("an adapter of no cluster", manifest(lambda m: m["adapters"][0].update(cluster=9)), {"manifest"}),
    Broken("an adapter of no module set", manifest(lambda m: m["adapters"][0].update(module_set=99)), {"manifest"}),
    Broken("a commit that is none", manifest(lambda m: m["adapters"][0]["origin"].update(commit="main")), {"manifest"}),
    Broken("two adapters of one name", manifest(lambda m: m["adapters"][0].update(name="b/c")), {"manifest"}),
    Broken(
        "cores of a basis that is not there",
        manifest(lambda m: m["clusters"][0]["shards"][0].update(basis_sha256="0" * 64)),
        {"contradiction"},
    ),
    Broken("a module set that is empty", manifest(lambda m: m["module_sets"].__setitem__(0, [])), {"contradiction"}),
    Broken("a module twice in a set", manifest(lambda m: m["module_sets"][0].insert(0, 0)), {"contradiction"}),
    Broken("a module set backwards", manifest(lambda m: m["module_sets"][0].reverse()), {"contradiction"}),
    Broken("a module set twice", manifest(lambda m: m["module_sets"].append(m["module_sets"][0])), {"contradiction"}),
    Broken("a module listed twice", manifest(lambda m: m["modules"].append(m["modules"][0])), {"contradiction"}),
    Broken("no adapters", no_adapters, {"contradiction", "unlisted-file"}),
    Broken("names that do not ascend", manifest(lambda m: m["adapters"][2].update(name="a/z")), {"contradiction"}),
    Broken("an adapter without a name", manifest(lambda m: m["adapters"][0].update(name="")), {"contradiction"}),
    Broken("a name that leads outside", manifest(lambda m: m["adapters"][0].update(name="../a")), {"contradiction"}),
    Broken(
        "a scheme of another cluster", manifest(lambda m: m["adapters"][0].update(scheme="diag")), {"contradiction"}
    ),
    Broken("an SVD without a rank", manifest(lambda m: m["adapters"][5].update(rank=None)), {"contradiction"}),
    Broken(
        "a module of more bytes than a basis",
        manifest(lambda m: m["modules"][0].update(d_in=2**62)),
        {"wrong-shape", "unreadable"},  # a packed file has no shapes of its own
    ),
    Broken(
        "a kernel of more than the inputs",
        manifest(lambda m: m["modules"][1].update(kernel=[2**62, 2])),
        {"contradiction"},
    ),
    Broken(
        "a parameter of an embedding",
        manifest(lambda m: m["modules"][0].update(parameter={"name": "x"})),
        {"contradiction"},
    ),
    Broken("a file of more bytes", manifest(lambda m: m["files"][0].update(size_bytes=2**62)), {"wrong-size"}),
    Broken(
        "a module of another size",
        manifest(lambda m: m["modules"][2].update(d_in=21)),
        {"wrong-shape", "unreadable"},
    ),
    Broken("a module of swapped sides", manifest(lambda m: m["modules"][3].update(d_out=20, d_in=8)), {"wrong-shape"}),
    Broken("a cluster of a lower rank", manifest(lambda m: m["clusters"][0].update(rank=3)), {"wrong-shape"}),
    Broken(
        "an adapter of fewer modules",
        manifest(lambda m: m["adapters"][1].update(module_set=m["module_sets"].index([2]))),
        {"wrong-shape"},
    ),
    Broken("two modules of one name", manifest(lambda m: m["modules"][0].update(name=Q)), {"contradiction"}),
    Broken("a kernel of a linear layer", manifest(lambda m: m["modules"][2].update(kernel=[2])), {"contradiction"}),
    Broken(
        "a kernel that does not divide", manifest(lambda m: m["modules"][1].update(kernel=[5, 5])), {"contradiction"}
    ),
    Broken(
        "a worst module of another adapter",
        manifest(lambda m: m["adapters"][4]["worst_module"].update(name="embed")),
        {"contradiction"},
    ),
    Broken("a rank of a shared basis", manifest(lambda m: m["adapters"][0].update(rank=3)), {"contradiction"}),
    Broken(
        "a scheme that it does not require", manifest(lambda m: m["requires"].update(read=["joint"])), {"contradiction"}
    ),
    Broken(
        "extras that it does not require",
        manifest(lambda m: m["requires"]["export"].remove("extras")),
        {"contradiction"},
    ),
    Broken(
        "a kind that it does not require", manifest(lambda m: m["requires"]["export"].remove("conv")), {"contradiction"}
    ),
    Broken("a file with two owners", two_owners, {"contradiction"}),
    Broken("no rank of an adapter that has one", manifest(lambda m: m["adapters"][8].pop("rank")), {"contradiction"}),
    Broken("a file of several that is one's own, too", one_of_several, {"contradiction", "unlisted-file"}),
]

ALL = [*FILES, *RESEALED, *PACKS, *MANIFESTS]

"""A bundle of many adapters from one of few: all of them again and again under other names."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from lorazip_core.bundle.manifest import AdapterEntry, Manifest
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.writer import BundleWriter

_AGAIN = "again-"


def repeat(bundle: Bundle, out: Path, adapters: int) -> Manifest:
    """Write ``out``, of at least so many ``adapters``, all of them once more in every round."""
    before = bundle.manifest
    if any(entry.name.startswith(_AGAIN) for entry in before.adapters):
        raise ValueError(f"{bundle.path}: it has repeated ones already")
    rounds = -(-adapters // len(before.adapters))
    out.mkdir()
    writer = BundleWriter(out)
    for file in before.files:
        writer.carry(bundle.path, file)
    own = {str(adapter.individual) for adapter in before.adapters if adapter.individual}
    own |= {shard.path for cluster in before.clusters for shard in cluster.shards}
    files = [file for file in before.files if file.path in own]
    entries = list(before.adapters)
    for number in range(1, rounds):
        for file in files:
            writer.add_file(_again(file.path, number), bundle.path / file.path, file.sha256)
        entries += [_renamed(entry, number) for entry in before.adapters]
    entries.sort(key=lambda entry: entry.name.encode())
    place = {entry.name: index for index, entry in enumerate(entries)}
    names = [entry.name for entry in before.adapters]
    clusters = [
        replace(
            cluster,
            shards=[
                replace(
                    shard,
                    path=_again(shard.path, number),
                    adapters=[place[_name(names[index], number)] for index in shard.adapters],
                )
                for shard in cluster.shards
                for number in range(rounds)
            ],
        )
        for cluster in before.clusters
    ]
    manifest = replace(before, clusters=clusters, adapters=entries, files=writer.files)
    writer.finish(manifest)
    return manifest


def _renamed(entry: AdapterEntry, number: int) -> AdapterEntry:
    path = None if entry.individual is None else _again(str(entry.individual), number)
    return replace(entry, name=_name(entry.name, number), individual=path)


def _name(name: str, number: int) -> str:
    """Those of a round are in the order of all, as their files have them."""
    return f"{_AGAIN}{number:04}-{name}" if number else name


def _again(path: str, number: int) -> str:
    return path.replace(".safetensors", f"-again{number}.safetensors") if number else path

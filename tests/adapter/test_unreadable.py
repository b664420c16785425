"""Adapters that the system does not let us read: each is named with the reason, and `--skip-bad` goes on without."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from testing import peft_fixtures as fixtures

from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.unreadable import unreadable
from lorazip_core.base.errors import AdapterError, AdapterErrors
from lorazip_core.reading.scan import scan

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fixtures.save_adapter(tmp_path / "root" / "good", fixtures.tokens(), target_modules=["q"], r=2)
    (tmp_path / "root" / "good" / fixtures.WEIGHTS).chmod(0o644)
    for name in ("config", "folder", "listing", "weights"):
        shutil.copytree(tmp_path / "root" / "good", tmp_path / "root" / name)
    return tmp_path / "root"


def as_nobody(root: Path, action: Callable[[Path], object]) -> object:
    """What ``action`` gives in ``root`` to a process that may read only what its permissions let everybody read."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(root)  # the folders above it are for their owner
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            os.write(writer, json.dumps(action(Path())).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    return json.loads(data)


def reasons(root: Path) -> dict[str, str]:
    try:
        open_collection(root)
    except AdapterErrors as error:
        return {each.adapter: each.reason for each in error.errors}
    return {}


def skipped(root: Path) -> list[list[str]]:
    collection = open_collection(root, skip_bad=True)
    return [[adapter.name for adapter in collection.adapters], [each.name for each in collection.skipped]]


def test_permissions(root: Path) -> None:
    (root / "config" / fixtures.CONFIG).chmod(0)
    (root / "weights" / fixtures.WEIGHTS).chmod(0)
    (root / "folder").chmod(0)
    (root / "listing").chmod(0o444)  # its files can be listed, and none of them opened
    try:
        found = as_nobody(root, reasons)
        rest = as_nobody(root, skipped)
    finally:
        for name in ("folder", "listing"):
            (root / name).chmod(0o755)
    denied = "cannot be read: Permission denied (check its permissions)"
    config = f"{fixtures.CONFIG} {denied}"
    assert found == {"config": config, "folder": config, "listing": config, "weights": f"{fixtures.WEIGHTS} {denied}"}
    assert rest == [["good"], ["config", "folder", "listing", "weights"]]


def test_a_folder_that_cannot_be_listed_is_named(root: Path) -> None:
    """There may be adapters, or files of other tools, but nobody can tell."""
    (root / "others" / "deep").mkdir(parents=True)
    (root / "others").chmod(0o111)
    shutil.copytree(root / "good", root / "files")
    (root / "files" / fixtures.CONFIG).unlink()
    (root / "files").chmod(0o444)
    try:
        found = as_nobody(root, reasons)
    finally:
        for name in ("others", "files"):
            (root / name).chmod(0o755)
    denied = "cannot be read: Permission denied (check its permissions)"
    assert found == {"others": f"others {denied}", "files": f"README.md {denied}"}


def test_weights_that_cannot_be_read_any_more(root: Path) -> None:
    """Found when all files are read, after their headers were."""
    collection = open_collection(root)
    (root / "weights" / fixtures.WEIGHTS).unlink()
    (root / "weights" / fixtures.WEIGHTS).symlink_to(fixtures.WEIGHTS)
    with pytest.raises(AdapterErrors) as caught:
        scan(collection, skip_bad=False, advance=lambda _: None)
    (error,) = caught.value.errors
    assert error.adapter == "weights"
    assert error.reason == f"{fixtures.WEIGHTS} cannot be read: {os.strerror(errno.ELOOP)}"
    assert len(scan(collection, skip_bad=True, advance=lambda _: None).collection.adapters) == 4


@pytest.mark.parametrize(("number", "whose"), [(errno.EIO, AdapterError), (errno.EMFILE, OSError)])
def test_what_the_process_lacks_is_no_fault_of_the_adapter(number: int, whose: type[Exception]) -> None:
    with pytest.raises(whose), unreadable("a"):
        raise OSError(number, os.strerror(number), "/x/y.safetensors")

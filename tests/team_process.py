"""One of several processes under torchrun: it does what a file says, and notes what it says itself.

    python -m torch.distributed.run --standalone --nproc-per-node N tests/team_process.py COMMANDS.json FOLDER

Importing torch takes longer than all of these commands, so a test starts its processes once. A command is one of
lorazip's, or one of ``OWN``.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from testing.recorder import Recorder

from lorazip_cli.main import main
from lorazip_core.base import team
from lorazip_core.base.errors import AdapterError, AdapterErrors, LorazipError
from lorazip_core.base.progress import Advance
from lorazip_core.compress.run import compress
from lorazip_core.planning.plan import CompressOptions


class Stopping(Recorder):
    """Interrupts as soon as the first pack of this process is stored, in the folder beside ``output``."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self._partial = output.with_name(f".{output.name}.partial")

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        def advance(steps: int) -> None:
            if label == "fitting bases" and any(self._partial.glob(f".work-*/pack-0-{team.rank()}.*")):
                raise KeyboardInterrupt

        yield advance


def interrupted(root: str, output: str) -> None:
    """`compress`, interrupted in every process after its first pack."""
    with patch("lorazip_core.reading.memory.cores", return_value=1):  # else others are stored before anybody notices
        compress(Path(root), Path(output), CompressOptions(rank=4, clusters=2), progress=Stopping(Path(output)))


def first_fails() -> None:
    def make() -> None:
        assert team.is_first()
        raise AdapterErrors([AdapterError("one", "is bad", "mend it"), AdapterError("two", "is bad")])

    team.from_first(make)


def second_leaves() -> None:
    if team.is_first():
        team.gathered("anybody there?")


OWN = {"interrupted": interrupted, "first-fails": first_fails, "second-leaves": second_leaves}


def code_of(command: list[str]) -> int:
    if command[0] not in OWN:
        return main(command)
    try:
        OWN[command[0]](*command[1:])
    except KeyboardInterrupt:
        return 130
    except LorazipError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def run(command: list[str]) -> dict[str, object]:
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        code = code_of(command)
    said = {name: stream.detach().getvalue().decode() for name, stream in (("out", out), ("err", err))}
    return {"code": code, **said}


if __name__ == "__main__":
    commands, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with team.joined():
        told = [run(command) for command in json.loads(commands.read_text())]
        (folder / f"{team.rank()}.json").write_text(json.dumps(told))

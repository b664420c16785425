"""`lorazip serve`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from lorazip_core.bundle.kinds import check_bundle_path

from . import console
from .options import Bundle, Quiet, between


def serve(
    bundle: Bundle,
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="The base model: owner/name, or a directory.")],
    vllm: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="Options of vLLM's own, after --.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="HOST", help="Default: vLLM's, all.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="PORT", callback=between(1, 65535), help="Default: vLLM's, 8000.")
    ] = None,
    spare: Annotated[
        int,
        typer.Option(
            "--spare", metavar="N", callback=between(0, 2**20), help="Keep room for N adapters to be added meanwhile."
        ),
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command that would be run.")] = False,
    quiet: Quiet = False,
) -> int:
    """Serve all adapters of a bundle at once, with vLLM."""
    check_bundle_path(bundle)
    from lorazip_core.vllm.address import check_free
    from lorazip_core.vllm.launch import plan
    from lorazip_core.vllm.versions import installed

    launch = plan(
        bundle,
        model,
        host=host,
        port=port,
        spare=spare,
        more=vllm or (),
        version=installed(),
        environment=os.environ,
    )
    if not quiet:
        for note in launch.notes:
            console.say(note)
    if dry_run:
        console.line(launch.text())
        return 0
    if launch.address:
        check_free(launch.address)
    if not quiet:
        console.say(launch.text())
    console.flush()
    os.execvpe(launch.command[0], launch.command, {**os.environ, **launch.environment})

"""What options of vLLM, on a command line and in the file of ``--config``, have to do with those of lorazip."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..base.errors import UsageError
from .forbidden import FORBIDDEN
from .options_file import read_options
from .source import KEY

ADDITIONAL = "--additional-config"
_CONFIG, _SERVERS = "--config", "--api-server-count"
_ADDRESS, _SOCKET = ("--host", "--port"), "--uds"
_KEPT = (
    "--max-loras",
    "--max-lora-rank",
    "--max-num-seqs",
    "--pipeline-parallel-size",
    _SERVERS,
    _CONFIG,
    *_ADDRESS,
    _SOCKET,
)
"""Options with a value that are read, and passed on."""
_NAMES = "--served-model-name"
_SHORT = {"--pipeline-parallel-size": "-pp", _SERVERS: "-asc"}


class Given(NamedTuple):
    """What vLLM is given. The command line has the last word of an option that the file has, too."""

    max_loras: str | None
    max_lora_rank: str | None
    max_num_seqs: str | None
    host: str | None
    port: str | None
    uds: str | None
    """A socket in the file system, instead of an address."""
    served_model_names: list[str]
    """What the base model is called; nothing if only by its own name."""
    additional_config: dict[str, Any]
    """Of several objects, what the last one says of each key: vLLM would take the last one alone."""
    words: list[str]
    """For vLLM, all but ``additional_config``. The file is one of them: vLLM reads it, too."""


class Ours(NamedTuple):
    """What lorazip itself says to vLLM, that options may contradict."""

    model: str
    settings: dict[str, Any]
    """In ``additional_config``."""
    host: str | None = None
    port: int | None = None


def understand(words: Sequence[str], ours: Ours) -> Given:
    """What the words say that vLLM gets besides lorazip's own.

    Raises UsageError for what contradicts lorazip, and for a file that vLLM could not read.
    """
    if words and not words[0].startswith("-"):
        raise UsageError(f"{words[0]!r} is no option of vLLM", "it gets what follows --")
    said = _parse(words, ours)
    both = [*(_in_file(Path(said.config[0]), ours) if said.config else ()), said]

    def last(name: str) -> str | None:
        return next((value[-1] for each in reversed(both) if (value := getattr(each, name))), None)

    objects = [known for each in both for known in each.additional_config]
    kept = [word for name in _KEPT for value in getattr(said, _field(name))[-1:] for word in (name, value)]
    names: list[str] = next((each.served_model_name[-1] for each in reversed(both) if each.served_model_name), [])
    return Given(
        last("max_loras"),
        last("max_lora_rank"),
        last("max_num_seqs"),
        last("host"),
        last("port"),
        last("uds"),
        names,
        {key: value for known in objects for key, value in known.items()},
        [*said.others, *kept, *(word for own in said.served_model_name[-1:] for word in (_NAMES, *own))],
    )


class _Options(argparse.ArgumentParser):
    """Those options of vLLM that concern lorazip, among others that it does not know."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"options of vLLM: {message}")


def _parse(words: Sequence[str], ours: Ours) -> argparse.Namespace:
    """Of every option of `_KEPT` its values, and all ``others``. Raises UsageError for what contradicts lorazip."""
    words = [_dashed(word) for word in words]
    for word in words:
        name, dot, _ = word.partition("=")[0].partition(".")
        if dot and len(name) > 2 and ADDITIONAL.startswith(name):
            raise UsageError(f"{word}: lorazip joins its settings with yours", f"give {ADDITIONAL} as one object")
    parser = _Options(add_help=False)  # abbreviations are options to vLLM, too
    parser.add_argument(ADDITIONAL, type=_object, action="append", default=[], metavar="JSON")
    parser.add_argument("--no-enable-lora", action="store_true")
    parser.add_argument("--model", action="append", default=[])
    for each in FORBIDDEN:
        if not each.most:
            parser.add_argument(each.option, action="store_true")
    for name in _KEPT:
        parser.add_argument(name, *filter(None, [_SHORT.get(name)]), action="append", default=[])
    parser.add_argument(_NAMES, action="append", nargs="+", default=[])
    said, others = parser.parse_known_args(words)
    said.others = others
    _refuse(said, ours)
    return said


def _refuse(said: argparse.Namespace, ours: Ours) -> None:
    if said.no_enable_lora:
        raise UsageError("--no-enable-lora: without LoRA vLLM serves no adapter")
    for other in said.model:
        if other != ours.model:
            raise UsageError(f"two base models, and the second is {other}", "give one, as «model»")
    for name in _ADDRESS:
        own = getattr(ours, _field(name))
        if own is not None and any(other != str(own) for other in getattr(said, _field(name))):
            raise UsageError(f"two of {name}, and the first is {own}", "give it before -- alone")
    for known in said.additional_config:
        if known.get(KEY, ours.settings) != ours.settings:
            raise UsageError(f"{ADDITIONAL} has other settings at {KEY!r}", "leave them to lorazip")
    for each in FORBIDDEN:
        if _above(getattr(said, each.field), each.most):
            raise UsageError(f"{each.option}: {each.why}")
    if _above(said.api_server_count, 1):
        raise UsageError(f"{_SERVERS}: adapters come and go in one process of the API server")
    if len(said.config) > 1:
        raise UsageError(f"two files of options, {' and '.join(said.config)}", "vLLM reads one")


def _above(value: bool | list[str], most: int) -> bool:
    """Whether an option says more than that; what is no number is for vLLM to refuse."""
    found = value if isinstance(value, list) else [str(int(value))]
    return any(each.isdecimal() and int(each) > most for each in found)


def _in_file(path: Path, ours: Ours) -> list[argparse.Namespace]:
    """What each key of the file says. Raises UsageError, with the key."""
    found = []
    for key, words in read_options(path):
        try:
            said = _parse(words, ours._replace(host=None, port=None))  # where the command has the last word
            if said.config:
                raise UsageError("vLLM reads no second file")
        except UsageError as error:
            raise UsageError(f"{path}, {key}: {error.message}", error.hint) from None
        found.append(said)
    return found


def _field(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _dashed(word: str) -> str:
    """An option as vLLM reads it: underscores in its name are dashes."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return found

"""What to say of a command line that makes no sense: how the command is called, or which option was meant."""

from __future__ import annotations

import difflib
import re

import typer

from .help import TEXTS, usage

_PARSER = (
    (r"Input should be a valid integer, .*", "not a whole number"),
    (r"Input should be a valid number, .*", "not a number"),
)
_ALIKE = 0.75  # of difflib: one letter of five may be wrong; less alike is another word


def explain_usage(error: typer.TyperException) -> str:
    """One line, with a hint. Typer's classes of errors have no public names, so they are recognised by their fields."""
    text = error.format_message().replace(": Value error, ", ": ").removesuffix(".")
    for pattern, plain in _PARSER:
        text = re.sub(pattern, plain, text)
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    hint = f"see '{context.command_path} --help'"
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        text = f"No such option: {error.option_name}"  # the parser would name what is hardly alike
        if context.info_name == "serve":
            hint = f"options of vLLM follow --; {hint}"
        elif near := nearest_option(error.option_name, context.command):
            hint = f"did you mean {near}? {hint}"
    elif hasattr(error, "param_type") and context.info_name in TEXTS:
        hint = f"usage: {usage(context.info_name)}; {hint}"
    return f"{text} ({hint})"


def nearest_option(wrong: str, command: object) -> str | None:
    """The long option of ``command`` that ``wrong`` is likely to stand for: it begins like that, or is nearly that."""
    parameters = getattr(command, "params", [])
    names = [name for each in parameters for name in (*each.opts, *each.secondary_opts) if name.startswith("--")]
    begun = [name for name in names if len(wrong) > 4 and name.startswith(wrong)]
    if len(begun) == 1:
        return begun[0]
    bare = {name.removeprefix("--"): name for name in names}  # two dashes are alike in all of them
    near = difflib.get_close_matches(wrong.removeprefix("--"), bare, n=1, cutoff=_ALIKE)
    return bare[near[0]] if near else None

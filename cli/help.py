"""The help texts: how each command is called, its options, and examples, in words that are not the parser's."""

from __future__ import annotations

from typing import Any, NamedTuple

from typer.core import TyperCommand, TyperGroup

from . import console


class Text(NamedTuple):
    """What the signature of a command does not say: the shortest call, and calls that people copy."""

    usage: str
    examples: tuple[str, ...]


TEXTS = {
    "fetch": Text(
        "SOURCE... -o DIR",
        (
            "lorazip fetch org:acme --base-model mistralai/Mistral-7B-v0.1 -o adapters",
            "lorazip fetch owner/repo@v1 collection:owner/slug ./trained-here -o adapters",
            "lorazip fetch -o adapters --locked",
        ),
    ),
    "cluster": Text(
        "DIR -o FILE.json",
        (
            "lorazip cluster adapters -o clusters.json",
            "lorazip cluster adapters -o clusters.json --clusters 8 --report clusters.html",
        ),
    ),
    "compress": Text(
        "DIR -o BUNDLE",
        (
            "lorazip compress adapters -o bundle --dry-run",
            "lorazip compress adapters -o bundle --max-error 0.1",
            "lorazip compress adapters -o bundle --clusters clusters.json --force",
        ),
    ),
    "add": Text(
        "BUNDLE DIR -o NEW",
        (
            "lorazip add bundle new-adapters -o bundle-2",
            "lorazip add bundle adapters/acme -o bundle-2 --replace --max-error 0.1",
            "lorazip add bundle new-adapters --dry-run",
        ),
    ),
    "remove": Text(
        "BUNDLE NAME... -o NEW",
        ("lorazip remove bundle owner/repo -o bundle-2", "lorazip remove bundle 'acme/*' --dry-run"),
    ),
    "verify": Text(
        "BUNDLE",
        (
            "lorazip verify bundle --against adapters --max-error 0.25",
            "lorazip verify bundle --against adapters --report page.html --junit verify.xml",
            "lorazip verify bundle --against adapters --model owner/base --rows rows.jsonl --min-kept 0.99",
        ),
    ),
    "export": Text(
        "BUNDLE -o DIR",
        (
            "lorazip export bundle -o served --target vllm",
            "lorazip export bundle -o one --adapter owner/repo --dtype f16",
        ),
    ),
    "info": Text("BUNDLE", ("lorazip info bundle", "lorazip info bundle --json")),
    "serve": Text(
        "BUNDLE --model MODEL",
        (
            "lorazip serve bundle --model mistralai/Mistral-7B-v0.1 --port 8000",
            "lorazip serve bundle --model ./base --spare 100 -- --max-model-len 4096 --tensor-parallel-size 2",
        ),
    ),
    "calibrate": Text(
        "MODEL FILE -o FILE.safetensors",
        (
            "lorazip calibrate owner/base rows.jsonl -o moments.safetensors",
            "lorazip calibrate owner/base rows.jsonl -o moments.safetensors --adapters adapters --max-rows 100",
        ),
    ),
    "demo": Text("", ("lorazip demo", "lorazip demo -o elsewhere --force")),
}


def usage(command: str) -> str:
    """How a command is called: ``lorazip compress DIR -o BUNDLE [options]``."""
    return " ".join(filter(None, ("lorazip", command, TEXTS[command].usage, "[options]")))


class Verb(TyperCommand):
    """A command whose help says how it is called, what its options are, and shows examples."""

    def get_help_option(self, ctx: Any) -> Any:
        return _shown_by_us(super().get_help_option(ctx))

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        assert self.name is not None
        formatter.write_usage("lorazip", usage(self.name).removeprefix("lorazip "))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self.get_params(ctx), formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        assert self.name is not None
        _write_lines("Examples", TEXTS[self.name].examples, formatter)


class Program(TyperGroup):
    """``lorazip`` itself."""

    def get_help_option(self, ctx: Any) -> Any:
        return _shown_by_us(super().get_help_option(ctx))

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_usage("lorazip", "COMMAND [options]")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        _write_parameters(self.get_params(ctx), formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        lines = ("lorazip demo", "lorazip compress --help", "lorazip compress adapters -o bundle --dry-run")
        _write_lines("Start with", lines, formatter)


def _shown_by_us(option: Any) -> Any:
    """The option --help, written like all else on stdout, so that a full device is reported alike."""
    option.callback = _show_help
    return option


def _show_help(ctx: Any, _: Any, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        console.line(ctx.get_help())
        ctx.exit()


def _write_parameters(parameters: list[Any], formatter: Any) -> None:
    for kind, title in (("argument", "Arguments"), ("option", "Options")):
        rows = [_row(each) for each in parameters if each.param_type_name == kind]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


def _row(parameter: Any) -> tuple[str, str]:
    """A parameter as it is written, and what it means."""
    if parameter.param_type_name == "argument":
        return parameter.metavar, parameter.help
    names = " / ".join(filter(None, (", ".join(sorted(parameter.opts, key=len)), *parameter.secondary_opts)))
    if parameter.is_flag:
        return names, parameter.help
    default = "" if parameter.default is None else f"  [default: {parameter.default}]"
    return f"{names} {parameter.metavar}", f"{parameter.help}{'  [needed]' if parameter.required else default}"


def _write_lines(title: str, lines: tuple[str, ...], formatter: Any) -> None:
    with formatter.section(title):
        for line in lines:
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")

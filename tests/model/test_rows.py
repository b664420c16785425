"""Rows of the user, and the tokens that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from testing.tiny_models import TEMPLATE, tokenizer

from lorazip_core.base.errors import UsageError
from lorazip_core.model.prompts import KEPT_HEAD, LEAST, Prompts
from lorazip_core.model.rows import Row, read_rows


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_has_rows_of_some_adapters_and_of_all(tmp_path: Path) -> None:
    lines = '\ufeff{"adapter": "x/y", "input": "a", "output": "b", "more": 1}\n\n{"input": "c\u2028", "output": ""}'
    rows = read_rows(written(tmp_path / "rows.jsonl", lines))
    assert rows.of("x/y") == [Row("a", "b"), Row("c\u2028", "")]
    assert rows.of("z") == [Row("c\u2028", "")]
    assert rows.unknown(["z"]) == ["x/y"]
    assert rows.all() == [Row("a", "b"), Row("c\u2028", "")]


def test_a_folder_has_a_file_for_each_adapter(tmp_path: Path) -> None:
    line = '{"input": "a", "output": "b"}\n'
    written(tmp_path / "rows" / "x.jsonl", line * 3)
    written(tmp_path / "rows" / "team" / "y.jsonl", line)
    written(tmp_path / "rows" / "README.md", "no rows")
    written(tmp_path / "rows" / ".hidden" / "z.jsonl", line)
    rows = read_rows(tmp_path / "rows")
    assert {name: len(own) for name, own in rows.by_adapter.items()} == {"team/y": 1, "x": 3}
    assert len(rows.first(2).of("x")) == 2
    assert rows.of("z") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ('{"input": "a", "output": "b"}\n{"input": "a"}', "rows.jsonl:2: not a row: Object missing"),
        ('{"input": 1, "output": "b"}', "rows.jsonl:1: not a row: Expected `str`, got `int`"),
        ("no json", "rows.jsonl:1: not a row: JSON is malformed"),
    ],
)
def test_what_is_no_row_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_rows(written(tmp_path / "rows.jsonl", text))


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"it has no ADAPTER\.jsonl"):
        read_rows(tmp_path)


def test_the_template_gives_prompt_and_end_of_turn() -> None:
    made = tokenizer()
    prompts = Prompts(made)
    assert prompts.end == "<|end|>"
    example = prompts.example(Row("a b", "c"))
    assert made.decode(example.ids[: example.prompt]).split() == [
        "<|start|>",
        "user",
        "a",
        "b",
        "<|end|>",
        "<|start|>",
        "assistant",
    ]
    assert made.decode(example.ids[example.prompt :]).split() == ["c", "<|end|>"]
    assert example.answer == 2


def test_without_a_template_the_prompt_is_the_input() -> None:
    made = tokenizer(None)
    prompts = Prompts(made)
    example = prompts.example(Row("a b", "c"))
    assert made.decode(example.ids).split() == ["a", "b", "c", "</s>"]
    assert prompts.example(Row("", "c")).ids[0] == made.bos_token_id


def test_a_template_that_takes_no_answer_ends_with_the_text() -> None:
    refusing = "{% if messages[1] %}{{ raise_exception('one message') }}{% endif %}" + TEMPLATE
    assert Prompts(tokenizer(refusing)).end == "</s>"


def test_a_template_that_takes_no_question_is_an_error() -> None:
    prompts = Prompts(tokenizer("{{ raise_exception('a system message first') }}"))
    with pytest.raises(UsageError, match="a system message first"):
        prompts.example(Row("a", "b"))


def test_a_long_prompt_loses_its_middle() -> None:
    row = Row(" ".join("abcdefghij" * 10), "c")
    whole, cut = Prompts(tokenizer()).example(row), Prompts(tokenizer(), LEAST).example(row)
    assert not whole.cut
    assert cut.cut
    assert cut.prompt == LEAST
    assert cut.ids[:KEPT_HEAD] == whole.ids[:KEPT_HEAD]
    assert cut.ids[KEPT_HEAD:] == whole.ids[-(LEAST - KEPT_HEAD) - cut.answer :]
    with pytest.raises(UsageError, match="keep 48 tokens or more"):
        Prompts(tokenizer(), LEAST - 1)

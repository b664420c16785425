"""Tokens of rows: the prompt as the model's chat template has it, and the answer with the end of its turn."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..base.errors import UsageError
from .rows import Row

KEPT_HEAD = 24
"""Tokens that a prompt which is too long keeps of its beginning, where templates have the system's message."""
LEAST, DEFAULT = 2 * KEPT_HEAD, 1024
"""The least that prompts may be cut to, and what they are cut to unless told otherwise."""

_MARK = "lorazip7answer"  # any text that no template has


class Example(NamedTuple):
    """The tokens of a row; the first ``prompt`` of ``ids`` are the prompt, the others the answer."""

    ids: tuple[int, ...]
    prompt: int
    cut: bool
    """Whether the prompt has lost its middle."""

    @property
    def answer(self) -> int:
        """The tokens of the answer."""
        return len(self.ids) - self.prompt


class Prompts:
    """Makes tokens of rows, with one tokenizer.

    With a chat template, the input is the only message of a user, and what opens the assistant's turn follows. Without
    one, the prompt is the input as it is, with the tokens that the tokenizer puts before a text. A prompt of more than
    ``most`` tokens keeps its first 24 and its last ``most`` − 24.
    """

    def __init__(self, tokenizer: Any, most: int = DEFAULT) -> None:
        if most < LEAST:
            raise UsageError(f"«prompt_tokens» {most}: prompts keep {LEAST} tokens or more")
        self._tokenizer = tokenizer
        self._most = most
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.end = self._end_of_turn()
        """What ends an answer: the token that ends an assistant's turn in the template, else the end of a text."""

    def example(self, row: Row) -> Example:
        """The tokens of a row. Raises UsageError where they make no question or no answer."""
        prompt = self._prompt(row.input)
        cut = len(prompt) > self._most
        if cut:
            prompt = [*prompt[:KEPT_HEAD], *prompt[KEPT_HEAD - self._most :]]
        answer = self._ids(row.output + self.end)
        if not (prompt and answer):
            what = "output" if prompt else "input"
            raise UsageError(f"a row's {what} is empty, and this model's tokenizer adds nothing to it")
        return Example((*prompt, *answer), len(prompt), cut)

    def _prompt(self, text: str) -> list[int]:
        if self._has_template:
            return self._ids(self._rendered([{"role": "user", "content": text}], add_generation_prompt=True))
        ids: list[int] = list(self._tokenizer(text).input_ids)
        if ids and ids[-1] == self._tokenizer.eos_token_id:  # some end every text, but the answer is still to come
            ids.pop()
        start = self._tokenizer.bos_token_id
        return ids or ([] if start is None else [start])

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _rendered(self, messages: list[dict[str, str]], **options: bool) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # of the template's own making
            reason = " ".join(str(error).split())
            raise UsageError(f"the model's chat template takes no message of a user alone: {reason}") from None

    def _end_of_turn(self) -> str:
        text_end = str(self._tokenizer.eos_token or "")
        if not self._has_template:
            return text_end
        turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        try:
            rest = self._rendered(turns).rpartition(_MARK)[2].strip()
        except UsageError:
            return text_end
        ends = [token for token in self._tokenizer.get_added_vocab() if rest.startswith(token)]
        return max(ends, key=len, default=text_end)

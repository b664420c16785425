"""An engine that is asked for what makes no sense says so, and lives on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

import testing.engine_steps
from testing.engine import SMALL, run
from testing.living_llama import NEW, OLD, PROMPTS, LivingLlama

pytestmark = pytest.mark.slow

OURS = "lorazip:"
SCRIPT = Path(testing.engine_steps.__file__)
SPARE = 2


def steps(living: LivingLlama) -> list[tuple[list[Any], Any]]:
    """What is done, and what it gives: tokens, or the beginning of a line."""
    second, third, others = map(str, (living.second, living.third, living.others))

    def of(name: str | None, bundle: Path = living.first) -> list[int]:
        return living.tokens[bundle][name][0]

    return [
        # One that is not there, alone and beside one that is.
        (["ask", ["old9", 1, OURS]], f"ValueError: there is no adapter old9 in {living.first} (did you mean 'old4'?)"),
        (["ask", ["old0", 1, OURS], ["other", 2, OURS]], "ValueError: there is no adapter other in "),
        (["ask", None, ["old0", 1, OURS]], [of(None), of("old0")]),
        # Ids.
        (["ask", ["old1", 1, OURS]], "ValueError: lora_int_id 1 of adapter old1 is that of adapter old0"),
        (["ask", ["old0", 2, OURS]], "ValueError: adapter old0 has lora_int_id 1 already, not 2"),
        (["ask", ["old0", 1, str(living.first)], ["old1", 2, OURS]], [of("old0"), of("old1")]),
        (["ask", ["old0", 1, OURS, True]], "ValueError: adapter old0: load_inplace would change"),
        # Another bundle.
        (["ask", ["new0", 5, "/nowhere"]], "ValueError: adapter new0: "),
        (["ask", ["new0", 5, second]], f"ValueError: adapter new0 of {second} was not added to the engine: use add_"),
        (["add", "new9", 5, second], f"ValueError: there is no adapter new9 in {second} (did you mean 'new3'?)"),
        (["add", "new0", 1, second], "ValueError: lora_int_id 1 of adapter new0 is that of adapter old0"),
        (["add", "new0", 5, second], True),
        (["add", "new0", 5, second], False),
        (["ask", ["new0", 5, second], ["old0", 1, OURS]], [of("new0", living.second), of("old0")]),
        (["ask", ["new0", 5, third]], "ValueError: lora_int_id 5 of adapter new0 is that of adapter new0"),
        # Two of one name, of two bundles; and one adapter with two ids.
        (["add", "new0", 6, third], True),
        (["add", "new0", 7, second], True),
        (
            ["ask", ["new0", 5, second], ["new0", 6, third], ["new0", 7, second], ["old0", 1, OURS]],
            [of("new0", living.second), of("new0", living.third), of("new0", living.second), of("old0")],
        ),
        (["held"], [len(OLD) + 2, 5, 0, 5]),
        # No room, and what does not fit.
        (["add", "new1", 8, second], "LocalError: no room for adapter new1"),
        (["add", "alien", 8, others], "LocalError: module layers.0.q_proj [24, 20] of adapter alien is none"),
        (["add", "more", 8, others], "ValueError: adapter more: 1 of 1 adapters cannot be served exactly"),
        (["add", "loner", 8, third], "LocalError: no room for adapter loner"),
        # Removed; an id is free again for another one.
        (["remove", 5], True),
        (["ask", ["new0", 5, second]], f"ValueError: adapter new0 of {second} was not added"),
        (["ask", ["new0", 7, second]], [of("new0", living.second)]),
        (["remove", 7], True),
        (["remove", 7], False),
        (["add", "new1", 5, second], True),
        (["ask", ["new1", 5, second], ["new0", 6, third]], [of("new1", living.second), of("new0", living.third)]),
        (["remove", 1], True),
        (["ask", ["old0", 1, OURS]], "ValueError: adapter old0 was removed from the engine"),
        (["add", "old0", 9, second], True),  # the very same adapter, carried over
        (["ask", ["old0", 9, second]], [of("old0")]),
        (["remove", 9], True),
        (["add", "old0", 1, OURS], True),
        (["ask", ["old0", 1, OURS], None], [of("old0"), of(None)]),
        (["remove", 5], True),
        *(([verb, *what], True) for _ in range(3) for verb, *what in (["add", NEW[2].name, 8, second], ["remove", 8])),
        (["remove", 6], True),
        (["held"], [len(OLD), 2, SPARE, 2]),
    ]


def test_one_after_another(living: LivingLlama, tmp_path: Path) -> None:
    expected = steps(living)
    engine = SMALL | living.engine(spare=SPARE)
    found = run(tmp_path, SCRIPT, {"engine": engine, "prompt": PROMPTS[0], "steps": [step for step, _ in expected]})
    for (step, wanted), got in zip(expected, found, strict=True):
        if isinstance(wanted, str):
            assert str(got).startswith(wanted), step
        else:
            assert got == wanted, step

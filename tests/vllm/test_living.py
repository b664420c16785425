"""A server that runs: adapters come from other bundles and go, while requests are under way."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

pytest.importorskip("vllm.version", reason="needs vLLM (make test-vllm)")

from testing.living_llama import BLOCK, NEW, OLD, PROMPTS, LivingLlama
from testing.server import Server, serve

pytestmark = pytest.mark.slow

SPARE = 3
LOAD, UNLOAD, COMPLETE = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"


@pytest.fixture(scope="module")
def server(living: LivingLlama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--max-model-len", 128, "--block-size", BLOCK, "--enable-prefix-caching")
    place = tmp_path_factory.mktemp("server")
    with serve(place, living.first, living.model, *options, ours=("--spare", SPARE)) as started:
        yield started


@pytest.fixture
def ask(server: Server, living: LivingLlama) -> Any:
    """Assert that the adapter of that name is the one of this bundle."""

    def check(name: str | None, bundle: Path) -> None:
        for prompt, expected in zip(PROMPTS, living.tokens[bundle][name], strict=True):
            assert server.tokens(name or server.model, prompt) == expected, (name, bundle.name)

    return check


@contextmanager
def traffic(server: Server, living: LivingLlama, known: dict[str, list[Path]]) -> Iterator[list[int]]:
    """Requests for some adapters from several threads, each with one answer of the bundles that it may be of.

    One that is not there just now is refused as that. The list has the number of answers.
    """
    stop, wrong, answered = threading.Event(), [], [0]

    def go(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            name, number = rng.choice(sorted(known)), rng.randrange(len(PROMPTS))
            allowed = [living.tokens[bundle][name][number] for bundle in known[name]]
            try:
                found = server.tokens(name, PROMPTS[number])
            except HTTPError as error:
                if name.startswith("old") or error.code not in (400, 404):
                    wrong.append((name, error.code))
            except Exception as error:
                wrong.append((name, error))
            else:
                answered[0] += 1
                if found not in allowed:
                    wrong.append((name, found))

    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]


def free(server: Server, living: LivingLlama) -> int:
    """How many adapters there is room for; they are unloaded again."""
    loaded = []
    for recipe in NEW:
        try:
            server.load(recipe.name, living.second)
        except HTTPError:
            break
        loaded.append(recipe.name)
    for name in loaded:
        server.unload(name)
    return len(loaded)


def test_all_answers_differ(living: LivingLlama) -> None:
    """Else nothing here would be a proof."""
    for number in range(len(PROMPTS)):
        found = [living.tokens[living.second][name][number] for name in living.tokens[living.second]]
        found += [living.tokens[living.third][recipe.name][number] for recipe in NEW]
        assert len({tuple(tokens) for tokens in found}) == len(found)


def test_a_new_one_comes_and_goes(server: Server, living: LivingLlama, ask: Any) -> None:
    names = [server.model, *(recipe.name for recipe in OLD)]
    assert server.models() == names
    assert server.fails(COMPLETE, {"model": "new0", "prompt": [9]})[0] == 404
    server.load("new0", living.second)
    assert server.models() == [*names, "new0"]
    ask("new0", living.second)
    ask("old0", living.first)
    ask(None, living.first)
    server.unload("new0")
    assert server.models() == names
    assert server.fails(COMPLETE, {"model": "new0", "prompt": [9]})[0] == 404
    assert server.fails(UNLOAD, {"lora_name": "new0"})[0] == 404


def test_who_is_nearly_right_is_told_so(server: Server, living: LivingLlama) -> None:
    """Of what is served at that time, loaded or there from the start."""
    chat = {"messages": [{"role": "user", "content": "a"}]}

    def asked(name: str) -> set[str]:
        found = [server.fails(COMPLETE, {"model": name, "prompt": [9]})]
        found.append(server.fails("/v1/chat/completions", {"model": name} | chat))
        assert {status for status, _ in found} == {404}
        return {line for _, line in found}

    def unloaded(name: str) -> tuple[int, str]:
        return server.fails(UNLOAD, {"lora_name": name})

    assert asked("odl2") == {"The model `odl2` does not exist (did you mean 'old2'?)"}
    assert unloaded("odl2") == (404, "The lora adapter 'odl2' cannot be found (did you mean 'old2'?)")
    for load in (False, True):
        if load:
            server.load("new0", living.second)
        hint = " (did you mean 'new0'?)" if load else ""
        assert unloaded("neww0") == (404, f"The lora adapter 'neww0' cannot be found{hint or '.'}")
        assert all(line.startswith(f"The model `neww0` does not exist{hint or '.'}") for line in asked("neww0"))
    server.unload("new0")
    assert all("did you mean" not in line for line in asked("neww0"))
    ask_of = {"lora_name": "newr0", "lora_path": str(living.second)}
    assert "there is no adapter newr0 in " in server.fails(LOAD, ask_of)[1]
    assert server.fails(LOAD, ask_of)[1].endswith("(did you mean 'new0'?)")


def test_another_one_of_the_same_name_is_another_one(server: Server, living: LivingLlama, ask: Any) -> None:
    """What is cached of a prompt is that of the adapter which it was computed with."""

    def hits() -> float:
        return metric(server, "vllm:prefix_cache_hits_total")

    server.load("new1", living.second)
    ask("new1", living.second)
    before = hits()
    ask("new1", living.second)
    assert hits() > before
    server.unload("new1")
    server.load("new1", living.third)
    before = hits()
    ask("new1", living.third)
    assert hits() == before
    server.unload("new1")


def test_one_that_was_there_from_the_start_goes_and_comes_back(server: Server, living: LivingLlama, ask: Any) -> None:
    server.unload("old4")
    assert "old4" not in server.models()
    assert server.fails(COMPLETE, {"model": "old4", "prompt": [9]})[0] == 404
    assert free(server, living) == SPARE + 1
    server.load("old4", living.second)
    ask("old4", living.first)
    assert free(server, living) == SPARE


def test_one_that_is_unloaded_while_it_is_loaded(server: Server, living: LivingLlama, ask: Any) -> None:
    """Whoever is told that it is unloaded finds it gone, and its place free."""
    body = {"lora_name": "old4", "lora_path": str(living.second)}
    server.unload("old4")
    with traffic(server, living, {"old0": [living.first]}), ThreadPoolExecutor() as pool:
        for wait in [*range(0, 40, 2)] * 2:  # milliseconds, of which a load takes some
            loading = pool.submit(server.status, LOAD, body)
            time.sleep(wait / 1000)
            unloaded = server.status(UNLOAD, {"lora_name": "old4"})
            assert loading.result() == 200
            assert server.status(UNLOAD, {"lora_name": "old4"}) == (200 if unloaded == 404 else 404)
            assert server.fails(COMPLETE, {"model": "old4", "prompt": [9]})[0] == 404
    assert free(server, living) == SPARE + 1
    server.load("old4", living.second)
    ask("old4", living.first)


def test_one_that_shares_nothing_has_room_among_those_that_share_bases(
    server: Server, living: LivingLlama, ask: Any
) -> None:
    server.load("loner", living.third)
    ask("loner", living.third)
    ask("old3", living.first)
    server.unload("loner")


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ({"lora_name": "old1"}, 400, "adapter old1 is served already: unload it first"),
        ({"lora_name": "new0", "load_inplace": True}, 400, "adapter new0: load_inplace would change requests"),
        ({"lora_name": "other"}, 400, "there is no adapter other in "),
        ({"lora_name": "new0", "lora_path": "/nowhere"}, 400, "/nowhere"),
        ({"lora_name": "alien", "lora_path": "others"}, 400, "layers.0.q_proj [24, 20] of adapter alien is none of"),
        ({"lora_name": "more", "lora_path": "others"}, 400, "('more': it has weights besides its factors: "),
    ],
)
def test_what_is_refused(
    server: Server, living: LivingLlama, ask: Any, body: dict[str, Any], status: int, line: str
) -> None:
    asked = {"lora_path": "second"} | body
    found = server.fails(LOAD, asked | {"lora_path": str(getattr(living, asked["lora_path"], asked["lora_path"]))})
    assert found[0] == status
    assert line in found[1]
    ask("old1", living.first)


def test_more_than_there_is_room_for(server: Server, living: LivingLlama, ask: Any) -> None:
    for recipe in NEW[:SPARE]:
        server.load(recipe.name, living.second)
    status, line = server.fails(LOAD, {"lora_name": NEW[SPARE].name, "lora_path": str(living.second)})
    assert status == 400
    assert line == f"no room for adapter {NEW[SPARE].name} (remove others, or start the server with more room)"
    for recipe in NEW[:SPARE]:
        ask(recipe.name, living.second)
        server.unload(recipe.name)


def test_its_requests_are_counted(server: Server, living: LivingLlama) -> None:
    before = metric(server, 'lorazip_requests_total{adapter="old2"}')
    server.tokens("old2", PROMPTS[0])
    server.tokens("old2", PROMPTS[1])
    assert metric(server, 'lorazip_requests_total{adapter="old2"}') == before + 2


def test_adapters_that_come_and_go_under_load(server: Server, living: LivingLlama, ask: Any) -> None:
    """Some hundred times, and all room is free again. An adapter that is unloaded stays until its requests are done."""
    rng = random.Random(7)
    there: dict[str, Path] = {}
    known = {recipe.name: [living.first] for recipe in OLD[:3]}
    known |= {recipe.name: [living.second, living.third] for recipe in NEW}
    with traffic(server, living, known) as answered:
        for step in range(300):
            name = rng.choice(NEW).name
            if name in there:
                server.unload(name)
                del there[name]
            elif len(there) < SPARE:
                there[name] = rng.choice([living.second, living.third])
                server.load(name, there[name])
                if step % 10 == 0:
                    ask(name, there[name])
        assert answered[0] > 30
    for name in there:
        server.unload(name)
    assert server.models() == [server.model, *(recipe.name for recipe in OLD)]
    assert free(server, living) == SPARE


def metric(server: Server, name: str) -> float:
    """Of a sample in what the server tells Prometheus; 0 if there is none."""
    lines = [line for line in server.text("/metrics").splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)

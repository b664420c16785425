"""How the server misbehaves: rules that say which requests are hit, and actions that say what happens to them.

Whether a random fault hits depends on the seed, the rule, method, path and how often that path was asked for before,
never on which thread came first: the same requests meet the same faults every time.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from .answers import Answer, Origin, Refused, Request


class Action(Protocol):
    """Changes an answer, or gives another one. `chance` is the hit's own generator."""

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer: ...


@dataclass(frozen=True)
class Status:
    """An error in place of the answer."""

    status: int
    message: str = "Internal Error"
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    echo_authorization: bool = False
    """The message repeats the client's token, as careless proxies do."""

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        message = self.message
        if self.echo_authorization:
            message += f" (Authorization: {request.headers.get('Authorization')})"
        error = Refused(self.status, message, self.code, self.headers).answer
        error.sending = answer.sending
        return error


def too_many_requests(seconds: int = 1, *, ratelimit: bool = False) -> Status:
    """429, with Retry-After or with the header that the Hub uses."""
    hub = {"ratelimit": f'"api";r=0;t={seconds}', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}
    return Status(429, "Too Many Requests", hub if ratelimit else {"Retry-After": str(seconds)})


@dataclass(frozen=True)
class Cut:
    """The connection is closed after some bytes of the body; None: after a number of them that the seed gives."""

    after: int | None = None
    reset: bool = False

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        answer.sending.cut_after = chance.randrange(max(answer.size, 1)) if self.after is None else self.after
        answer.sending.reset = self.reset
        return answer


@dataclass(frozen=True)
class Flip:
    """Other bytes, as many as there should be. Only a digest can tell."""

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        body = bytearray(answer.bytes())
        if body:
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        return _with_body(answer, bytes(body))


@dataclass(frozen=True)
class Resize:
    """A body that is too short or too long, with a Content-Length that agrees with it."""

    by: int

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        body = answer.bytes()
        return _with_body(answer, body[: self.by] if self.by < 0 else body + b"\0" * self.by)


@dataclass(frozen=True)
class Drip:
    """So many bytes, then so many seconds of nothing, and so on."""

    size: int
    seconds: float

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        answer.sending.drip = self.size, self.seconds
        return answer


@dataclass(frozen=True)
class Delay:
    seconds: float

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        answer.sending.delay += self.seconds
        return answer


@dataclass(frozen=True)
class Silence:
    """No answer, and after some time the connection is closed."""

    seconds: float = 3600.0

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        answer.sending.delay += self.seconds
        answer.sending.silent = True
        return answer


@dataclass(frozen=True)
class Call:
    """Something happens when the request arrives, before it's answered: a push, a squash, the end of a repository."""

    hook: Callable[[], object]

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        return answer


class RateLimit:
    """More than so many requests within so many seconds are refused, and told how long to wait."""

    def __init__(
        self,
        requests: int,
        seconds: float,
        *,
        ratelimit: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.requests = requests
        self.seconds = seconds
        self._ratelimit = ratelimit
        self._clock = clock
        self._admitted: deque[float] = deque()
        self._lock = threading.Lock()

    def __call__(self, answer: Answer, request: Request, chance: random.Random) -> Answer:
        with self._lock:
            now = self._clock()
            while self._admitted and self._admitted[0] <= now - self.seconds:
                self._admitted.popleft()
            if len(self._admitted) < self.requests:
                self._admitted.append(now)
                return answer
            wait = math.ceil(self._admitted[0] + self.seconds - now)
        return too_many_requests(wait, ratelimit=self._ratelimit)(answer, request, chance)


def _with_body(answer: Answer, body: bytes) -> Answer:
    answer.body, answer.start, answer.length = body, 0, None
    return answer


@dataclass
class Rule:
    """Which requests an action hits: those that everything given here is true of."""

    action: Action
    method: str | None = None
    path: str = ""
    """A regular expression that is searched for in the decoded path."""
    origin: Origin | None = None
    nth: Collection[int] | None = None
    """The how manieth request of this method for this path; the first is 1."""
    times: int | None = None
    """Only so often in all, however many paths match."""
    probability: float = 1.0
    hits: int = 0

    @property
    def name(self) -> str:
        return type(self.action).__name__


class Faults:
    """The rules of one server, in the order in which they act. Empty, it does nothing."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._rules: list[Rule] = []
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    def add(
        self,
        action: Action,
        *,
        method: str | None = None,
        path: str = "",
        origin: Origin | None = None,
        nth: Collection[int] | None = None,
        times: int | None = None,
        probability: float = 1.0,
    ) -> Rule:
        rule = Rule(action, method, path, origin, nth, times, probability)
        with self._lock:
            self._rules.append(rule)
        return rule

    def remove(self, rule: Rule) -> None:
        with self._lock:
            self._rules.remove(rule)

    def clear(self) -> None:
        """No more faults, and all paths are as if never asked for."""
        with self._lock:
            self._rules.clear()
            self._seen.clear()

    def hitting(self, request: Request) -> list[tuple[Rule, random.Random]]:
        """The rules that hit a request, which counts as one more for its path."""
        key = (request.origin, request.method, request.path)
        with self._lock:
            self._seen[key] += 1
            hitting = []
            for index, rule in enumerate(self._rules):
                chance = _chance(self.seed, index, *key, self._seen[key])
                if _is_hit(rule, request, self._seen[key]) and chance.random() < rule.probability:
                    rule.hits += 1
                    hitting.append((rule, chance))
            return hitting


def _is_hit(rule: Rule, request: Request, occurrence: int) -> bool:
    return (
        (rule.method is None or rule.method == request.method)
        and (rule.origin is None or rule.origin == request.origin)
        and (rule.nth is None or occurrence in rule.nth)
        and (rule.times is None or rule.hits < rule.times)
        and re.search(rule.path, request.path) is not None
    )


def _chance(*key: object) -> random.Random:
    return random.Random(hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).digest())

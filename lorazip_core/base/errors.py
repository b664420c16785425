"""Every failure that lorazip names, each with its slug and the exit code of the command line.

The table of exit codes in docs/commands.md is generated from these classes.
"""

from __future__ import annotations

from typing import ClassVar


class LorazipError(Exception):
    """A failure with a message of one line: what is wrong, where, and (the hint) what to do about it."""

    slug: ClassVar[str]
    exit_code: ClassVar[int]
    meaning: ClassVar[str]

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class CheckFailed(LorazipError):
    slug = "check-failed"
    exit_code = 1
    meaning = "a check that was asked for did not hold"


class UsageError(LorazipError):
    slug = "usage"
    exit_code = 2
    meaning = "usage: an option or argument makes no sense"


class AdapterError(LorazipError):
    """An adapter cannot be used. ``reason`` is the message without the adapter's name."""

    slug = "adapter"
    exit_code = 3
    meaning = "an adapter cannot be used: which one, which tensor, why, what to do"

    def __init__(self, adapter: str, reason: str, hint: str | None = None) -> None:
        super().__init__(f"adapter {adapter!r}: {reason}", hint)
        self.adapter = adapter
        self.reason = f"{reason} ({hint})" if hint else reason


class AdapterErrors(AdapterError):
    """Several adapters cannot be used; each has its own line."""

    def __init__(self, errors: list[AdapterError]) -> None:
        LorazipError.__init__(self, "\n".join(map(str, errors)))
        self.errors = errors


class BundleDamaged(LorazipError):
    slug = "bundle-damaged"
    exit_code = 4
    meaning = "a bundle is damaged"


class Unsupported(LorazipError):
    slug = "unsupported"
    exit_code = 5
    meaning = "a format or feature that this version does not support"


class OutputExists(LorazipError):
    slug = "output-exists"
    exit_code = 6
    meaning = "the output exists"


class HubError(LorazipError):
    slug = "hub"
    exit_code = 7
    meaning = "the Hub or the network does not answer or refuses"


class LocalError(LorazipError):
    slug = "local"
    exit_code = 8
    meaning = "local resources: disk, permission, memory, a device that is not there"


class Interrupted(KeyboardInterrupt):
    """An interruption that leaves something to go on from, with a message of one line that says where it is."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message} ({hint})")

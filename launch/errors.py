"""How a command ends when it cannot do its work: one line on stderr and an exit code."""

from __future__ import annotations

STOPPED = 75  # sysexits.h: a temporary failure, to be tried again


def printable(text: str) -> str:
    """Return a text as one line, in which what a terminal would act on is spelt out."""
    line = " ".join(text.splitlines())
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)


class UserError(Exception):
    """Something the user can mend: exit code 2. The message is one line: what, where, what to do."""


class RunFailed(Exception):
    """The run could not go on (NaN, a full disk), and would not if it were started anew: exit code 1."""


class OutOfMemory(RunFailed):
    """There was no memory left; started anew, there may be."""


class Stopped(Exception):
    """A run was asked to end (SIGTERM) and did, with a checkpoint: exit code STOPPED."""

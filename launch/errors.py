"""How a command ends when it cannot do its work: one line on stderr and an exit code."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: exit code 2. The message is one line: what, where, what to do."""


class RunFailed(Exception):
    """The run could not go on (NaN, a full disk): exit code 1."""

"""What this package raises for the outside world; everything else is a bug."""


class RecipeError(ValueError):
    """A recipe that cannot be built or does not exist. The message is one line."""


class PeerError(RuntimeError):
    """The other tower died, hangs, or does not do the same as this one. The message is one line."""


def reason(error: BaseException) -> str:
    """Return the first line of what torch says, whose messages run over many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

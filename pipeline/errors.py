"""The one error that this package raises for what a user can mend."""


class DataError(ValueError):
    """Input that cannot be used. The message is one line: what, where, what to do."""

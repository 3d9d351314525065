"""The errors that this package raises for what a user can mend, and for what stopped it."""


class DataError(ValueError):
    """Input that cannot be used. The message is one line: what, where, what to do."""


class PreprocessError(RuntimeError):
    """Packing stopped for a reason outside the data (a full disk, a killed worker). The message is one line."""

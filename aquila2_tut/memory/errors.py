"""The one exception of this room."""


class RehearsalError(ValueError):
    """A setting that no run can be made of, or a library that a rehearsal needs and that is missing."""

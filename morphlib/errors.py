"""The one exception that means: the input is wrong, and the person who gave it can mend it."""


class InputError(ValueError):
    """Wrong input. The message is one line: what is wrong, where, and what to do about it."""

"""The one exception that means: the input is wrong, and the person who gave it can mend it."""


class InputError(ValueError):
    """Wrong input. The message is one line, whatever it quotes: what is wrong, where, and what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))

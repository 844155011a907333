"""A pickle that leaves a witness if it runs."""

from pathlib import Path


class Bomb:
    """Unpickled without a list of what may be called, it makes a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)

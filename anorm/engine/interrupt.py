"""What ends a run between two steps."""


class Interrupted(Exception):
    """A signal stopped the run at a step boundary; everything is saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number

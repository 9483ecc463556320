"""What ends a run between two steps."""


class Interrupted(Exception):
    """A signal stopped the run at a step boundary. saved: whether the checkpoint of that step was written; None in a
    process that writes none.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number: int = number
        self.saved: bool | None = None

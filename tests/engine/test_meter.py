"""When something is due."""

from anorm.config.settings import settings_from
from anorm.engine import meter
from anorm.engine.meter import SaveTimer


def test_a_checkpoint_is_asked_for_once(monkeypatch):
    """Several processes save a step after rank 0 asked: asking again meanwhile would be a second checkpoint."""
    now = [0.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    timer = SaveTimer(settings_from({"checkpoint": {"every_minutes": 1}}))
    due = []
    for step in range(1, 10):
        now[0] += 20
        due.append(timer.now(step))
    assert [step for step, asked in enumerate(due, 1) if asked] == [4, 8]

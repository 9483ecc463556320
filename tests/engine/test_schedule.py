from pathlib import Path

import numpy as np
import pytest

from anorm.engine.schedule import WarmupCosine

ARRAYS = Path(__file__).parent / "arrays"


def test_equals_the_values_of_the_authors_schedule():
    file = np.load(ARRAYS / "lr_v2.npz")
    assert len(file["rows"]) > 100
    for base, epochs, iterations, warmup, epoch, iteration, expected in file["rows"]:
        schedule = WarmupCosine(base, int(epochs), int(iterations), warmup)
        assert abs(schedule(int(epoch * iterations + iteration)) - expected) < 1e-12


def test_ends_at_the_floor_and_never_rises_after_warm_up():
    schedule = WarmupCosine(0.4, 10, 7, 2.0, floor=0.01)
    rates = [schedule(step) for step in range(70)]
    assert rates[-1] == pytest.approx(0.004, abs=1e-15)
    assert rates[13] == pytest.approx(0.4, abs=1e-15)
    assert all(a > b for a, b in zip(rates[13:], rates[14:], strict=False))


def test_no_warm_up_starts_below_the_peak_by_one_step_of_the_cosine():
    assert WarmupCosine(1.0, 2, 10, 0.0)(0) == pytest.approx(0.5 * (1 + np.cos(np.pi / 20)), abs=1e-15)

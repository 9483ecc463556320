import math
from pathlib import Path

import numpy as np
import pytest
import torch

from anorm.engine.schedule import Alrs, Steps, WarmupCosine

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


# ---- steps


def test_steps_follow_torchs_milestones():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    torchs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.1)
    schedule = Steps(0.4, 3, (2, 5), 0.1)
    for epoch in range(7):
        for step in range(3):
            assert schedule(3 * epoch + step) == pytest.approx(torchs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        torchs.step()


def test_steps_warm_up_over_iterations_from_a_third_as_mask_rcnn_does():
    """500 iterations from 1/3, the rate of the first is a third of the peak; 16 and 22 of 24 epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    torchs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=500)
    schedule = Steps(0.02, 1000, (16, 22), warmup_steps=500, warmup_from=1 / 3)
    for step in range(600):
        assert schedule(step) == pytest.approx(torchs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        torchs.step()
    assert [schedule(s) for s in (15_999, 16_000, 22_000)] == pytest.approx([0.02, 0.002, 0.0002], rel=1e-12)


def test_steps_warm_up_over_epochs_as_the_cosine_does():
    schedule, cosine = Steps(0.4, 7, (8,), warmup_epochs=2.0), WarmupCosine(0.4, 10, 7, 2.0)
    assert [schedule(s) for s in range(13)] == [cosine(s) for s in range(13)]
    assert schedule(13) == schedule(55) == 0.4


# ---- ALRS


def rates(losses, schedule):
    found = []
    for epoch, loss in enumerate(losses):
        found.append(schedule(epoch * schedule.steps_per_epoch))
        schedule.epoch_ended(epoch, loss)
    return [*found, schedule(len(losses) * schedule.steps_per_epoch)]


def test_alrs_lowers_the_rate_where_the_loss_falls_too_little_absolutely_and_relatively():
    """By hand. With tolerance 0.1: 4 -> 3.5 falls enough; 3.5 -> 3.45 by 0.05 and by 1.4 %: lower; 3.45 -> 3.3 by 0.15:
    enough; 3.3 -> 3.4 rises: lower; 3.4 -> 0.5; 0.5 -> 0.44 by 0.06 < 0.1 but by 12 %: enough; 0.44 -> 0.42 by 4.5 %: lower.
    """
    losses = [4, 3.5, 3.45, 3.3, 3.4, 0.5, 0.44, 0.42]
    lowered = [0, 0, 1, 1, 2, 2, 2, 3]  # after each epoch
    found = rates(losses, Alrs(0.2, 10, tolerance=0.1, factor=0.5))
    assert found == [0.2, *(0.2 * 0.5**n for n in lowered)]


def test_alrs_does_not_look_at_losses_while_warming_up():
    schedule = Alrs(0.1, 4, tolerance=0.02, factor=0.9, warmup_epochs=2)
    assert [schedule(s) for s in range(8)] == pytest.approx([0.1 * (s + 1) / 8 for s in range(8)], rel=1e-12)
    for epoch, loss in enumerate([5.0, 6.0, 7.0]):  # rising: but only the third counts, and it is the first
        schedule.epoch_ended(epoch, loss)
    assert schedule(12) == 0.1
    schedule.epoch_ended(3, 8.0)
    assert schedule(16) == pytest.approx(0.09, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_alrs_passes_over_a_loss_that_is_not_finite(bad):
    """Remembered, a NaN would make every later comparison false: the rate would never fall again."""
    assert rates([3.0, bad, 3.1, 3.1], Alrs(1.0, 1, factor=0.5)) == [1.0, 1.0, 1.0, 0.5, 0.25]


def test_alrs_takes_a_loss_of_zero():
    assert rates([1.0, 0.0, 0.0, 0.5], Alrs(1.0, 1, factor=0.5)) == [1.0, 1.0, 1.0, 1.0, 0.5]


def test_alrs_continues_from_its_state_through_a_checkpoint(tmp_path):
    losses = [3.0, 2.5, 2.495, 2.6, 1.0, 0.999, 0.9989]
    whole = rates(losses, Alrs(0.3, 5))
    for cut in range(len(losses)):
        first, second = Alrs(0.3, 5), Alrs(0.3, 5)
        before = rates(losses[:cut], first)[:-1]
        torch.save(first.state_dict(), tmp_path / "state")
        second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        after = []
        for epoch in range(cut, len(losses)):
            after.append(second(5 * epoch))
            second.epoch_ended(epoch, losses[epoch])
        assert [*before, *after] == whole[:-1] and second(5 * len(losses)) == whole[-1]

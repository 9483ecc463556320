import pytest
import torch

from anorm.data.random import seed_of, stream


def test_a_stream_is_the_same_on_every_machine():
    # a run resumed elsewhere, or next year, must see the same numbers: these were written down once
    assert seed_of(0, "order", 3) == 3067814781472862278
    assert seed_of(1, "augment", 2, 5) == 6455646562731713596


def test_streams_of_different_names_differ():
    seeds = {
        seed_of(s, p, *k)
        for s in range(3)
        for p in ("order", "augment")
        for k in ((), (1,), (1, 2), (12,), (2, 1))
    }
    assert len(seeds) == 3 * 2 * 5


def test_streams_do_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(4, generator=stream(0, "augment", 1))
    assert torch.equal(torch.rand(3), expected)


def test_a_purpose_that_could_be_confused_with_keys_is_refused():
    with pytest.raises(AssertionError):
        seed_of(0, "order/1")

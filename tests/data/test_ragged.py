"""Samples of any shape on the loaders that images of one size take: a data set says what its batches are."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from anorm.data.loaders import Batch, EvalLoader, TrainLoader
from anorm.data.sources import Dataset, Source

COUNT = 23
BAD = 5


class FetchedBoxes(NamedTuple):
    """images: a uint8 (3,H,W) each; boxes: a float32 (k,4) each, k from 0 on."""

    images: list[Tensor]
    boxes: list[Tensor]
    indices: Tensor
    bad: list[tuple[int, str]]


class Boxes(Dataset):
    """COUNT images of other heights and widths, with other numbers of boxes; the widest first within a step."""

    def __init__(self, skip: bool = False):
        self.identity, self.skip = "boxes", skip

    def __len__(self) -> int:
        return COUNT

    def size(self, index: int) -> tuple[int, int]:
        return 3 + 7 * index % 5, 2 + 11 * index % 13

    def order(self, rng, global_batch):
        mixed = torch.randperm(COUNT, generator=rng)
        steps = [sorted(step.tolist(), key=lambda i: -self.size(i)[1]) for step in mixed.split(global_batch)]
        return torch.tensor([index for step in steps for index in step])

    def fetch(self, indices, rngs):
        kept, bad = [], []
        for index in indices:
            if self.skip and index == BAD:
                bad.append((index, f"{index} is bad"))
                if rngs is None:
                    continue
                index += 1
            kept.append(index)
        draws = [0] * len(kept) if rngs is None else [int(torch.randint(99, (), generator=r)) for r in rngs]
        images = [
            torch.full((3, *self.size(i)), i + draw, dtype=torch.uint8)
            for i, draw in zip(kept, draws, strict=True)
        ]
        boxes = [torch.full((i % 4, 4), float(i)) for i in kept]
        return FetchedBoxes(images, boxes, torch.tensor(kept, dtype=torch.int64), bad)

    def finish(self, fetched, device, memory_format):
        images = [image.to(device).float() for image in fetched.images]
        return Batch(images, [boxes.to(device) for boxes in fetched.boxes], fetched.indices)


def source(skip=False):
    return Source(Boxes(skip), {"near": Boxes(skip), "far": Boxes(skip)}, ["box"], "boxes")


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert torch.equal(ours.indices, theirs.indices) and ours.indices.dtype == torch.int64
    for mine, other in ((ours.inputs, theirs.inputs), (ours.targets, theirs.targets)):
        assert len(mine) == len(other) == len(ours.indices)
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_takes_each_sample_once_whole_and_in_the_order_of_the_data_set(workers, world):
    alone = list(TrainLoader(source(), 3, 12, 2).epoch(1))
    seen = []
    loaders = [TrainLoader(source(), 3, 12, 2, rank, world, workers) for rank in range(world)]
    ranks = [list(loader.epoch(1)) for loader in loaders]
    for step, whole in enumerate(alone):
        widths = [image.shape[2] for batch in whole for image in batch.inputs]
        assert widths == sorted(widths, reverse=True) and len(widths) == 12
        for rank, loader in enumerate(loaders):
            assert len(ranks[rank][step]) == 6 // world  # accumulated
            for k, batch in enumerate(ranks[rank][step]):
                assert_same(batch, whole[loader.micro_batch_number(k)])
                seen += batch.indices.tolist()
                for index, image, boxes in zip(
                    batch.indices.tolist(), batch.inputs, batch.targets, strict=True
                ):
                    assert image.shape[1:] == source().train.size(index) and boxes.shape == (index % 4, 4)
    assert len(alone) == 1 and len(seen) == len(set(seen)) == 12
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("skip", [False, True])
def test_evaluation_takes_each_sample_exactly_once(workers, world, skip):
    data, seen = source(skip), []
    for dataset in data.evals.values():
        assert dataset.identity == "boxes"
    for rank in range(world):
        loader = EvalLoader(data.val, 4, rank, world, workers)
        for batch in loader:
            assert_same(batch, data.val.finish(data.val.fetch(batch.indices.tolist(), None), "cpu", None))
            seen += batch.indices.tolist()
        loader.close()
    assert seen == [i for i in range(COUNT) if not skip or i != BAD]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_where_it_was(workers):
    whole = list(TrainLoader(source(), 3, 4, 2).epoch(7))
    loader = TrainLoader(source(), 3, 4, 2, workers=workers)
    for ours, theirs in zip(loader.epoch(7, 2), whole[2:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    loader.close()


def test_a_bad_sample_is_counted_and_replaced_as_its_data_set_says():
    loader = TrainLoader(source(skip=True), 0, COUNT, COUNT)
    [[batch]] = loader.epoch(0)
    assert len(batch.inputs) == COUNT and BAD not in batch.indices
    assert loader.skipped == {BAD: f"{BAD} is bad"}


def test_an_order_that_is_no_permutation_is_noticed():
    class Short(Boxes):
        def order(self, rng, global_batch):
            return super().order(rng, global_batch)[1:]

    data = Source(Short(), {"val": Boxes()}, ["box"], "boxes")
    with pytest.raises(AssertionError):
        next(TrainLoader(data, 0, 4, 2).epoch(0))


def test_the_first_evaluation_set_is_val():
    data = source()
    assert data.val is data.evals["near"] and list(data.evals) == ["near", "far"]
    with pytest.raises(AssertionError, match="evaluation set"):
        Source(Boxes(), {}, ["box"], "boxes")


def test_the_order_of_labelled_images_is_torchs_permutation():
    """Runs made before data sets had an order of their own resume: from (seed, "order", epoch) alone."""
    from anorm.data.random import stream
    from anorm.data.sources import create

    train = create("synthetic", image_size=8, train_images=50).train
    expected = torch.randperm(50, generator=stream(4, "order", 2))
    assert torch.equal(train.order(stream(4, "order", 2), 8), expected)
    loader = TrainLoader(create("synthetic", image_size=8, train_images=50), 4, 8, 8)
    assert torch.equal(torch.cat([batch.indices for [batch] in loader.epoch(2)]), expected[:48])

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from photographs import write_folder

from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.sources import create


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("files") / "set", train=9, val=5)
    return create("imagefolder", root=str(root), image_size=16, cache=False)


def run(loader, epoch, start_step=0):
    steps = list(loader.epoch(epoch, start_step))
    loader.close()
    return steps


def assert_equal_steps(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(files, workers):
    alone = TrainLoader(files, 3, 8, 4)
    helped = TrainLoader(files, 3, 8, 4, workers=workers)
    for epoch in range(2):
        assert_equal_steps(list(helped.epoch(epoch)), list(alone.epoch(epoch)))
    helped.close()


@pytest.mark.parametrize("name", ["files", "digits"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_equals_the_rest_of_an_uninterrupted_one(files, name, workers):
    source = files if name == "files" else create("digits")
    whole = run(TrainLoader(source, 0, 6, 3), 2)
    for start in (0, 1, len(whole) - 1, len(whole)):
        rest = run(TrainLoader(source, 0, 6, 3, workers=workers), 2, start)
        assert_equal_steps(rest, whole[start:])


def test_an_epoch_broken_off_leaves_the_loader_usable(files):
    loader = TrainLoader(files, 0, 6, 3, workers=2)
    steps = loader.epoch(0)
    next(steps)
    del steps
    assert_equal_steps(list(loader.epoch(1)), run(TrainLoader(files, 0, 6, 3), 1))
    loader.close()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["files", "digits"])
def test_ranks_share_the_micro_batches_of_one_process(files, name, world):
    source = files if name == "files" else create("digits")
    alone = run(TrainLoader(source, 1, 8, 2), 0)
    loaders = [TrainLoader(source, 1, 8, 2, rank, world) for rank in range(world)]
    ranks = [run(loader, 0) for loader in loaders]
    assert {len(steps) for steps in ranks} == {len(alone)}
    for step, whole in enumerate(alone):
        for rank, loader in enumerate(loaders):
            for k, batch in enumerate(ranks[rank][step]):
                expected = whole[loader.micro_batch_number(k)]
                assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_the_micro_batch_size_does_not_change_the_images_of_a_step(files):
    fine, coarse = run(TrainLoader(files, 1, 8, 2), 0), run(TrainLoader(files, 1, 8, 8), 0)
    for a, b in zip(fine, coarse, strict=True):
        assert torch.equal(torch.cat([batch.inputs for batch in a]), b[0].inputs)


def test_an_epoch_takes_each_image_at_most_once_and_drops_the_rest(files):
    loader = TrainLoader(files, 0, 8, 4)
    assert loader.steps_per_epoch == 3  # 27 images
    taken = [index for step in loader.epoch(0) for batch in step for index in batch.indices.tolist()]
    assert len(taken) == len(set(taken)) == 24
    for step in loader.epoch(1):
        for batch in step:
            assert torch.equal(batch.targets, files.train.labels[batch.indices])


def test_epochs_and_seeds_give_other_orders_and_other_augmentations(files):
    def step(seed, epoch):
        return torch.cat(
            [batch.indices for batch in next(iter(TrainLoader(files, seed, 27, 27).epoch(epoch)))]
        )

    orders = [step(seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    looks = set()
    for epoch in range(3):
        (batch,) = next(iter(TrainLoader(files, 0, 27, 27).epoch(epoch)))
        looks.add(batch.inputs[batch.indices == 5].sum().item())
    assert len(looks) == 3


def test_loading_leaves_the_global_generator_alone(files):
    torch.manual_seed(0)
    expected = torch.rand(2)
    for workers in (0, 2):
        torch.manual_seed(0)
        loader = TrainLoader(files, 0, 8, 4, workers=workers)
        list(loader.epoch(0))
        loader.close()
        assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_normalised_on_the_device(files, channels_last):
    (batch,) = next(iter(TrainLoader(files, 0, 8, 8, channels_last=channels_last).epoch(0)))
    assert batch.inputs.dtype == torch.float32 and batch.targets.dtype == batch.indices.dtype == torch.int64
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.inputs.is_contiguous(memory_format=layout)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (files.mean, files.std))
    levels = (batch.inputs.double() * std + mean) * 255
    # float32 rounding of numbers up to 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.min() > -0.5 and levels.max() < 255.5


@pytest.mark.parametrize("batch, world", [(1, 1), (4, 1), (7, 3), (15, 4), (100, 2), (2, 16)])
def test_evaluation_takes_every_image_exactly_once(files, batch, world):
    seen = []
    for rank in range(world):
        loader = EvalLoader(files.val, batch, rank, world)
        batches = list(loader)
        assert len(batches) == len(loader)
        for images, labels, indices in batches:
            assert len(images) == len(labels) == len(indices) <= batch
            assert torch.equal(labels, files.val.labels[indices])
            seen += indices.tolist()
    assert sorted(seen) == list(range(15))


def test_evaluation_repeats_with_any_number_of_workers(files):
    alone = list(EvalLoader(files.val, 4))
    loader = EvalLoader(files.val, 4, workers=2)
    for _ in range(2):
        assert_equal_steps([[batch] for batch in loader], [[batch] for batch in alone])
    loader.close()


# ---- what a user can get wrong


def test_fewer_images_than_one_global_batch(files):
    with pytest.raises(
        ValueError, match="27 images, fewer than one global batch of 32: lower optim.global_batch"
    ):
        TrainLoader(files, 0, 32, 16)


def test_a_global_batch_that_does_not_divide(files):
    with pytest.raises(ValueError, match="8 images is not a multiple of 1 processes x 3 images"):
        TrainLoader(files, 0, 8, 3)
    with pytest.raises(ValueError, match="not a multiple of 2 processes x 8"):
        TrainLoader(files, 0, 8, 8, rank=0, world=2)


@pytest.mark.parametrize("sizes", [{"global_batch": 0}, {"micro_batch": -1}, {"world": 0}, {"workers": -1}])
def test_sizes_must_be_positive(files, sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        TrainLoader(files, 0, **{"global_batch": 4, "micro_batch": 2} | sizes)
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        EvalLoader(files.val, 0)


def test_an_unknown_loader_is_refused(tmp_path):
    source = create("imagefolder", root=str(write_folder(tmp_path / "set")), loader="ffcv")
    with pytest.raises(ValueError, match="data.loader='ffcv' is unknown: choose one of torch"):
        TrainLoader(source, 0, 4, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_ends_training_with_its_name_and_no_traceback(tmp_path, workers):
    root = write_folder(tmp_path / "set")
    (root / "train/bee/bee_2.JPEG").write_bytes(b"\xff\xd8\xff damaged")
    loader = TrainLoader(create("imagefolder", root=str(root), image_size=16), 0, 21, 21, workers=workers)
    with pytest.raises(ValueError, match=r"bee_2.JPEG is not a readable image") as caught:
        list(loader.epoch(0))
    loader.close()
    assert str(caught.value).count("\n") <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_counted_and_listed_once(tmp_path, workers, caplog):
    root = write_folder(tmp_path / "set")
    (root / "train/bee/bee_2.JPEG").write_bytes(b"\xff\xd8\xff damaged")
    (root / "val/ant/ant_0.JPEG").write_bytes(b"\xff\xd8\xff damaged")
    source = create("imagefolder", root=str(root), image_size=16, on_error="skip")
    train, val = TrainLoader(source, 0, 7, 7, workers=workers), EvalLoader(source.val, 1, workers=workers)
    for epoch in range(2):
        assert all(len(batch.inputs) == 7 for step in train.epoch(epoch) for batch in step)
    assert [int(batch.indices) for batch in val] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(train.skipped) == [9] and list(val.skipped) == [0]
    assert caplog.text.count("bee_2.JPEG") == 1
    train.close()
    val.close()


PROGRAM = """
    import os, sys, time
    from anorm.data.loaders import TrainLoader
    from anorm.data.sources import create

    loader = TrainLoader(create("imagefolder", root=sys.argv[1], image_size=16, cache=False), 0, 6, 3, workers=2)
    for epoch in range(10000):
        for step in loader.epoch(epoch):
            print(epoch, flush=True)
            time.sleep(0.02)
            if sys.argv[2] == "finish" and epoch == 1:
                sys.exit(0)
"""


def start(root, how):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(root), how],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdout.readline()
    return process


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def gone(pids, seconds):
    end = time.time() + seconds
    while time.time() < end and any(map(alive, pids)):
        time.sleep(0.1)
    return not any(map(alive, pids))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_outlive_a_signal_to_the_group_but_not_their_rank(tmp_path):
    process = start(write_folder(tmp_path / "set"), "run")
    workers = children(process.pid)
    assert len(workers) >= 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        for worker in workers:
            os.kill(worker, number)
    for _ in range(20):
        assert process.stdout.readline()
    assert all(map(alive, workers))
    process.kill()
    process.communicate()
    assert gone(workers, 30)  # torch's workers look for their parent every five seconds


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_program_that_forgets_to_close_its_loader_still_ends(tmp_path):
    process = start(write_folder(tmp_path / "set"), "finish")
    workers = children(process.pid)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert gone(workers, 10)

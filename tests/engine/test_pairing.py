"""Runs of equal seeds are pairs: whatever the norm, they see the same mixed pictures and start alike."""


import pytest
import torch
from commands import ROOT
from photographs import write_folder

from anorm.build import build
from anorm.config.frozen import Config
from anorm.engine.fit import fit
from anorm.norms.base import Norm
from anorm.processes.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """21 pictures of several sizes in three classes, to be cropped."""
    return write_folder(tmp_path_factory.mktemp("pictures"))


def seen(data, folder, norm, seed):
    """(what the network was given in training, in order; the mixed targets; its initial parameters that are
    no norm's), of a run through the program's own loop.
    """
    asked = [
        "arch=resnet18",
        f"norm={norm}",
        f"seed={seed}",
        "data=imagefolder",
        f"data.root={data}",
        "data.image_size=32",
    ]
    asked += [
        "data.cache=false",
        "batch_size=5",
        "optim.global_batch=10",
        "epochs=2",
        "schedule.warmup_epochs=0",
    ]
    asked += [
        "mix.mixup=0.4",
        "hardware=cpu",
        "hardware.workers=0",
        "hardware.threads=1",
        "log.tensorboard=false",
    ]
    config = Config.compose(ROOT / "configs", asked).on()
    folder.mkdir()
    run = build(config, folder, "signature", World().on("cpu"), None)
    of_norms = {
        id(p) for module in run.model.modules() if isinstance(module, Norm) for p in module.parameters()
    }
    start = {name: p.detach().clone() for name, p in run.model.named_parameters() if id(p) not in of_norms}
    inputs, targets, mix = [], [], run.task.mixing.mix

    def listen(module, arguments):
        if module.training:
            inputs.append(arguments[0].clone())

    def mixed(*arguments):
        images, target = mix(*arguments)
        targets.append(target)
        return images, target

    run.network.register_forward_pre_hook(listen)
    run.task.mixing.mix = mixed
    try:
        fit(run)
    finally:
        run.close()
    return inputs, targets, start


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    wanted = (("bn", 0), ("an", 0), ("gn", 0), ("bn", 1))
    return {(norm, seed): seen(data, folder / f"{norm}-{seed}", norm, seed) for norm, seed in wanted}


@pytest.mark.parametrize("norm", ["an", "gn"])
def test_equal_seeds_see_the_same(runs, norm):
    (images, targets, start), (other_images, other_targets, other_start) = runs["bn", 0], runs[norm, 0]
    assert len(images) == len(other_images) == 8  # two epochs of two steps of two micro-batches
    for here, there in zip(images, other_images, strict=True):
        assert torch.equal(here, there)  # order, crops, flips and mixup's draws
    for here, there in zip(targets, other_targets, strict=True):
        assert torch.equal(here.labels, there.labels) and torch.equal(here.partners, there.partners)
        assert 0 < here.weight == there.weight < 1
    assert start.keys() == other_start.keys() and "conv1.weight" in start and "fc.weight" in start
    assert all(torch.equal(value, other_start[name]) for name, value in start.items())


def test_other_seeds_see_something_else(runs):
    (images, _, start), (other_images, _, other_start) = runs["bn", 0], runs["bn", 1]
    assert not any(torch.equal(here, there) for here, there in zip(images, other_images, strict=True))
    assert not torch.equal(start["conv1.weight"], other_start["conv1.weight"])
    assert not torch.equal(images[0], images[4])  # nor does the second epoch repeat the first

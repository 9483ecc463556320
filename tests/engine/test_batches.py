"""Batch statistics in evaluation: how images come together, for any number of processes, and what is said of it."""

import copy
from contextlib import nullcontext

import pytest
import torch
from commands import SMALL, cut_at, events, run_train, script, train

from anorm import create_model
from anorm.config.settings import Eval
from anorm.config.signature import EXCLUDED, signature
from anorm.data import sources
from anorm.data.loaders import Batches, EvalLoader
from anorm.engine.device import autocast_of
from anorm.engine.evaluate import Evaluator, Pair, batch_dependence, dependence_warning
from anorm.processes.world import World
from anorm.tasks.classification import Classification

DATA = {"name": "synthetic", "image_size": 16, "num_classes": 4, "train_images": 64, "val_images": 101}


@pytest.fixture(scope="module")
def val():
    return sources.create(**DATA).val


@pytest.mark.parametrize("order", ["shuffled", "classes"])
def test_batches_are_whole_and_every_image_counts_once(val, order):
    found = Batches(8, order, seed=3).indices(val)
    assert [len(indices) for indices, _ in found] == [8] * 13
    counted = torch.cat([indices[:count] for indices, count in found])
    assert sorted(counted.tolist()) == list(range(101))
    last, count = found[-1]
    assert count == 5 and torch.equal(last[5:], counted[:3])  # filled from the start of the order
    if order == "classes":
        assert val.labels[counted].tolist() == sorted(val.labels.tolist())
    else:
        again, other = (Batches(8, order, seed=s).indices(val)[0][0] for s in (3, 4))
        assert torch.equal(again, found[0][0]) and not torch.equal(other, found[0][0])
        assert len(set(val.labels[found[0][0]].tolist())) > 1


def test_a_set_smaller_than_a_batch_is_one_batch(val):
    ((indices, count),) = Batches(200).indices(val)
    assert len(indices) == count == 101


@pytest.mark.parametrize("world", [2, 3, 20])
def test_processes_share_the_same_batches(val, world):
    """Of 13 batches some of 20 processes have none."""
    whole = list(EvalLoader(val, 8).together(Batches(8)))
    shared = [list(EvalLoader(val, 8, rank, world).together(Batches(8))) for rank in range(world)]
    assert [len(EvalLoader(val, 8, rank, world).together(Batches(8))) for rank in range(world)] == list(
        map(len, shared)
    )
    for number, batch in enumerate(whole):
        other = shared[number % world][number // world]
        assert torch.equal(batch.inputs, other.inputs) and torch.equal(batch.indices, other.indices)
    assert len(whole[-1].inputs) == len(whole[-1].targets) == 8 and len(whole[-1].indices) == 5


def evaluator(model, val, stats, size=8, rank=0, world=1, **asked):
    loader = EvalLoader(val, size, rank, world)
    hardware = type("Hardware", (), {"dtype": "fp32"})
    asked = Eval(stats=stats, **asked)
    task = Classification([str(k) for k in range(4)])
    return Evaluator(
        task, model, None, {"val": loader}, World(), autocast_of(hardware, torch.device("cpu")), asked, 0
    )


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = create_model("resnet20", norm="bn", num_classes=4)
    for norm in model.modules():
        if hasattr(norm, "running_mean"):
            norm.running_mean.normal_(0, 0.1)
    return model.eval()


def test_the_answers_are_those_of_the_batches_by_hand(network, val):
    result = evaluator(network, val, "batch", size=32)()[Pair("val", "batch")]
    assert result.images == 101 and result.batches == "batches of 32, shuffled by seed 0"
    plain = copy.deepcopy(network)
    for norm in plain.modules():
        if hasattr(norm, "eval_stats"):
            norm.eval_stats = "batch"
    expected = torch.zeros(101, dtype=torch.int64)
    for indices, count in Batches(32).indices(val):
        fetched = val.fetch(indices.tolist(), None)
        batch = val.finish(fetched, torch.device("cpu"), torch.contiguous_format)
        with torch.no_grad():
            expected[indices[:count]] = plain(batch.inputs).argmax(1)[:count]
    assert result.rows["predicted"].tolist() == expected.tolist()
    assert result.rows["index"].tolist() == list(range(101))


def test_the_answers_are_the_same_for_any_number_of_processes(network, val):
    one = evaluator(network, val, "batch")()[Pair("val", "batch")].rows
    for rank in range(3):
        part = evaluator(network, val, "batch", rank=rank, world=3)()[Pair("val", "batch")].rows
        for name in ("predicted", "confidence", "label"):
            assert part[name].tolist() == one[name][part["index"]].tolist()


def test_running_statistics_are_read_in_the_order_of_the_set(network, val):
    found = evaluator(network, val, "running")
    assert found()[Pair("val", "running")].batches == ""
    assert found.dependence() == {"running": 0.0}


def test_a_network_whose_answers_depend_on_the_batch_is_found(val):
    torch.manual_seed(0)
    released = create_model("resnet20", norm="afn_as_released", num_classes=4)
    found = evaluator(released, val, ["running", "batch"])
    assert set(found.dependence()) == {"running", "batch"} and min(found.dependence().values()) > 0.01
    assert "depends on the others in its batch" in dependence_warning(found.dependence())
    result = found()[Pair("val", "running")]
    assert result.batches == "batches of 8, shuffled by seed 0"
    assert torch.equal(
        torch.as_tensor(result.rows["predicted"]),
        torch.as_tensor(found()[Pair("val", "batch")].rows["predicted"]),
    )
    asked = evaluator(create_model("resnet20", norm="bn", num_classes=4), val, "batch").dependence()
    assert asked["batch"] > 0.01 and dependence_warning(asked) == ""


def test_a_run_says_that_its_answers_depend_on_the_batch(tmp_path, capsys):
    small = [*SMALL, "data.val_images=50", "epochs=1"]
    assert train(*small, "norm=afn_as_released", f"run_dir={tmp_path / 'afn'}") == 0
    out = capsys.readouterr().out
    assert "warning: the network's answer for an image depends on the others in its batch" in out
    assert events(tmp_path / "afn", "eval")[-1]["batches"] == "batches of 8, shuffled by seed 0"
    assert events(tmp_path / "afn", "final")[-1]["batch_dependence"]["running"] > 0.01
    assert (
        script("tools/validate.py").main(
            [str(tmp_path / "afn"), "--batch-sizes", "8,50", "--orders", "shuffled,classes"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    top1 = events(tmp_path / "afn", "final")[-1]["top1"]
    assert lines[1] == f"running statistics (batches of 8, shuffled by seed 0): {top1:.2f} %"
    assert lines[2] == f"batch statistics (batches of 8, shuffled by seed 0): {top1:.2f} %"
    assert [line.split(":")[0] for line in lines[3:]] == [
        "batch statistics (batches of 8, by class)",
        "batch statistics (batches of 50, shuffled by seed 0)",
        "batch statistics (batches of 50, by class)",
    ]
    # one batch of all images is the same in any order, but for the order of sums
    assert lines[4].split(": ")[1] == lines[5].split(": ")[1]
    for wrong, words in (
        (["--batch-sizes", "8,x"], "whole numbers above 0"),
        (["--orders", "random"], "eval.order=random"),
    ):
        assert script("tools/validate.py").main([str(tmp_path / "afn"), *wrong]) == 2
        assert words in capsys.readouterr().err


def test_others_can_be_evaluated_after_the_last_epoch_alone(tmp_path):
    arguments = [*SMALL, "eval.stats=[running,batch]", "eval.others=last"]
    assert train(*arguments, f"run_dir={tmp_path / 'run'}") == 0
    found = [(e["epoch"], e["stats"]) for e in events(tmp_path / "run", "eval")]
    assert found == [(1, "running"), (2, "running"), (2, "batch")]


def test_order_and_seed_are_of_a_run_only_where_batches_matter():
    import dataclasses

    from anorm.config.settings import settings_from

    def signed(**asked):
        config = dataclasses.asdict(settings_from({"eval": asked})) | {
            n: {"name": n} for n in ("arch", "norm", "data")
        }
        return signature(config, "data", 1)

    assert {"eval.order", "eval.seed", "eval.others"} <= set(EXCLUDED)
    assert signed(seed=1) == signed(order="classes") == signed(others="last") == signed()
    assert (
        len({signed(stats="batch"), signed(stats="batch", seed=1), signed(stats="batch", order="classes")})
        == 3
    )


@pytest.mark.slow
def test_two_processes_that_are_cut_evaluate_every_set_and_statistics_bit_for_bit(tmp_path):
    """The last evaluation is of the same batches, whatever the process that had them."""
    import numpy

    two = [
        *SMALL,
        "hardware.processes=2",
        "eval.stats=[running,batch]",
        "checkpoint.every_steps=1",
        "checkpoint.keep=20",
    ]
    assert run_train(*two, f"run_dir={tmp_path / 'run'}")[0] == 0
    cut = cut_at(tmp_path / "run", 6, tmp_path / "cut")
    status, out, err = run_train(*two, f"run_dir={cut}")
    assert status == 0 and "continuing at step 6" in out, err
    for name in ("predictions.npz", "predictions-val-batch.npz"):
        one, other = numpy.load(tmp_path / "run" / name), numpy.load(cut / name)
        assert all(numpy.array_equal(one[key], other[key]) for key in one)
    # one process, on the weights of two
    found = script("tools/validate.py").main([str(cut), "hardware.processes=1"])
    assert found == 0


def test_dependence_is_probed_in_batches_that_evaluation_uses(val):
    """A larger one might not fit the device, at the end of a run."""
    seen = []

    class Watching(torch.nn.Module):
        def forward(self, images):
            seen.append(len(images))
            return images.mean((2, 3))

    for size in (1, 6, 64):
        batch_dependence(Classification(["a", "b", "c"]), Watching(), EvalLoader(val, size), nullcontext)
    assert seen == [6, 6, 32, 32]

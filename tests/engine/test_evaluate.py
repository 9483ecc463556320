"""Evaluation, and the statistics it uses."""

from contextlib import nullcontext

import pytest
import torch
from commands import ROOT, SMALL
from torch import nn

from anorm import create_model, create_norm
from anorm.build import evaluator
from anorm.config.frozen import Config
from anorm.data.sources.base import Batch
from anorm.engine.evaluate import Pair, evaluate
from anorm.engine.statistics import check_statistics, statistics_from
from anorm.processes.world import World
from anorm.tasks.classification import Classification


class Batches(list):
    """What an EvalLoader yields, without its data set."""

    dataset = None


def batches_of(images, labels, size=5):
    whole = range(0, len(images), size)
    indices = torch.arange(len(images))
    return Batches(Batch(images[i : i + size], labels[i : i + size], indices[i : i + size]) for i in whole)


TASK = Classification([f"class {k}" for k in range(7)])


def test_evaluation_counts_every_image_once_and_its_columns_agree():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)).double()
    images, labels = torch.randn(23, 3, 2, 2, dtype=torch.float64), torch.randint(7, (23,))
    result = evaluate(TASK, model, batches_of(images, labels), World(), nullcontext)
    logits = model(images)
    five = logits.topk(5).indices == labels[:, None]
    right = logits.argmax(1) == labels
    assert result.images == 23
    assert result.values["top1"] == pytest.approx(100 * right.double().mean().item())
    assert result.values["top5"] == pytest.approx(100 * five.any(1).double().mean().item())
    assert result.values["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-12)
    rows = {name: torch.as_tensor(column) for name, column in result.rows.items()}
    assert torch.equal(rows["index"], torch.arange(23)) and torch.equal(rows["top1"], right)
    assert torch.equal(rows["label"], labels) and torch.equal(rows["predicted"], logits.argmax(1))
    torch.testing.assert_close(rows["confidence"], logits.softmax(1).amax(1))


def test_processes_put_their_rows_into_the_order_of_the_data_set():
    """Another process had the other batches, or none: sums are added, rows are ordered by their index."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)).double()
    images, labels = torch.randn(23, 3, 2, 2, dtype=torch.float64), torch.randint(7, (23,))
    whole = batches_of(images, labels)
    parts = []

    class Collecting(World):
        def sum(self, sums):
            parts.append(sums)

        def gather(self, rows):
            parts.append(rows)
            return [rows]

    class Joining(World):
        def sum(self, sums):
            sums += sum(parts[0::2])

        def gather(self, rows):
            return [rows, *parts[1::2]]

    evaluate(TASK, model, Batches(whole[1::2]), Collecting(), nullcontext)
    with pytest.raises(ValueError, match="no images"):
        evaluate(TASK, model, Batches(), Collecting(), nullcontext)
    found = evaluate(TASK, model, Batches(whole[0::2]), Joining(), nullcontext)
    alone = evaluate(TASK, model, whole, World(), nullcontext)
    assert found.images == 23 and found.values == pytest.approx(alone.values, rel=1e-12)
    for name, column in alone.rows.items():
        assert column.dtype == found.rows[name].dtype and (column == found.rows[name]).all(), name


def test_an_evaluation_tunes_nothing_and_puts_back_what_it_finds(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            seen.append((torch.backends.cudnn.benchmark, self.training))
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), Watching(12, 7)).train()
    batches = batches_of(torch.randn(4, 3, 2, 2), torch.randint(7, (4,)))
    evaluate(TASK, model, batches, World(), nullcontext)
    assert seen == [(False, False)] and torch.backends.cudnn.benchmark and model.training


def test_a_data_set_that_loses_an_image_is_noticed():
    from anorm.data import sources
    from anorm.data.loaders import EvalLoader

    val = sources.create("synthetic", image_size=8, val_images=10).val

    class Losing(type(val)):
        def fetch(self, indices, rngs):
            found = super().fetch(indices, rngs)
            return found._replace(images=found.images[1:]) if 7 in indices else found

    val.__class__ = Losing
    with pytest.raises(AssertionError):
        list(EvalLoader(val, 4))


@pytest.mark.parametrize("norm", [["norm=bn"], ["norm=afn", "norm.dropout=0.3"]], ids=lambda n: n[0])
def test_recalibration_takes_so_many_plain_training_batches_and_no_dropout(norm):
    """Repeated, as after a kill, it gives the same: functional dropout is off too, a norm's own is seeded."""
    asked = [
        *SMALL,
        "arch=wrn_16_4",
        "arch.widen=1",
        "arch.dropout=0.5",
        *norm,
        "mix.mixup=0.4",
        "eval.stats=recalibrated",
        "eval.recalibrate_batches=5",
    ]
    found = evaluator(Config.compose(ROOT / "configs", asked).on())
    inputs, counts = [], []
    first = next(m for m in found.model.modules() if hasattr(m, "running_mean"))
    found.model.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    first.register_forward_pre_hook(lambda module, given: counts.append(int(module.num_batches_tracked)))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(found())
    a, b = (one[Pair("val", "recalibrated")] for one in results)
    assert a.values == b.values and (a.rows["confidence"] == b.rows["confidence"]).all()
    assert counts[: len(counts) // 2] == [0, 1, 2, 3, 4, 5, 5, 5]  # 21 images in batches of 8
    plain = [batch.inputs for step in found.train.epoch(found.unused_epoch) for batch in step][:5]
    assert all(torch.equal(a, b) for a, b in zip(inputs[:5], plain, strict=True))
    assert int(first.num_batches_tracked) == 0


def test_torchs_own_norms_are_recalibrated_and_not_passed_over_by_batch_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), create_norm("bn", 3))
    batches = [torch.randn(8, 3, 4, 4) * 2 + 1 for _ in range(3)]

    def recalibrate():
        model.train()
        for batch in batches:
            model(batch)
        model.eval()

    with statistics_from(model, "recalibrated", recalibrate):
        mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
        torch.testing.assert_close(model[0].running_mean, mean)
    assert model[0].momentum == 0.1 and torch.equal(model[0].running_mean, torch.zeros(3))
    check_statistics(model, "recalibrated")
    with pytest.raises(ValueError, match="batch does not reach a BatchNorm2d .*running or recalibrated"):
        check_statistics(model, "batch")
    check_statistics(nn.InstanceNorm2d(3), "batch")  # it tracks nothing
    for stats in ("batch", "recalibrated"):
        check_statistics(create_model("convnet", "afn", 4), stats)
        with pytest.raises(ValueError, match=f"{stats} does not reach an? InstanceNorm2d .*running$"):
            check_statistics(nn.InstanceNorm2d(3, track_running_stats=True), stats)


def test_recalibrated_statistics_are_those_of_the_batches_and_are_put_back():
    model = create_model("convnet", "bn", 4).double()
    norm = next(m for m in model.modules() if hasattr(m, "running_mean"))
    batches = [torch.randn(16, 3, 32, 32, dtype=torch.float64) * 3 for _ in range(4)]
    before = {name: value.clone() for name, value in model.named_buffers()}
    seen = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean((0, 2, 3))))

    def recalibrate():
        model.train()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        model.eval()

    with statistics_from(model, "recalibrated", recalibrate):
        torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))
    hook.remove()
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_every_set_is_evaluated_under_every_statistics():
    asked = [*SMALL, "norm=bn", "eval.stats=[batch,running,recalibrated]", "eval.recalibrate_batches=2"]
    found = evaluator(Config.compose(ROOT / "configs", asked).on())
    found.sets["again"] = found.val
    results = found()
    sources = ("batch", "running", "recalibrated")
    assert list(results) == [Pair(name, source) for source in sources for name in ("val", "again")] == found.pairs
    for source in sources:
        assert results[Pair("val", source)].values == results[Pair("again", source)].values
    assert len({results[Pair("val", source)].values["loss"] for source in sources}) == 3
    for source in sources:  # as each by itself
        alone = evaluator(
            Config.compose(ROOT / "configs", [*asked, f"eval.stats={source}"]).on()
        )
        assert alone()[Pair("val", source)].values == results[Pair("val", source)].values

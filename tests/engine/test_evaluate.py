"""Evaluation, and the statistics it uses."""

from contextlib import nullcontext

import pytest
import torch
from commands import ROOT, SMALL
from torch import nn

from anorm import create_model, create_norm
from anorm.build import evaluator
from anorm.config.complete import accepted, complete, resolve
from anorm.config.compose import compose
from anorm.engine.evaluate import evaluate
from anorm.engine.statistics import check_statistics, statistics_from
from anorm.processes.world import World


def test_evaluation_counts_every_image_once_and_its_columns_agree():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)).double()
    images, labels = torch.randn(23, 3, 2, 2, dtype=torch.float64), torch.randint(7, (23,))
    batches = [
        (images[i : i + 5], labels[i : i + 5], torch.arange(i, min(i + 5, 23))) for i in range(0, 23, 5)
    ]
    result = evaluate(model, batches, World(), nullcontext)
    logits = model(images)
    assert result.images == 23
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert result.top5 == pytest.approx(
        100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    )
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-12)
    assert torch.equal(result.index, torch.arange(23)) and torch.equal(
        result.first, logits.argmax(1) == labels
    )
    assert torch.equal(result.label, labels) and torch.equal(result.predicted, logits.argmax(1))
    torch.testing.assert_close(result.confidence, logits.softmax(1).amax(1))


def test_a_process_without_images_has_columns_of_the_same_types():
    """Columns of all processes are put together: one of another type would change that of the whole."""

    class Two(World):
        """Another process has four images, of which one is right."""

        def sum(self, values):
            values += torch.tensor([1, 4, 2.0, 4], dtype=values.dtype)

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    batch = (torch.randn(4, 3, 2, 2), torch.randint(7, (4,)), torch.arange(4))
    some, none = evaluate(model, [batch], World(), nullcontext), evaluate(model, [], Two(), nullcontext)
    assert (none.images, none.top1, none.top5, none.loss) == (4, 25.0, 100.0, 0.5)
    for name in ("index", "label", "predicted", "first", "among_five", "confidence"):
        assert len(getattr(none, name)) == 0 and getattr(none, name).dtype == getattr(some, name).dtype, name


def test_an_evaluation_tunes_nothing_and_puts_back_what_it_finds(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            seen.append((torch.backends.cudnn.benchmark, self.training))
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), Watching(12, 7)).train()
    evaluate(
        model, [(torch.randn(4, 3, 2, 2), torch.randint(7, (4,)), torch.arange(4))], World(), nullcontext
    )
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
    found = evaluator(resolve(complete(compose(ROOT / "configs", asked, accepted).config)))
    inputs, counts = [], []
    first = next(m for m in found.model.modules() if hasattr(m, "running_mean"))
    found.model.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    first.register_forward_pre_hook(lambda module, given: counts.append(int(module.num_batches_tracked)))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(found())
    assert results[0].loss == results[1].loss and torch.equal(results[0].confidence, results[1].confidence)
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

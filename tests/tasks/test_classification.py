"""What classification reports: accuracies and calibration, against definitions written in another way."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss, top_k_accuracy_score

from anorm.data.sources.base import Batch
from anorm.tasks import find, list_tasks
from anorm.tasks.classification import Classification, calibration_error, mean_class_accuracy

CLASSES = [f"class {k}" for k in range(7)]


def judged(task, logits, labels, batch=16, fill=0):
    """(metrics, rows) of ``logits`` given in batches, as the engine gives them; ``fill``: rows that must not count."""
    judge = task.judge(None)
    for at in range(0, len(labels), batch):
        outputs, targets = logits[at : at + batch], labels[at : at + batch]
        indices = torch.arange(at, at + len(targets))
        judge.add(
            torch.cat([outputs, torch.randn(fill, outputs.shape[1])]),
            Batch(None, torch.cat([targets, torch.zeros(fill, dtype=torch.int64)]), indices),
        )
    sums, rows = judge.done()
    return task.metrics_of(sums, rows), rows


@pytest.fixture
def evaluation():
    draws = torch.Generator().manual_seed(3)
    labels = torch.randint(7, (301,), generator=draws) * (torch.rand(301, generator=draws) < 0.8)  # unequal classes
    logits = torch.randn(301, 7, generator=draws) + 1.5 * torch.nn.functional.one_hot(labels, 7)
    return logits, labels


@pytest.mark.parametrize("fill", [0, 3])
def test_metrics_are_those_of_scikit_learn(evaluation, fill):
    logits, labels = evaluation
    found, rows = judged(Classification(CLASSES), logits, labels, fill=fill)
    scores = logits.double().softmax(1).numpy()
    assert found["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=1))
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5))
    assert found["loss"] == pytest.approx(log_loss(labels, scores), rel=1e-6)  # float32 logits
    assert found["mean_class_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, scores.argmax(1)))
    assert list(found) == list(Classification.metrics)
    assert all(len(column) == len(labels) for column in rows.values())


def test_calibration_error_is_the_sum_over_bins(evaluation):
    logits, labels = evaluation
    found, _ = judged(Classification(CLASSES), logits, labels)
    confidence, predicted = logits.softmax(1).max(1)
    expected = 0.0
    for b in range(15):  # Guo et al. 2017, equation 3
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            accuracy = (predicted == labels)[inside].double().mean()
            expected += inside.double().mean() * (accuracy - confidence[inside].double().mean()).abs()
    assert found["ece"] == pytest.approx(100 * float(expected), rel=1e-6)


def test_calibration_error_by_hand():
    # two images in the bin (12/15, 13/15]: |(1 + 0) - 1.66| / 4; one in (14/15, 1]: |1 - 1| / 4; one at 0.2, bin (2/15, 3/15]
    confidence = np.array([0.82, 0.84, 1.0, 0.2])
    assert calibration_error(confidence, np.array([True, False, True, False])) == pytest.approx((0.66 + 0.2) / 4)


def test_classes_without_images_do_not_count():
    assert mean_class_accuracy(np.array([0, 0, 0, 5]), np.array([True, True, False, False])) == pytest.approx(1 / 3)


def test_two_classes_have_a_top5(evaluation):
    _, labels = evaluation
    found, _ = judged(Classification(["a", "b"]), torch.randn(301, 2), labels % 2)
    assert found["top5"] == 100


def test_a_process_without_images_has_columns_of_the_same_types(evaluation):
    task = Classification(CLASSES)
    _, rows = judged(task, *evaluation)
    sums, none = task.judge(None).done()
    assert sums.tolist() == [0, 0, 0]
    assert {name: (column.dtype, len(column)) for name, column in none.items()} == {
        name: (column.dtype, 0) for name, column in rows.items()
    }


def test_tasks_are_found_by_name():
    assert "classification" in list_tasks()
    assert find("classification") is Classification
    with pytest.raises(ValueError, match="classification"):
        find("clasification")


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_says_what_its_metrics_are(name):
    task = find(name)
    assert task.best in task.metrics and set(task.shown) <= set(task.metrics)
    for metric in task.metrics.values():
        assert metric.heading and metric.unit in ("", "%")
        assert not metric.as_error or (metric.unit == "%" and metric.higher_is_better)

from pathlib import Path

import numpy
import pytest
import torch

from anorm.data.random import stream
from anorm.tasks.mixing import Mixing, Target

LOSS = Path(__file__).parent / "arrays" / "loss.npz"


@pytest.fixture(scope="module")
def reference():
    with numpy.load(LOSS) as saved:
        return {key: torch.from_numpy(saved[key]) for key in saved.files}


def test_label_smoothing_equals_the_reference(reference):
    mixing = Mixing(label_smoothing=0.1)
    loss = mixing.loss(reference["logits"], Target(reference["target"], None, 1.0))
    assert abs(loss.item() - reference["ls_loss"].item()) < 1e-12


def test_mixup_with_label_smoothing_equals_the_reference_with_its_gradient(reference):
    mixing, logits = Mixing(mixup=0.2, label_smoothing=0.1), reference["logits"].clone().requires_grad_()
    target = Target(reference["target"], reference["target"][reference["perm"]], reference["lam"].item())
    loss = mixing.loss(logits, target)
    loss.backward()
    assert abs(loss.item() - reference["ls_mixup_loss"].item()) < 1e-12
    torch.testing.assert_close(logits.grad, reference["ls_mixup_grad"], rtol=0, atol=1e-12)


def test_mixup_mixes_images_and_labels_with_one_weight():
    images, labels = torch.randn(6, 3, 4, 5, dtype=torch.float64), torch.arange(6)
    mixed, target = Mixing(mixup=1.0, num_classes=6).mix(images, labels, stream(0, "mix", 0, 0))
    # labels are positions here
    expected = target.weight * images + (1 - target.weight) * images[target.partners]
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-14)
    assert 0 < target.weight < 1
    assert sorted(target.partners.tolist()) == list(range(6))


def test_cutmix_pastes_one_box_whose_area_is_the_partners_weight():
    images = (
        torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 20, 30).contiguous(memory_format=torch.channels_last)
    )
    kept = images.clone()
    for step in range(20):
        mixed, target = Mixing(cutmix=1.0, num_classes=8).mix(
            images, torch.arange(8), stream(0, "mix", step, 0)
        )
        pasted = (mixed == target.partners.view(8, 1, 1, 1)) & (mixed != images)
        share = pasted.double().mean((1, 2, 3))
        for i in range(8):
            if target.partners[i] != i:
                assert share[i].item() == pytest.approx(1 - target.weight, abs=1e-12)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, kept)  # the given batch is left as it was


def test_cutmix_and_mixup_each_take_half_of_the_steps():
    mixing, images = Mixing(mixup=1.0, cutmix=1.0, num_classes=9), torch.randn(9, 1, 16, 16)
    boxes = 0
    for step in range(200):
        mixed, target = mixing.mix(images, torch.arange(9), stream(0, "mix", step, 0))
        whole = (mixed == images) | (mixed == images[target.partners])
        boxes += bool(whole.all())
    assert 70 <= boxes <= 130  # binomial(200, 1/2): outside with probability 3e-5, and the streams are fixed


def test_the_draw_depends_on_its_stream_alone():
    mixing, images, labels = (
        Mixing(mixup=0.2, cutmix=0.5, num_classes=7),
        torch.randn(7, 3, 6, 6),
        torch.arange(7),
    )
    first = mixing.mix(images, labels, stream(1, "mix", 5, 2))
    torch.manual_seed(123)
    again, other = (mixing.mix(images, labels, stream(1, "mix", *keys)) for keys in ((5, 2), (5, 3)))
    assert torch.equal(first[0], again[0]) and first[1].weight == again[1].weight
    assert not torch.equal(first[0], other[0])


def test_mixup_weight_has_the_beta_distribution():
    mixing, image, label = Mixing(mixup=0.2), torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    weights = torch.tensor([mixing.mix(image, label, stream(0, "mix", i))[1].weight for i in range(4000)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)) = 0.1786; four standard errors of 4,000 draws
    assert abs(weights.mean() - 0.5) < 4 * 0.4226 / 4000**0.5
    assert abs(weights.var() - 0.1786) < 0.012


def test_without_mixing_the_batch_is_handed_through():
    images, labels = torch.randn(2, 3, 4, 4), torch.tensor([1, 0])
    mixed, target = Mixing(label_smoothing=0.1, num_classes=2).mix(images, labels, stream(0, "mix", 0))
    assert mixed is images and target == (labels, None, 1.0)


@pytest.mark.parametrize(
    "options", [{"mixup": -1}, {"cutmix": -0.1}, {"label_smoothing": 1.0}, {"num_classes": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Mixing(**options)

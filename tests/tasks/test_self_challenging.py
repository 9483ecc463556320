"""Self-challenging: what is muted, by hand; one forward; exact resume; two processes."""

import math

import pytest
import torch
from commands import SMALL, cut_at, events, run_train, train, weights
from torch import nn

from anorm import create_model
from anorm.config.settings import Mix
from anorm.data.sources.base import Batch
from anorm.tasks.self_challenging import SelfChallenging, SelfChallengingClassification


class Two(nn.Module):
    """A map as it comes, and a linear head on its mean: the gradient of a logit is its weight / (h w)."""

    def __init__(self, channels, classes):
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward_stages(self, x):
        return {"last": x}

    def forward_head(self, z):
        return self.fc(z.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(x)


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Two(8, 5).double()
    return model, torch.randn(11, 8, 3, 4, dtype=torch.float64), torch.arange(11) % 5


def by_hand(model, z, labels, of_positions, share, variant):
    """One image at a time, with Python's own sorting."""
    w, answers = model.fc.weight.detach(), []
    masks, falls = [], []
    for image, label in zip(z, labels.tolist(), strict=True):
        mask = torch.ones_like(image)
        if variant == "curriculum" and of_positions:
            values = (image * (w[label] / 12)[:, None, None]).sum(0).flatten().tolist()
            for place in sorted(range(12), key=lambda i: -values[i])[: math.ceil(12 / 3)]:
                mask[:, place // 4, place % 4] = 0
        else:
            k = (
                math.ceil(8 / 3.2)
                if variant == "curriculum"
                else sum(w[label] >= torch.quantile(w[label], 2 / 3))
            )
            for channel in sorted(range(8), key=lambda c: -w[label, c].item())[: int(k)]:
                mask[channel] = 0
        probabilities = [model.fc(m.mean((1, 2))).softmax(0)[label].item() for m in (image, image * mask)]
        masks.append(mask)
        falls.append(probabilities[0] - probabilities[1])
    if variant == "curriculum":
        chosen = sorted(range(11), key=lambda i: -falls[i])[: round(11 * share)]
        chosen = [i for i in chosen if falls[i] > 1e-4]
    else:
        chosen = [
            i for i in range(11) if falls[i] >= torch.quantile(torch.tensor(falls), 1 - share).item() - 1e-12
        ]
    for i in range(11):
        kept = masks[i] if i in chosen else torch.ones_like(masks[i])
        answers.append(model.fc((z[i] * kept).mean((1, 2))))
    return torch.stack(answers), len(chosen)


@pytest.mark.parametrize("variant", ["curriculum", "domainbed"])
@pytest.mark.parametrize("of_positions", [True, False])
def test_what_is_muted_is_what_the_equations_say(case, variant, of_positions):
    model, z, labels = case
    share = 0.5 if variant == "curriculum" else 1 / 3
    network = SelfChallenging(model, variant, 1 / 3, 1 / 3.2 if variant == "curriculum" else 1 / 3).train()
    found = network(z, labels, of_positions, share)
    expected, chosen = by_hand(model, z, labels, of_positions, share, variant)
    assert chosen >= 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # probabilities are compared in float32
    assert not torch.allclose(found, model(z))


def test_the_mask_is_a_constant_of_the_backward_pass(case):
    """The gradient is that of head(z mask) with the mask fixed."""
    model, z, labels = case
    network = SelfChallenging(model, "curriculum", 1 / 3, 1 / 3.2).train()
    z.requires_grad_()
    network(z, labels, True, 0.5).square().sum().backward()
    found, own = z.grad.clone(), model.fc.weight.grad.clone()
    mask = network.mask(z.detach().clone(), model.forward_head, labels, True, 0.5)
    z.grad, model.fc.weight.grad = None, None
    model.forward_head(z * mask).square().sum().backward()
    torch.testing.assert_close(found, z.grad)
    torch.testing.assert_close(own, model.fc.weight.grad)


def test_statistics_are_taken_once_and_modes_are_kept():
    torch.manual_seed(0)
    model = create_model("resnet20", norm="bn", num_classes=4).train()
    model.layer1[0].bn1.eval()
    SelfChallenging(model, "curriculum", 1 / 3, 1 / 3.2)(
        torch.randn(4, 3, 16, 16), torch.arange(4), True, 0.5
    )
    assert model.bn1.num_batches_tracked == 1 and model.training and model.layer3[0].bn2.training
    assert not model.layer1[0].bn1.training


@pytest.mark.parametrize("arch", ["resnet18", "resnet20", "wrn_16_4", "vgg13"])
def test_networks_are_two_parts_that_make_one(arch):
    torch.manual_seed(0)
    model = create_model(arch, norm="bn", num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model.forward_head(list(model.forward_stages(x).values())[-1]))


def test_the_share_grows_with_the_epochs_and_draws_come_from_the_stream():
    task = SelfChallengingClassification(["a", "b"], flip_copies=True)
    shares = []
    for epoch in (0, 9, 10, 19, 20, 99):
        task.begin(epoch)
        shares.append(task.share)
    assert shares == pytest.approx([0.3, 0.3, 0.5, 0.5, 0.7, 1.0])
    batch = Batch(torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 0]), torch.arange(3))
    draws = []
    for seed in range(40):
        (images, labels, of_positions, share), target = task.prepare(
            batch, torch.Generator().manual_seed(seed)
        )
        draws.append(of_positions)
    assert torch.equal(images, torch.cat([batch.inputs, batch.inputs.flip(-1)]))
    assert labels.tolist() == [0, 1, 0, 0, 1, 0] and torch.equal(target.labels, labels)
    assert 8 < sum(draws) < 32  # of 40 with probability 1/2: beyond 3.8 standard deviations otherwise


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mix": Mix(mixup=0.2)}, "set mix.mixup=0 mix.cutmix=0"),
        ({"variant": "old"}, "task.variant=old is unknown"),
        ({"images": 1.0}, "task.images=1.0 must lie between 0 and 1"),
        ({"drop_channels": 0.0}, "task.drop_channels"),
        ({"images_epochs": 0}, "task.images_epochs=0"),
    ],
)
def test_impossible_options_are_said(options, words):
    with pytest.raises(ValueError, match=words):
        SelfChallengingClassification(["a", "b"], **options)


def test_a_network_of_one_part_is_refused():
    with pytest.raises(ValueError, match="forward_stages and forward_head, which ConvNet is not"):
        SelfChallenging(create_model("convnet", num_classes=4), "curriculum", 1 / 3, 1 / 3)


RSC = [
    *SMALL,
    "task=self_challenging",
    "task.images_epochs=1",
    "task.flip_copies=true",
    "epochs=3",
    "log.every=1",
    "checkpoint.every_steps=1",
    "checkpoint.keep=20",
]


def same(a, b):
    one, other = weights(a)["model"], weights(b)["model"]
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [e["loss"] for e in events(a, "train")] == [e["loss"] for e in events(b, "train")]


def test_a_run_that_is_cut_continues_exactly_and_its_checkpoint_is_the_plain_networks(tmp_path):
    assert train(*RSC, f"run_dir={tmp_path / 'run'}") == 0
    cut = cut_at(tmp_path / "run", 6, tmp_path / "cut")  # in the second epoch, of another share
    assert train(*RSC, f"run_dir={cut}") == 0
    same(tmp_path / "run", cut)
    plain = create_model("resnet20", norm="bn", num_classes=4)
    plain.load_state_dict(weights(cut)["model"])
    assert events(cut, "eval")[-1]["images"] == 21


@pytest.mark.slow
def test_two_processes_continue_bit_for_bit(tmp_path):
    two = [*RSC, "hardware.processes=2"]
    assert run_train(*two, f"run_dir={tmp_path / 'run'}")[0] == 0
    cut = cut_at(tmp_path / "run", 6, tmp_path / "cut")
    status, out, err = run_train(*two, f"run_dir={cut}")
    assert status == 0 and "continuing at step 6" in out, err
    same(tmp_path / "run", cut)


def test_it_trains_in_double_precision(tmp_path):
    """It calls the network's two parts and not the network, whose hook would double the images."""
    assert train(*SMALL, "task=self_challenging", "hardware.dtype=fp64", f"run_dir={tmp_path}") == 0
    assert weights(tmp_path)["model"]["conv1.weight"].dtype == torch.float64

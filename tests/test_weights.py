"""Files of weights: every format finds its place, and what does not fit, is damaged or carries code is refused."""

import argparse
import os
import pickle
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision

import anorm
from anorm.weights import distance_from_bn, load_weights, read_state


def small(norm="bn", **options):
    """A quarter-width MobileNetV2 that answers like a fixed function of its weights."""
    return anorm.create_model(
        "mobilenetv2", norm, **{"num_classes": 5, "width_mult": 0.25, "dropout": 0.0} | options
    )


def shaken(model):
    """Every tensor of the state away from its initial value, so that a tensor left out shows."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if value.dim() == 1 else torch.randn_like(value) * 0.1)
        else:
            value.fill_(7)
    return model


def logits(model, size=64):
    with torch.no_grad():
        x = torch.linspace(-1, 1, 2 * 3 * size * size, dtype=torch.double).view(2, 3, size, size)
        return model.double().eval()(x)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(state, other):
    return (
        all(torch.equal(value, other[name]) for name, value in state.items()) and state.keys() == other.keys()
    )


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- formats that hold our own names ----


@pytest.mark.parametrize("norm", [name for name in anorm.list_norms() if name != "module"])
def test_round_trip_of_every_norm(norm, tmp_path):
    model = shaken(small(norm))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    for file in ("a.pth", "a.safetensors"):
        other = small(norm)
        report = load_weights(other, tmp_path / file)
        assert report.complete and report.loaded == len(model.state_dict()) and not report.new_head
        assert same(other.state_dict(), model.state_dict())


def test_safetensors_is_recognised_by_content(tmp_path):
    model = shaken(small())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.bin")
    assert same(read_state(tmp_path / "weights.bin"), model.state_dict())


def test_files_of_the_format_before_zip(tmp_path):
    model = shaken(small())
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_state(tmp_path / "old.pth"), model.state_dict())


@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict"])
def test_checkpoint_entries(entry, tmp_path):
    model, average = shaken(small()), shaken(small())
    torch.save({"step": 3, entry: model.state_dict(), "ema": average.state_dict()}, tmp_path / "last.ckpt")
    other = small()
    load_weights(other, tmp_path / "last.ckpt")
    assert same(other.state_dict(), model.state_dict())
    load_weights(other, tmp_path / "last.ckpt", entry="ema")
    assert same(other.state_dict(), average.state_dict())
    with pytest.raises(ValueError, match="no weights under 'step'"):
        load_weights(other, tmp_path / "last.ckpt", entry="step")


def test_checkpoints_with_the_arguments_of_a_script(tmp_path):
    model = shaken(small())
    torch.save({"args": argparse.Namespace(lr=0.1), "state_dict": model.state_dict()}, tmp_path / "a.pth")
    assert same(read_state(tmp_path / "a.pth"), model.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.network.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix, tmp_path):
    model, other = shaken(small("an")), small("an")
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "a.pth")
    load_weights(other, tmp_path / "a.pth")
    assert same(other.state_dict(), model.state_dict())


def test_half_precision_files_are_widened(tmp_path):
    model, other = shaken(small()).half(), small()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    load_weights(other, tmp_path / "a.pth")
    assert same(other.state_dict(), model.float().state_dict())


def test_files_without_counters(tmp_path):
    """Before torch 0.4.1 batch norms counted nothing."""
    model, other = shaken(small()), small()
    state = {
        name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "a.pth")
    assert load_weights(other, tmp_path / "a.pth").complete
    assert same({name: other.state_dict()[name] for name in state}, state)


# ---- other libraries ----


@pytest.mark.parametrize(
    "arch, theirs",
    [("resnet18", "resnet18"), ("densenet121", "densenet121"), ("mobilenetv2", "mobilenet_v2")],
)
def test_torchvision(arch, theirs, tmp_path):
    reference = shaken(torchvision.models.get_model(theirs))
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    model = anorm.create_model(arch)
    assert load_weights(model, tmp_path / "a.pth").complete
    torch.testing.assert_close(
        logits(model), logits(reference), rtol=1e-9, atol=1e-9 * logits(reference).abs().max()
    )


def test_first_names_of_torchvisions_densenet(tmp_path):
    """Its downloadable weights still say norm.1 for norm1."""
    model, other = shaken(anorm.create_model("densenet121")), anorm.create_model("densenet121")
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): v
        for name, v in model.state_dict().items()
    }
    assert any(".norm.1." in name for name in old)
    torch.save(old, tmp_path / "a.pth")
    assert "first names" in load_weights(other, tmp_path / "a.pth").style
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "arch, theirs, options",
    [
        ("resnet18", "resnet18", {}),
        ("resnet50", "resnet50", {}),
        ("densenet121", "densenet121", {}),
        ("mobilenetv2", "mobilenetv2_100", {}),
        ("mobilenetv2", "mobilenetv2_050", {"width_mult": 0.5}),
    ],
)
def test_timm(arch, theirs, options, tmp_path):
    reference = shaken(timm.create_model(theirs, pretrained=False))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "model.safetensors")
    model = anorm.create_model(arch, **options)
    assert load_weights(model, tmp_path / "model.safetensors").complete
    torch.testing.assert_close(
        logits(model), logits(reference), rtol=1e-9, atol=1e-9 * logits(reference).abs().max()
    )


def test_timms_deep_stem_is_another_function(tmp_path):
    """timm's resnet50d pools 3x3 behind its stem, ours 2x2: equal shapes must not pass for equal networks."""
    torch.save(timm.create_model("resnet50d").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="layer1.0.downsample"):
        load_weights(anorm.create_model("resnet50", stem="deep", shortcut="avgpool"), tmp_path / "a.pth")


# ---- what does not fit ----


def test_partial_match_is_refused_and_copies_nothing(tmp_path):
    model = shaken(small())
    before = snapshot(model)
    state = small().state_dict()
    del state["features.3.conv.0.0.weight"]
    state["extra.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="nothing was loaded") as refused:
        load_weights(model, tmp_path / "a.pth")
    assert "missing in the file (1): features.3.conv.0.0.weight" in str(refused.value)
    assert "without a place here (1): extra.weight" in str(refused.value)
    assert same(model.state_dict(), before)
    report = load_weights(model, tmp_path / "a.pth", strict=False)
    assert (report.missing, report.unexpected) == (["features.3.conv.0.0.weight"], ["extra.weight"])
    assert torch.equal(model.state_dict()["features.0.0.weight"], state["features.0.0.weight"])
    assert torch.equal(model.state_dict()["features.3.conv.0.0.weight"], before["features.3.conv.0.0.weight"])


def test_plain_weights_do_not_pass_for_attentive_ones(tmp_path):
    torch.save(small("bn").state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"other shapes \(34\): features.1.conv.0.1.weight \(8,\) for \(5, 8\)"
    ):
        load_weights(small("an"), tmp_path / "a.pth")


def test_plain_weights_under_squeeze_excite(tmp_path):
    """A BN network's norms find their place inside SE; the gates are missing, and are named."""
    plain, model = shaken(small("bn")), small("se")
    torch.save(plain.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"missing in the file \(34\): features.1.conv.2.fc1.weight"):
        load_weights(model, tmp_path / "a.pth")
    report = load_weights(model, tmp_path / "a.pth", strict=False)
    assert not report.unexpected and all(".fc" in name for name in report.missing)
    inner, outer = model.state_dict(), plain.state_dict()
    assert torch.equal(inner["features.1.conv.2.base.running_var"], outer["features.1.conv.2.running_var"])


def test_another_number_of_classes(tmp_path):
    many, few = shaken(small(num_classes=9)), shaken(small(num_classes=5))
    head = {name: value for name, value in snapshot(few).items() if name.startswith("classifier")}
    torch.save(many.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"classifier.1.weight \(9, 1280\) for \(5, 1280\)"):
        load_weights(few, tmp_path / "a.pth")
    report = load_weights(few, tmp_path / "a.pth", head="replace")
    assert report.new_head and "the classifier is new" in str(report)
    state = few.state_dict()
    assert same({name: state[name] for name in head}, head)
    assert all(
        torch.equal(state[name], value) for name, value in many.state_dict().items() if name not in head
    )


def test_replaced_head_is_taken_where_it_fits(tmp_path):
    model, other = shaken(small()), small()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert not load_weights(other, tmp_path / "a.pth", head="replace").new_head
    assert same(other.state_dict(), model.state_dict())
    torch.save(
        {n: v for n, v in model.state_dict().items() if "classifier" not in n}, tmp_path / "headless.pth"
    )
    assert load_weights(other, tmp_path / "headless.pth", head="replace").new_head
    with pytest.raises(ValueError, match="'match' nor 'replace'"):
        load_weights(other, tmp_path / "a.pth", head="new")


def test_replacing_the_head_forgives_nothing_else(tmp_path):
    state = small(num_classes=9).state_dict()
    del state["features.0.0.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="features.0.0.weight"):
        load_weights(small(), tmp_path / "a.pth", head="replace")


def test_one_gate_with_two_places_is_refused(tmp_path):
    """The published "se" of a block names no norm: it must be clear from the network which one it belongs to."""
    with torch.device("meta"):
        model = anorm.create_model("resnet50", {"name": "se", "place": [1, 2], "reduction": 4})
    one = anorm.create_model("resnet50", {"name": "se", "place": 2})
    published = {}
    for name, value in one.state_dict().items():
        name = name.replace("bn2.base.", "bn2.").replace("bn2.fc1", "se.fc.0").replace("bn2.fc2", "se.fc.2")
        published[name] = value
    torch.save(published, tmp_path / "a.pth")
    assert load_weights(one, tmp_path / "a.pth").complete
    with pytest.raises(ValueError, match="without a place here .*se.fc.0"):
        load_weights(model, tmp_path / "a.pth")


def test_weights_of_something_else(tmp_path):
    torch.save({"a": torch.zeros(3), "b": torch.zeros(4)}, tmp_path / "a.pth")
    for strict in (True, False):
        with pytest.raises(ValueError, match="does not fit this network"):
            load_weights(small(), tmp_path / "a.pth", strict=strict)


# ---- damaged and malicious files ----


def damaged_files(folder):
    state = small().state_dict()
    torch.save(state, folder / "whole.pth")
    safetensors.torch.save_file(state, folder / "whole.safetensors")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("whole.pth", "whole.safetensors", "legacy.pth"):
        content = (folder / name).read_bytes()
        yield f"cut_{name}", content[: len(content) // 2]
    yield "empty.pth", b""
    yield "empty.safetensors", b""
    yield "text.pth", b"<html>404 not found</html>"
    yield "noise.pth", bytes(range(256)) * 40


def test_damaged_files_are_refused(tmp_path):
    model = shaken(small())
    before = snapshot(model)
    for name, content in damaged_files(tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*damaged"):
            load_weights(model, tmp_path / name)
    assert same(model.state_dict(), before)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_pickled_code_is_refused_and_does_not_run(zip_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = dict(small().state_dict()) | {"payload": Payload()}
    torch.save(state, "evil.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match="holds Python objects beside tensors, and is refused"):
        load_weights(small(), "evil.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match="refused|damaged"):
        load_weights(small(), "bare.pth")
    assert not (tmp_path / "pwned").exists()


def test_a_pickled_network_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="save its state_dict alone"):
        load_weights(small(), tmp_path / "a.pth")


def test_files_without_weights(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_weights(small(), tmp_path / "none.pth")
    torch.save({"step": 3, "notes": "no weights"}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds a dict of step, notes"):
        load_weights(small(), tmp_path / "a.pth")
    torch.save(torch.zeros(3), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="holds Tensor"):
        load_weights(small(), tmp_path / "b.pth")


# ---- zoos of CIFAR networks; AFN from batch norms ----


def test_cifar_resnets_with_the_head_linear(tmp_path):
    """The names of the two most copied CIFAR repositories: DataParallel's prefix, head linear, shortcut.0 and .1."""
    for option in ("A", "B"):
        model = shaken(anorm.create_model("resnet20", num_classes=10, option=option))
        theirs = {}
        for name, value in model.state_dict().items():
            name = re.sub(r"^fc\.", "linear.", name).replace("downsample.", "shortcut.")
            theirs[f"module.{name}"] = value
        torch.save({"best_prec1": 91.7, "state_dict": theirs}, tmp_path / "a.th")
        other = anorm.create_model("resnet20", num_classes=10, option=option)
        assert load_weights(other, tmp_path / "a.th").complete
        assert same(other.state_dict(), model.state_dict())


WIDE = {
    "block1.layer.0": [
        (r"^layer(\d)\.(\d+)\.shortcut\.", r"block\1.layer.\2.convShortcut."),
        (r"^layer(\d)\.(\d+)\.", r"block\1.layer.\2."),
        (r"^bn\.", "bn1."),
    ],
    "group0.block0": [
        (r"^layer1\.(\d+)\.", r"group0.block\1."),
        (r"^layer2\.(\d+)\.", r"group1.block\1."),
        (r"^layer3\.(\d+)\.", r"group2.block\1."),
        (r"^(group.*)\.(bn|conv)1", r"\1.\g<2>0"),
        (r"^(group.*)\.(bn|conv)2", r"\1.\g<2>1"),
        (r"^(group.*)\.shortcut", r"\1.convdim"),
        (r"^conv1\.", "conv0."),
        (r"^(.*conv(?:\d|dim))\.weight$", r"\1"),
    ],
}


@pytest.mark.parametrize("zoo", WIDE)
def test_wide_resnets_of_the_zoos(zoo, tmp_path):
    model, other = (anorm.create_model("wrn_16_4", num_classes=10) for _ in range(2))
    theirs = {}
    for name, value in shaken(model).state_dict().items():
        for pattern, replacement in WIDE[zoo]:
            name = re.sub(pattern, replacement, name)
        theirs[name] = value
    assert not any(name.startswith("layer") for name in theirs) and len(theirs) == len(model.state_dict())
    torch.save(theirs, tmp_path / "a.pth")
    report = load_weights(other, tmp_path / "a.pth")
    assert report.complete and "wide ResNet" in report.style
    assert same(other.state_dict(), model.state_dict())


def test_vgg_of_the_zoos_whose_convolutions_have_biases(tmp_path):
    """A bias in front of a batch norm is its running mean, smaller by it: the same function."""
    layers = []
    inputs = 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
        if width == "M":
            layers.append(torch.nn.MaxPool2d(2))
        else:
            conv = torch.nn.Conv2d(inputs, width, 3, padding=1)
            layers += [conv, torch.nn.BatchNorm2d(width), torch.nn.ReLU(inplace=True)]
            inputs = width
    theirs = torch.nn.Sequential()
    theirs.features = torch.nn.Sequential(*layers, torch.nn.AvgPool2d(1))
    theirs.flatten = torch.nn.Flatten()
    theirs.classifier = torch.nn.Linear(512, 10)
    torch.save({"net": shaken(theirs).state_dict()}, tmp_path / "a.pth")
    model = anorm.create_model("vgg13", num_classes=10)
    assert load_weights(model, tmp_path / "a.pth").complete
    expected = logits(theirs, 32)
    torch.testing.assert_close(logits(model, 32), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("norm", ["afn", "afn_as_released", "afn_identity"])
def test_afn_starts_from_batch_norms(norm, tmp_path):
    plain = shaken(small("bn"))
    torch.save(plain.state_dict(), tmp_path / "a.pth")
    model = small({"name": norm, "eval_stats": "running"})
    report = load_weights(model, tmp_path / "a.pth")
    norms = [name for name, m in model.named_modules() if hasattr(m, "adapt")]
    assert report.complete and report.carried == norms
    assert f"{len(norms)} norms keep gamma, beta and statistics" in str(report)
    state, kept = model.state_dict(), plain.state_dict()
    assert same({name: state[name] for name in kept}, kept)

    images = torch.randn(8, 3, 64, 64, dtype=torch.double)
    model, plain = model.double().train(), plain.double().eval()
    modes, before = [(m, m.training) for m in model.modules()], snapshot(model)
    moved, agree = distance_from_bn(model, images)
    assert [(m, m.training) for m in model.modules()] == modes and same(model.state_dict(), before)
    with torch.no_grad():
        own, theirs = model.eval()(images), plain(images)
    assert moved == pytest.approx(float((own - theirs).square().mean().sqrt() / theirs.std()), rel=1e-6)
    assert agree == float((own.argmax(1) == theirs.argmax(1)).double().mean())
    assert (moved < 1e-9) == (norm == "afn_identity")


def test_afn_from_a_file_that_lacks_more_is_refused(tmp_path):
    state = small("afn").state_dict()
    first = next(name for name in state if ".adapt." in name)
    del state[first]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"missing in the file \(1\): {re.escape(first)}"):
        load_weights(small("afn"), tmp_path / "a.pth")


# ---- the classifier ----


@pytest.mark.parametrize("arch", ["dla34", "resnet18", "efficientnet_b0"])
def test_the_head_is_what_timm_calls_it(arch, tmp_path):
    """dla34 ends in a convolution, and an AN holds linear layers."""
    torch.save(timm.create_model(arch, num_classes=9).state_dict(), tmp_path / "a.pth")
    model = timm.create_model(arch, num_classes=5)
    word = model.default_cfg["classifier"]
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(f"{word}.")}
    assert load_weights(model, tmp_path / "a.pth", head="replace").new_head
    assert before and same({name: model.state_dict()[name] for name in before}, before)


def test_the_head_is_never_an_attention(tmp_path):
    def network(classes, *more):
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, classes, 1), *more)

    torch.save(network(9).state_dict(), tmp_path / "a.pth")
    model = network(5, anorm.create_norm("an", 5))
    with pytest.raises(ValueError, match="2.attention.fc.weight") as refused:
        load_weights(model, tmp_path / "a.pth", head="replace")
    assert "head='replace'" not in str(refused.value)  # which was given
    assert load_weights(model, tmp_path / "a.pth", head="replace", strict=False).new_head

"""What holds between the laws, and between each law and plain autograd: no stored numbers."""

import pytest
import torch
from torch import nn

import anorm
from anorm import ops

OPTIONS = {
    "an": {"k": 3},
    "an_gn": {"k": 3},
    "module": {"target": "torch.nn.BatchNorm2d"},
    "afn_as_released": {"dropout": 0.0},  # a random function has no numerical gradient
}
NORMS = anorm.list_norms()
C = 6


def make(name, act=None, **options):
    torch.manual_seed(0)
    layer = anorm.create_norm(name, C, act=act, **(OPTIONS.get(name, {}) | options)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def both(layers, shape=(4, C, 5, 3), dtype=torch.double, **close):
    """Outputs and input gradients of two layers on the same x and random dy agree."""
    torch.manual_seed(1)
    x, dy = torch.randn(2, *shape, dtype=dtype)
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        results.append((y, leaf.grad))
    torch.testing.assert_close(*results, **close)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("act, with_residual", [(None, False), ("relu", True)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(name, act, with_residual, training, backend):
    layer = make(name, act).train(training)
    torch.manual_seed(2)
    maps = [torch.randn(3, C, 3, 2, dtype=torch.double, requires_grad=True) for _ in range(1 + with_residual)]
    parameters = dict(layer.named_parameters())

    def function(*values):
        call = dict(zip(parameters, values[len(maps) :], strict=True))
        return torch.func.functional_call(layer, call, values[: len(maps)])

    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(function, (*maps, *parameters.values()))


CASES = [(name, {}) for name in NORMS] + [
    ("se", {"bias": True}),
    ("sn", {"variance": "biased"}),
    ("sn", {"affine": False}),
]


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("name, options", CASES)
def test_the_compiled_backend_computes_the_law_as_it_is_written(name, options, with_residual):
    """Output, every gradient and running statistics in float64; the difference is the order of sums."""
    torch.manual_seed(2)
    x, r, dy = torch.randn(3, 4, C, 5, 3, dtype=torch.double)
    results = []
    for backend in ("reference", "cpu"):
        layer = make(name, "relu", **options)
        leaf, residual = x.clone().requires_grad_(), r.clone().requires_grad_()
        with ops.use_backend(backend):
            y = layer(leaf, residual if with_residual else None)
            y.backward(dy)
        gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        results.append(
            gradients | dict(layer.named_buffers()) | {"y": y, "dx": leaf.grad, "dr": residual.grad}
        )
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        torch.testing.assert_close(
            results[1][key], value, rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_gradients_with_a_graph_where_the_input_depends_on_the_layer():
    """A layer used twice, with a hook between: what lies before x is differentiated once, with a graph as without."""
    torch.manual_seed(2)
    x, dy = torch.randn(2, 4, C, 3, 2, dtype=torch.double)
    found = []
    for create_graph in (False, True):
        layer = make("bn")
        between = layer(x).tanh()
        between.register_hook(lambda g: 2 * g)
        with ops.use_backend("cpu"):
            found.append(
                torch.autograd.grad(layer(between), [*layer.parameters()], dy, create_graph=create_graph)
            )
    torch.testing.assert_close(found[1], found[0])


def test_gradients_with_a_graph_of_the_residual_alone():
    layer = make("bn", "relu", affine=False)
    x, r, dy = torch.randn(3, 4, C, 3, 2, dtype=torch.double)
    with ops.use_backend("cpu"):
        y = layer(x, r.requires_grad_())
        (dr,) = torch.autograd.grad(y, r, dy, create_graph=True)
    torch.testing.assert_close(dr, torch.where(y > 0, dy, 0.0))


def test_the_shares_of_a_half_precision_model_sum_to_one():
    layer = anorm.create_norm("sn", C).bfloat16()
    for share in layer.weights():
        torch.testing.assert_close(share.sum(), torch.tensor(1.0))
    x = 50 + torch.randn(8, C, 5, 3, dtype=torch.float32)
    for backend in ("reference", "cpu"):
        with ops.use_backend(backend):  # shares of a sum of 1.002 would move the mean by a tenth
            assert layer(x).mean().abs() < 1e-3


def test_a_base_norm_keeps_no_affine_of_its_own_by_request():
    with pytest.raises(ValueError, match="up to the law above it"):
        anorm.create_norm("an", C, base={"name": "bn", "affine": False})


@pytest.mark.parametrize("name", ["bn", "gn", "an", "se", "sn"])
@pytest.mark.parametrize("act, with_residual", [("relu", True), ("relu", False), (None, True)])
def test_gradients_of_gradients_on_the_compiled_backend(name, act, with_residual):
    layer = make(name, act)
    torch.manual_seed(2)
    maps = [torch.randn(3, C, 3, 2, dtype=torch.double, requires_grad=True) for _ in range(1 + with_residual)]
    with ops.use_backend("cpu"):
        assert torch.autograd.gradgradcheck(layer, maps, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name, twin",
    [
        ("bn", lambda: nn.BatchNorm2d(C)),
        ("gn", lambda: nn.GroupNorm(6, C)),
        ("ln", lambda: nn.GroupNorm(1, C)),
        ("in", lambda: nn.InstanceNorm2d(C, affine=True)),
    ],
)
def test_equals_torch(name, twin, training):
    own, torchs = make(name), twin().double()
    torchs.load_state_dict(own.state_dict())
    own.train(training), torchs.train(training)
    both((own, torchs))
    for key, value in torchs.state_dict().items():
        torch.testing.assert_close(own.state_dict()[key], value)
    assert list(own.state_dict()) == list(torchs.state_dict())


def test_batch_norm_running_statistics_follow_torch_over_steps():
    own, torchs = anorm.create_norm("bn", C), nn.BatchNorm2d(C)
    for _ in range(5):
        x = 3 * torch.randn(4, C, 5, 5) + 2
        own(x), torchs(x)
    torch.testing.assert_close(own.state_dict(), torchs.state_dict())
    own.reset_running_stats(), torchs.reset_running_stats()
    torch.testing.assert_close(own.state_dict(), torchs.state_dict())


def test_batch_norm_loads_a_checkpoint_without_counter():
    state = nn.BatchNorm2d(C).state_dict()
    del state["num_batches_tracked"]
    assert anorm.create_norm("bn", C).load_state_dict(state).missing_keys == []


@pytest.mark.parametrize("branch, name", list(enumerate(["in", "ln", "bn"])))
@pytest.mark.parametrize("training", [True, False])
def test_one_hot_switchable_is_its_branch(branch, name, training):
    """Softmax of a large gap is one-hot to double precision; with the biased variance the branch is exact."""
    sn, one = make("sn", variance="biased"), make(name)
    with torch.no_grad():
        for weight in (sn.mean_weight, sn.var_weight):
            weight.fill_(-50).index_fill_(0, torch.tensor(branch), 50.0)
        sn.weight.copy_(one.weight), sn.bias.copy_(one.bias)
    if name == "bn":
        with torch.no_grad():
            one.running_mean.copy_(sn.running_mean.normal_())
            one.running_var.copy_(sn.running_var.uniform_(0.5, 2))
    sn.train(training), one.train(training)
    both((sn, one))


def test_switchable_uses_the_official_variances():
    """IN's variance unbiased; LN's and BN's pooled from it (E[v + mu^2] - E[mu]^2); running_var starts at 0."""
    sn = make("sn")
    assert sn.running_var.eq(0).all()
    x = torch.randn(4, C, 5, 3, dtype=torch.double)
    mu, v = x.mean((2, 3)), x.var((2, 3))
    t = v + mu.square()
    stats = [(mu, v)]
    for dim in (1, 0):
        m = mu.mean(dim, keepdim=True)
        stats.append((m.expand_as(mu), (t.mean(dim, keepdim=True) - m.square()).expand_as(v)))
    w_mean, w_var = sn.weights()
    mean = sum(w * m for w, (m, _) in zip(w_mean, stats, strict=True))[..., None, None]
    var = sum(w * s for w, (_, s) in zip(w_var, stats, strict=True))[..., None, None]
    expected = (x - mean) / (var + 1e-5).sqrt() * sn.weight[:, None, None] + sn.bias[:, None, None]
    torch.testing.assert_close(sn(x), expected)
    torch.testing.assert_close(sn.running_var, 0.1 * stats[2][1][0])
    torch.testing.assert_close(sn.running_mean, 0.1 * stats[2][0][0])


def test_switchable_without_batch_norm_has_no_buffers_and_no_batch_dependence():
    sn = make("sn", use_bn=False)
    assert not list(sn.buffers()) and not list(sn.stat_buffers())
    x = torch.randn(4, C, 3, 3, dtype=torch.double)
    torch.testing.assert_close(sn(x)[:1], sn(x[:1]))


def test_layer_norm_is_group_norm_of_one_group_and_instance_norm_of_c():
    for name, groups in (("ln", 1), ("in", C)):
        both((make(name), make("gn", groups=groups)))


def test_squeeze_excite_with_open_gate_is_its_base():
    se, bn = make("se", bias=True), make("bn")
    bn.load_state_dict(se.base.state_dict())
    with torch.no_grad():
        se.fc2.weight.zero_(), se.fc2.bias.fill_(40)  # sigmoid(40) = 1 - 4e-18
    both((se, bn))


@pytest.mark.parametrize("base", ["bn", "gn", "sn"])
def test_squeeze_excite_equals_the_two_module_form(base):
    """Eq. 3-5 on the normalized map itself, which the fused layer never reads."""
    se = make("se", act="relu", base=base, reduction=2)

    class Naive(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.fc1, self.fc2 = make(base), se.fc1, se.fc2
            self.base.load_state_dict(se.base.state_dict())

        def forward(self, x):
            y = self.base(x)
            gate = torch.sigmoid(self.fc2(self.fc1(y.mean((2, 3))).relu()))
            return (y * gate[..., None, None]).relu()

    both((se, Naive()))


def test_attentive_norm_over_every_base():
    for base in ("bn", "gn", "ln", "in", "sn"):
        an, x = make("an", base=base), torch.randn(4, C, 3, 3, dtype=torch.double)
        assert an(x).isfinite().all() and an.base.weight is None
        both((an, make("an", base={"name": base})))


@pytest.mark.parametrize("name", NORMS)
def test_channel_mask_scales_before_the_residual(name):
    layer = make(name).eval()
    x, r = torch.randn(2, 4, C, 3, 3, dtype=torch.double)
    mask = torch.tensor([0.0, 2.0], dtype=torch.double)[torch.randint(0, 2, (4, C))]
    torch.testing.assert_close(layer(x, r, mask=mask), layer(x) * mask[..., None, None] + r)


@pytest.mark.parametrize("name", [n for n in NORMS if n != "module"])  # a foreign module keeps its own rules
def test_frozen_layers_keep_their_statistics(name):
    layer = make(name)
    anorm.freeze_stats(layer)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(4, C, 3, 3, dtype=torch.double)
    trained = layer.train()(x)
    torch.testing.assert_close(layer.state_dict(), before)
    torch.testing.assert_close(trained, layer.eval()(x))


@pytest.mark.parametrize("name", NORMS)
def test_zero_init_leaves_the_shortcut(name):
    layer = make(name)
    if name == "module":
        layer.module.bias.data.zero_()
    elif hasattr(layer, "base") and name == "se":
        layer.base.bias.data.zero_()
    elif not name.startswith("an"):
        layer.bias.data.zero_()
    layer.zero_init()
    x, r = torch.randn(2, 4, C, 3, 3, dtype=torch.double)
    torch.testing.assert_close(layer(x, r), r)


@pytest.mark.parametrize("name", NORMS)
def test_every_parameter_states_its_needs(name):
    layer = make(name)
    assert set(layer.param_needs()) == {key for key, _ in layer.named_parameters()}


@pytest.mark.parametrize("name", [n for n in NORMS if n != "module"])
def test_one_pixel_maps_constants_and_single_channels_are_finite(name):
    for channels, shape in ((C, (4, C, 1, 1)), (1, (4, 1, 3, 3)), (C, (4, C, 3, 3))):
        layer = anorm.create_norm(name, channels, **OPTIONS.get(name, {}))
        x = torch.full(shape, 2.0, requires_grad=True)
        y = layer(x)
        (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert y.isfinite().all() and grad.isfinite().all()


def test_evaluation_with_batch_statistics():
    layer = make("bn").eval()
    x = torch.randn(4, C, 3, 3, dtype=torch.double)
    layer.eval_stats = "batch"
    before = layer.running_mean.clone()
    torch.testing.assert_close(layer(x), make("bn").train()(x))
    torch.testing.assert_close(layer.running_mean, before)


@pytest.mark.parametrize("stats", ["running", "batch"])
@pytest.mark.parametrize("name", [n for n in NORMS if n != "module"])
def test_evaluation_waits_for_no_other_process(name, stats, monkeypatch):
    """Processes evaluate unequal numbers of batches: an exchange in a layer would meet another one."""
    layer = make(name, sync=True).eval()
    for part in layer.modules():
        if hasattr(part, "eval_stats"):
            part.eval_stats = stats

    def exchange(*arguments, **options):
        raise AssertionError(f"{name} waits for others in evaluation")

    for function, answer in {"is_initialized": True, "get_world_size": 2}.items():
        monkeypatch.setattr(torch.distributed, function, lambda *group, answer=answer: answer)
    monkeypatch.setattr(torch.distributed, "all_reduce", exchange)
    x = torch.randn(4, C, 5, 3, dtype=torch.double)
    layer(x)
    if name in ("bn", "an", "sn"):  # the exchange is where it should be
        with pytest.raises(AssertionError, match="waits for others"):
            layer.train()(x)


def test_another_librarys_batch_norm_is_not_taken_for_synchronized():
    with pytest.raises(ValueError, match="sync=True does not reach a BatchNorm2d"):
        make("module", sync=True)


def test_group_count():
    assert anorm.create_norm("gn", 48).groups == 24
    assert anorm.create_norm("gn", 64).groups == 32
    with pytest.raises(
        ValueError, match="48 channels cannot be divided into groups=32; use groups=auto or one of"
    ):
        anorm.create_norm("gn", 48, groups=32)


def test_wrong_shapes_and_names_are_errors():
    with pytest.raises(ValueError, match=r"BatchNorm of 6 channels got a shape \(2, 5, 3, 3\)"):
        make("bn")(torch.randn(2, 5, 3, 3))
    with pytest.raises(ValueError, match="did you mean gn"):
        anorm.create_norm("gnn", 8)
    with pytest.raises(ValueError, match="at least one channel"):
        anorm.create_norm("bn", 0)
    with pytest.raises(ValueError, match="cannot be imported"):
        anorm.create_norm("module", 8, target="torch.nn.NoSuchNorm")


@pytest.mark.parametrize("name", [n for n in NORMS if n != "module"])
def test_shapes_flow_on_the_meta_device(name):
    with torch.device("meta"):
        layer = anorm.create_norm(name, C, act="relu", **OPTIONS.get(name, {}))
        for training in (True, False):
            assert layer.train(training)(torch.empty(4, C, 5, 3)).shape == (4, C, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_of_small_maps_is_one_function_by_either_way(dtype):
    """Small contiguous maps take torch's own kernel: the same dtype, and the values of the two passes to rounding."""
    torch.manual_seed(0)
    layer = anorm.create_norm("gn", C, act="relu", groups=6)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5), layer.bias.normal_()
    x, dy = torch.randn(2, 3, C, 7, 7).to(dtype)
    found = {}
    for layout in (torch.contiguous_format, torch.channels_last):  # channels_last always takes the two passes
        leaf = x.to(memory_format=layout, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(leaf)
        assert y.dtype == dtype
        found[layout] = y, *torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)
    # a bfloat16 has 8 bits: rounding of y and of dx
    digits = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=digits, atol=digits * 4)

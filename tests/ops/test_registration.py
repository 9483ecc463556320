"""Every law, on every backend that works here, under what people wrap layers in: compile, autocast, DDP,
checkpointing, export, gradients of gradients, torch.func; and the rules for empty batches, inf and NaN.

Laws are found by listing them, so that a new one is covered by itself. The operators' own opcheck is in
test_cpu.py and triton_cases.py.
"""

import copy
import functools
import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import anorm
from anorm import algebra, ops
from anorm.norms.base import RunningNorm

LAWS = [name for name in anorm.list_norms() if name != "module"]
COMPILED = [name for name in ("cpu", "triton") if ops.why_not(name) is None]
BACKENDS = ["reference", *COMPILED]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPE = (4, 16, 6, 5)
RANDOM = {"afn_as_released": {"dropout": 0.0}}  # a layer with dropout is compared without it


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The device type that a backend works on, with the backend chosen."""
    torch.manual_seed(0)
    with ops.use_backend(request.param):
        yield "cuda" if request.param == "triton" else "cpu"


def create(law, device="cpu", act="relu", **options):
    return anorm.create_norm(law, SHAPE[1], act=act, **RANDOM.get(law, {}), **options).to(device)


def tensors(device, count, layout="nchw", dtype=torch.float32):
    return [torch.randn(SHAPE).to(device, dtype).to(memory_format=LAYOUTS[layout]) for _ in range(count)]


def step(layer, call, x, residual, dy):
    """Everything a training step produces: output, gradients, running statistics."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual)]
    y = call(*leaves)
    y.backward(dy)
    return {
        "y": y.detach(),
        "x": leaves[0].grad,
        "residual": leaves[1].grad,
        **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None},
        **{name: b.clone() for name, b in layer.named_buffers()},
    }


def assert_same(found, expected, rtol=1e-4, atol=2e-5):
    """Equal up to the order of float32 sums: terms of order 1, up to N*H*W = 120 of them."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("law", LAWS)
def test_compiles_whole(backend, law, layout):
    """One graph, no breaks, and the same numbers, running statistics and memory layouts as without."""
    torch._dynamo.reset()
    layer = create(law, backend)
    twin = copy.deepcopy(layer)
    x, r, dy = tensors(backend, 3, layout)
    expected = step(layer, layer, x, r, dy)
    found = step(twin, torch.compile(twin, fullgraph=True, backend="aot_eager"), x, r, dy)
    assert_same(found, expected)
    assert all(found[name].stride() == x.stride() for name in ("y", "x", "residual"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_computes_the_same(backend, layout, dtype):
    torch._dynamo.reset()
    layer = create("an", backend)
    twin = copy.deepcopy(layer)
    x, r, dy = tensors(backend, 3, layout, dtype)
    expected = step(layer, layer, x, r, dy)
    found = step(twin, torch.compile(twin, fullgraph=True), x, r, dy)
    # bf16: one rounding of results near 4 differs at most by its unit in the last place, 2^-6
    assert_same(found, expected, **({"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {}))
    assert found["y"].stride() == x.stride() == found["x"].stride()


def test_a_compiled_layer_follows_modes_and_sizes(backend):
    torch._dynamo.reset()
    layer = create("an", backend)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for size in (6, 6, 7, 9):
        x = torch.randn(4, 16, size, 5, device=backend)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=2e-5)
    assert twin.base.num_batches_tracked == 4
    layer.eval(), twin.eval()
    before = twin.base.running_mean.clone()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=2e-5)
    assert torch.equal(twin.base.running_mean, before)


@pytest.mark.skipif("cpu" not in COMPILED, reason="the C++ kernels are not built here")
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12), reason="torch 2.11 guards no such choice"
)
def test_a_compiled_layer_follows_the_choice_of_a_backend():
    torch._dynamo.reset()
    graphs = []

    def look(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    layer = torch.compile(create("se").eval(), fullgraph=True, backend=look)
    x = torch.randn(SHAPE)
    for name in ("reference", "cpu"):
        with ops.use_backend(name):
            layer(x)
    assert ["anorm_cpu" in graph for graph in graphs] == [False, True]


# ---- autocast ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_autocast_leaves_the_statistics_in_float32(backend, law):
    """A bf16 map under autocast gives what it gives without: the law's matrices are not rounded to bf16."""
    layer = create(law, backend)
    twin = copy.deepcopy(layer)
    x, r, dy = tensors(backend, 3, dtype=torch.bfloat16)
    found = step(layer, torch.autocast(backend, dtype=torch.bfloat16)(layer.forward), x, r, dy)
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())
    assert_same(found, step(twin, twin, x, r, dy), rtol=0, atol=0)


def test_autocast_through_a_network(backend):
    """A convolution's bf16 output and a float32 shortcut meet in the norm, as in a ResNet's first block."""
    conv, layer = nn.Conv2d(16, 16, 1).to(backend), create("an", backend)
    x = torch.randn(SHAPE, device=backend, requires_grad=True)
    with torch.autocast(backend, dtype=torch.bfloat16):
        y = layer(conv(x), x)
    assert y.dtype == torch.float32
    y.square().mean().backward()
    assert x.grad.isfinite().all() and conv.weight.grad.isfinite().all()


# ---- processes ---------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, law, **options):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 16, 3), create(law, **options), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def parts():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, 3, 7, 6, generator=generator) for n in (3, 3)]


CASES = list(itertools.product(("bn", "an", "sn", "gn"), (False, True), ("eager", "compiled")))


def train_in_a_process(rank, folder, backend):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    ops.set_backend(backend)
    for law, sync, way in CASES:
        torch.manual_seed(0)
        model = Small(law, sync=sync)
        called = torch.compile(model, backend="aot_eager") if way == "compiled" else model
        parallel = DistributedDataParallel(called, broadcast_buffers=False)
        parallel(parts()[rank]).square().sum().backward()
        kept = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
        torch.save(kept, f"{folder}/{law}-{sync}-{way}-{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "triton"])
def test_two_processes(name, tmp_path):
    """Without sync: the mean of two independent steps. With: the step of one process on the whole batch."""
    mp.spawn(train_in_a_process, (str(tmp_path), name), nprocs=2)
    for law, sync, way in CASES:
        single = []
        for batch in [torch.cat(parts())] if sync else parts():
            torch.manual_seed(0)
            model = Small(law)
            (model(batch).square().sum() / (2 if sync else 1)).backward()
            single.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
        for rank in range(2):
            found = torch.load(tmp_path / f"{law}-{sync}-{way}-{rank}")
            gradients = {n: sum(g[n] for g, _ in single) / len(single) for n in single[0][0]}
            buffers = single[0][1] if sync else single[rank][1]
            # sums of 252 float32 terms of order 10, and a division by a standard deviation in between
            assert_same(found, gradients | buffers, rtol=1e-3, atol=2e-3)


# ---- checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_checkpointing_changes_nothing(backend, law):
    layer = create(law, backend)
    twin = copy.deepcopy(layer)
    x, r, dy = tensors(backend, 3)
    expected = step(layer, layer, x, r, dy)
    found = step(twin, lambda *a: checkpoint(twin, *a, use_reentrant=False), x, r, dy)
    # taken in twice, as by nn.BatchNorm2d: see below
    statistics = {name for name, _ in layer.named_buffers()}
    assert_same(
        *({k: v for k, v in side.items() if k not in statistics} for side in (found, expected)),
        rtol=0,
        atol=0,
    )


def test_checkpointing_tracks_once_or_as_torch_does(backend):
    """nn.BatchNorm2d takes a recomputed batch in twice; a layer of one node is not run to its end again."""
    layers = create("bn", backend, act=None), nn.BatchNorm2d(SHAPE[1]).to(backend)
    x = torch.randn(SHAPE, device=backend, requires_grad=True)
    checkpoint(layers[0], x, use_reentrant=False).square().sum().backward()
    for _ in range(layers[0].num_batches_tracked):
        layers[1](x)
    assert layers[0].num_batches_tracked <= 2
    assert_same(*(dict(layer.named_buffers()) for layer in layers))


# ---- export ------------------------------------------------------------------------------------------------


def lived_in(layer):
    with torch.no_grad():
        for _ in range(3):
            layer(2 * torch.randn(SHAPE) + 0.5)
    return layer.eval()


@functools.cache
def exported(law):
    """A layer with a residual and its graph, free in batch and size."""
    torch.manual_seed(0)
    layer = lived_in(create(law))
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}
    with torch.no_grad():
        return layer, torch.export.export(layer, tuple(tensors("cpu", 2)), dynamic_shapes=(sizes, sizes))


@torch.no_grad()
@pytest.mark.parametrize("law", LAWS)
def test_exports_in_standard_operators(law):
    layer, graph = exported(law)
    called = {
        node.target.namespace for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    }
    assert called == {"aten"}
    x, r = torch.randn(3, 16, 9, 4), torch.randn(3, 16, 9, 4)
    torch.testing.assert_close(graph.module()(x, r), layer(x, r), rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnxruntime_computes_the_same(law, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, graph = exported(law)
    path = str(tmp_path / "layer.onnx")
    torch.onnx.export(graph, dynamo=True, verbose=False, input_names=["x", "r"]).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in (SHAPE, (1, 16, 2, 11)):
        x, r = torch.randn(shape), torch.randn(shape)
        found = session.run(None, {"x": x.numpy(), "r": r.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), layer(x, r), rtol=1e-4, atol=2e-5)


# ---- gradients of gradients, torch.func --------------------------------------------------------------------


def plain(layer, x):
    """The definition, for autograd alone to differentiate."""
    mean = x.mean((2, 3))
    var = (x - mean[..., None, None]).square().mean((2, 3))
    c, s, b = (t[..., None, None] for t in layer.law(algebra.Moments(mean, var, x.shape[2] * x.shape[3])))
    return torch.relu(s * (x - c) + b)


@pytest.mark.parametrize("law", LAWS)
def test_gradients_of_gradients(backend, law):
    layer = create(law, backend).double()
    x, dy, direction = tensors(backend, 3, dtype=torch.double)
    results = []
    for function in (layer, lambda x: plain(layer, x)):
        leaf, upstream = x.clone().requires_grad_(), dy.clone().requires_grad_()
        learned = [p for p in layer.parameters() if p.requires_grad]
        (dx,) = torch.autograd.grad(function(leaf), leaf, upstream, create_graph=True)
        results.append(
            torch.autograd.grad((dx * direction).sum(), [leaf, upstream, *learned], allow_unused=True)
        )
    for found, expected in zip(*results, strict=True):
        # None stands for a zero gradient
        zero = torch.zeros(()) if found is None else torch.zeros_like(found)
        torch.testing.assert_close(zero if found is None else found, zero if expected is None else expected)


@pytest.mark.parametrize("law", LAWS)
def test_functional_gradients(backend, law):
    """torch.func.grad of a layer in training; running statistics are passed in, as torch.nn needs it too."""
    layer = create(law, backend)
    x, w = tensors(backend, 2)
    parameters = {n: p.detach().clone() for n, p in layer.named_parameters()}
    buffers = {n: b.clone() for n, b in layer.named_buffers()}

    def loss(parameters, buffers, x):
        return (torch.func.functional_call(layer, (parameters, buffers), (x,)) * w).sum()

    found, dx = torch.func.grad(loss, argnums=(0, 2))(parameters, buffers, x)
    leaf = x.clone().requires_grad_()
    (layer(leaf) * w).sum().backward()
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-4, atol=2e-5)
    for name, p in layer.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("law", ["gn", "in", "an_gn", "se", "an"])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_each_example(backend, law):
    """vmap over grad: per-example gradients of a layer in evaluation (its statistics do not mix examples)."""
    layer = create(law, backend).eval()
    x, w = tensors(backend, 2)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters, x, w):
        return (torch.func.functional_call(layer, parameters, (x[None],)) * w).sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, w)
    for i in range(SHAPE[0]):
        one = torch.func.grad(loss)(parameters, x[i], w[i])
        for name in one:
            torch.testing.assert_close(found[name][i], one[name], rtol=1e-4, atol=1e-4)


# ---- edges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("law", LAWS)
def test_an_empty_batch(backend, law, training):
    """Empty results, zero gradients, running statistics as they were: a rank without images does no harm."""
    layer = create(law, backend).train(training)
    before = {name: b.clone() for name, b in layer.named_buffers() if b.is_floating_point()}
    x = torch.randn(0, *SHAPE[1:], device=backend, requires_grad=True)
    y = layer(x, torch.zeros_like(x))
    assert y.shape == x.shape
    y.backward(torch.zeros_like(y))
    assert x.grad.shape == x.shape
    for name, p in layer.named_parameters():
        assert p.grad is None or not p.grad.any(), f"the gradient of {name} is not zero"
    for name, b in layer.named_buffers():
        if name in before:
            torch.testing.assert_close(b, before[name], rtol=0, atol=0, msg=f"{name} changed")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("law", LAWS)
def test_what_is_not_finite_stays_visible(backend, law, value):
    """In x it reaches y, in dy it reaches dx: a loss scaler finds an overflow only if it is still there."""
    layer = create(law, backend, act=None)
    x, dy = tensors(backend, 2)
    spoiled = x.clone()
    spoiled[1, 2, 3, 3] = value
    assert not layer(spoiled)[1, 2].isfinite().all()
    x.requires_grad_()
    spoiled = dy.clone()
    spoiled[1, 2, 3, 3] = value
    layer(x).backward(spoiled)
    assert not x.grad[1, 2].isfinite().all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", [(4, 16, 1, 1), (4, 16, 3, 3)], ids=["1x1", "constant"])
def test_cells_without_variance_are_finite(backend, law, shape):
    layer = create(law, backend)
    x = (torch.randn(shape) if shape[2] == 1 else torch.ones(shape)).to(backend).requires_grad_()
    y = layer(x)
    y.backward(torch.randn_like(y))
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("law", LAWS)
def test_one_value_for_each_channel(backend, law):
    """Neither batch statistics nor a group's can come from one value (an error in words); every other law just works."""
    layer = create(law, backend)
    batch = any(isinstance(m, RunningNorm) and m.tracked for m in layer.modules())
    x = torch.randn(1, 16, 1, 1, device=backend)
    if batch:
        with pytest.raises(ValueError, match="batch"):
            layer(x)
    elif law == "gn":
        with pytest.raises(ValueError, match="one value a group"):
            layer(x)
        return
    else:
        assert layer(x).isfinite().all()
    assert layer.eval()(x).isfinite().all()


def test_the_environment_did_not_choose_for_us():
    """These tests cover the C++ kernels wherever they can be built; this skip says where they cannot."""
    if "cpu" not in COMPILED:
        pytest.skip(f"no C++ backend: {ops.why_not('cpu')}")
    assert os.environ.get("TRITON_INTERPRET") != "1"

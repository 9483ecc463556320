"""SparsestMax against brute force, SSN against its limits, and what it asks of the training loop."""

import itertools

import pytest
import torch

import anorm
from anorm.algebra import Moments
from anorm.norms.sparse_switchable import sparsemax, sparsestmax

C = 6


def rows(count=200, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(count, 3, dtype=torch.double, generator=generator)


def projection(z):
    """On the simplex, by trying every support: the nearest of the feasible stationary points."""
    best = None
    for size in range(1, len(z) + 1):
        for support in itertools.combinations(range(len(z)), size):
            p = torch.zeros_like(z)
            index = list(support)
            p[index] = z[index] - (z[index].sum() - 1) / size
            if (p >= 0).all() and (best is None or (p - z).norm() < (best - z).norm()):
                best = p
    return best


def arc(radius, count=20001):
    """Points of the circle of a radius around the centre of the 3-simplex that lie in the simplex."""
    angle = torch.linspace(0, 2 * torch.pi, count, dtype=torch.double)[:, None]
    e1 = torch.tensor([1.0, -1, 0], dtype=torch.double) / 2**0.5
    e2 = torch.tensor([1.0, 1, -2], dtype=torch.double) / 6**0.5
    points = 1 / 3 + radius * (angle.cos() * e1 + angle.sin() * e2)
    return points[(points >= -1e-12).all(1)]


@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
def test_sparsemax_is_the_projection_on_the_simplex(scale):
    z = rows(scale=scale)
    torch.testing.assert_close(sparsemax(z), torch.stack([projection(row) for row in z]))


def test_sparsemax_gradient_is_exact():
    z = rows(20).requires_grad_()
    assert torch.autograd.gradcheck(sparsemax, z)
    for radius in (0.0, 0.3, 0.6):
        for centre in ("support", "simplex"):
            assert torch.autograd.gradcheck(lambda z, r=radius, c=centre: sparsestmax(z, r, c), z)


@pytest.mark.parametrize("radius", [0.1, 0.3, 0.4, 0.41, 0.5, 0.7, 0.81])
def test_sparsestmax_is_the_nearest_point_at_the_radius(radius):
    """The paper's definition: among the points of the simplex at least r from its centre, the nearest to z.

    Where sparsemax is far enough it is the answer; else the nearest lies on the circle, tried densely.
    """
    circle = arc(radius)
    for z in rows(60, 0.5):
        p = sparsestmax(z, radius, "simplex")
        flat = sparsemax(z)
        expected = flat
        if (flat - 1 / 3).norm() < radius:
            expected = circle[(circle - flat).norm(dim=1).argmin()]
        # neighbours on the circle are 2 pi r / 20000 < 3e-4 apart
        torch.testing.assert_close(p, expected, rtol=0, atol=4e-4)


@pytest.mark.parametrize("centre", ["support", "simplex"])
def test_sparsestmax_ends(centre):
    z = rows(scale=0.5)
    torch.testing.assert_close(sparsestmax(z, 0.0, centre), sparsemax(z))
    for radius in ((2 / 3) ** 0.5, 0.9, 1.0):
        one_hot = torch.nn.functional.one_hot(z.argmax(1), 3).double()
        torch.testing.assert_close(sparsestmax(z, radius, centre), one_hot)
    for radius in (0.0, 0.2, 0.5, 0.8):
        p = sparsestmax(z, radius, centre)
        torch.testing.assert_close(p.sum(1), torch.ones(len(z), dtype=torch.double))
        assert (p >= 0).all() and (p.argmax(1) == z.argmax(1)).all()
        support = sparsemax(z).gt(0)
        middle = 1 / 3 if centre == "simplex" else support / support.sum(1, keepdim=True)
        far = (p - middle).norm(dim=1)  # a one-hot sparsemax is its support's middle, and final
        assert ((far >= radius - 1e-9) | (p.amax(1) == 1)).all()


def test_centres_differ_where_sparsemax_drops_a_candidate():
    """z = (0.9, 0.5, 0.1): sparsemax (0.7, 0.3, 0), 0.28 from the middle of its edge.

    At r = 0.4 the code moves it to 0.5 +- 0.4 / sqrt(2); the paper does not: it is 0.50 from (1/3, 1/3, 1/3).
    """
    z = torch.tensor([0.9, 0.5, 0.1], dtype=torch.double)
    step = 0.4 / 2**0.5
    moved = torch.tensor([0.5 + step, 0.5 - step, 0], dtype=torch.double)
    torch.testing.assert_close(sparsestmax(z, 0.4), moved)
    torch.testing.assert_close(sparsestmax(z, 0.4, "simplex"), sparsemax(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("z", [[1.0, 1.0, 1.0], [0.7, 0.7, -1.0], [5.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
def test_a_point_without_direction_stays_and_has_a_gradient(z, dtype):
    z = torch.tensor(z, dtype=dtype, requires_grad=True)
    for radius in (0.0, 0.3, 0.6, 1.0):
        p = sparsestmax(z, radius)
        torch.testing.assert_close(p, sparsemax(z))
        (grad,) = torch.autograd.grad(p, z, torch.tensor([0.3, -1.0, 2.0], dtype=dtype))
        assert grad.isfinite().all()


def make(radius=0.0, name="ssn", **options):
    torch.manual_seed(0)
    layer = anorm.create_norm(name, C, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    if name == "ssn":
        layer.radius.fill_(radius)
    return layer


@pytest.mark.parametrize("training", [True, False])
def test_radius_zero_is_switchable_norm_with_sparsemax(training):
    """SN is driven to sparsemax's weights by their logarithms (softmax(log p) = p; log 0 = -inf)."""
    ssn, sn = make(), make(name="sn", momentum=0.003)
    with torch.no_grad():
        for name in ("mean_weight", "var_weight"):
            getattr(sn, name).copy_(sparsemax(getattr(ssn, name)).log())
    x = torch.randn(4, C, 5, 3, dtype=torch.double)
    torch.testing.assert_close(ssn.train(training)(x), sn.train(training)(x))
    torch.testing.assert_close(ssn.running_var, sn.running_var)


@pytest.mark.parametrize("branch, name", list(enumerate(["in", "ln", "bn"])))
@pytest.mark.parametrize("training", [True, False])
def test_a_large_radius_is_one_branch(branch, name, training):
    ssn, one = make((2 / 3) ** 0.5, variance="biased"), anorm.create_norm(name, C).double()
    ssn.train(training), one.train(training)
    with torch.no_grad():
        ssn.mean_weight[branch] += 2
        ssn.var_weight[branch] += 2
    one.load_state_dict({key: ssn.state_dict()[key] for key in one.state_dict()})
    x = torch.randn(4, C, 5, 3, dtype=torch.double)
    torch.testing.assert_close(ssn(x), one(x))


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.6])
def test_gradcheck_through_the_radius(radius):
    layer = make(radius)
    x = torch.randn(3, C, 3, 2, dtype=torch.double, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


def test_the_schedule_ends_in_a_choice_that_stays():
    layer = make()
    assert layer.radius == 0 and layer.chosen.tolist() == [-1, -1]
    x = torch.randn(4, C, 3, 3, dtype=torch.double)
    leading = [layer.mean_weight.argmax().item(), layer.var_weight.argmax().item()]
    layer.after_step(0.3)
    assert layer.radius == 0.3 and layer.chosen.tolist() == [-1, -1]
    layer.after_step(0.9)
    assert layer.chosen.tolist() == leading
    for weight, index in zip((layer.mean_weight, layer.var_weight), leading, strict=True):
        assert weight.tolist() == [float(k == index) for k in range(3)]
    layer(x).backward(torch.randn_like(x))
    assert layer.mean_weight.grad.eq(0).all() and layer.var_weight.grad.eq(0).all()
    with torch.no_grad():  # whatever an optimizer's momentum still does
        layer.mean_weight.copy_(torch.tensor([9.0, -3.0, 7.0]).roll(leading[0] + 1))
    expected = [float(k == leading[0]) for k in range(3)]
    assert layer.weights()[0].tolist() == expected
    layer.after_step(1.0)
    assert layer.mean_weight.tolist() == expected


def test_an_early_choice_of_one_set_leaves_the_other_open():
    layer = make()
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.0, 3.0, 0.0]))
    layer.after_step(0.01)
    assert layer.chosen.tolist() == [1, -1]
    x = torch.randn(4, C, 3, 3, dtype=torch.double)
    layer(x).backward(torch.randn_like(x))
    assert layer.mean_weight.grad.eq(0).all() and layer.var_weight.grad.ne(0).any()


def test_state_survives_a_checkpoint():
    layer, other = make(), make()
    layer.after_step(0.9)
    other.load_state_dict(layer.state_dict())
    assert other.radius == layer.radius and other.chosen.tolist() == layer.chosen.tolist()


def test_two_candidates_without_batch_norm():
    torch.manual_seed(0)
    layer = anorm.create_norm("ssn", C, use_bn=False)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.2, 0.6]))
    layer.after_step(0.71)  # beyond sqrt(1/2)
    assert layer.chosen.tolist() == [1, -1]  # var_weight is uniform: no direction
    x = torch.randn(4, C, 3, 3)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


def test_compiles_without_a_break_or_a_branch_on_values():
    """Weights and schedule in one graph each, that holds for every radius and choice (no recompilation)."""
    torch.compiler.reset()
    layer = make()
    x = torch.randn(4, C, 3, 2, dtype=torch.double)
    moments = Moments(x.mean((2, 3)), x.var((2, 3), unbiased=False), 6)
    law = torch.compile(layer.law, fullgraph=True, backend="aot_eager")
    step = torch.compile(layer.after_step, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for radius in (0.0, 0.5, 1.0):
            layer.radius.fill_(radius)
            layer.chosen.fill_(-1 if radius < 1 else 2)
            for got, want in zip(law(moments), layer.law(moments), strict=True):
                torch.testing.assert_close(got, want)
    layer.chosen.fill_(-1)
    step(0.9)
    assert layer.chosen.ge(0).all() and layer.radius == 0.9
    torch.compiler.reset()


def test_needs_and_options():
    layer = anorm.create_norm("ssn", C)
    for name in ("mean_weight", "var_weight"):
        need = layer.param_needs()[name]
        assert (need.role, need.decay, need.lr_scale, need.clip) == ("control", False, 0.1, 1.0)
        assert getattr(layer, name).tolist() == [1.0, 1.0, 1.0]
    assert layer.momentum == 0.003 and layer.running_var.eq(0).all()
    assert [n for n, _ in layer.stat_buffers()] == ["running_mean", "running_var", "num_batches_tracked"]
    with pytest.raises(ValueError, match="'support' nor 'simplex'"):
        anorm.create_norm("ssn", C, centre="origin")

"""Quantities against torch.func, by hand, and on networks of other programs."""

import copy
import math
from itertools import pairwise

import curvlinops
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from measures.derivatives import View
from measures.quantities import Wanted, average, look, quantity, share_in
from networks import build_network
from run.errors import NotFinite, UserError
from run.expressions import parse

N, C = 12, 3


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 1, 6, 6, dtype=torch.float64, generator=generator), torch.arange(N) % C


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    network = nn.Sequential()
    for name, part in {
        "conv1": nn.Conv2d(1, 3, 3), "bn": nn.BatchNorm2d(3), "act": nn.Tanh(), "pool": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(3, 4, 2), "relu": nn.ReLU(inplace=True), "flat": nn.Flatten(), "drop": nn.Dropout(0.5),
        "fc": nn.Linear(4, C),
    }.items():  # fmt: skip
        network.add_module(name, part)
    network.bn.running_mean.uniform_(-1, 1)
    network.bn.running_var.uniform_(0.5, 2)
    return network.double()


def functional_loss(network, x, y):
    """The mean loss as a function of all parameters in one vector, in eval mode, and that vector."""
    network = copy.deepcopy(network).eval()
    parameters = dict(network.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for part in network.modules():
        if hasattr(part, "inplace"):
            part.inplace = False

    def loss(theta):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        tensors = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
        return F.cross_entropy(torch.func.functional_call(network, tensors, (x,)), y)

    return loss, torch.cat([parameter.detach().flatten() for parameter in parameters.values()])


def place_of(network, names):
    """Where these tensors lie in the vector of all parameters."""
    places, first = [], 0
    for name, parameter in network.named_parameters():
        if name in names:
            places += range(first, first + parameter.numel())
        first += parameter.numel()
    return torch.tensor(places)


def test_gradients_and_hessians_are_torch_funcs(cnn, data):
    loss, theta = functional_loss(cnn, *data)
    g, H = torch.func.grad(loss)(theta), torch.func.hessian(loss)(theta)
    torch.testing.assert_close(look(cnn, *data, "grad(loss, theta)").values, g)
    torch.testing.assert_close(look(cnn, *data, "hess(loss, theta)").matrix(), H)
    v = torch.randn(len(theta), dtype=torch.float64)
    torch.testing.assert_close(look(cnn, *data, "hess(loss, theta)").matvec(v), H @ v)
    conv, fc = place_of(cnn, ["conv1.weight", "conv1.bias"]), place_of(cnn, ["fc.weight", "fc.bias"])
    torch.testing.assert_close(look(cnn, *data, "grad(loss, theta(fc))").values, g[fc])
    torch.testing.assert_close(look(cnn, *data, "hess(loss, theta(fc))").matrix(), H[fc][:, fc])
    block = look(cnn, *data, "hess(loss, theta(conv1), theta(fc))")
    torch.testing.assert_close(block.matrix(), H[conv][:, fc])
    torch.testing.assert_close(block.operator.matvec(v[: len(fc)]), H[conv][:, fc] @ v[: len(fc)])
    torch.testing.assert_close(block.operator.rmatvec(v[: len(conv)]), H[conv][:, fc].T @ v[: len(conv)])
    weights = place_of(cnn, ["conv1.weight", "conv2.weight"])
    torch.testing.assert_close(look(cnn, *data, "hess(loss, theta(conv?.weight))").matrix(), H[weights][:, weights])
    channel = place_of(cnn, ["conv1.weight"]).view(3, 9)[2]
    torch.testing.assert_close(look(cnn, *data, "hess(loss, theta(conv1.weight)[2])").matrix(), H[channel][:, channel])
    single = place_of(cnn, ["fc.weight"]).view(C, 4)[2, 1]
    [[value]] = look(cnn, *data, "hess(loss, theta(fc.weight)[2, 1])").matrix().tolist()
    assert value == pytest.approx(float(H[single, single]))


def test_eigenvalues_without_the_matrix_are_those_of_torch_funcs_hessian(cnn, data):
    loss, theta = functional_loss(cnn, *data)
    exact = torch.linalg.eigvalsh(torch.func.hessian(loss)(theta)).flip(0)
    H = look(cnn, *data, "hess(loss, theta)", dense=0)
    scale = exact.abs().max()
    # Lanczos' error in an eigenvalue is the square of its residual, here 1e-6, over the gap
    torch.testing.assert_close(H.top(5, tol=1e-6).values, exact[:5], rtol=0, atol=1e-9 * float(scale))
    torch.testing.assert_close(H.bottom(2, tol=1e-6).values, exact[-2:].flip(0), rtol=0, atol=1e-9 * float(scale))
    trace = H.trace(100)
    assert abs(trace.value - float(exact.sum())) < 4 * trace.error


def test_a_float32_networks_top_five_are_within_1e_5_of_the_dense_ones(data):
    torch.manual_seed(0)
    network = build_network("MLP", (1, 6, 6), C, widths=(20, 10))
    loss, theta = functional_loss(network.double(), *data)
    exact = torch.linalg.eigvalsh(torch.func.hessian(loss)(theta)).flip(0)
    H = look(network.float(), *data, "hess(loss, theta)", dense=0)
    found = H.top(5)
    torch.testing.assert_close(found.values, exact[:5], rtol=0, atol=1e-5 * float(exact[0]))
    assert (found.residuals < 1e-3).all()


def test_products_are_those_of_curvlinops(cnn, data):
    cnn.eval().relu.inplace = False
    parameters = list(cnn.parameters())
    theirs = curvlinops.HessianLinearOperator(cnn, nn.CrossEntropyLoss(), parameters, [data])
    v = torch.randn(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    torch.testing.assert_close(look(cnn, *data, "hess(loss, theta)").matvec(v), (theirs @ v).detach())


def test_jacobians_are_torch_funcs(cnn, data):
    x, y = data
    other = copy.deepcopy(cnn).eval()
    other.relu.inplace = False
    J = torch.func.vmap(torch.func.jacrev(lambda x: other(x[None])[0]))(x).flatten(2)
    mine = look(cnn, x, y, "grad(f(output), f(input))")
    torch.testing.assert_close(mine.matrix(), J.mean(0))
    torch.testing.assert_close(mine.singular, torch.linalg.svdvals(J))
    torch.testing.assert_close(look(cnn, x, y, "grad(f(output)[2], f(input)[0, 3])").matrix(),
                               J.view(N, C, 6, 6)[:, 2, 3].mean(0)[None])  # fmt: skip
    # a layer that the next one writes into: its values and derivatives are those from before
    head = nn.Sequential(other.relu, other.flat, other.fc)
    h = other[:5](x).detach()
    J = torch.func.vmap(torch.func.jacrev(lambda h: head(h[None])[0]))(h).flatten(2)
    torch.testing.assert_close(look(cnn, x, y, "grad(f(output), f(conv2))").matrix(), J.mean(0))
    torch.testing.assert_close(look(cnn, x, y, "f(conv2)").matrix(), h.flatten(1))
    assert (look(cnn, x, y, "f(conv2)").matrix() < 0).any()


def test_hessians_with_respect_to_activations_are_torch_funcs(cnn, data):
    x, y = data
    other = copy.deepcopy(cnn).eval()
    other.relu.inplace = False
    of_input = torch.func.vmap(torch.func.hessian(lambda x, y: F.cross_entropy(other(x[None]), y[None])), (0, 0))(x, y)
    H = of_input.reshape(N, 36, 36)
    mine = look(cnn, x, y, "hess(loss, f(input))")
    torch.testing.assert_close(mine.matrix(), H.mean(0))
    torch.testing.assert_close(mine.eigenvalues, torch.linalg.eigvalsh(H).flip(1))
    of_output = torch.func.vmap(torch.func.hessian(lambda x: other(x[None])[0, 1]))(x).reshape(N, 36, 36)
    torch.testing.assert_close(look(cnn, x, y, "hess(f(output)[1], f(input))").matrix(), of_output.mean(0))
    free = look(cnn, x, y, "hess(loss, f(input))", dense=0)
    v = torch.randn(36, dtype=torch.float64)
    torch.testing.assert_close(free.matvec(v), H.mean(0) @ v)
    assert free.eigenvalues is None


def test_at_the_logits_a_samples_hessian_is_diag_p_minus_p_pt(cnn, data):
    p = cnn.eval()(data[0]).softmax(1).detach()
    exact = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    view = View(cnn, *data)
    expression = parse("hess(loss, f(output))")
    found = torch.cat([H for _, H in view.sample_hessians(expression.of, expression.at[0], expression)])
    torch.testing.assert_close(found, exact)


def test_gradients_by_activations_are_those_of_each_samples_own_loss(cnn, data):
    p = cnn.eval()(data[0]).softmax(1).detach()
    torch.testing.assert_close(look(cnn, *data, "grad(loss, f(output))").matrix(), p - F.one_hot(data[1], C))


def test_the_kernel_is_j_jt_of_torch_funcs_jacobian(cnn, data):
    x, y = data
    other = copy.deepcopy(cnn).eval()
    other.relu.inplace = False
    parameters = {name: value.detach() for name, value in other.named_parameters()}
    J = torch.func.jacrev(lambda p: torch.func.functional_call(other, p, (x,)))(parameters)
    whole = torch.cat([part.reshape(N * C, -1) for part in J.values()], 1)
    kernel = look(cnn, x, y, "grad(f(output), theta)")
    torch.testing.assert_close(kernel.matrix(), whole @ whole.T)
    torch.testing.assert_close(look(cnn, x, y, "grad(f(output)[1], theta(fc.weight)[1])").matrix(),
                               (J["fc.weight"][:, 1, 1] @ J["fc.weight"][:, 1, 1].T))  # fmt: skip
    assert kernel.trace().value == pytest.approx(float(whole.square().sum()))


def test_least_squares_have_the_hessian_2_over_nc_times_1_kron_xtx():
    X, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % C
    network = nn.Linear(4, C, bias=False).double()

    def mean_square(logits, y):
        return (logits - F.one_hot(y, C)).square().mean(1)

    H = look(network, X, y, "hess(loss, theta)", loss=mean_square)
    exact = torch.kron(torch.eye(C, dtype=torch.float64), 2 / (N * C) * X.T @ X)
    torch.testing.assert_close(H.matrix(), exact)
    # every eigenvalue comes C times: also without the matrix
    free = look(network, X, y, "hess(loss, theta)", loss=mean_square, dense=0)
    torch.testing.assert_close(free.top(2 * C, 1e-5).values, torch.linalg.eigvalsh(exact).flip(0)[: 2 * C])


def test_softmax_regression_at_zero():
    X, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % C
    network = nn.Linear(4, C, bias=False).double()
    nn.init.zeros_(network.weight)
    p = torch.full((C,), 1 / C, dtype=torch.float64)
    exact = torch.kron(torch.diag(p) - torch.outer(p, p), X.T @ X / N)
    torch.testing.assert_close(look(network, X, y, "hess(loss, theta)").matrix(), exact)


def test_a_linear_networks_jacobian_is_the_product_of_its_weights():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)]
    network = nn.Sequential(*layers).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    product = layers[2].weight @ layers[1].weight @ layers[0].weight
    found = look(network, x, y, "grad(f(output), f(input))")
    torch.testing.assert_close(found.matrix(), product.detach())
    torch.testing.assert_close(look(network, x, y, "grad(f(1), f(0))").matrix(), layers[1].weight.detach())
    # and what is linear has no second derivative
    assert look(network, x, y, "hess(f(output)[0], f(input))").matrix().abs().max() == 0
    assert look(network, x, y, "hess(f(output)[0], theta(2))").matrix().abs().max() == 0


def test_without_biases_an_output_is_the_input_times_its_gradient():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, C, bias=False)
    ).double()
    x, y = torch.randn(N, 1, 6, 6, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
    view, expression = View(network, x, y), parse("grad(f(output), f(input))")
    J = torch.cat([J for _, J in view.jacobians(expression.of, expression.at[0], expression)])
    torch.testing.assert_close((J * x.flatten(1)[:, None]).sum(2), network(x).detach())


ALL_KINDS = [
    "loss", "f(conv1)", "f(output)[1]", "theta", "theta(conv2.weight)", "theta(fc.bias)", "grad(loss, theta)",
    "grad(loss, theta(fc.weight))", "grad(loss, f(act))", "grad(f(output), f(pool))", "grad(f(output), theta(fc))",
    "hess(loss, theta)", "hess(loss, theta(conv1), theta(conv2))", "hess(loss, f(fc))", "hess(f(output)[0], theta(fc))",
    "hess(f(conv2)[1, 0, 0], f(input))",
]  # fmt: skip


@pytest.mark.parametrize("text", ALL_KINDS)
def test_looking_leaves_no_trace_also_when_it_fails_half_way(text, cnn, data, monkeypatch):
    cnn.train()
    cnn.bn.eval()
    cnn.fc.bias.requires_grad_(False)
    cnn.conv1.weight.grad = torch.ones_like(cnn.conv1.weight)
    cnn(data[0])  # batch norm has statistics of its own now
    state = copy.deepcopy(cnn.state_dict())

    def check():
        assert all(torch.equal(value, cnn.state_dict()[name]) for name, value in state.items())
        assert [part.training for part in cnn.modules()] == modes
        assert [p.requires_grad for p in cnn.parameters()] == flags
        assert [p.grad is not None for p in cnn.parameters()] == [True, *[False] * (len(flags) - 1)]
        assert (cnn.conv1.weight.grad == 1).all()
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(part._forward_hooks for part in cnn.modules())
        assert torch.is_grad_enabled() and torch.backends.cudnn.allow_tf32

    modes = [part.training for part in cnn.modules()]
    flags = [p.requires_grad for p in cnn.parameters()]
    random = torch.get_rng_state()
    figures = look(cnn, *data, text, seed=1).figures(Wanted(top=2, trace_probes=3, probes=1, steps=3))
    undefined = ("condition", "snr", "effective", "stable", "participation", "trace_error")  # some, of some matrices
    assert all(math.isfinite(value) for name, value in figures.items() if not name.startswith(undefined))
    check()

    def fails(self, x):
        raise RuntimeError("half-way")

    monkeypatch.setattr(nn.Linear, "forward", fails)
    if not text.startswith("theta"):
        with pytest.raises(RuntimeError, match="half-way"):
            look(cnn, *data, text).figures()
        check()


@pytest.mark.parametrize("text", ALL_KINDS)
def test_how_many_samples_a_pass_takes_changes_nothing(text, cnn, data):
    wanted = Wanted(dense=0, top=2, bottom=1, tolerance=1e-6, trace_probes=2, probes=1, steps=4)
    whole = quantity(View(cnn, *data), parse(text), wanted).figures(wanted)
    parts = quantity(View(cnn, *data, chunk=5, keeps_graphs=False), parse(text), wanted).figures(wanted)
    # float64 throughout: what differs is the order of sums, 1e-16 each; a figure may divide by small differences
    assert parts == pytest.approx(whole, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("text", ["loss", "grad(loss, theta)", "hess(loss, theta)", "grad(f(output), f(input))"])
def test_averages_of_groups_weighted_by_samples_are_the_average_of_all(text, cnn, data):
    view, wanted = View(cnn, *data), Wanted()
    groups = [torch.arange(5), torch.arange(5, 7), torch.arange(7, N)]

    def value(view):
        found = quantity(view, parse(text), wanted)
        return torch.tensor([found.loss, found.accuracy]) if text == "loss" else (
            found.values if text == "grad(loss, theta)" else found.matrix())  # fmt: skip

    mixed = sum(len(group) / N * value(view.of(group)) for group in groups)
    torch.testing.assert_close(mixed, value(view))


@pytest.mark.parametrize("text", ALL_KINDS)
def test_an_average_over_one_network_is_that_network(text, cnn, data):
    wanted = Wanted(top=2, trace_probes=2, probes=1, steps=3)
    one = quantity(View(cnn, *data), parse(text), wanted)
    figures, averaged = one.figures(wanted), average([one]).figures(wanted)
    assert averaged == pytest.approx({name: figures[name] for name in averaged}, nan_ok=True, rel=1e-9, abs=1e-12)
    assert all(
        name.startswith("sample_") for name in figures.keys() - averaged.keys()
    )  # of single samples: not averaged


def test_an_average_of_operators_is_that_of_the_matrices(cnn, data):
    other = copy.deepcopy(cnn)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for text in ("hess(loss, theta)", "hess(loss, theta(conv1), theta(fc))", "grad(f(output), f(input))"):
        looks = [look(network, *data, text) for network in (cnn, other)]
        torch.testing.assert_close(average(looks).matrix(), (looks[0].matrix() + looks[1].matrix()) / 2)


def test_every_network_of_the_program_can_be_looked_at():
    for model, shape in (("MLP", (12,)), ("MNISTNet", (1, 28, 28)), ("CIFARNet", (3, 32, 32)), ("ResNet", (1, 28, 28))):
        torch.manual_seed(0)
        network = build_network(model, shape, 4)
        x, y = torch.randn(4, *shape), torch.arange(4)
        last = network.layers[-1]
        tensor = [name for name, _ in network.named_parameters()][-2]
        J = look(network, x, y, f"grad(f(output), f({last}))")
        weight = dict(network.named_parameters())[tensor].detach()
        if model in ("MLP", "ResNet"):  # the others scale what their last linear map gives
            torch.testing.assert_close(J.matrix(), weight.double(), rtol=1e-4, atol=1e-6)
        H = look(network, x, y, f"hess(loss, theta({tensor}))", dense=0)
        u, v = torch.randn(2, H.operator.size)
        uHv, vHu = float(u @ H.matvec(v)), float(v @ H.matvec(u))
        # symmetric up to float32's rounding of sums of some hundred terms
        assert uHv == pytest.approx(vHu, rel=1e-2, abs=1e-3 * float(H.matvec(v).norm() * u.norm()))
        assert look(network, x, y, "grad(loss, theta)").norms()["norm"] > 0
        kernel = look(network, x, y, f"grad(f(output), theta({tensor}))").matrix()
        assert kernel.shape == (16, 16) and torch.linalg.eigvalsh(kernel).min() > -1e-4 * kernel.diagonal().max()


class Foreign(nn.Module):
    """A network of another program: a residual connection, a module that runs twice, one that gives no tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(5, 4), nn.Linear(4, 4), nn.Tanh()
        self.pair = Pair()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.act(self.first(x))
        h = h + self.act(self.second(h))
        return self.head(self.pair(h)[0])


class Pair(nn.Module):
    def forward(self, h):
        return h, h


def test_a_network_of_another_program():
    torch.manual_seed(0)
    network = Foreign().double()
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 2
    J = look(network, x, y, "grad(f(act:1), f(act:0))").matrix()
    h = network.act(network.first(x))
    g = 1 - network.act(network.second(h)).square()
    exact = (g[:, :, None] * network.second.weight).mean(0)
    torch.testing.assert_close(J, exact.detach())
    with pytest.raises(UserError, match="act runs 2 times: say act:0 or act:1"):
        look(network, x, y, "f(act)")
    with pytest.raises(UserError, match="f\\(first\\) does not depend on f\\(head\\): it comes after it"):
        look(network, x, y, "grad(f(first), f(head))")
    with pytest.raises(UserError, match="pair does not return one tensor once"):
        look(network, x, y, "f(pair)")


WRONG = [
    ("f(conv3)", "there is no layer 'conv3'; perhaps conv"),
    ("f(conv1)[3]", "index 3 is beyond the last, 2"),
    ("f(fc)[0, 1]", "fc has 1 dimension"),
    ("theta(conv3)", "no parameter is called 'conv3'; perhaps conv"),
    ("theta(act)", "no parameter is called 'act'"),
    ("theta(fc)[0]", "an index needs one tensor, and fc has fc.weight, fc.bias"),
    ("theta(fc.weight)[0, 0, 0]", r"fc.weight has 2 dimension\(s\), not 3"),
    ("theta(fc.weight)[3]", "index 3 is beyond the last, 2"),
    ("hess(f(conv1)[0], theta)", "f\\(conv1\\)\\[0\\] has 16, give as many indices as conv1 has dimensions: 3"),
    ("grad(f(conv1), f(conv2))", "does not depend on f\\(conv2\\)"),
    ("grad(f(conv1), f(conv1))", "does not depend on"),
    ("gradients", "means several quantities"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[text for text, _ in WRONG])
def test_what_a_network_has_not_is_said_in_a_sentence(text, words, cnn, data):
    with pytest.raises(UserError, match=words):
        look(cnn, *data, text)


def test_what_a_quantity_cannot_answer_it_refuses(cnn, data):
    with pytest.raises(UserError, match=r"grad\(loss, theta\) has no spectral density"):
        look(cnn, *data, "grad(loss, theta)").density()
    with pytest.raises(UserError, match="theta has no matrix: it is no single tensor"):
        look(cnn, *data, "theta").matrix()
    with pytest.raises(UserError, match="loss has no product"):
        look(cnn, *data, "loss").matvec(torch.ones(1))
    with pytest.raises(UserError, match="a label is needed for each sample, and there are 11 for 12"):
        look(cnn, data[0], data[1][1:], "loss")


def test_what_takes_too_many_numbers_is_refused(data):
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 1_000_000), nn.Linear(1_000_000, 3))
    with pytest.raises(UserError, match=r"takes 12 × 3 × 40000003 numbers, and at most 2\^28 are held: lower"):
        look(network, data[0].float(), data[1], "grad(f(output), theta)")


def test_a_kernel_of_too_many_samples_is_refused_however_few_parameters_it_is_of(cnn, data):
    view = View(cnn, *data)
    with pytest.raises(UserError, match="takes 6000 × 3 × 6000 × 3 numbers"):
        view.refuse_large(parse("grad(f(output), theta(fc.bias))"), 6000)
    view.refuse_large(parse("grad(f(output), theta(fc.bias))"), 5000)


def test_a_network_that_mixes_samples_is_refused(data):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(),
                            nn.Linear(32, C)).double()  # fmt: skip
    with pytest.raises(UserError, match="1 normalises by the batch even in eval mode"):
        look(network, *data, "loss")


def test_what_is_not_finite_is_told(cnn, data):
    cnn.fc.weight.data[0, 0] = math.nan
    for text in ("grad(loss, theta)", "hess(loss, theta)", "f(output)", "grad(f(output), f(input))"):
        with pytest.raises(NotFinite, match="infinite or nan"):
            look(cnn, *data, text).figures()


def test_the_share_of_a_gradient_in_the_top_eigenspace(cnn, data):
    H = look(cnn, *data, "hess(loss, theta)")
    vectors = H.operator.pairs().vectors
    mixed = 3 * vectors[0] + 4 * vectors[-1]
    assert share_in(H.top(2).vectors, mixed) == pytest.approx(9 / 25)


def test_samples_that_are_there_anyway_do_not_count_as_memory_of_a_graph(cnn, data):
    x, y = (tensor.repeat(1000, *[1] * (tensor.dim() - 1)) for tensor in data)
    view = View(cnn, x[:N], y[:N])  # a few of many: they share the memory of all
    at = view.parameters(parse("theta").of, parse("theta"))
    alone = View(cnn, *data)
    sizes = [v.curvature(parse("loss").of, at, at)._graph_bytes() for v in (view, alone)]
    assert sizes[0] == sizes[1]


def test_graphs_that_do_not_fit_are_built_anew(cnn, data, monkeypatch):
    kept = look(cnn, *data, "hess(loss, theta)")
    monkeypatch.setattr("measures.derivatives.free_memory", lambda device: 1)
    anew = look(cnn, *data, "hess(loss, theta)")
    torch.testing.assert_close(anew.matrix(), kept.matrix())


def test_products_in_the_small_chunks_of_cpus_are_those_of_one(cnn, data, monkeypatch):
    x, y = (tensor.repeat(12, *[1] * (tensor.dim() - 1)) for tensor in data)
    whole = look(cnn, x, y, "hess(loss, theta)")
    monkeypatch.setattr("measures.derivatives.CPU_CHUNK", 50)
    monkeypatch.setattr("measures.derivatives.CPU_CHUNK_BYTES", 1)
    parts = look(cnn, x, y, "hess(loss, theta)")
    assert [made.operator.product.__self__.chunk for made in (whole, parts)] == [12 * N, 50]
    v = torch.randn(whole.operator.size, dtype=torch.float64)
    torch.testing.assert_close(parts.matvec(v), whole.matvec(v))


def test_a_deep_network_keeps_its_order_of_layers(cnn, data):
    shapes = list(View(cnn, *data).shapes)
    assert shapes[0] == "input" and shapes[-1] == "output"
    order = ["conv1", "bn", "act", "pool", "conv2", "relu", "drop", "fc"]
    assert [shapes.index(name) for name in order] == sorted(shapes.index(name) for name in order)
    assert all(a != b for a, b in pairwise(shapes))

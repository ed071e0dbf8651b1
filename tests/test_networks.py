"""Every network splits at every measured layer, has the published sizes, starts and resets as it should."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import convnext_tiny, resnet18

import networks
from networks import MLP, NETWORKS, CIFARNet, ConvNeXt, MNISTNet, ResNet
from run.errors import UserError
from whitebox_networks import Directions, DisjConj, Gumbel, Positive

# ConvNeXt is the slow one: a quarter of the pixels shows the same.
SHAPES = {
    "MLP": (12,),
    "MNISTNet": (1, 28, 28),
    "CIFARNet": (3, 32, 32),
    "ConvNeXt": (3, 16, 16),
    "ResNet": (3, 32, 32),
    "DisjConj": (3, 32, 32),
    "Directions": (1, 28, 28),
    "Gumbel": (3, 32, 32),
    "Positive": (3, 32, 32),
}
OPTIONS = {"MLP": {"widths": (10, 7, 5), "batch_norm": True}}


def build(name):
    return NETWORKS[name](SHAPES[name], 10, **OPTIONS.get(name, {}))


@torch.no_grad()
def disturb(network):
    """As if trained: no parameter and no statistic is what it was at construction."""
    for parameter in network.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)


@pytest.fixture(scope="module", params=list(NETWORKS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def network(name):
    """Shared by the tests of this module: those that change it work on a copy."""
    torch.manual_seed(0)
    network = build(name)
    disturb(network)
    return network.eval()


@pytest.fixture(scope="module")
def x(name):
    return torch.randn(3, *SHAPES[name], generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(2)


def parameters(network, trainable_only=False):
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trainable_only)


def same_values(module, other):
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def test_every_split_composes_to_the_network_bit_for_bit(network, x):
    logits = network(x)
    assert logits.isfinite().all()
    for layer in network.layers:
        encoder, decoder = network.get_encoder_decoder(layer)
        assert torch.equal(decoder(encoder(x)), logits), layer


@torch.no_grad()
def test_feature_extractor_returns_in_order_what_the_encoders_return(network, x):
    features = network.feature_extractor(x)
    assert tuple(features) == network.layers
    for layer, h in features.items():
        encoder, _ = network.get_encoder_decoder(layer)
        assert torch.equal(h, encoder(x)), layer


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_no_decoder_writes_into_its_input(network, x, training):
    network = copy.deepcopy(network).train(training)
    for layer, h in network.feature_extractor(x).items():
        before = h.clone()
        _, decoder = network.get_encoder_decoder(layer)
        decoder(h)
        assert torch.equal(h, before), layer


def test_encoder_and_decoder_together_hold_the_networks_own_parameters(network):
    for layer in network.layers:
        encoder, decoder = network.get_encoder_decoder(layer)
        halves = [*encoder.parameters(), *decoder.parameters()]
        assert {id(p) for p in halves} == {id(p) for p in network.parameters()}
        assert len(halves) == len(list(network.parameters()))


def test_encoder_and_decoder_are_in_the_networks_mode(network):
    for mode in (True, False):
        other = copy.deepcopy(network).train(mode)
        for part in other.get_encoder_decoder(other.layers[0]):
            assert all(module.training is mode for module in part.modules())


def test_the_last_measured_layer_is_the_input_of_what_makes_the_logits(network, x):
    inputs = []
    handle = network.get_submodule(network.readout[0]).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    network(x)
    handle.remove()
    assert torch.equal(inputs[0], network.feature_extractor(x)[network.layers[-1]])


def test_unknown_layer_is_refused_with_the_names_of_the_layers(network):
    with pytest.raises(UserError) as error:
        network.get_encoder_decoder("layer9")
    assert all(layer in str(error.value) for layer in ("layer9", *network.layers))


@torch.no_grad()
def test_compiled_network_is_measured_as_the_plain_one(network, x):
    plain, compiled = network, copy.deepcopy(network)
    torch.compiler.reset()
    compiled.compile(backend="eager", fullgraph=True)  # traced by dynamo, but computed by the same kernels
    assert torch.equal(compiled(x), plain(x))
    features = compiled.feature_extractor(x)
    for layer, h in plain.feature_extractor(x).items():
        encoder, decoder = compiled.get_encoder_decoder(layer)
        assert torch.equal(features[layer], h)
        assert torch.equal(encoder(x), h)
        assert torch.equal(decoder(h), plain(x))


def test_dimensions_are_the_shapes_of_the_features_and_asking_leaves_no_trace(name, network, x):
    network = copy.deepcopy(network).train()
    next(network.children()).eval()  # a part that is frozen stays so
    before, modes = copy.deepcopy(network), [module.training for module in network.modules()]
    random_state = torch.get_rng_state()
    shapes = networks.dimensions(network, SHAPES[name])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same_values(network, before)
    assert [module.training for module in network.modules()] == modes
    features = before.eval().feature_extractor(x)
    assert shapes == {layer: tuple(h.shape[1:]) for layer, h in features.items()}


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (lambda: MLP((12,), 2, (10, 7, 5, 4, 3)), 130 + 77 + 40 + 24 + 15 + 8),
        (lambda: MLP((1, 28, 28), 10, (100,), batch_norm=True), 78500 + 200 + 1010),
        (lambda: MNISTNet((1, 28, 28), 10), (600 + 24) + (6912 + 32) + (800 * 256 + 256) + 2570),
        (lambda: ResNet((3, 224, 224), 1000), 11_689_512),
        # 7 × 7 becomes 3 × 3, 1000 classes become 10
        (lambda: ResNet((3, 32, 32), 10), 11_689_512 - 64 * 3 * 40 - 990 * 513),
        (lambda: ConvNeXt((3, 224, 224), 1000), 28_589_128),
        # 4 × 4 becomes 3 × 3, 1000 classes become 10
        (lambda: ConvNeXt((3, 32, 32), 10), 28_589_128 - 96 * 3 * 7 - 990 * 769),
        (lambda: ConvNeXt((1, 32, 32), 10, stem="imagenet"), 28_589_128 - 96 * 2 * 16 - 990 * 769),
        (lambda: DisjConj((3, 32, 32), 2), 36_361),
        (lambda: Directions((3, 32, 32), 2), 266_881),
        (lambda: Positive((3, 32, 32), 2), 266_881),
        (lambda: Gumbel((3, 32, 32), 2), 166_021),
        # two copies of everything but the last factor
        (lambda: Gumbel((3, 32, 32), 2, branches=2), 2 * 166_020 + 1),
        # 60 parts per class instead of 2 · 60: filters, batch norm
        (lambda: DisjConj((1, 28, 28), 10), 600 * 101 + 2 * 600 + 1),
    ],
)
def test_parameter_counts(network, count):
    assert parameters(network()) == count


@pytest.mark.parametrize(("channels", "filters"), [(3, 24), (1, 8)])
def test_cifarnet_has_1_97_million_parameters(channels, filters):
    network = CIFARNet((channels, 32, 32), 10)
    group1 = 9 * filters * 64 + 9 * 64 * 64
    groups = group1 + 9 * 64 * 256 + 9 * 256 * 256 + 2 * 9 * 256 * 256
    biases = filters + 2 * (64 + 256 + 256)
    learnt = groups + biases + 256 * 10
    fixed = filters * 4 * channels + 2 * (64 + 256 + 256)  # whitening filters, batch norms' scales of 1
    assert parameters(network, trainable_only=True) == learnt
    assert parameters(network) == learnt + fixed
    assert round(learnt / 1e6, 2) == (1.97 if channels == 3 else 1.96)


MNISTNET_28 = {"conv1": (24, 12, 12), "conv2": (32, 5, 5), "hidden": (256,)}
CIFARNET_32 = {"group1": (64, 15, 15), "group2": (256, 7, 7), "group3": (256, 3, 3), "pool": (256,)}
CIFARNET_28 = {"group1": (64, 13, 13), "group2": (256, 6, 6), "group3": (256, 3, 3), "pool": (256,)}
RESNET_32 = {
    f"layer{stage}.{i}": (32 * 2**stage, 64 // 2**stage, 64 // 2**stage) for stage in (1, 2, 3, 4) for i in (0, 1)
} | {"avgpool": (512,)}
CONVNEXT_32 = {
    f"features.{2 * stage + 1}.{i}": (96 * 2**stage, 32 // 2**stage, 32 // 2**stage)
    for stage, blocks in enumerate((3, 3, 9, 3))
    for i in range(blocks)
} | {"classifier.1": (768,)}


@pytest.mark.parametrize(
    ("model", "shape", "sizes"),
    [
        (MLP, (1, 28, 28), {"hidden1": (512,), "hidden2": (256,)}),
        (MNISTNet, (1, 28, 28), MNISTNET_28),
        (MNISTNet, (3, 32, 32), {"conv1": (24, 14, 14), "conv2": (32, 6, 6), "hidden": (256,)}),
        (CIFARNet, (3, 32, 32), CIFARNET_32),
        (CIFARNet, (1, 28, 28), CIFARNET_28),
        (ResNet, (3, 32, 32), RESNET_32),
        (ConvNeXt, (3, 32, 32), CONVNEXT_32),
        (DisjConj, (3, 32, 32), {"conv": (600, 12, 12), "parts": (600,), "prototypes": (120,)}),
        (Directions, (1, 28, 28), {"conv1": (120, 4, 4), "units": (600,)}),
        (Gumbel, (3, 32, 32), {"conv1": (120, 3, 3), "units": (300,)}),
    ],
)
def test_feature_sizes(model, shape, sizes):
    assert networks.dimensions(model(shape, 10), shape) == sizes


def test_first_residual_block_of_a_cifar_image_has_65536_dimensions():
    assert math.prod(RESNET_32["layer1.0"]) == 65536


@pytest.mark.parametrize(
    ("model", "size", "options"),
    [(MNISTNet, 12, {}), (CIFARNet, 25, {}), (ConvNeXt, 8, {}), (ConvNeXt, 32, {"stem": "imagenet"})],
)
def test_smallest_image_works_and_a_smaller_one_is_refused(model, size, options):
    shape = (1, size, size + 20)
    network = model(shape, 7, **options).eval()
    assert network(torch.zeros(1, *shape)).shape == (1, 7)
    with pytest.raises(UserError, match=f"{size} × {size} pixels, but these are {size + 20} × {size - 1}"):
        model((1, size + 20, size - 1), 7, **options)


@pytest.mark.parametrize("model", [MNISTNet, CIFARNet, ResNet, ConvNeXt, Positive])
def test_convolutional_network_on_vectors_is_refused_in_one_sentence(model):
    with pytest.raises(UserError, match=rf"^-m {model.__name__} needs images, .*\(12\); use -m MLP\.$"):
        model((12,), 2)


def test_mlp_without_hidden_layers_is_a_linear_classifier_of_the_flattened_input():
    network = MLP((1, 4, 4), 3, widths=())
    x = torch.randn(5, 1, 4, 4)
    assert network.layers == ("flatten",)
    assert torch.equal(network.feature_extractor(x)["flatten"], x.flatten(1))
    encoder, decoder = network.get_encoder_decoder("flatten")
    assert torch.equal(decoder(encoder(x)), network(x))
    assert parameters(network) == 16 * 3 + 3


@pytest.mark.parametrize("nonlinearity", networks.NONLINEARITIES)
def test_mlp_is_measured_after_the_nonlinearity(nonlinearity):
    functions = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda h: h}
    functions |= {name: getattr(F, name) for name in ("relu", "gelu", "silu", "leaky_relu", "elu")}
    network = MLP((6,), 2, (4,), nonlinearity)
    x = torch.randn(5, 6)
    h = network.feature_extractor(x)["hidden1"]
    assert torch.equal(h, functions[nonlinearity](network.hidden1.linear(x)))


def test_mlp_normalises_before_the_nonlinearity():
    network = MLP((6,), 2, (4,), "tanh", batch_norm=True)  # in training mode
    x = torch.randn(50, 6)
    before = network.feature_extractor(x)["hidden1"].atanh()
    assert torch.allclose(before.mean(0), torch.zeros(4), atol=1e-5)  # float32 rounding of atanh(tanh(h))
    assert torch.allclose(before.var(0, correction=0), torch.ones(4), atol=1e-3)  # batch norm's eps of 1e-5


def test_unknown_nonlinearity_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'swish'.*tanh, relu, gelu"):
        MLP((6,), 2, (4,), "swish")


def slow_patches(images):
    """All 2 × 2 patches, one row each, cut out position by position."""
    height, width = images.shape[2:]
    corners = [(i, j) for i in range(height - 1) for j in range(width - 1)]
    return torch.cat([images[:, :, i : i + 2, j : j + 2].flatten(1) for i, j in corners])


def test_patch_covariance_is_that_of_patches_cut_out_one_by_one():
    images = torch.randn(502, 2, 3, 4) + torch.linspace(-1, 1, 4)  # more than one chunk
    expected = torch.cov(slow_patches(images).double().T, correction=0)
    # float64 sums of about 3000 numbers of order 1
    assert torch.allclose(networks.patch_covariance(images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_patches_are_uncorrelated_with_unit_variance(channels):
    smooth = F.interpolate(torch.randn(200, channels, 3, 3), size=12, mode="bilinear")
    network = CIFARNet((channels, 32, 32), 10)
    network.whiten(smooth)
    weight, half = network.whitening.weight, 4 * channels
    assert torch.equal(weight[half:], -weight[:half])

    filters = weight[:half].flatten(1).double()
    covariance = networks.patch_covariance(smooth)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)
    expected = (eigenvalues / (eigenvalues + networks.WHITENING_EPS)).diag()
    # The filters are rounded to float32 and up to 1 / sqrt(5e-4) = 45 long; the covariance is of order 1.
    assert torch.allclose(filters @ covariance @ filters.T, expected, rtol=0, atol=1e-4)


def test_whitening_filters_are_fixed_and_their_bias_is_learnt():
    whitening = CIFARNet((3, 32, 32), 10).whitening
    assert not whitening.weight.requires_grad
    assert whitening.bias.requires_grad
    assert not whitening.bias.any()


def test_whitening_starts_with_an_orthonormal_basis_and_its_negative():
    weight = CIFARNet((3, 32, 32), 10).whitening.weight.flatten(1)
    assert torch.allclose(weight[:12] @ weight[:12].T, torch.eye(12), atol=1e-6)  # float32 rounding
    assert torch.equal(weight[12:], -weight[:12])


def test_whitening_travels_in_the_state_dict():
    network, other = (CIFARNet((3, 32, 32), 10) for _ in range(2))
    network.whiten(torch.randn(20, 3, 8, 8))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.whitening.weight, network.whitening.weight)


def test_cifarnets_convolutions_start_by_passing_their_input_through():
    network = CIFARNet((3, 32, 32), 10)
    h = torch.randn(2, 24, 6, 6)
    out = network.group1.conv1(h)
    assert torch.equal(out[:, :24], h)
    assert not torch.equal(out[:, 24:48], h)


def test_cifarnets_batch_norms_have_a_bias_but_no_learnt_scale():
    norms = [module for module in CIFARNet((3, 32, 32), 10).modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 6
    for norm in norms:
        assert (norm.eps, norm.momentum) == (1e-12, 0.4)
        assert norm.bias.requires_grad
        assert not norm.weight.requires_grad
        assert (norm.weight == 1).all()


def test_cifarnets_head_starts_at_standard_deviation_1_and_is_scaled_by_a_ninth():
    network = CIFARNet((3, 32, 32), 10)
    assert network.output.weight.std().item() == pytest.approx(1, rel=1e-6)  # float32 rounding
    h = torch.randn(2, 256)
    _, decoder = network.get_encoder_decoder("pool")
    expected = h @ network.output.weight.T / 9
    assert torch.allclose(decoder(h), expected, atol=1e-5)  # float32 sums of 256 terms of order 1


@pytest.mark.parametrize(("model", "original"), [(ResNet, resnet18), (ConvNeXt, convnext_tiny)])
@torch.no_grad()
def test_imagenet_stem_is_torchvisions_network_name_by_name_and_bit_by_bit(model, original):
    network, original = model((3, 64, 64), 10, stem="imagenet").eval(), original(num_classes=10).eval()
    disturb(original)
    network.load_state_dict(original.state_dict())  # strict: the same keys and shapes
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(x), original(x))


@pytest.mark.parametrize(("model", "original"), [(ResNet, resnet18), (ConvNeXt, convnext_tiny)])
def test_small_stem_keeps_torchvisions_names(model, original):
    assert list(model((1, 32, 32), 10).state_dict()) == list(original(num_classes=10).state_dict())


@pytest.mark.parametrize(("size", "stem"), [(32, "small"), (64, "small"), (65, "imagenet")])
def test_stem_follows_the_image_size_unless_it_is_given(size, stem):
    assert networks.chosen_stem(None, (3, size, size)) == stem
    assert networks.chosen_stem("imagenet", (3, size, size)) == "imagenet"


def test_unknown_stem_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'big'.*small, imagenet"):
        ResNet((3, 32, 32), 10, stem="big")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stem", networks.STEMS)
def test_resnet_takes_one_and_three_channels_with_either_stem(channels, stem):
    network = ResNet((channels, 28, 28), 10, stem=stem).eval()
    assert network(torch.zeros(1, channels, 28, 28)).shape == (1, 10)


def poisoned(module):
    """A copy with nan in place of every value, so that one left behind is noticed."""
    module = copy.deepcopy(module)
    for value in module.state_dict().values():
        value.fill_(math.nan if value.is_floating_point() else 7)
    return module


def assert_same_distribution(value, fresh):
    """Mean and spread of two samples of n values agree within six standard errors (constants exactly)."""
    assert value.isfinite().all()
    value, fresh = value.double(), fresh.double()
    spread, n = fresh.std(correction=0), fresh.numel()
    assert (value.mean() - fresh.mean()).abs() <= 6 * spread * (2 / n) ** 0.5
    assert (value.std(correction=0) - spread).abs() <= 6 * spread / n**0.5


def test_reset_of_a_decoders_copy_leaves_no_old_value_and_draws_as_construction_does(name, network):
    decoder = poisoned(network.get_encoder_decoder(network.layers[0])[1])
    network.reset(decoder)
    fresh = build(name).get_encoder_decoder(network.layers[0])[1].state_dict()
    for key, value in decoder.state_dict().items():
        assert_same_distribution(value, fresh[key])


def test_reset_of_a_whole_copy_draws_as_construction_does(name, network):
    other = poisoned(network)
    network.reset(other)
    fresh = build(name).state_dict()
    for key, value in other.state_dict().items():
        assert_same_distribution(value, fresh[key])


def test_reset_depends_on_the_random_state_alone_and_leaves_the_network_as_it_was(network):
    before = copy.deepcopy(network)
    _, decoder = network.get_encoder_decoder(network.layers[-1])
    one, two = copy.deepcopy(decoder), poisoned(decoder)
    for part in (one, two):
        torch.manual_seed(5)
        network.reset(part)
    assert same_values(one, two)
    assert same_values(network, before)


def test_reset_keeps_fixed_parameters_fixed():
    network = CIFARNet((3, 32, 32), 10)
    other = copy.deepcopy(network)
    network.reset(other)
    flags = [[p.requires_grad for p in n.parameters()] for n in (network, other)]
    assert flags[0] == flags[1]


HEADED = {"ResNet": ("layer4.1", 512, 16), "CIFARNet": ("group3", 256, 9), "ConvNeXt": ("classifier.0", 768, 4)}
HEADED |= {"MLP": ("hidden3", 5, 1), "MNISTNet": ("hidden", 256, 1), "Positive": ("conv2", 600, 1)}


@pytest.mark.parametrize("name", HEADED)
def test_prototypes_take_the_place_of_all_that_follows_the_last_map(name):
    layer, channels, places = HEADED[name]
    network = networks.build_network(name, SHAPES[name], 10, head="prototypes", **OPTIONS.get(name, {})).eval()
    plain = NETWORKS[name](SHAPES[name], 10, **OPTIONS.get(name, {}))
    assert network.sequence[-2:] == (layer, "head") and network.layers[-1] == layer
    assert set(network.layers) <= {*plain.layers, layer}
    assert not {*plain.readout, *plain.pooling} & {key.rpartition(".")[0] for key in network.state_dict()}
    x = torch.randn(3, *SHAPES[name])
    h = network.feature_extractor(x)[layer]
    assert h.shape[1] == network.head.parts.in_channels == channels and h[0, 0].numel() == places
    encoder, decoder = network.get_encoder_decoder(layer)
    assert torch.equal(decoder(encoder(x)), network(x)) and network(x).shape == (3, 10)


def test_an_unknown_head_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'tail'.*linear, prototypes"):
        networks.build_network("MLP", (6,), 2, head="tail")

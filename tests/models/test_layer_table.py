"""Receptive fields against gradients and hand-made cases; multiply-adds in closed form."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import models
from flax_cifar.configs import common
from flax_cifar.models import blocks, layer_table, norms
from flax_cifar.run import tables
from tests import reference

RECEPTIVE_FIELDS = {"dilated": 99, "pyramid": 44, "skip_dilated": 47, "keras_base": 36}
TOTALS = {"dilated": 192_672, "pyramid": 48_656, "skip_dilated": 167_424, "keras_base": 1_172_410}

# Multiply-adds of a bias-free convolution: its parameters at every position of its output.
C = 288 + 1024 + 9216  # a separable unit beside a dilated one
MULTIPLY_ADDS = {
  "dilated": 32**2 * (864 + C + 2 * 9216)
  + (30**2 + 28**2) * (2 * 9216 + C + 2 * 9216)
  + 26**2 * (2 * 9216 + C + 2 * 18432)
  + 640,
  "pyramid": 32**2 * (432 + 4608 + 512)
  + 16**2 * (2304 + 4608)
  + 14**2 * (9216 + 512)
  + 7**2 * 2304
  + 5**2 * 4608
  + 3**2 * 18432
  + 640,
  "skip_dilated": 32**2 * (864 + 9216)
  + 16**2 * (18_432 + 1024 + 4608 + 288)
  + 8**2 * (18_432 + 2048 + 18_432 + 36_864)
  + 4**2 * 55_296
  + 960,
  "keras_base": 9 * (32**2 * 3 * 48 + 30**2 * 48**2)
  + 9 * (15**2 * 48 * 96 + 13**2 * 96**2)
  + 9 * (6**2 * 96 * 192 + 4**2 * 192**2)
  + (768 * 512 + 512 * 256 + 256 * 10),
}


def create(name, norm=None):
  """The network called `name`; `norm` is by default the published one."""
  return models.create_model(
    name=name,
    num_classes=10,
    norm=norm or ("none" if name == "keras_base" else "batch"),
    norm_arguments=common.get_config().norm,
    dropout_rate=0.0,
    init="torch",
    residual=common.get_config().model.residual,
    dtype="float32",
  )


def get_rows(model, image_shape=(32, 32, 3)):
  return {row.name: row for row in layer_table.get_layer_table(model, image_shape)}


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("name", RECEPTIVE_FIELDS)
def test_published_receptive_fields_come_from_the_table(name, norm):
  rows = layer_table.get_layer_table(create(name, norm), (32, 32, 3))
  assert layer_table.get_receptive_field(rows) == (RECEPTIVE_FIELDS[name], RECEPTIVE_FIELDS[name])


@pytest.mark.parametrize(
  ("name", "last", "size"),
  [
    ("dilated", "c4_3", 107),
    ("pyramid", "c3_3", 64),
    ("skip_dilated", "c9", 64),
  ],
)
def test_the_gradient_of_one_position_reaches_as_far_as_the_receptive_field(name, last, size):
  rng = np.random.default_rng(0)
  count = 4 if name == "pyramid" else 1  # its max-pools select random pixels
  images = rng.uniform(0.5, 1, (count, size, size, 3)).astype(np.float32)
  model = create(name, norm="none")
  shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
  # Positive weights: no ReLU is off and no two paths cancel.
  variables = jax.tree.map(
    lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) / np.prod(leaf.shape[:-1]),
    shapes,
  )

  @jax.jit
  @jax.grad
  def differentiate(images):
    _, state = model.apply(
      variables,
      images,
      False,
      capture_intermediates=lambda module, _: module.name == last,
      mutable=["intermediates"],
    )
    (features,) = state["intermediates"][last]["__call__"]
    return features[:, features.shape[1] // 2, features.shape[2] // 2].sum()

  seen = np.asarray(differentiate(images)).any((0, 3))
  for axis in (0, 1):
    positions = np.flatnonzero(seen.any(axis))
    assert positions[0] > 0
    assert positions[-1] < size - 1
    assert positions[-1] - positions[0] + 1 == RECEPTIVE_FIELDS[name]


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_follow_from_the_published_table(name):
  rows = layer_table.get_layer_table(create(name), (32, 32, 3))
  assert sum(row.multiply_adds for row in rows) == MULTIPLY_ADDS[name]


def test_dilated_has_the_published_155_million_multiply_adds():
  assert round(MULTIPLY_ADDS["dilated"] / 1e6) == 155


class Skips(nn.Module):
  """Skip additions, stride, max-pool, dilation, a bias, a kernel that is not square."""

  @nn.compact
  def __call__(self, x, train):
    a = nn.Conv(4, (3, 3), padding=1, name="a")(x)
    x = a + nn.Conv(4, (3, 3), padding=1, name="b")(nn.relu(a))
    x = nn.Conv(6, (3, 3), strides=2, padding=1, use_bias=False, name="c")(x)
    x = blocks.MaxPool(2, name="pool")(nn.relu(x))
    y = nn.Conv(6, (3, 3), kernel_dilation=2, padding=2, feature_group_count=3, name="d")(x)
    x = nn.relu(x + y)
    x = nn.Conv(5, (3, 1), padding=0, name="e")(x)
    x = blocks.GlobalAveragePool(name="mean")(x)
    return nn.Conv(2, (1, 1), name="head")(x)


def test_receptive_fields_of_a_made_up_network():
  fields = {name: row.receptive_field for name, row in get_rows(Skips(), (32, 24, 3)).items()}
  assert fields == {
    "a": layer_table.ReceptiveField((3, 3), (1, 1)),
    "b": layer_table.ReceptiveField((5, 5), (1, 1)),
    "c": layer_table.ReceptiveField((7, 7), (2, 2)),  # 5 + 2 x 1
    "pool": layer_table.ReceptiveField((9, 9), (4, 4)),  # 7 + 1 x 2
    "d": layer_table.ReceptiveField((25, 25), (4, 4)),  # 9 + 4 x 4
    "e": layer_table.ReceptiveField((33, 25), (4, 4)),  # 25 + 2 x 4 in height
    "mean": None,
    "head": None,
  }
  assert layer_table.get_receptive_field(layer_table.get_layer_table(Skips(), (32, 24, 3))) == (
    33,
    25,
  )


def test_shapes_parameters_and_multiply_adds_of_a_made_up_network():
  rows = get_rows(Skips(), (32, 24, 3)).values()
  actual = [(row.output_shape, row.parameters, row.multiply_adds) for row in rows]
  assert actual == [
    ((32, 24, 4), 27 * 4 + 4, 32 * 24 * 27 * 4),
    ((32, 24, 4), 36 * 4 + 4, 32 * 24 * 36 * 4),
    ((16, 12, 6), 36 * 6, 16 * 12 * 36 * 6),
    ((8, 6, 6), 0, 0),
    ((8, 6, 6), 18 * 6 + 6, 8 * 6 * 18 * 6),  # each of three groups reads two channels
    ((6, 6, 5), 18 * 5 + 5, 6 * 6 * 18 * 5),
    ((1, 1, 5), 0, 0),
    ((1, 1, 2), 5 * 2 + 2, 5 * 2),
  ]


class Position(nn.Module):
  """A parameter per position, which sees no pixel."""

  @nn.compact
  def __call__(self):
    return self.param("table", nn.initializers.zeros, (1, 8, 8, 4))


class ScaledBranch(nn.Module):
  """A convolution, and a scale of its own."""

  @nn.compact
  def __call__(self, x):
    y = nn.Conv(4, (3, 3), name="conv")(x)
    return self.param("scale", nn.initializers.ones, (4,)) * y


class OtherParameters(nn.Module):
  """Parameters outside the layers that the table knows."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(4, (3, 3), name="first")(x) + Position(name="position")()
    x = nn.LayerNorm(name="norm")(x + ScaledBranch(name="branch")(x))
    x = blocks.GlobalAveragePool(name="mean")(x)
    return nn.Conv(2, (1, 1), name="head")(x) * self.param("scale", nn.initializers.ones, ())


def test_parameters_outside_the_layers_have_rows():
  rows = layer_table.get_layer_table(OtherParameters(), (8, 8, 3))
  fields = [row.receptive_field and row.receptive_field.size[0] for row in rows]
  names = [(row.name, row.kind, row.parameters) for row in rows]
  assert list(zip(names, fields, strict=True)) == [
    (("first", "conv 3x3", 27 * 4 + 4), 3),
    (("position", "Position", 8 * 8 * 4), 0),
    (("branch/conv", "conv 3x3", 36 * 4 + 4), 5),
    (("branch", "ScaledBranch", 4), 5),
    (("norm", "LayerNorm", 8), 5),
    (("mean", "GlobalAveragePool", 0), None),
    (("head", "conv 1x1", 4 * 2 + 2), None),
    (("", "OtherParameters", 1), None),
  ]
  variables = OtherParameters().init(jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)
  total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  assert layer_table.summarize(rows)["parameters"] == total
  assert layer_table.get_receptive_field(rows) == (5, 5)


def test_operations_are_described_by_kernel_dilation_stride_and_groups():
  kinds = {name: row.kind for name, row in get_rows(Skips()).items()}
  assert kinds["c"] == "conv 3x3 stride 2"
  assert kinds["d"] == "conv 3x3 dilation 2 groups 3"
  assert kinds["e"] == "conv 3x1"
  assert (kinds["pool"], kinds["mean"]) == ("MaxPool", "GlobalAveragePool")


@pytest.mark.parametrize(
  ("norm", "kinds"),
  [
    ("batch", {"BatchNorm"}),
    ("ghost", {"GhostNorm"}),
    ("layer", {"LayerNorm"}),
    ("group", {"GroupNorm"}),
    ("none", set()),
  ],
)
def test_norms_have_the_names_that_the_config_chose(norm, kinds):
  rows = layer_table.get_layer_table(create("pyramid", norm), (32, 32, 3))
  assert {row.kind for row in rows if row.name.endswith("norm")} == kinds


class Chain(nn.Module):
  """One convolution after another; each is (kernel size, dilation, stride)."""

  layers: tuple[tuple[int, int, int], ...]

  @nn.compact
  def __call__(self, x, train):
    for size, dilation, stride in self.layers:
      x = nn.Conv(2, (size, size), kernel_dilation=dilation, strides=stride)(x)
    return x


@pytest.mark.parametrize(
  "layers",
  [
    ((3, 1, 2),),
    ((3, 1, 2), (3, 1, 1)),
    ((1, 1, 2), (1, 1, 3), (3, 1, 1)),
    ((3, 1, 2), (3, 1, 2), (3, 1, 2), (3, 1, 1)),
    ((5, 1, 3), (3, 2, 2), (3, 4, 1), (1, 1, 2), (5, 3, 1)),
  ],
)
def test_receptive_fields_after_strides_match_the_closed_form(layers):
  """1 plus, for each layer, (size - 1) x dilation x the product of the strides before it."""
  table = layer_table.get_layer_table(Chain(layers), (64, 48, 3))
  assert len(table) == len(layers)
  for number, (row, (size, dilation, stride)) in enumerate(zip(table, layers, strict=True)):
    strides = [layer[2] for layer in layers[:number]]
    before = [(k - 1) * d * np.prod(strides[:i]) for i, (k, d, _) in enumerate(layers[:number])]
    receptive_field = 1 + sum(before) + (size - 1) * dilation * np.prod(strides)
    jump = np.prod(strides) * stride
    assert row.receptive_field == layer_table.ReceptiveField((receptive_field,) * 2, (jump,) * 2)
    words = [f"conv {size}x{size}"]
    words += [f"dilation {dilation}"] * (dilation > 1) + [f"stride {stride}"] * (stride > 1)
    assert row.kind == " ".join(words)
    assert row.output_shape == (*(int(np.ceil(side / jump)) for side in (64, 48)), 2)
  assert layer_table.get_receptive_field(table) == (receptive_field, receptive_field)


class OneConv(nn.Module):
  """A convolution with every property that a description names."""

  @nn.compact
  def __call__(self, x, train):
    return nn.Conv(6, (3, 1), strides=2, kernel_dilation=3, feature_group_count=3)(x)


def test_a_grouped_strided_and_dilated_convolution_is_described_in_full():
  (row,) = layer_table.get_layer_table(OneConv(), (8, 8, 3))
  assert row.kind == "conv 3x1 dilation 3 stride 2 groups 3"
  assert (row.output_shape, row.parameters) == ((4, 4, 6), 3 * 6 + 6)
  assert row.multiply_adds == 4 * 4 * 3 * 6


class DenseHead(nn.Module):
  """A convolution, then dense layers with and without a bias, and a norm between them."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(4, (3, 3), strides=2, name="a")(x)
    x = nn.relu(x).reshape(len(x), -1)
    x = nn.Dense(7, name="b")(x)
    x = norms.BatchNorm(0.9, 1e-5, name="c")(nn.relu(x)[:, None, None], train)
    return nn.Dense(5, use_bias=False, name="d")(x[:, 0, 0])


def test_rows_of_dense_layers():
  rows = layer_table.get_layer_table(DenseHead(), (6, 4, 3))
  actual = [(row.name, row.kind, row.output_shape, row.parameters) for row in rows]
  assert actual == [
    ("a", "conv 3x3 stride 2", (3, 2, 4), 27 * 4 + 4),
    ("b", "dense", (7,), 3 * 2 * 4 * 7 + 7),
    ("c", "BatchNorm", (1, 1, 7), 14),
    ("d", "dense", (5,), 7 * 5),
  ]
  assert [row.multiply_adds for row in rows] == [3 * 2 * 27 * 4, 3 * 2 * 4 * 7, 0, 7 * 5]
  assert [row.receptive_field for row in rows] == [
    layer_table.ReceptiveField((3, 3), (2, 2)),
    None,
    None,
    None,
  ]
  assert layer_table.get_receptive_field(rows) == (3, 3)


class Perceptron(nn.Module):
  @nn.compact
  def __call__(self, images, train):
    return nn.Dense(3)(images.reshape(len(images), -1))


def test_a_network_without_convolutions_sees_the_whole_image():
  rows = layer_table.get_layer_table(Perceptron(), (6, 4, 3))
  assert layer_table.get_receptive_field(rows) is None


def test_squeeze_excite_sees_the_whole_image():
  residual = {"activation": "relu", "squeeze_excite": 0.25, "drop_path": 0.0}
  rows = layer_table.get_layer_table(
    reference.create_model("tiny50k", residual=residual), (32, 32, 3)
  )
  assert layer_table.get_receptive_field(rows) is None
  total = tables.format_layer_table(rows).splitlines()[-1]
  assert total.split()[-1] == "all"


def test_dense_layers_are_printed_as_seeing_the_whole_image():
  text = tables.format_layer_table(layer_table.get_layer_table(DenseHead(), (6, 4, 3)))
  (line,) = [line for line in text.splitlines() if line.startswith("b ")]
  assert line.split() == ["b", "dense", "7", "175", "168", "all"]


class Branches(nn.Module):
  """Branches that read the same array, or half of its channels; the array is not a module's."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
    narrow = nn.Conv(4, (3, 3), name="narrow")(x)
    wide = nn.Conv(4, (5, 5), name="wide")(x)
    half = nn.Conv(4, (7, 7), name="half")(x[..., 2:])
    return nn.Conv(4, (1, 1), name="after")(jnp.concatenate([narrow + wide, half], -1))


def test_branches_that_read_the_same_array_start_from_the_same_receptive_field():
  sizes = {name: row.receptive_field.size[0] for name, row in get_rows(Branches()).items()}
  assert sizes == {"stem": 3, "narrow": 5, "wide": 7, "half": 9, "after": 9}


@pytest.mark.parametrize("name", RECEPTIVE_FIELDS)
def test_the_printed_table_has_a_line_per_row_and_the_totals(name):
  rows = layer_table.get_layer_table(create(name), (32, 32, 3))
  head, _, *lines, _, total = tables.format_layer_table(rows).splitlines()
  assert " ".join(head.split()) == "layer operation output parameters multiply-adds field jump"
  assert len(lines) == len(rows)
  for line, row in zip(lines, rows, strict=True):
    assert line.split()[0] == row.name
    assert row.kind in line
    assert "x".join(map(str, row.output_shape)) in line
    assert f" {row.parameters:,} " in line
    assert f" {row.multiply_adds:,} " in line
  totals = [f"{TOTALS[name]:,}", f"{MULTIPLY_ADDS[name]:,}", str(RECEPTIVE_FIELDS[name])]
  assert total.split() == ["total", *totals]


def test_receptive_fields_that_are_not_square_are_printed_as_height_x_width():
  text = tables.format_layer_table(layer_table.get_layer_table(Skips(), (32, 24, 3)))
  (line,) = [line for line in text.splitlines() if line.startswith("e ")]
  assert line.split()[-2:] == ["33x25", "4"]
  assert text.splitlines()[-1].split()[-1] == "33x25"


def test_the_table_is_created_without_computing_activations():
  row = get_rows(create("pyramid"), (4096, 4096, 3))["c1_1/conv"]
  assert row.output_shape == (4096, 4096, 16)
  assert row.multiply_adds == 4096**2 * 432


class Between(nn.Module):
  """An operation that is not a layer, between two convolutions."""

  operation: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, images, train):
    x = blocks.Conv(4, (3, 3), name="first")(images)
    return blocks.Conv(4, (3, 3), name="second")(self.operation(x))


@pytest.mark.parametrize(
  "operation",
  [
    lambda x: nn.avg_pool(x, (2, 2)),
    lambda x: jax.jit(lambda x: nn.max_pool(x, (3, 3)))(x),
    lambda x: jax.lax.conv(x, jnp.ones((7, 7, 3, 3)), (1, 1), "SAME"),
    lambda x: x[:, ::2, ::2],
    lambda x: jnp.cumsum(x, 1),
    lambda x: jnp.einsum("nhwc,hk->nkwc", x, jnp.ones((x.shape[1], 8))),
    lambda x: x.reshape(len(x), -1, x.shape[-1]).reshape(x.shape),  # as attention has it
    lambda x: x.reshape(len(x), 1, *x.shape[1:]).reshape(x.shape),
  ],
)
def test_operations_with_an_unknown_receptive_field_are_refused(operation):
  with pytest.raises(ValueError, match=r"receptive field of .* is not known"):
    layer_table.get_layer_table(Between(operation), (7, 7, 3))


def test_known_operations_between_layers_are_followed():
  def excite(x):
    return x * nn.sigmoid(x.mean((1, 2), keepdims=True))

  for operation, expected in ((nn.relu, (5, 5)), (lambda x: x[:, 1:, :3], (5, 5)), (excite, None)):
    last = layer_table.get_layer_table(Between(operation), (7, 7, 3))[-1].receptive_field
    assert (last and last.size) == expected

"""Receptive fields against gradients and hand-made cases; multiply-adds in closed form."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from flax_cifar.layer_table import Field, format_layer_table, get_layer_table, receptive_field
from flax_cifar.models import create_model
from flax_cifar.models.blocks import GlobalAveragePool, MaxPool

FIELDS = {"dilated": 99, "pyramid": 44}

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
}


def create(name, norm="batch"):
  return create_model(
    name=name,
    num_classes=10,
    norm=norm,
    norm_arguments=common.get_config().norm,
    dropout_rate=0.0,
    init="torch",
    dtype="float32",
  )


def get_rows(model, image_shape=(32, 32, 3)):
  return {row.name: row for row in get_layer_table(model, image_shape)}


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("name", FIELDS)
def test_published_receptive_fields_come_from_the_table(name, norm):
  rows = get_layer_table(create(name, norm), (32, 32, 3))
  assert receptive_field(rows) == (FIELDS[name], FIELDS[name])


@pytest.mark.parametrize(
  ("name", "last", "size"), [("dilated", "c4_3", 107), ("pyramid", "c3_3", 64)]
)
def test_the_gradient_of_one_position_reaches_as_far_as_the_receptive_field(name, last, size):
  rng = np.random.default_rng(0)
  images = rng.uniform(0.5, 1, (4 if name == "pyramid" else 1, size, size, 3)).astype(np.float32)
  model = create(name, norm="none")
  shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
  # Positive weights: no ReLU is off and no two paths cancel. Max-pools choose at random.
  variables = jax.tree.map(
    lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) / np.prod(leaf.shape[:3]),
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
    assert positions[-1] - positions[0] + 1 == FIELDS[name]


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_follow_from_the_published_table(name):
  rows = get_layer_table(create(name), (32, 32, 3))
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
    x = MaxPool(2, name="pool")(nn.relu(x))
    y = nn.Conv(6, (3, 3), kernel_dilation=2, padding=2, feature_group_count=3, name="d")(x)
    x = nn.relu(x + y)
    x = nn.Conv(5, (3, 1), padding=0, name="e")(x)
    x = GlobalAveragePool(name="mean")(x)
    return nn.Conv(2, (1, 1), name="head")(x)


def test_fields_and_jumps_of_a_made_up_network():
  fields = {name: row.field for name, row in get_rows(Skips(), (32, 24, 3)).items()}
  assert fields == {
    "a": Field((3, 3), (1, 1)),
    "b": Field((5, 5), (1, 1)),
    "c": Field((7, 7), (2, 2)),  # 5 + 2 x 1
    "pool": Field((9, 9), (4, 4)),  # 7 + 1 x 2
    "d": Field((25, 25), (4, 4)),  # 9 + 4 x 4
    "e": Field((33, 25), (4, 4)),  # 25 + 2 x 4 in height
    "mean": None,
    "head": None,
  }
  assert receptive_field(get_layer_table(Skips(), (32, 24, 3))) == (33, 25)


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


def test_operations_are_described_by_kernel_dilation_and_groups():
  kinds = {name: row.kind for name, row in get_rows(Skips()).items()}
  assert kinds["c"] == "conv 3x3"
  assert kinds["d"] == "conv 3x3 dilation 2 groups 3"
  assert kinds["e"] == "conv 3x1"
  assert (kinds["pool"], kinds["mean"]) == ("MaxPool", "GlobalAveragePool")


class Branches(nn.Module):
  """Branches that read one array, or half its channels, which no module has made."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
    narrow = nn.Conv(4, (3, 3), name="narrow")(x)
    wide = nn.Conv(4, (5, 5), name="wide")(x)
    half = nn.Conv(4, (7, 7), name="half")(x[..., 2:])
    return nn.Conv(4, (1, 1), name="after")(jnp.concatenate([narrow + wide, half], -1))


def test_branches_that_read_the_same_array_see_the_same_field():
  sizes = {name: row.field.size[0] for name, row in get_rows(Branches()).items()}
  assert sizes == {"stem": 3, "narrow": 5, "wide": 7, "half": 9, "after": 9}


@pytest.mark.parametrize("name", FIELDS)
def test_the_printed_table_has_a_line_per_row_and_the_totals(name):
  rows = get_layer_table(create(name), (32, 32, 3))
  head, _, *lines, _, total = format_layer_table(rows).splitlines()
  assert " ".join(head.split()) == "layer operation output parameters multiply-adds field jump"
  assert len(lines) == len(rows)
  for line, row in zip(lines, rows, strict=True):
    assert line.split()[0] == row.name
    assert row.kind in line
    assert "x".join(map(str, row.output_shape)) in line
    assert f" {row.parameters:,} " in line
    assert f" {row.multiply_adds:,} " in line
  parameters = {"dilated": "192,672", "pyramid": "48,656"}[name]
  assert total.split() == ["total", parameters, f"{MULTIPLY_ADDS[name]:,}", str(FIELDS[name])]


def test_fields_that_are_not_square_are_printed_as_height_x_width():
  text = format_layer_table(get_layer_table(Skips(), (32, 24, 3)))
  (line,) = [line for line in text.splitlines() if line.startswith("e ")]
  assert line.split()[-2:] == ["33x25", "4"]
  assert text.splitlines()[-1].split()[-1] == "33x25"


def test_the_table_is_made_without_computing_anything():
  row = get_rows(create("pyramid"), (4096, 4096, 3))["c1_1/conv"]
  assert row.output_shape == (4096, 4096, 16)
  assert row.multiply_adds == 4096**2 * 432

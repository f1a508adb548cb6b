"""The networks against the tables their sources published, and against float64 NumPy."""

import importlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors, models
from flax_cifar.models import blocks, dropout, ghost, layer_table
from flax_cifar.run import config as config_lib
from tests import numpy_networks, reference
from tests.configs import test_configs

F32 = jnp.dtype(jnp.float32)
NORMS_WITH_PARAMETERS = ("batch", "layer", "group", "ghost")


def unit(operation, side, channels, parameters):
  """The rows of conv and norm: (operation, output shape, parameters)."""
  shape = (*side, channels) if isinstance(side, tuple) else (side, side, channels)
  return [(operation, shape, parameters), ("norm", shape, 2 * channels)]


def pool(side, channels):
  return ("MaxPool", (side, side, channels), 0)


def separable(side, channels=32, features=32):
  """Depthwise separable."""
  return [
    (f"conv 3x3 groups {channels}", (side, side, channels), 9 * channels),
    *unit("conv 1x1", side, features, channels * features),
  ]


def spatial(side, channels, features):
  """Spatially separable."""
  return [
    ("conv 3x1", (side, side, features), 3 * channels * features),
    *unit("conv 1x3", side, features, 3 * features * features),
  ]


def two_groups(second, taps, side, channels, features):
  """A 3x3 group, and a second group that has `taps` weights per channel."""
  half = (side, side, features // 2)
  return [
    ("conv 3x3", half, 9 * (channels // 2) * (features // 2)),
    (second, half, taps * (channels // 2) * (features // 2)),
    ("norm", (side, side, features), 2 * features),
  ]


def block(side, last_channels, last_parameters):
  """C2, C3 and C4 of `dilated`."""
  return [
    *unit("conv 3x3", side, 32, 9216),
    *unit("conv 3x3 dilation 2", side, 32, 9216),
    *separable(side),
    *unit("conv 3x3 dilation 4", side, 32, 9216),
    *unit("conv 3x3", side, last_channels, last_parameters),
    *unit("conv 3x3 dilation 8", side, last_channels, last_parameters),
  ]


def pooled(side, channels, features):
  """Convolution, pool, norm."""
  conv, norm = unit("conv 3x3", side, features, 9 * channels * features)
  half = (side // 2, side // 2, features)
  return [conv, pool(side // 2, features), (norm[0], half, norm[2])]


def residual(side, channels, features):
  """Depthwise, norm, pointwise, norm."""
  return [
    *unit(f"conv 3x3 groups {channels}", side, channels, 9 * channels),
    *unit("conv 1x1", side, features, channels * features),
  ]


def strided(side, channels, features):
  """The residual unit that halves the sides."""
  first, *rest = residual(side, channels, features)
  return [(first[0].replace(" groups", " stride 2 groups"), *first[1:]), *rest]


def tiny(widths, units):
  """A convolution, then residual units in three stages, the last two begin with a strided one."""
  first, second, third = widths
  return [
    *unit("conv 3x3", 32, first, 9 * 3 * first),
    *(units[0] * residual(32, first, first)),
    *strided(16, first, second),
    *(units[1] * residual(16, second, second)),
    *strided(8, second, third),
    *(units[2] * residual(8, third, third)),
    ("norm", (8, 8, third), 2 * third),
    ("GlobalAveragePool", (1, 1, third), 0),
    ("conv 1x1", (1, 1, 10), 10 * third + 10),
  ]


def wide(kind, widths):
  """Patches of 2x2 pixels, then groups of two convolutions; only a whitening has a bias."""
  rows = [("conv 2x2", (31, 31, 24), 4 * 3 * 24 + (24 if kind == "sprint" else 0))]
  for side, channels, features in zip((31, 15, 7), (24, *widths), widths, strict=False):
    rows += pooled(side, channels, features)
    rows += unit("conv 3x3", side // 2, features, 9 * features**2)
  pooled_row = ("GlobalAveragePool", (1, 1, widths[-1]), 0)
  return [*rows, pooled_row, ("conv 1x1", (1, 1, 10), 10 * widths[-1])]


def tiny_norms(widths, units):
  """The parameters of all norms."""
  first, second, third = widths
  inside = sum(2 * number * width for number, width in zip(units, widths, strict=True))
  return 2 * (first + inside + (first + second) + (second + third) + third)


# In execution order. The widths of `keras_fcn` and `five_convs` are ours.
PUBLISHED = {
  "dilated": [
    *unit("conv 3x3", 32, 32, 864),
    *separable(32),
    *unit("conv 3x3 dilation 2", 32, 32, 9216),
    *unit("conv 3x3", 32, 32, 9216),
    *unit("conv 3x3 dilation 4", 32, 32, 9216),
    *block(30, 32, 9216),
    *block(28, 32, 9216),
    *block(26, 64, 18432),
    ("GlobalAveragePool", (1, 1, 64), 0),
    ("conv 1x1", (1, 1, 10), 640),
  ],
  "pyramid": [
    *unit("conv 3x3", 32, 16, 432),
    *unit("conv 3x3", 32, 32, 4608),
    ("conv 1x1", (32, 32, 16), 512),
    pool(16, 16),
    *unit("conv 3x3", 16, 16, 2304),
    *unit("conv 3x3", 16, 32, 4608),
    *unit("conv 3x3", 14, 32, 9216),
    ("conv 1x1", (14, 14, 16), 512),
    pool(7, 16),
    *unit("conv 3x3", 7, 16, 2304),
    *unit("conv 3x3", 5, 32, 4608),
    *unit("conv 3x3", 3, 64, 18432),
    ("GlobalAveragePool", (1, 1, 64), 0),
    ("conv 1x1", (1, 1, 10), 640),
  ],
  "ghost": [
    *unit("conv 3x3", 32, 32, 896),
    *unit("conv 3x3", 32, 32, 9248),
    pool(16, 32),
    *unit("conv 1x1", 18, 16, 528),
    *unit("conv 3x1", (18, 20), 64, 3136),
    *unit("conv 1x3", 20, 64, 12_352),
    pool(10, 64),
    *unit("conv 1x1", 12, 32, 2080),
    *unit("conv 3x3 dilation 2", 12, 128, 36_992),
    *unit("conv 3x3 dilation 2", 10, 128, 147_584),
    pool(5, 128),
    ("conv 3x3", (5, 5, 256), 295_168),
    ("conv 3x3", (5, 5, 64), 147_520),
    ("GlobalAveragePool", (1, 1, 64), 0),
    ("conv 1x1", (1, 1, 10), 650),
  ],
  "skip": [
    *unit("conv 3x3", 32, 24, 648),
    *unit("conv 3x3", 32, 24, 5184),
    ("conv 1x1", (32, 32, 8), 192),
    pool(16, 8),
    *unit("conv 3x3", 16, 32, 2304),
    *unit("conv 3x3", 16, 32, 9216),
    *unit("conv 3x3", 16, 32, 9216),
    ("conv 1x1", (16, 16, 8), 256),
    pool(8, 8),
    *unit("conv 3x3", 8, 32, 2304),
    *unit("conv 3x3", 8, 32, 9216),
    *unit("conv 3x3", 8, 32, 9216),
    ("GlobalAveragePool", (1, 1, 32), 0),
    ("conv 1x1", (1, 1, 10), 320),
  ],
  "skip_dilated": [
    *unit("conv 3x3", 32, 32, 864),
    *unit("conv 3x3", 32, 32, 9216),
    *unit("conv 3x3 stride 2", 16, 64, 18_432),
    ("conv 1x1", (16, 16, 16), 1024),
    *unit("conv 3x3 dilation 2", 16, 32, 4608),
    *unit("conv 3x3 groups 32", 16, 32, 288),
    *unit("conv 3x3 stride 2", 8, 64, 18_432),
    ("conv 1x1", (8, 8, 32), 2048),
    *unit("conv 3x3", 8, 64, 18_432),
    *unit("conv 3x3", 8, 64, 36_864),
    *unit("conv 3x3 stride 2", 4, 96, 55_296),
    ("GlobalAveragePool", (1, 1, 96), 0),
    ("conv 1x1", (1, 1, 10), 960),
  ],
  "keras_base": [
    *unit("conv 3x3", 32, 48, 9 * 3 * 48 + 48),
    *unit("conv 3x3", 30, 48, 9 * 48 * 48 + 48),
    pool(15, 48),
    *unit("conv 3x3", 15, 96, 9 * 48 * 96 + 96),
    *unit("conv 3x3", 13, 96, 9 * 96 * 96 + 96),
    pool(6, 96),
    *unit("conv 3x3", 6, 192, 9 * 96 * 192 + 192),
    *unit("conv 3x3", 4, 192, 9 * 192 * 192 + 192),
    pool(2, 192),
    ("dense", (512,), 768 * 512 + 512),
    ("dense", (256,), 512 * 256 + 256),
    ("dense", (10,), 256 * 10 + 10),
  ],
  "keras_fcn": [
    *unit("conv 3x3", 32, 32, 9 * 3 * 32),
    *unit("conv 3x3", 32, 32, 9 * 32 * 32),
    ("conv 1x1", (32, 32, 24), 32 * 24),
    pool(16, 24),
    *unit("conv 3x3", 16, 64, 9 * 24 * 64),
    *unit("conv 3x3", 16, 64, 9 * 64 * 64),
    ("conv 1x1", (16, 16, 32), 64 * 32),
    pool(8, 32),
    *unit("conv 3x3", 8, 128, 9 * 32 * 128),
    *unit("conv 3x3", 8, 128, 9 * 128 * 128),
    ("GlobalAveragePool", (1, 1, 128), 0),
    ("conv 1x1", (1, 1, 10), 128 * 10),
  ],
  "five_convs": [
    *unit("conv 3x3", 32, 32, 9 * 3 * 32),
    *unit("conv 3x3", 32, 32, 9 * 32 * 32),
    ("conv 1x1", (32, 32, 32), 32 * 32),
    pool(16, 32),
    *spatial(16, 32, 64),
    *spatial(16, 64, 64),
    *separable(16, 64, 96),
    *separable(16, 96, 96),
    ("conv 1x1", (16, 16, 64), 96 * 64),
    pool(8, 64),
    *two_groups("conv 5x5", 25, 8, 64, 128),
    *two_groups("conv 5x5", 25, 8, 128, 128),
    *two_groups("conv 3x3 dilation 2", 9, 8, 128, 128),
    *two_groups("conv 3x3 dilation 2", 9, 8, 128, 128),
    ("GlobalAveragePool", (1, 1, 128), 0),
    ("conv 1x1", (1, 1, 10), 128 * 10),
  ],
  "sprint": wide("sprint", (64, 128, 128)),
  "sprint_wide": wide("sprint", (64, 256, 256)),
  "tiny50k": tiny((32, 48, 64), (3, 4, 5)),
  "tiny100k": tiny((48, 64, 96), (3, 4, 5)),
  "tiny200k": tiny((64, 96, 128), (3, 4, 6)),
  "tiny700k": tiny((96, 192, 256), (3, 4, 6)),
  "wide": wide("wide", (64, 128, 128)),
}
# The others differ in numbers of channels and units alone.
CASES = [*((name, reference.NORMS[name]) for name in reference.DISTINCT), ("keras_base", "batch")]
NORM_PARAMETERS = {
  "dilated": 21 * 64 + 2 * 128,
  "pyramid": 480,
  "keras_base": 4 * (48 + 96 + 192),
  "keras_fcn": 4 * (32 + 64 + 128),
  "five_convs": 4 * (32 + 64 + 96 + 128 + 128),
  "ghost": 992,
  "skip": 480,
  "skip_dilated": 960,
  "sprint": 2 * (2 * 64 + 4 * 128),
  "sprint_wide": 2 * (2 * 64 + 4 * 256),
  "tiny50k": tiny_norms((32, 48, 64), (3, 4, 5)),
  "tiny100k": tiny_norms((48, 64, 96), (3, 4, 5)),
  "tiny200k": tiny_norms((64, 96, 128), (3, 4, 6)),
  "tiny700k": tiny_norms((96, 192, 256), (3, 4, 6)),
  "wide": 2 * (2 * 64 + 4 * 128),
}
UNITS = {  # norms
  "dilated": 1 + 2 * 11,
  "pyramid": 8,
  "keras_base": 6,
  "keras_fcn": 6,
  "five_convs": 10,
  "ghost": 8,
  "skip": 8,
  "skip_dilated": 9,
  "sprint": 6,
  "sprint_wide": 6,
  "tiny50k": 2 + 2 * 14,
  "tiny100k": 2 + 2 * 14,
  "tiny200k": 2 + 2 * 15,
  "tiny700k": 2 + 2 * 15,
  "wide": 6,
}
RATE = 0.125
DROPOUT = {name: [RATE] * units for name, units in UNITS.items()}
DROPOUT["ghost"] = [0, *[RATE] * 7, 0, 0]  # the first unit and those without norm have none
# A residual unit has two norms and one dropout.
DROPOUT |= {f"tiny{size}": [RATE] * (1 + 14) for size in ("50k", "100k")}
DROPOUT |= {f"tiny{size}": [RATE] * (1 + 15) for size in ("200k", "700k")}
DROPOUT["keras_base"] = [0, 0, RATE] * 3 + [2 * RATE] * 2  # after the pools and the dense layers
# 1 plus, for each layer, (kernel size - 1) x dilation x the product of the strides before it.
RECEPTIVE_FIELDS = {
  "dilated": 99,
  "pyramid": 44,
  "keras_base": 1 + (2 + 2 + 1) + 2 * (2 + 2 + 1) + 4 * (2 + 2 + 1),
  "keras_fcn": 1 + (2 + 2 + 1) + 2 * (2 + 2 + 1) + 4 * (2 + 2),
  "five_convs": 1 + (2 + 2 + 1) + 2 * (2 + 2 + 2 + 2 + 1) + 4 * (4 + 4 + 4 + 4),
  # 3x3 3x3 pool, 1x1 3x1 1x3 pool, 1x1 and two dilated, pool, 3x3 3x3: jumps 1, 2, 4 and 8.
  "ghost": 1 + (2 + 2 + 1) + 2 * (2 + 1) + 4 * (4 + 4 + 1) + 8 * (2 + 2),
  "skip": 1 + (2 + 2 + 1) + 2 * (2 + 2 + 2 + 1) + 4 * (2 + 2 + 2),
  "skip_dilated": 1 + (2 + 2 + 2) + 2 * (4 + 2 + 2) + 4 * (2 + 2 + 2),
  **{f"tiny{size}": 1 + 2 * (1 + 3 + 1) + 4 * (4 + 1) + 8 * 5 for size in ("50k", "100k")},
  **{f"tiny{size}": 1 + 2 * (1 + 3 + 1) + 4 * (4 + 1) + 8 * 6 for size in ("200k", "700k")},
  **dict.fromkeys(("wide", "sprint", "sprint_wide"), 1 + 4 + 2 * 5 + 4 * 5 + 8 * 2),
}


def get_rows(name, norm):
  """The published rows, without those of norms if `norm` is "none"."""
  return [row for row in PUBLISHED[name] if norm != "none" or row[0] != "norm"]


def get_total(name, norm):
  """The published total, plus or minus the parameters of the norms that `norm` adds or removes."""
  change = (norm != "none") - (reference.NORMS[name] != "none")
  return reference.TOTALS[name] + change * NORM_PARAMETERS[name]


@pytest.mark.parametrize(
  ("name", "norm"),
  [
    *[(name, norm) for name in reference.DISTINCT for norm in ("batch", "group", "none")],
    *[(name, "batch") for name in reference.SCALED],
  ],
)
def test_rows_are_the_published_ones_in_execution_order(name, norm):
  rows = layer_table.get_layer_table(reference.create_model(name, norm=norm), (32, 32, 3))
  actual = [
    ("norm" if row.kind.endswith("Norm") else row.kind, row.output_shape, row.parameters)
    for row in rows
  ]
  assert actual == get_rows(name, norm)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_rows_add_up_to_the_published_total(name):
  assert (
    sum(parameters for _, _, parameters in get_rows(name, reference.NORMS[name]))
    == reference.TOTALS[name]
  )
  norms = [parameters for kind, _, parameters in PUBLISHED[name] if kind == "norm"]
  assert (len(norms), sum(norms)) == (UNITS[name], NORM_PARAMETERS[name])


@pytest.mark.parametrize("norm", ["layer", "ghost"])
@pytest.mark.parametrize("name", reference.DISTINCT)
def test_the_parameters_add_up_to_the_published_total_with_every_norm(name, norm):
  """Those that the rows above are not compared with."""
  assert reference.count_parameters(reference.create_model(name, norm=norm)) == get_total(
    name, norm
  )


def test_ghosts_scales_are_fixed_but_counted():
  model = reference.create_model("ghost", norm="ghost", train_scale=False)
  leaves = jax.tree_util.tree_leaves_with_path(reference.get_variable_shapes(model)["params"])
  fixed = [leaf.size for path, leaf in leaves if path[-1].key == "fixed_scale"]
  assert (len(fixed), sum(fixed)) == (8, 496)
  assert sum(leaf.size for _, leaf in leaves) == reference.TOTALS["ghost"]
  rows = layer_table.get_layer_table(model, (32, 32, 3))
  assert [row.parameters for row in rows] == [count for _, _, count in PUBLISHED["ghost"]]


def test_skip_has_its_other_published_totals():
  assert (
    reference.count_parameters(reference.create_model("skip", norm="group", num_groups=4)) == 48_552
  )
  assert (
    reference.count_parameters(reference.create_model("skip", norm="layer", affine=False)) == 48_072
  )


@pytest.mark.parametrize("name", RECEPTIVE_FIELDS)
def test_the_receptive_field_is_that_of_the_formula(name):
  rows = layer_table.get_layer_table(reference.create_model(name), (32, 32, 3))
  assert layer_table.get_receptive_field(rows) == (RECEPTIVE_FIELDS[name], RECEPTIVE_FIELDS[name])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_dropout_is_where_published_and_norms_update_their_statistics_in_training(name, norm):
  model, calls = reference.create_model(name, norm=norm, dropout_rate=RATE, num_classes=7), []

  def record(next_fun, args, kwargs, context):
    if isinstance(context.module, dropout.Dropout) and context.method_name == "__call__":
      calls.append((context.module.rate, args[1]))
    return next_fun(*args, **kwargs)

  variables = reference.get_variable_shapes(model)
  apply = partial(
    model.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
  )
  with nn.intercept_methods(record):
    logits, changed = jax.eval_shape(apply, variables, jnp.zeros((2, 32, 32, 3)))
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  assert calls == [(rate, True) for rate in DROPOUT[name]]
  statistics = {key: value for key, value in variables.items() if key == "batch_stats"}
  assert jax.tree.structure(changed) == jax.tree.structure(statistics)
  assert len(jax.tree.leaves(changed)) == (0 if norm == "none" else 2 * UNITS[name])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_logits_equal_the_published_network_written_in_numpy(name, norm):
  model = reference.create_model(name, norm=norm)
  variables = reference.draw_variables(model)
  images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
  logits = jax.jit(partial(model.apply, train=False))(variables, images)
  expected = numpy_networks.evaluate(name, variables, images)
  assert expected.std() > 0.1
  assert (logits.shape, logits.dtype) == (expected.shape, jnp.float32)
  np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("side", [4, 5, 7, 8, 11])
def test_ghosts_average_pool_uses_only_whole_windows_of_four(side):
  x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
  windows = [
    np.float64(x)[:, i : i + 4, j : j + 4].mean((1, 2))
    for i in range(0, side - 3, 4)
    for j in range(0, side - 3, 4)
  ]
  kept = np.asarray(ghost.keep_whole_windows(jnp.asarray(x), 4), np.float64)
  np.testing.assert_allclose(kept.mean((1, 2)), np.mean(windows, 0), atol=1e-12)


def test_ghost_names_images_too_small_for_its_average_pool():
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  with pytest.raises(ValueError, match=r"too small .*3x3 pixels left and needs 4"):
    jax.eval_shape(
      partial(reference.create_model("ghost").init, train=False), jax.random.key(0), images
    )


@pytest.mark.parametrize(("name", "norm"), [CASES[1], *CASES[-3:]])
def test_in_bfloat16_variables_and_logits_are_float32_and_logits_are_close(name, norm):
  model = reference.create_model(name, norm=norm, dtype="bfloat16", dropout_rate=0.0)
  variables = reference.draw_variables(model)
  images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
  apply = partial(model.apply, train=True, mutable=["batch_stats"])
  trained, changed = jax.eval_shape(apply, variables, images)
  shapes = (reference.get_variable_shapes(model), trained, changed)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {F32}
  logits = jax.jit(partial(model.apply, train=False))(variables, images)
  expected = numpy_networks.evaluate(name, variables, images)
  assert logits.dtype == F32
  assert (logits != expected.astype(np.float32)).any()
  np.testing.assert_allclose(logits, expected, atol=0.1 * np.std(expected))


def test_an_unknown_dtype_is_an_error_that_lists_the_choices():
  message = r"compute_dtype='bfloat61' is unknown; .*float32, bfloat16.*'bfloat16'"
  with pytest.raises(errors.UserError, match=message):
    reference.create_model("pyramid", dtype="bfloat61")


def test_an_unknown_network_is_an_error_that_lists_the_choices():
  message = (
    r"model\.name='piramid' is unknown; .*dilated, pyramid, keras_base, keras_fcn, five_convs, "
    r"ghost, skip, skip_dilated.*'pyramid'"
  )
  with pytest.raises(errors.UserError, match=message):
    reference.create_model("piramid")


def test_squeeze_and_excitation_adds_two_layers_to_each_unit():
  plain = reference.create_model("tiny50k")
  model = reference.create_model("tiny50k", residual={"squeeze_excite": 0.25})
  inputs = 3 * [32] + [32, *4 * [48]] + [48, *5 * [64]]  # channels of each unit's depthwise norm
  added = sum(2 * c * (c // 4) + c // 4 + c for c in inputs)
  assert reference.count_parameters(model) == reference.count_parameters(plain) + added
  rows = layer_table.get_layer_table(model, (32, 32, 3))
  assert sum(row.parameters for row in rows) == reference.count_parameters(model)
  assert rows[-1].receptive_field is None


def test_a_gate_doubles_the_pointwise_layers_and_their_norms():
  plain, model = (
    reference.create_model("tiny50k", residual={"activation": name}) for name in ("relu", "glu")
  )
  layers = [*4 * [(32, 32)], (32, 48), *4 * [(48, 48)], (48, 64), *5 * [(64, 64)]]
  added = sum(ins * outs + 2 * outs for ins, outs in layers[1:])
  assert reference.count_parameters(model) == reference.count_parameters(plain) + added


def test_drop_path_grows_from_unit_to_unit():
  model = reference.create_model("tiny50k", residual={"activation": "silu", "drop_path": 0.2})
  rates = []

  def watch(next_fn, args, kwargs, context):
    unit = context.module
    is_call = context.method_name == "__call__"
    if is_call and isinstance(unit, blocks.ResidualSeparableUnit):
      assert unit.activation == "silu"
      if unit.stride == 1:
        rates.append(unit.drop_path)
    return next_fn(*args, **kwargs)

  with nn.intercept_methods(watch):
    reference.get_variable_shapes(model)
  np.testing.assert_allclose(rates, np.arange(12) * 0.2 / 11)


@pytest.mark.parametrize(
  ("name", "residual", "message"),
  [
    ("tiny50k", {"activation": "rely"}, r"residual\.activation='rely'.*'relu'"),
    ("tiny50k", {"drop_path": 1.0}, r"residual\.drop_path=1\.0.*below 1"),
    (
      "pyramid",
      {"activation": "gelu"},
      r"activation='gelu'.*'relu' for.*'pyramid'; tiny50k",
    ),
    ("tiny50k", {"squeeze_excite": 1.5}, r"residual\.squeeze_excite=1\.5.*a fraction"),
    ("pyramid", {"squeeze_excite": 0.5}, r"residual\.squeeze_excite=0\.5.*0\.0 for.*'pyramid'"),
    ("pyramid", {"drop_path": 0.1}, r"residual\.drop_path=0\.1.*0\.0 for.*'pyramid'"),
  ],
)
def test_options_of_residual_units_are_checked(name, residual, message):
  with pytest.raises(errors.UserError, match=message):
    reference.create_model(name, residual=residual)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_an_impossible_dropout_rate_is_named(rate):
  with pytest.raises(errors.UserError, match=rf"model\.dropout_rate={rate} .*below 1"):
    reference.create_model("pyramid", dropout_rate=rate)


@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_keras_base_takes_dropout_rates_below_a_half_only(rate):
  """The rate after the dense layers is twice as high."""
  with pytest.raises(ValueError, match=rf"dropout_rate={rate} .*below 0\.5.*dense"):
    reference.get_variable_shapes(
      reference.create_model("keras_base", norm="none", dropout_rate=rate)
    )


def test_every_network_is_tested_here():
  tables = (
    PUBLISHED,
    reference.NORMS,
    reference.TOTALS,
    NORM_PARAMETERS,
    UNITS,
    DROPOUT,
    RECEPTIVE_FIELDS,
    numpy_networks.NETWORKS,
  )
  for tested in tables:
    assert set(models.MODELS) == set(tested)


@pytest.mark.parametrize(
  "name",
  test_configs.NAMES,
)
def test_every_config_names_a_network_and_a_norm_that_are_tested_here(name):
  config = importlib.import_module(f"flax_cifar.configs.{name}").get_config()
  assert config.model.name in PUBLISHED
  assert config.model.norm in (*NORMS_WITH_PARAMETERS, "none")
  model = config_lib.create_model(config, num_classes=10)
  assert reference.count_parameters(model) == get_total(config.model.name, config.model.norm)

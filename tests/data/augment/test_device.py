"""Device augmentation against Albumentations: pixels, distributions, and the inputs of a draw."""

import functools
import inspect
import random

import albumentations as A
import cv2
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import stats

from flax_cifar import errors
from flax_cifar.configs import common
from flax_cifar.data.augment import arguments as arguments_lib
from flax_cifar.data.augment import device as device_lib
from flax_cifar.data.augment import device_pixels, device_random
from flax_cifar.data.augment import host as host_lib
from flax_cifar.parallel import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures("optimized")

MEAN = (0.49139968, 0.48215841, 0.44653091)
S9_OPS = ("horizontal_flip", "shift_scale_rotate", "coarse_dropout")
WILD = {"shift": 0.5, "scale": 0.5, "rotate": 180.0}
STRONG = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5}
COLORED = {"border": "fill", "fill": (125, 30, 200)}
DRAWS = 2000


def get_arguments(name, **changes):
  return arguments_lib.resolve_arguments(
    name, common.get_config().augment[name].to_dict() | changes, MEAN
  )


def get_all_arguments(changes):
  config = common.get_config().augment.to_dict()
  return {name: config[name] | changes.get(name, {}) for name in device_lib.DEVICE_OPS}


def create(ops, **changes):
  return jax.jit(device_lib.create_device_augment(ops=ops, mean=MEAN, **get_all_arguments(changes)))


@functools.cache
def create_s9():
  return create(S9_OPS)


@functools.cache
def make_images(count=200, height=32, width=32):
  """One half is noise; the other half is blurred with a little noise, like photographs."""
  rng = np.random.default_rng(0)
  shape = (count // 2, height, width, 3)
  noise = rng.integers(0, 256, shape, dtype=np.uint8)
  blurred = [cv2.GaussianBlur(image, (0, 0), 2) for image in rng.normal(size=shape)]
  blurred = 127 + 500 * np.stack(blurred) + rng.normal(0, 3, shape)
  return np.concatenate([noise, blurred.clip(0, 255).astype(np.uint8)])


def run_host(name, images, **changes):
  """The images as Albumentations augments them, and the parameters it drew, as arrays."""
  transform = host_lib.OPS[name](**get_arguments(name, **changes))
  compose, outputs, drawn = A.Compose([transform]), [], []
  for number, image in enumerate(images):
    generator = np.random.default_rng((7, number))
    compose.set_random_state(generator, random.Random(int(generator.integers(1 << 63))))
    outputs.append(compose(image=image)["image"])
    drawn.append(DECODERS[name](transform.params))
  return np.stack(outputs), {key: np.array([params[key] for params in drawn]) for key in drawn[0]}


def decode_affine(params):
  (a, b, x), (c, d, y), _ = params["matrix"]
  height, width = params["shape"][:2]
  center_x, center_y = (width - 1) / 2, (height - 1) / 2
  return {
    "shift_x": np.rint(a * center_x + b * center_y + x - center_x),
    "shift_y": np.rint(c * center_x + d * center_y + y - center_y),
    "scale_x": np.hypot(a, c),
    "scale_y": np.hypot(b, d),
    "angle": np.rad2deg(np.arctan2(-c, a)),
  }


def decode_holes(params):
  left, top, _, _ = params["holes"].T
  return {"top": top, "left": left}


def select(*keys):
  return lambda params: {key: params[key] for key in keys}


DECODERS = {
  "horizontal_flip": select(),
  "shift_scale_rotate": decode_affine,
  "rotate": lambda params: {"angle": decode_affine(params)["angle"]},
  "random_crop": select("top", "left"),
  "coarse_dropout": decode_holes,
  "color_jitter": select("brightness", "contrast", "saturation", "hue", "order"),
  "trivial_augment": select("kind", "level"),
}


def apply_on_device(name, images, params, **changes):
  op = device_lib.DEVICE_OPS[name](**get_arguments(name, **changes))
  params = {
    key: jnp.asarray(value, jnp.float32 if value.dtype.kind == "f" else jnp.int32)
    for key, value in params.items()
  }
  apply = jax.jit(
    lambda images, params: device_pixels.unpack(op.apply(device_pixels.pack(images), **params))
  )
  return np.asarray(apply(images, params))


def difference(one, other):
  return np.abs(one.astype(np.int16) - other)


# ---- Pixels, with the parameters that Albumentations drew


@pytest.mark.parametrize(
  ("name", "changes", "size"),
  [
    ("horizontal_flip", {"p": 1.0}, (32, 32)),
    ("random_crop", {"padding": 4, "border": "reflect"}, (32, 32)),
    ("random_crop", {"padding": 9, **COLORED}, (24, 40)),
    ("random_crop", {"padding": 11, "border": "reflect"}, (5, 4)),  # reflected more than once
    ("coarse_dropout", {"p": 1.0}, (32, 32)),
    ("coarse_dropout", {"p": 1.0, "holes": 3, "height": 5, "fill": (1, 2, 3)}, (24, 40)),
  ],
)
def test_pixels_match_albumentations(name, changes, size):
  images = make_images(200, *size)
  expected, params = run_host(name, images, **changes)
  np.testing.assert_array_equal(apply_on_device(name, images, params, **changes), expected)


@pytest.mark.parametrize(
  ("name", "changes", "size"),
  [
    ("shift_scale_rotate", {"border": "reflect"}, (32, 32)),
    ("shift_scale_rotate", COLORED, (24, 40)),
    ("shift_scale_rotate", {"border": "reflect", **WILD}, (24, 40)),
    ("shift_scale_rotate", {**COLORED, **WILD}, (32, 32)),
    ("rotate", {"border": "reflect", "limit": 6.0}, (32, 32)),
    ("rotate", {**COLORED, "limit": 90.0}, (32, 32)),
    ("rotate", {**COLORED, "limit": 8.0, "interpolation": "nearest"}, (32, 32)),
  ],
)
def test_affine_pixels_match_albumentations(name, changes, size):
  images = make_images(200, *size)
  expected, params = run_host(name, images, p=1.0, **changes)
  found = difference(apply_on_device(name, images, params, p=1.0, **changes), expected)
  assert found.max() <= 1
  assert (found > 0).mean() < 1e-4


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_nearest_rotation_matches_torchvision(size):
  """torchvision rotates with PIL."""
  images = make_images(200, *size)
  angles = np.random.default_rng(0).uniform(-180, 180, len(images))
  expected = [Image.fromarray(i).rotate(a) for i, a in zip(images, angles, strict=True)]
  changes = {"border": "fill", "fill": "black", "interpolation": "nearest"}
  found = apply_on_device("rotate", images, {"angle": angles}, **changes)
  assert (found != expected).any(-1).mean() < 1e-3  # where a point is halfway between two pixels


@pytest.mark.parametrize("kept", [*STRONG, "all"])
def test_jitter_pixels_match_albumentations(kept):
  """Each part alone is exact; several together may be off by one where float32 rounds."""
  images = make_images()
  changes = {key: value if kept in (key, "all") else 0.0 for key, value in STRONG.items()}
  expected, params = run_host("color_jitter", images, p=1.0, **changes)
  found = difference(apply_on_device("color_jitter", images, params, p=1.0, **changes), expected)
  assert (expected != images).mean() > 0.5
  assert (found > 0).mean() < (3e-4 if kept == "all" else 1e-5)
  assert (found > 1).mean() < 1e-4


@pytest.mark.parametrize(
  ("changes", "size", "most"),
  [
    ({"border": "reflect", "interpolation": "bilinear"}, (32, 32), 1e-4),
    ({**COLORED, "interpolation": "bilinear"}, (24, 40), 1e-4),
    ({**COLORED, "interpolation": "nearest"}, (32, 32), 1e-3),  # halfway between two pixels
    ({"border": "fill", "fill": "mean", "strength": 0.3}, (32, 32), 1e-3),
  ],
)
def test_trivial_pixels_match_albumentations(changes, size, most):
  images = make_images(400, *size)
  expected, params = run_host("trivial_augment", images, **changes)
  found = difference(apply_on_device("trivial_augment", images, params, **changes), expected)
  for number, name in enumerate(arguments_lib.TRIVIAL_KINDS):
    chosen = params["kind"] == number
    assert chosen.sum() > 10
    assert (found[chosen] > 1).mean() < most, name
    exact = name in ("identity", "shift_x", "shift_y", "posterize", "solarize")
    assert (found[chosen] > 0).mean() <= (0 if exact else 1e-3), name
    assert (expected[chosen] == images[chosen]).all() == (name == "identity")


@pytest.mark.parametrize("level", [-1.0, -0.4, 0.3])
def test_trivial_changes_are_those_of_pillow(level):
  """Shears about the center with the nearest pixel, bits and inversions."""
  images, shear, center = make_images(), arguments_lib.TRIVIAL_FACTOR * level, 16
  color = (125, 30, 200)
  affine = {"method": Image.Transform.AFFINE, "fillcolor": color, "size": (32, 32)}
  bits, threshold = 8 - round(6 * abs(level)), int(np.ceil(255 * (1 - abs(level))))
  references = {
    "shear_x": lambda x: x.transform(data=(1, -shear, shear * center, 0, 1, 0), **affine),
    "shear_y": lambda x: x.transform(data=(1, 0, 0, -shear, 1, shear * center), **affine),
    "posterize": lambda x: ImageOps.posterize(x, bits),
    "solarize": lambda x: ImageOps.solarize(x, threshold),
  }
  for name, reference in references.items():
    expected = np.stack([np.asarray(reference(Image.fromarray(image))) for image in images])
    number = arguments_lib.TRIVIAL_KINDS.index(name)
    params = {"kind": np.full(len(images), number), "level": np.full(len(images), level)}
    found = apply_on_device("trivial_augment", images, params, border="fill", fill=color)
    assert (found != expected).any(-1).mean() < 2e-2, name  # halfway between two pixels


def test_identity_changes_no_bit():
  images = make_images()
  zero, one = np.zeros(len(images)), np.ones(len(images))
  params = {"shift_x": zero, "shift_y": zero, "scale_x": one, "scale_y": one, "angle": zero}
  for border in ("reflect", "fill"):
    found = apply_on_device("shift_scale_rotate", images, params, border=border)
    np.testing.assert_array_equal(found, images)


def test_unpack_reverses_pack():
  images = make_images()
  np.testing.assert_array_equal(
    device_pixels.unpack(device_pixels.pack(jnp.asarray(images))), images
  )


# ---- Distributions


def draw_on_device(name, *, epoch=0, **changes):
  """For each of DRAWS examples: whether the op is applied, and its parameters."""
  op = device_lib.DEVICE_OPS[name](**get_arguments(name, **changes))
  key, example = jax.random.key(5), jnp.arange(DRAWS)
  uniforms = device_random.draw_uniforms(
    key, jnp.int32(epoch), example, redraw=[op.redraw] * op.columns
  )
  applied, params = op.draw(uniforms, jnp.int32(epoch), (32, 32))
  return np.asarray(applied), {key: np.asarray(value) for key, value in params.items()}


def as_columns(params):
  """One number per example and parameter; a permutation is read as a number in base 4."""
  columns = {}
  for key, values in params.items():
    if key == "order":
      values = values @ 4 ** np.arange(4)
    for number, column in enumerate(np.reshape(values, (len(values), -1)).T):
      columns[key, number] = column.astype(np.float64)
  return columns


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("shift_scale_rotate", {"p": 1.0}),
    ("rotate", {"p": 1.0}),
    ("random_crop", {}),
    ("coarse_dropout", {"p": 1.0, "holes": 2}),
    ("color_jitter", {"p": 1.0}),
    ("trivial_augment", {}),
  ],
)
def test_parameters_are_distributed_as_albumentations_draws_them(name, changes):
  _, params = run_host(name, np.zeros((DRAWS, 32, 32, 3), np.uint8), **changes)
  host, device = as_columns(params), as_columns(draw_on_device(name, **changes)[1])
  assert host.keys() == device.keys()
  for key, expected in host.items():
    values = np.unique(expected)
    if values.size < 50:
      assert set(np.unique(device[key])) == set(values)
      counts = [[(drawn == v).sum() for v in values] for drawn in (expected, device[key])]
      assert stats.chi2_contingency(counts).pvalue > 1e-4, key
    else:
      assert stats.ks_2samp(expected, device[key]).pvalue > 1e-4, key


@pytest.mark.parametrize(
  "name", ["shift_scale_rotate", "random_crop", "coarse_dropout", "trivial_augment"]
)
def test_parameters_are_independent(name):
  applied, params = draw_on_device(name)
  columns = np.array([applied, *as_columns(params).values()], float)
  columns = columns[columns.std(1) > 0]
  correlation = np.corrcoef(columns) - np.eye(len(columns))
  assert np.abs(correlation).max() < 4.5 / np.sqrt(DRAWS)


@pytest.mark.parametrize(
  "name", ["horizontal_flip", "rotate", "coarse_dropout", "color_jitter", "trivial_augment"]
)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_probability_is_kept(name, p):
  rate = draw_on_device(name, p=p)[0].mean()
  assert abs(rate - p) <= 4.5 * np.sqrt(p * (1 - p) / DRAWS)


def test_ops_are_applied_independently():
  """The colors of the image tell which ops were applied."""
  image = np.full((32, 32, 3), 50, np.uint8)
  image[:, 16:] = 200
  augment = create(S9_OPS, coarse_dropout={"fill": (0, 255, 0)})
  count = 2048
  images = jnp.broadcast_to(image, (count, 32, 32, 3))
  out = np.asarray(augment(images, jax.random.key(3), 0, jnp.arange(count)))
  hole = (out == (0, 255, 0)).all(-1)
  # Interpolation across the edge in the middle gives other values; the hole cannot hide it all.
  warped = ((out[..., 0] != 50) & (out[..., 0] != 200) & ~hole).any((1, 2))
  rest = np.ma.masked_array(out[..., 0], hole)
  flipped = rest[..., :12].max((1, 2)) == 200
  combinations = 4 * hole.any((1, 2)) + 2 * warped + flipped.filled(False)
  assert stats.chisquare(np.bincount(combinations, minlength=8)).pvalue > 1e-4


def test_uniforms_are_uniform_and_never_one():
  redraw = [True] * 3 + [False]
  draw = jax.jit(functools.partial(device_random.draw_uniforms, redraw=redraw))
  first, second = (np.asarray(draw(jax.random.key(0), epoch, jnp.arange(5000))) for epoch in (0, 1))
  assert first.min() >= 0
  assert first.max() <= 1 - 2**-23
  for column in first.T:
    assert stats.kstest(column, "uniform").pvalue > 1e-4
  together = np.concatenate([first.T, second.T[:3]])
  assert np.abs(np.corrcoef(together) - np.eye(7)).max() < 4.5 / np.sqrt(5000)
  np.testing.assert_array_equal(first[:, 3], second[:, 3])


# ---- The inputs of a draw


def test_a_draw_depends_only_on_key_epoch_and_example():
  """The position in the batch, the other images and the batch size have no effect."""
  augment, images = create_s9(), make_images()[:64]
  key, example = jax.random.key(1), np.arange(64) * 700
  whole = np.asarray(augment(images, key, 3, example))
  shuffled = np.random.default_rng(0).permutation(64)
  other = np.asarray(augment(images[shuffled], key, 3, example[shuffled]))
  np.testing.assert_array_equal(other, whole[shuffled])
  part = np.asarray(augment(images[40:], key, 3, example[40:]))
  np.testing.assert_array_equal(part, whole[40:])


@pytest.mark.parametrize(("seed", "epoch", "first"), [(2, 3, 0), (1, 4, 0), (1, 3, 1)])
def test_another_key_epoch_or_example_gives_another_draw(seed, epoch, first):
  augment, images = create_s9(), make_images()[:64]
  one = np.asarray(augment(images, jax.random.key(1), 3, np.arange(64)))
  other = np.asarray(augment(images, jax.random.key(seed), epoch, first + np.arange(64)))
  # Two draws agree where neither applies anything, 1/64 of the time, or both only flip.
  assert (one != other).any((1, 2, 3)).mean() > 0.8


def test_a_batch_split_over_devices_gives_the_same_without_communication():
  mesh, images, key = mesh_lib.create_mesh(4), make_images()[:64], jax.random.key(1)
  augment = device_lib.create_device_augment(ops=S9_OPS, mean=MEAN, **get_all_arguments({}))
  split, whole = mesh_lib.split_batch(mesh), mesh_lib.replicated(mesh)
  step = jax.jit(augment, in_shardings=(split, whole, whole, split), out_shardings=split)
  arguments = (images, key, jnp.int32(0), jnp.arange(64))
  np.testing.assert_array_equal(step(*arguments), create_s9()(*arguments))
  compiled = step.lower(*arguments).compile().as_text()
  assert not any(word in compiled for word in ("all-gather", "all-to-all", "collective-permute"))


def test_shape_and_type_are_kept():
  for name in device_lib.DEVICE_OPS:
    augment = device_lib.create_device_augment(ops=(name,), mean=MEAN, **get_all_arguments({}))
    images = jax.ShapeDtypeStruct((6, 20, 28, 3), jnp.uint8)
    example = jax.ShapeDtypeStruct((6,), jnp.int32)
    out = jax.eval_shape(augment, images, jax.random.key(0), jnp.int32(0), example)
    assert (out.shape, out.dtype) == (images.shape, images.dtype), name


def test_an_image_without_a_batch_axis_is_refused():
  pytest.importorskip("beartype")
  with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'images'"):
    create_s9()(make_images()[0], jax.random.key(0), 0, np.arange(1))


def test_probability_zero_changes_no_bit():
  augment = create(S9_OPS, **{name: {"p": 0.0} for name in S9_OPS})
  images = make_images()[:64]
  np.testing.assert_array_equal(augment(images, jax.random.key(0), 0, np.arange(64)), images)


def test_ops_are_applied_in_their_order():
  """The crop moves a part of the hole out of the image only if it comes after the hole."""
  white = np.full((64, 32, 32, 3), 255, np.uint8)
  changes = {
    "random_crop": {"padding": 4, "border": "fill", "fill": (9, 9, 9)},
    "coarse_dropout": {"p": 1.0, "fill": (1, 2, 3), "height": 30, "width": 30},
  }
  holes = []
  for ops in (("random_crop", "coarse_dropout"), ("coarse_dropout", "random_crop")):
    out = np.asarray(create(ops, **changes)(white, jax.random.key(0), 0, np.arange(64)))
    holes.append((out == (1, 2, 3)).all(-1).sum((1, 2)))
  assert (holes[0] == 900).all()
  assert (holes[1] < 900).any()


def test_alternating_flip_alternates_with_the_epochs():
  augment, images = create(("alternating_flip",)), make_images()
  key, example = jax.random.key(4), np.arange(len(images))
  epochs = [np.asarray(augment(images, key, epoch, example)) for epoch in range(3)]
  flipped = (epochs[0] != images).any((1, 2, 3))
  np.testing.assert_array_equal(epochs[0][flipped], images[flipped][:, :, ::-1])
  np.testing.assert_array_equal(epochs[1], epochs[0][:, :, ::-1])
  np.testing.assert_array_equal(epochs[2], epochs[0])
  assert abs(draw_on_device("alternating_flip")[0].mean() - 0.5) < 4.5 * 0.5 / np.sqrt(DRAWS)
  other = np.asarray(augment(images, jax.random.key(5), 0, example))
  assert (other != epochs[0]).any()


# ---- Both backends take the same arguments


def test_backends_have_the_same_ops_and_arguments():
  assert set(host_lib.OPS) == set(device_lib.DEVICE_OPS) == set(arguments_lib.RULES)
  for name, op in device_lib.DEVICE_OPS.items():
    arguments = set(inspect.signature(op).parameters)
    assert arguments == set(inspect.signature(host_lib.OPS[name]).parameters), name
    assert arguments == set(common.get_config().augment[name]), name


def test_without_ops_there_is_no_augmentation():
  assert device_lib.create_device_augment(ops=(), mean=MEAN, **get_all_arguments({})) is None


@pytest.mark.parametrize(
  "create_augment", [host_lib.create_host_augment, device_lib.create_device_augment]
)
@pytest.mark.parametrize(
  ("op", "change", "message"),
  [
    ("horizontal_flip", {"p": 1.5}, "augment.horizontal_flip.p=1.5"),
    ("shift_scale_rotate", {"shift": 1.5}, "augment.shift_scale_rotate.shift=1.5"),
    ("shift_scale_rotate", {"border": "wrap"}, "augment.shift_scale_rotate.border='wrap'"),
    ("rotate", {"limit": 181.0}, "augment.rotate.limit=181.0"),
    ("rotate", {"interpolation": "cubic"}, "augment.rotate.interpolation='cubic'"),
    ("rotate", {"fill": (0, 0, 256)}, r"\(0, 0, 256\)"),
    ("random_crop", {"padding": 0}, "augment.random_crop.padding=0"),
    ("random_crop", {"border": "wrap"}, "augment.random_crop.border='wrap'"),
    ("coarse_dropout", {"width": 0}, "augment.coarse_dropout.width=0"),
    ("coarse_dropout", {"fill": (0.5, 0, 0)}, r"\(0.5, 0, 0\)"),
    ("color_jitter", {"brightness": -0.1}, "augment.color_jitter.brightness=-0.1"),
    ("color_jitter", {"hue": 0.6}, "augment.color_jitter.hue=0.6"),
    ("trivial_augment", {"strength": 1.5}, "augment.trivial_augment.strength=1.5"),
  ],
)
def test_bad_values_are_quoted(create_augment, op, change, message):
  with pytest.raises(errors.UserError, match=message):
    create_augment(ops=(op,), mean=MEAN, **get_all_arguments({op: change}))


@pytest.mark.parametrize(
  "create_augment", [host_lib.create_host_augment, device_lib.create_device_augment]
)
def test_unknown_op_is_named(create_augment):
  with pytest.raises(errors.UserError, match=r"'random_corp'.*Did you mean 'random_crop'"):
    create_augment(ops=("random_corp",), mean=MEAN, **get_all_arguments({}))

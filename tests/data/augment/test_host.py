"""Host augmentation: distributions of the drawn parameters, pixels against OpenCV, streams."""

import albumentations as A
import cv2
import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.configs import common
from flax_cifar.data.augment import arguments as arguments_lib
from flax_cifar.data.augment import host

MEAN = (0.49139968, 0.48215841, 0.44653091)
S9_OPS = ("horizontal_flip", "shift_scale_rotate", "coarse_dropout")


def create(ops, **changes):
  config = common.get_config().augment.to_dict()
  arguments = {name: config[name] | changes.get(name, {}) for name in host.OPS}
  return host.create_host_augment(ops=ops, mean=MEAN, **arguments)


def image(seed=0):
  return np.random.default_rng(seed).integers(1, 256, (32, 32, 3), dtype=np.uint8)


def test_without_ops_there_is_no_augmentation():
  assert create(()) is None


def test_ops_are_applied_independently():
  """With the same seed for each transform, either all of them or none would be applied."""
  flip_only = create(("horizontal_flip", "coarse_dropout"))
  seen = {}
  source = image()
  for example in range(400):
    out = flip_only(source, (0, 0, example))
    hole = (out == 0).any() or (out == arguments_lib.get_fill("fill", "mean", MEAN)).all(
      -1
    ).sum() >= 256
    kept = out[:, :, 0] == source[:, :, 0]
    flipped = kept.mean() < 0.5
    seen[flipped, hole] = seen.get((flipped, hole), 0) + 1
  # Each of the four combinations has probability 1/4; five standard deviations are 43.
  assert set(seen) == {(False, False), (False, True), (True, False), (True, True)}
  assert all(abs(count - 100) < 43 for count in seen.values()), seen


def test_the_result_depends_only_on_the_stream():
  augment, other = create(S9_OPS), create(S9_OPS)
  forward = [augment(image(), (0, 1, i)) for i in range(20)]
  backward = [other(image(), (0, 1, i)) for i in reversed(range(20))][::-1]
  np.testing.assert_array_equal(forward, backward)


@pytest.mark.parametrize("stream", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_seed_epoch_and_example_all_matter(stream):
  augment = create(S9_OPS)
  runs = [[augment(image(), (0, 0, 10 * i)), None] for i in range(8)]
  for i, pair in enumerate(runs):
    base = np.array((0, 0, 10 * i)) + stream
    pair[1] = augment(image(), tuple(int(v) for v in base))
  assert any((a != b).any() for a, b in runs)


def test_flip_is_exact():
  augment = create(("horizontal_flip",), horizontal_flip={"p": 1.0})
  np.testing.assert_array_equal(augment(image(), (0, 0, 0)), image()[:, ::-1])


def test_probability_is_kept():
  augment = create(("horizontal_flip",), horizontal_flip={"p": 0.3})
  flips = sum((augment(image(), (0, 0, i)) != image()).any() for i in range(1000))
  assert abs(flips - 300) < 5 * np.sqrt(1000 * 0.3 * 0.7)


def test_dropout_makes_one_square_hole_of_the_named_fill():
  white = np.full((32, 32, 3), 255, np.uint8)
  rows, columns = [], []
  augment = create(("coarse_dropout",), coarse_dropout={"p": 1.0})
  for example in range(600):
    hole = (augment(white, (0, 0, example)) == (125, 122, 113)).all(-1)
    ys, xs = np.nonzero(hole)
    assert hole.sum() == 256
    assert np.ptp(ys) == np.ptp(xs) == 15
    rows.append(ys.min())
    columns.append(xs.min())
  for starts in (rows, columns):  # uniform on 0..16
    counts = np.bincount(starts, minlength=17)
    assert counts.size == 17
    assert ((counts - 600 / 17) ** 2 / (600 / 17)).sum() < 45  # chi-square(16) at 1e-4


@pytest.mark.parametrize(
  ("fill", "expected"),
  [("black", (0, 0, 0)), ("mean", (125, 122, 113)), ((1, 2, 3), (1, 2, 3))],
)
def test_fills(fill, expected):
  assert arguments_lib.get_fill("fill", fill, MEAN) == expected
  white = np.full((32, 32, 3), 255, np.uint8)
  out = create(("coarse_dropout",), coarse_dropout={"p": 1.0, "fill": fill})(white, (0, 0, 0))
  assert (out == np.uint8(expected)).all(-1).sum() == 256


def inverse_warp(source, matrix):
  """Warps `source` with OpenCV; `matrix` maps source to target, with pixel centers at integers."""
  return cv2.warpAffine(source, matrix[:2], (32, 32), borderMode=cv2.BORDER_REFLECT_101)


def affine(tx, ty, sx, sy, degrees):
  """Scale, rotate counter-clockwise as displayed, then shift, all about the center."""
  a, c = np.deg2rad(degrees), 15.5
  to, back = np.eye(3), np.eye(3)
  to[:2, 2], back[:2, 2] = -c, c + np.array([tx, ty])
  rotate = np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])
  return back @ rotate @ np.diag([sx, sy, 1.0]) @ to


@pytest.mark.parametrize(
  ("changes", "parameters"),
  [
    ({"shift": 0.0, "scale": 0.0, "rotate": 6.0}, "rotate"),
    ({"shift": 0.09, "scale": 0.0, "rotate": 0.0}, "shift"),
    ({"shift": 0.0, "scale": 0.09, "rotate": 0.0}, "scale"),
  ],
)
def test_shift_scale_rotate_stays_within_its_limits(changes, parameters):
  """Recovers each drawn parameter by search and compares the pixels with OpenCV's."""
  smooth = cv2.GaussianBlur(image(3), (7, 7), 2)
  augment = create(("shift_scale_rotate",), shift_scale_rotate={"p": 1.0} | changes)
  grids = {
    "rotate": [(0, 0, 1, 1, d) for d in np.linspace(-6, 6, 241)],
    "shift": [(x, y, 1, 1, 0) for x in range(-4, 5) for y in range(-4, 5)],
    "scale": [
      (0, 0, x, y, 0) for x in np.linspace(0.91, 1.09, 37) for y in np.linspace(0.91, 1.09, 37)
    ],
  }
  warped = np.array([inverse_warp(smooth, affine(*p)) for p in grids[parameters]], np.int16)
  found = []
  for example in range(40):
    out = augment(smooth, (0, 0, example)).astype(np.int16)
    error = np.abs(warped - out).mean((1, 2, 3))
    assert error.min() < 0.6, "no parameters within the limits give these pixels"
    found.append(grids[parameters][int(error.argmin())])
  found = np.array(found, float)
  if parameters == "shift":
    assert np.abs(found[:, :2]).max() <= 2  # 0.09 * 32 = 2.88, cut to whole pixels
    assert np.unique(found[:, 0]).size == 5
    assert not np.array_equal(found[:, 0], found[:, 1])
  elif parameters == "rotate":
    assert found[:, 4].min() < -3
    assert found[:, 4].max() > 3
  else:
    assert np.ptp(found[:, 2]) > 0.09
    assert np.abs(np.corrcoef(found[:, 2], found[:, 3])[0, 1]) < 0.6  # drawn independently


@pytest.mark.parametrize("border", ["reflect", "fill"])
def test_rotation_is_about_the_center_within_its_limit(border):
  smooth = cv2.GaussianBlur(image(3), (7, 7), 2)
  augment = create(("rotate",), rotate={"p": 1.0, "limit": 8.0, "border": border})
  mode = {"reflect": cv2.BORDER_REFLECT_101, "fill": cv2.BORDER_CONSTANT}[border]
  angles = np.linspace(-8, 8, 321)
  matrices = [affine(0, 0, 1, 1, angle)[:2] for angle in angles]
  warped = [cv2.warpAffine(smooth, matrix, (32, 32), borderMode=mode) for matrix in matrices]
  found = []
  for example in range(30):
    error = np.abs(np.int16(warped) - augment(smooth, (0, 0, example))).mean((1, 2, 3))
    assert error.min() < 0.6
    found.append(angles[error.argmin()])
  assert min(found) < -4
  assert max(found) > 4


@pytest.mark.parametrize("border", ["reflect", "fill"])
def test_crop_matches_pad_and_random_crop(border):
  """Each result is one of the 9 x 9 possible crops, and every row and column occurs."""
  fill, mode = (9.0, 8.0, 7.0), {"reflect": cv2.BORDER_REFLECT_101, "fill": cv2.BORDER_CONSTANT}
  padded = A.Pad(4, border_mode=mode[border], fill=fill, p=1)(image=image())["image"]
  augment = create(("random_crop",), random_crop={"border": border, "fill": fill})
  crops = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
  starts = [crops[augment(image(), (0, 0, example)).tobytes()] for example in range(300)]
  assert {y for y, _ in starts} == {x for _, x in starts} == set(range(9))


def test_alternating_flip_alternates_with_the_epochs():
  augment = create(("alternating_flip", "coarse_dropout"), coarse_dropout={"p": 0.0})
  first = np.array([is_flipped(augment, (5, 0, example)) for example in range(400)])
  assert abs(first.sum() - 200) < 5 * 10
  for epoch in (1, 2, 3):
    now = np.array([is_flipped(augment, (5, epoch, example)) for example in range(400)])
    np.testing.assert_array_equal(now, first ^ (epoch % 2 == 1))
  other_seed = [is_flipped(augment, (6, 0, example)) for example in range(400)]
  assert (first != other_seed).any()


def is_flipped(augment, stream):
  out = augment(image(), stream)
  assert np.array_equal(out, image()) or np.array_equal(out, image()[:, ::-1])
  return not np.array_equal(out, image())


def test_jitter_stays_within_its_limits():
  """On gray images only the brightness has an effect; its factor lies between 0.7 and 1.3."""
  gray = np.full((32, 32, 3), 100, np.uint8)
  limits = {"brightness": 0.3, "contrast": 0.5, "saturation": 0.5, "hue": 0.1, "p": 1.0}
  augment = create(("color_jitter",), color_jitter=limits)
  values = []
  for example in range(300):
    out = augment(gray, (0, 0, example)).astype(int)
    assert np.ptp(out) <= 1
    values.append(out.mean())
  assert 68 <= min(values) < 75
  assert 125 < max(values) <= 131


@pytest.mark.parametrize(
  ("op", "change", "message"),
  [
    ("coarse_dropout", {"fill": "grey"}, r"augment\.coarse_dropout\.fill='grey'"),
    ("rotate", {"fill": (1, 2)}, r"augment\.rotate\.fill=\(1, 2\)"),
    ("coarse_dropout", {"holes": 0}, "augment.coarse_dropout.holes=0"),
    ("coarse_dropout", {"height": 0}, "augment.coarse_dropout.height=0"),
    ("shift_scale_rotate", {"border": "wrap"}, "border='wrap'"),
    ("shift_scale_rotate", {"shift": 1.5}, "shift=1.5"),
    ("shift_scale_rotate", {"rotate": -1.0}, "rotate=-1.0"),
    ("horizontal_flip", {"p": 1.5}, "augment.horizontal_flip.p=1.5"),
  ],
)
def test_bad_values_are_quoted(op, change, message):
  with pytest.raises(errors.UserError, match=message):
    create((op,), **{op: change})


def test_unknown_op_is_named():
  with pytest.raises(errors.UserError, match=r"'horizontal_flop'.*Did you mean 'horizontal_flip'"):
    create(("horizontal_flop",))


def test_unknown_argument_is_an_error():
  with pytest.raises(TypeError, match="max_holes"):
    create(("coarse_dropout",), coarse_dropout={"max_holes": 1})

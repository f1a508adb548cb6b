"""Corruptions against formulas in float64 and the standard library."""

import colorsys
import io

import numpy as np
import PIL.Image
import pytest

from flax_cifar import errors
from flax_cifar.data import corruptions

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
SMOOTH = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (2, 32, 32, 3))


def corrupt(name, severity, images=IMAGES):
  corrupted = corruptions.corrupt(images, name, severity)
  assert (corrupted.dtype, corrupted.shape) == (np.uint8, images.shape)
  return corrupted


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_the_last_severity_is_stronger_and_each_repeats(name):
  distances = []
  for severity in corruptions.SEVERITIES:
    corrupted = corrupt(name, severity, SMOOTH)
    np.testing.assert_array_equal(corrupt(name, severity, SMOOTH), corrupted)
    distances.append(np.abs(corrupted.astype(float) - SMOOTH).mean())
  assert 0 < distances[0] < distances[-1]


def test_the_strengths_are_those_of_the_source():
  """The numbers of its program for CIFAR-10; every name is one of ours."""
  assert {name: strengths for name, (_, strengths) in corruptions.CORRUPTIONS.items()} == {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "jpeg": (80, 65, 58, 50, 40),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
  }


def test_jpeg_has_the_quality_of_its_severity():
  file = io.BytesIO()
  PIL.Image.fromarray(IMAGES[1]).save(file, "JPEG", quality=58)
  np.testing.assert_array_equal(corrupt("jpeg", 3)[1], np.asarray(PIL.Image.open(file)))


def test_noise_has_the_standard_deviation_of_the_source():
  gray = np.full((20, 32, 32, 3), 128, np.uint8)
  noise = corrupt("noise", 3, gray).astype(float) - 128
  assert noise.std() == pytest.approx(0.08 * 255, rel=0.02)
  assert noise.mean() == pytest.approx(-0.5, abs=0.3)  # it truncates


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_images_are_corrupted_in_blocks_as_all_at_once(monkeypatch, name):
  images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
  whole = corrupt(name, 3, images)
  monkeypatch.setattr(corruptions, "BLOCK", 2)
  np.testing.assert_array_equal(corrupt(name, 3, images), whole)


def test_blur_is_a_gaussian_with_a_repeated_rim():
  sd, reach = 1.0, 4
  taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sd) ** 2)
  taps /= taps.sum()
  padded = np.pad(IMAGES / 255, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
  rows = sum(tap * padded[:, i : i + 32] for i, tap in enumerate(taps))
  expected = sum(tap * rows[:, :, i : i + 32] for i, tap in enumerate(taps))
  difference = corrupt("blur", 5).astype(float) - np.floor(expected * 255)
  assert np.abs(difference).max() <= 1  # float32 may fall on the other side of an integer


def test_brightness_moves_the_value_of_hsv():
  corrupted = corrupt("brightness", 4)
  for before, after in zip(IMAGES[0, ::5, 0], corrupted[0, ::5, 0], strict=True):
    hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
    expected = np.multiply(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1)), 255)
    assert np.abs(after - expected).max() <= 1 + 1e-3
  black = corrupt("brightness", 4, np.zeros((1, 4, 4, 3), np.uint8))
  np.testing.assert_array_equal(black, 51)


def test_contrast_shrinks_the_distance_from_the_mean():
  x = IMAGES / 255
  mean = x.mean((1, 2), keepdims=True)
  expected = np.floor(((x - mean) * 0.4 + mean) * 255)
  assert np.abs(corrupt("contrast", 3).astype(float) - expected).max() <= 1


def test_pixelate_joins_pixels_of_equal_boxes():
  """At 0.75 of 32 pixels a box is 4/3 pixels wide; a constant stays."""
  constant = np.full((1, 32, 32, 3), 77, np.uint8)
  np.testing.assert_array_equal(corrupt("pixelate", 4, constant), constant)
  assert len(np.unique(corrupt("pixelate", 5, SMOOTH)[0, :, 0, 0])) <= 20 + 12


def test_images_of_one_pixel_stay_what_they_are():
  image = np.full((1, 1, 1, 3), 7, np.uint8)
  np.testing.assert_array_equal(corruptions.corrupt(image, "pixelate", 5), image)


def test_unknown_ones_are_refused():
  with pytest.raises(errors.UserError, match="corruption='fog' is unknown"):
    corruptions.corrupt(IMAGES, "fog", 1)
  with pytest.raises(errors.UserError, match="severity=6"):
    corruptions.corrupt(IMAGES, "noise", 6)

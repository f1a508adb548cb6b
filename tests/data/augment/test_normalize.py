"""Normalization on the device against Albumentations."""

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data.augment import normalize


def test_normalize_matches_albumentations():
  A = pytest.importorskip("albumentations")
  mean, std = (0.49, 0.48, 0.44), (0.24, 0.25, 0.26)
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
  expected = [A.Normalize(mean=mean, std=std)(image=image)["image"] for image in images]
  actual = np.asarray(normalize.create_normalize(mean, std, dtype=np.float32)(images))
  assert actual.dtype == np.float32
  np.testing.assert_allclose(actual, expected, atol=2e-6)
  exact = (images.astype(np.float64) / 255 - mean) / std
  np.testing.assert_allclose(actual, exact, atol=2e-6)


def test_normalize_refuses_a_zero_deviation():
  with pytest.raises(errors.UserError, match=r"augment.std=\(0.0,"):
    normalize.create_normalize((0.5,) * 3, (0.0, 1.0, 1.0), dtype=np.float32)

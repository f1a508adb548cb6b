"""The checks of a data set, whose messages have remedies that work."""

import re

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import dataset
from tests.data.sources import test_npz


def test_check_split_accepts_a_good_one():
  dataset.check_split(dataset.Split(*test_npz.arrays()), num_classes=3, where="x")
  with pytest.raises(errors.UserError, match=r"x: labels lie in 0\.\.2 but there are 2"):
    dataset.check_split(dataset.Split(*test_npz.arrays()), num_classes=2, where="x")


@pytest.mark.parametrize(
  "shape", [(6, 3, 8, 9), (6, 1, 8, 9), (6, 4, 8, 9), (6, 8, 9, 4), (6, 3, 8, 3)]
)
def test_the_remedy_for_images_of_another_shape_makes_them_valid(shape):
  images = np.zeros(shape, np.uint8)
  for _ in range(2):  # channels first may have an alpha channel too
    split = dataset.Split(dataset.gray_to_rgb(images), np.zeros(6, int))
    try:
      dataset.check_split(split, num_classes=1, where="x")
      break
    except errors.UserError as error:
      code = re.search(r"images = (images\S*(?: \S+\))?)\.$|images = (images.*)\.$", str(error))
      images = eval(next(filter(None, code.groups())))
  dataset.check_split(
    dataset.Split(dataset.gray_to_rgb(images), np.zeros(6, int)), num_classes=1, where="x"
  )


def test_the_remedy_for_floats_makes_them_valid():
  images = np.linspace(0, 1, 6 * 8 * 9 * 3).reshape(6, 8, 9, 3)
  with pytest.raises(errors.UserError) as raised:
    dataset.check_split(dataset.Split(images, np.zeros(6, int)), num_classes=1, where="x")
  images = eval(re.search(r"np\.rint.*uint8\)", str(raised.value))[0])
  dataset.check_split(dataset.Split(images, np.zeros(6, int)), num_classes=1, where="x")


def test_find_unseen_names_the_classes_without_an_image():
  split = dataset.Split(np.zeros((3, 1, 1, 3), np.uint8), np.array([0, 2, 2]))
  assert dataset.find_unseen(split, ("a", "b", "c", "d")) == ["b", "d"]

"""The checks of a data set."""

import pytest

from flax_cifar import errors
from flax_cifar.data import dataset
from tests.data.sources import test_npz


def test_check_split_accepts_a_good_one():
  dataset.check_split(dataset.Split(*test_npz.arrays()), num_classes=3, where="x")
  with pytest.raises(errors.UserError, match=r"x: labels lie in 0\.\.2 but there are 2"):
    dataset.check_split(dataset.Split(*test_npz.arrays()), num_classes=2, where="x")

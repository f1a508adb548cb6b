"""Data sets in npz archives."""

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data.sources import npz
from tests.data import test_load


def arrays(n=6, size=8, classes=3):
  rng = np.random.default_rng(n)
  images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
  return images, np.arange(n) % classes


def write_npz(path, form=npz.KEYS[0], **extra):
  values = (*arrays(9), *arrays(6))
  keys = [key.format(part) for part in ("train", "test") for key in form]
  np.savez(path, **(dict(zip(keys, values, strict=True)) | extra))
  return values


@pytest.mark.parametrize("form", npz.KEYS)
def test_npz_keeps_pixels_labels_and_order(tmp_path, form):
  train_x, train_y, test_x, test_y = write_npz(tmp_path / "a.npz", form)
  data = test_load.load(f"npz:{tmp_path / 'a.npz'}")
  np.testing.assert_array_equal(data.train.images, train_x)
  np.testing.assert_array_equal(data.train.labels, train_y)
  np.testing.assert_array_equal(data.test.images, test_x)
  np.testing.assert_array_equal(data.test.labels, test_y)
  assert data.train.labels.dtype == np.int32
  assert data.class_names == ("0", "1", "2")
  assert (len(data.train), len(data.test)) == (9, 6)


def test_npz_takes_column_labels_and_class_names(tmp_path):
  _, labels = arrays(9)
  write_npz(tmp_path / "a.npz", train_labels=labels[:, None], class_names=["x", "y", "z", "w"])
  data = test_load.load(f"npz:{tmp_path / 'a.npz'}")
  np.testing.assert_array_equal(data.train.labels, labels)
  assert data.class_names == ("x", "y", "z", "w")


@pytest.mark.parametrize("name", dataset.VALIDATION_NAMES)
@pytest.mark.parametrize("form", npz.KEYS)
def test_npz_has_the_validation_split_of_the_archive(tmp_path, form, name, capsys):
  images, labels = arrays(4)
  extra = {form[0].format(name): images, form[1].format(name): labels[:, None]}
  write_npz(tmp_path / "a.npz", form, **extra)
  data = test_load.load(f"npz:{tmp_path / 'a.npz'}")
  np.testing.assert_array_equal(data.validation.images, images)
  np.testing.assert_array_equal(data.validation.labels, labels)
  assert capsys.readouterr().err == ""


def test_npz_names_the_arrays_that_it_leaves_out(tmp_path, capsys):
  write_npz(tmp_path / "a.npz", extra_images=arrays(3)[0], ids=np.arange(9))
  assert test_load.load(f"npz:{tmp_path / 'a.npz'}").validation is None
  warning = f"warning: npz:{tmp_path / 'a.npz'}: left out the arrays extra_images, ids\n"
  assert capsys.readouterr().err == warning


@pytest.mark.parametrize("axis", [(), (1,)])
def test_npz_makes_gray_images_rgb(tmp_path, axis):
  gray = {f"{part}_images": arrays(n)[0][..., 0] for part, n in (("train", 9), ("test", 6))}
  write_npz(tmp_path / "a.npz", **{k: v.reshape(*v.shape, *axis) for k, v in gray.items()})
  data = test_load.load(f"npz:{tmp_path / 'a.npz'}")
  for channel in range(3):
    np.testing.assert_array_equal(data.train.images[..., channel], gray["train_images"])
    np.testing.assert_array_equal(data.test.images[..., channel], gray["test_images"])


@pytest.mark.parametrize(
  ("train_labels", "message"),
  [
    (1 + np.arange(9) % 3, "up to 3, but no training image has the label 0;.*without gaps"),
    (2 * (np.arange(9) % 3), "up to 4, but no training image has the label 1, 3;"),
    (np.arange(9) % 2, "up to 2, but no training image has the label 2;"),  # test has it
    (np.full(9, 8), "label 0, 1, 2, 3, 4 and 3 more;"),
  ],
)
def test_npz_refuses_labels_that_training_never_sees(tmp_path, train_labels, message):
  write_npz(tmp_path / "a.npz", train_labels=train_labels)
  with pytest.raises(errors.UserError, match=message):
    test_load.load(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    ({"train_images": np.zeros((9, 8, 8, 3), np.float32)}, "float32.*uint8"),
    ({"train_images": np.zeros((9, 64), np.uint8)}, r"\(9, 64\).*reshape\(-1, height"),
    ({"train_images": np.zeros((), np.uint8)}, r"shape \(\);.*one image per row"),
    ({"class_names": ["a", "", "c"]}, "class 1 has an empty name"),
    ({"train_images": np.zeros((9, 8, 8, 4), np.uint8)}, r"\(9, 8, 8, 4\).*alpha channel"),
    ({"train_images": np.zeros((9, 3, 8, 8), np.uint8)}, "transpose"),
    ({"train_images": np.zeros((9, 8, 7, 3), np.uint8)}, "8x7 pixels"),
    ({"test_images": np.zeros((6, 4, 4, 3), np.uint8)}, "test.*4x4.*image_size=4"),
    ({"train_images": np.zeros((0, 8, 8, 3), np.uint8), "train_labels": np.zeros(0, int)}, "no im"),
    ({"train_labels": np.zeros(8, int)}, r"\(8,\) for 9 images"),
    ({"train_labels": np.zeros(9)}, "float64.*integers"),
    ({"train_labels": np.full(9, -1)}, r"-1\.\.-1"),
    (
      {"train_labels": np.full(9, -1), "test_labels": np.full(6, -2)},
      "labels go up to -1; number the classes from 0",
    ),
    ({"test_labels": np.full(6, 2**32), "class_names": ["a", "b", "c"]}, "4294967296.*3 classes"),
    ({"train_labels": np.zeros(9, int), "test_labels": np.zeros(6, int)}, "one class"),
    ({"class_names": np.array([{}], dtype=object)}, "cannot be read"),
  ],
)
def test_npz_refuses(tmp_path, extra, message):
  write_npz(tmp_path / "a.npz", **extra)
  with pytest.raises(errors.UserError, match=message):
    test_load.load(f"npz:{tmp_path / 'a.npz'}")


def test_npz_refuses_numbers_in_place_of_arrays(tmp_path):
  scalars = {f"{part}_{what}": 0 for part in ("train", "test") for what in ("images", "labels")}
  np.savez(tmp_path / "a.npz", **scalars)
  with pytest.raises(errors.UserError, match=r"npz:.*a\.npz"):
    test_load.load(f"npz:{tmp_path / 'a.npz'}")


def test_classes_of_one_name_are_reported(tmp_path, capsys):
  write_npz(tmp_path / "a.npz", class_names=["crane", "crane", "cat"])
  assert len(test_load.load(f"npz:{tmp_path / 'a.npz'}").class_names) == 3
  assert "several classes are called crane;" in capsys.readouterr().err


def test_npz_missing_truncated_or_with_other_keys(tmp_path):
  path = tmp_path / "a.npz"
  with pytest.raises(errors.UserError, match="does not exist"):
    test_load.load(f"npz:{path}")
  write_npz(path)
  path.write_bytes(path.read_bytes()[:500])
  with pytest.raises(errors.UserError, match="cannot be read"):
    test_load.load(f"npz:{path}")
  with path.open("wb") as file:
    np.save(file, np.zeros(3))
  with pytest.raises(errors.UserError, match="cannot be read"):
    test_load.load(f"npz:{path}")
  np.savez(path, images=np.zeros(3))
  with pytest.raises(errors.UserError, match=r"\['images'\].*x_train"):
    test_load.load(f"npz:{path}")

"""Data sets that TFDS itself has prepared: sizes, gray images, names, splits, and damage."""

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_cifar import errors
from flax_cifar.data import load
from flax_cifar.data.sources import prepared

COUNTS = {"train": 12, "validation": 3, "test": 5}


def encode(image):
  return cv2.imencode(".png", image)[1].tobytes()


def prepare(
  root,
  *,
  splits=COUNTS,
  shape=(28, 28, 1),
  names=("zero", "one"),
  file_format=None,
  draw_label=lambda i: i % 2,
):
  """Prepares `digits`, whose pixels are drawn from their split, with a builder of TFDS."""
  rng = np.random.default_rng(0)
  images = {name: rng.integers(0, 256, (n, *shape), np.uint8) for name, n in splits.items()}

  with tfds.core.registered.skip_registration():

    class Digits(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.2.0")

      def _info(self):
        label = tfds.features.ClassLabel(names=list(names)) if names else np.int64
        features = {"image": tfds.features.Image(shape=(None, None, shape[-1])), "label": label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager):
        return {name: self._generate_examples(images[name]) for name in splits}

      def _generate_examples(self, arrays):
        for i, image in enumerate(arrays):
          yield i, {"image": encode(image), "label": draw_label(i)}

  builder = Digits(data_dir=root, file_format=file_format or "array_record")
  builder.download_and_prepare()
  return images


def sort(images):
  return sorted(image.tobytes() for image in images)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_gray_images_become_rgb_and_every_example_is_there(tmp_path, file_format):
  if file_format == "tfrecord":
    pytest.importorskip("tensorflow")  # TFDS needs it to write, we do not to read
  images = prepare(tmp_path, file_format=file_format)
  data = load.load_dataset(name="tfds:digits", dir=str(tmp_path), image_size=28)
  for name in COUNTS:
    split = getattr(data, name)
    assert split.images.shape == (COUNTS[name], 28, 28, 3)
    assert split.labels.dtype == np.int32
    assert sort(split.images) == sort(images[name].repeat(3, -1))
    labels = {image.repeat(3, -1).tobytes(): i % 2 for i, image in enumerate(images[name])}
    found = zip(split.images, split.labels, strict=True)
    assert all(labels[image.tobytes()] == label for image, label in found)
  assert data.class_names == ("zero", "one")
  assert not data.test_is_held_out


def test_labels_without_names_are_called_by_their_numbers(tmp_path):
  prepare(tmp_path, names=(), shape=(8, 8, 3), splits={"train": 6, "test": 4})
  data = load.load_dataset(name="tfds:digits", dir=str(tmp_path), image_size=8)
  assert data.class_names == ("0", "1")
  assert data.validation is None


def test_the_newest_version_counts(tmp_path):
  for version in ("1.10.0", "1.9.0", "2.0.0-part"):
    (tmp_path / version).mkdir()
    (tmp_path / version / "dataset_info.json").touch()
  (tmp_path / "3.0.0").mkdir()  # not complete
  assert prepared.find_newest(tmp_path).name == "1.10.0"
  assert prepared.find_newest(tmp_path / "none") is None


@pytest.mark.parametrize(
  ("name", "size", "message"),
  [
    ("kmnist", 28, "data.name='tfds:kmnist' is not prepared"),
    ("mnist/big", 28, "data.name='tfds:mnist/big' is not prepared.*tfds.load.'mnist/big'"),
    ("digits/big", 28, "data.name='tfds:digits/big' is not prepared"),
    ("../digits", 28, "is no name of a data set"),
    ("digits/..", 28, "is no name of a data set"),
    ("digits", 32, "images have 28x28 pixels but data.image_size=32; set"),
  ],
)
def test_what_cannot_be_loaded_is_one_line(tmp_path, name, size, message):
  prepare(tmp_path)
  with pytest.raises(errors.UserError, match=message) as caught:
    load.load_dataset(name=f"tfds:{name}", dir=str(tmp_path), image_size=size)
  assert "\n" not in str(caught.value)


def test_a_sound_data_set_without_labels_is_not_called_damaged(tmp_path):
  prepare(tmp_path, names=(), draw_label=lambda i: -1)
  with pytest.raises(errors.UserError, match="has the label -1, so it has no class") as caught:
    load.load_dataset(name="tfds:digits", dir=str(tmp_path), image_size=28)
  assert "delete" not in str(caught.value)


def test_a_data_set_without_a_test_split_is_refused(tmp_path):
  prepare(tmp_path, splits={"train": 4, "validation": 2})
  with pytest.raises(errors.UserError, match="has the splits train, validation and lacks test"):
    load.load_dataset(name="tfds:digits", dir=str(tmp_path), image_size=28)


def test_a_damaged_file_is_named(tmp_path):
  prepare(tmp_path)
  (file,) = tmp_path.glob("digits/1.2.0/*test*")
  file.write_bytes(file.read_bytes()[:-40])
  remedy = rf"delete the directory {file.parent} and prepare it with tfds.load\('digits', .*TensorF"
  with pytest.raises(errors.UserError, match=f"missing, damaged or not readable.*{remedy}"):
    load.load_dataset(name="tfds:digits", dir=str(tmp_path), image_size=28)


def test_fewer_names_than_labels_are_refused(tmp_path):
  prepare(tmp_path)
  (tmp_path / "digits" / "1.2.0" / "label.labels.txt").write_text("zero\n")
  message = "has 1 names, and there are labels up to 1; delete .* and prepare it again"
  with pytest.raises(errors.UserError, match=message):
    load.load_dataset(name="tfds:digits", dir=str(tmp_path), image_size=28)


@pytest.mark.parametrize("highest", [-1, 10**12])
def test_labels_far_from_a_class_number_are_refused_before_they_get_names(tmp_path, highest):
  with pytest.raises(errors.UserError, match=f"labels go up to {highest}; number the classes"):
    prepared.read_names(tmp_path, highest)

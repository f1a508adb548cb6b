"""Scores of one seed and of several."""

import numpy as np
import pytest

from flax_cifar.data import dataset
from flax_cifar.run import result as result_lib

LABELS = np.array([0, 1, 2, 1], np.int32)
SPLIT = dataset.Split(np.zeros((4, 2, 2, 3), np.uint8), LABELS)


def make_logits(*wrong):
  """Logits that are certain of the label, or of another class for the examples in `wrong`."""
  predicted = (LABELS + np.isin(np.arange(4), wrong)) % 3
  return 50 * np.eye(3, dtype=np.float32)[predicted]


def test_one_seed_has_no_deviation():
  result = result_lib.score("test", SPLIT, make_logits(2))
  assert result == {"test_loss": 12.5, "test_accuracy": 0.75}
  assert result_lib.format_score(result | {"num_seeds": 1}, "accuracy", ".2%") == "75.00%"


def test_several_seeds_have_mean_and_sample_deviation():
  result = result_lib.score(
    "test", SPLIT, np.stack([make_logits(), make_logits(1), make_logits(0, 3)])
  )
  assert result["test_accuracy_per_seed"] == [1.0, 0.75, 0.5]
  assert result["test_accuracy"] == 0.75
  assert result["test_accuracy_sd"] == pytest.approx(0.25)
  assert result["test_loss"] == pytest.approx(12.5)
  assert (
    result_lib.format_score(result | {"num_seeds": 3}, "accuracy", ".2%")
    == "75.00% ± 25.00% (n = 3)"
  )


def test_a_trial_is_scored_on_validation_images_and_has_no_test_score():
  result = result_lib.score("validation", SPLIT, np.stack([make_logits(2), make_logits()]))
  assert not any("test" in name for name in result)
  assert result_lib.get_final_split_name(result) == "validation"
  assert (
    result_lib.format_score(result | {"num_seeds": 2}, "accuracy", ".1%") == "87.5% ± 17.7% (n = 2)"
  )


@pytest.mark.parametrize("text", ["images/s", "a / b", "runs/x", "../x", "https://a.b/c", "N/A"])
def test_a_slash_is_not_always_a_path(text):
  assert not result_lib.list_paths({"command": text})


@pytest.mark.parametrize("text", ["/x", "~/x", "a /x", "--dir=/x", "'/x'", "D:\\x", "--dir=/.data"])
def test_a_path_is_found_anywhere(text):
  assert result_lib.list_paths({"data": [0, {"dir": text}]}) == [("data.1.dir", text)]

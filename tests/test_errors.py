"""Errors quote the value and name a remedy."""

import pytest

from flax_cifar import errors


def test_choose_returns_the_named_one():
  assert errors.choose("color", "red", {"red": 1, "blue": 2}) == 1


def test_choose_lists_the_choices_and_guesses():
  with pytest.raises(errors.UserError, match=r"color='redd' .* red, blue\. Did you mean 'red'\?"):
    errors.choose("color", "redd", {"red": 1, "blue": 2})


def test_choose_does_not_guess_wildly():
  with pytest.raises(errors.UserError) as caught:
    errors.choose("color", "xyz", {"red": 1, "blue": 2})
  assert "Did you mean" not in str(caught.value)


def test_require_quotes_the_value():
  errors.require(True, "size", 3, "positive")
  with pytest.raises(errors.UserError, match=r"size=-3 is not valid; it must be positive\."):
    errors.require(False, "size", -3, "positive")


def test_differences_name_changed_and_missing_keys():
  assert errors.list_differences({"a": 1, "b": (2,), "c": 3}, {"a": 1, "b": (4,), "d": 5}) == [
    "b is (2,) there and (4,) here",
    "c is 3 there and 'absent' here",
    "d is 'absent' there and 5 here",
  ]


def test_an_empty_path_is_refused():
  with pytest.raises(errors.UserError, match="FOLDER='' "):
    errors.get_path("FOLDER", "")

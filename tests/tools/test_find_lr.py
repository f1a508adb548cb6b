"""The range test of learning rates."""

import json
import sys

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.tools import find_lr
from tests import tiny


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_suggestion_is_the_middle_of_a_known_curve(noise):
  """A sigmoid in the logarithm of the rate has its middle at 0.01; then the loss rises."""
  rates = np.logspace(-4, 1, 400)
  place = np.log10(rates)
  losses = 2.3 - 1 / (1 + np.exp(-4 * (place + 2))) + np.maximum(0, place) ** 2
  losses += np.random.default_rng(0).normal(0, noise, len(losses))
  found = find_lr.analyze(rates, losses)
  # The moving average lags by 1 / (1 - SMOOTHING) steps.
  lag = 10 ** (5 / 400 / (1 - find_lr.SMOOTHING))
  assert 0.01 / 1.1 <= found.halfway <= 0.01 * lag * 1.2
  assert 0.1 < found.lowest < 10
  assert not found.diverged
  assert not found.still_falls


def test_a_loss_that_still_falls_at_the_last_rate_asks_for_higher_ones():
  found = find_lr.analyze(np.logspace(-4, -2, 60), np.linspace(2, 1, 60))
  assert found.still_falls
  text = find_lr.format_result(found, tiny.get_config("shapes"), None)
  assert "the loss still fell at the last rate: choose a higher --high" in text


@pytest.mark.parametrize("losses", [[2.0] * 20 + [9.0] * 40, [2.0] * 20 + [np.nan]])
def test_a_loss_that_explodes_has_diverged(losses):
  assert find_lr.has_diverged(losses)
  assert not find_lr.has_diverged(losses[:20])


def test_a_loss_that_never_falls_is_explained():
  with pytest.raises(errors.UserError, match=r"did not fall .*between the rates 0\.01 and 1"):
    find_lr.analyze(np.logspace(-2, 0, 50), np.linspace(2, 3, 50))


def test_a_fall_within_the_noise_is_no_fall():
  losses = 2.3 + np.random.default_rng(0).normal(0, 0.05, 60)
  with pytest.raises(errors.UserError, match="did not fall by more than its noise"):
    find_lr.analyze(np.logspace(-9, -8, 60), losses)


def test_a_config_that_a_run_refuses_is_refused():
  config = tiny.get_config("shapes", **{"loss.label_smoothing": 2.0})
  with pytest.raises(errors.UserError, match="label_smoothing=2"):
    find_lr.find(config, low=0.1, high=1.0, num_steps=20)


def test_the_rate_grows_from_low_to_high_and_the_loss_falls(tiny_model, data, tmp_path):
  config = tiny.get_config(data)
  found = find_lr.find(config, low=1e-4, high=100.0, num_steps=40)
  steps = len(found.rates)
  ratio = found.rates[1] / found.rates[0]
  np.testing.assert_allclose(found.rates, 1e-4 * ratio ** np.arange(steps), rtol=1e-4)
  assert found.rates[0] == pytest.approx(1e-4)
  assert 1e-4 < found.halfway < found.lowest
  text = find_lr.format_result(found, config, tmp_path / "lr.png")
  assert f"suggestion {found.halfway:.2g}" in text
  assert config.schedule.name != "exponential"  # the caller's config is left alone


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1e-5, 1e6)])
def test_rates_out_of_order_or_too_far_apart_are_refused(low, high):
  with pytest.raises(errors.UserError, match=f"--high={high}"):
    find_lr.find(tiny.get_config("shapes"), low=low, high=high, num_steps=20)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--steps=19", "--steps=19 is not valid.*from 20 to"),
    ("--steps=3000000000", "--steps=3000000000"),
    ("--low=0", "--low=0.0 is not valid.*from 1e-30 to 1e\\+38"),
    ("--low=nan", "--low=nan"),
    ("--high=1e39", r"--high=1e\+39"),
  ],
)
def test_numbers_out_of_range_are_refused(flag, message):
  with pytest.raises(errors.UserError, match=message):
    find_lr.parse(["--config=quickstart", flag])


@pytest.fixture
def command(tiny_model, data, tmp_path, monkeypatch):
  """Calls the program with a config of the tiny network."""
  path = tmp_path / "own.py"
  path.write_text(f"from tests import tiny\nget_config = lambda: tiny.get_config({data!r})\n")

  def call(*flags):
    monkeypatch.setattr(sys, "argv", ["find_lr", f"--config={path}", *flags])
    find_lr.main()

  return call


# ml_collections loads a config file so.
by_flags = pytest.mark.filterwarnings(r"ignore:the load_module\(\):DeprecationWarning")


@by_flags
def test_the_command_draws_and_prints(command, tmp_path, capsys):
  out = tmp_path / "lr.png"
  command("--config.optimizer.name=adamw", "--high=1000", "--steps=40", f"--out={out}", "--json")
  found = json.loads(capsys.readouterr().out)
  assert len(found["rates"]) == len(found["losses"]) <= 40
  assert out.read_bytes().startswith(b"\x89PNG")


@by_flags
def test_a_picture_that_cannot_be_drawn_is_a_warning(command, tmp_path, capsys, monkeypatch):
  def fail(figure, path):
    raise OSError("No space left on device")

  monkeypatch.setattr("flax_cifar.run.plots.save_figure", fail)
  out = tmp_path / "lr.png"
  command("--high=100", "--steps=40", f"--out={out}")
  output, errors_seen = capsys.readouterr()
  assert "suggestion" in output
  assert "picture" not in output
  assert "is not drawn" in errors_seen


@by_flags
def test_a_wrong_flag_is_one_line(command, capsys):
  with pytest.raises(SystemExit) as end:
    command("--stepz=20")
  assert end.value.code == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1
  assert "stepz" in message

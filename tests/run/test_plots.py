"""The plots of a run: their files, titles and curves."""

import os
import subprocess
import sys

import matplotlib
import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from flax_cifar.configs import common
from flax_cifar.data import dataset
from flax_cifar.run import plots

NAMES = ("cat", "dog", "frog")


@pytest.fixture
def titles(monkeypatch):
  """Collects the titles that are drawn."""
  seen = []
  original = matplotlib.axes.Axes.text

  def remember(self, x, y, label, *args, **kwargs):
    seen.append(label)
    return original(self, x, y, label, *args, **kwargs)

  monkeypatch.setattr(matplotlib.axes.Axes, "text", remember)
  return seen


def images(count):
  return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_misclassified_shows_only_errors_as_predicted_and_actual(tmp_path, titles):
  labels, predicted = np.array([0, 1, 2, 1]), np.array([0, 2, 2, 0])
  split = dataset.Split(images(4), labels)
  plots.save_misclassified(tmp_path / "m.png", split, np.eye(3)[predicted], NAMES)
  assert titles == ["frog / dog", "cat / dog"]
  assert Image.open(tmp_path / "m.png").size[0] > 300


def test_without_misclassified_images_the_plot_is_still_written(tmp_path, titles):
  split = dataset.Split(images(3), np.array([0, 1, 2]))
  plots.save_misclassified(tmp_path / "m.png", split, np.eye(3), NAMES)
  assert titles == []
  assert (tmp_path / "m.png").exists()


def test_augmented_samples_have_their_class_names(tmp_path, titles):
  batch = {"image": images(25), "label": np.arange(25) % 3}
  plots.save_augmented(tmp_path / "a.png", batch, NAMES)
  assert titles == [NAMES[i % 3] for i in range(20)]


def test_images_stand_in_rows_upright_and_in_their_colors(tmp_path):
  shown = np.full((7, 2, 2, 3), 255, np.uint8)
  shown[:, 0, 0] = [[20 * i, 100, 0] for i in range(7)]  # the upper left corner
  plots.save_images(tmp_path / "i.png", shown, ["name"] * 7)
  picture = np.asarray(Image.open(tmp_path / "i.png").convert("RGB"))
  assert picture.shape[:2] == (round(2 * 1.9 * plots.DPI), round(5 * 1.7 * plots.DPI))
  for i, image in enumerate(shown):
    row, column = divmod(i, 5)
    cell = picture[row * 228 : (row + 1) * 228, column * 204 : (column + 1) * 204]
    found = (cell == image[0, 0]).all(-1)
    assert found.sum() == pytest.approx((plots.IMAGE * plots.DPI / 2) ** 2, rel=0.05)
    rows, columns = np.nonzero(found)
    assert rows.max() < 228 * 0.7
    assert columns.max() < 204 * 0.6


def test_a_plot_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
  class FigureOnAFullDisk:
    def savefig(self, path, **options):
      path.write_bytes(b"half")
      raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space left"):
    plots.save_figure(FigureOnAFullDisk(), tmp_path / "a.png")
  assert not (tmp_path / "a.png").exists()


def test_curves_have_a_line_per_split_and_metric(tmp_path, monkeypatch):
  drawn = []
  original = matplotlib.axes.Axes.plot

  def remember(self, x, y, *args, **kwargs):
    drawn.append((list(x), list(y)))
    return original(self, x, y, *args, **kwargs)

  monkeypatch.setattr(matplotlib.axes.Axes, "plot", remember)
  record = {"train_loss": 2.0, "train_accuracy": 0.25}
  records = [record | {"epoch": 1}, record | {"epoch": 2}]
  records[1] |= {"validation_loss": 1.0, "validation_accuracy": 0.5}
  plots.save_curves(tmp_path / "c.png", records)
  assert drawn == [
    ([1, 2], [2.0, 2.0]),
    ([1, 2], [25.0, 25.0]),
    ([2], [1.0]),
    ([2], [50.0]),
  ]


def create_records(rates, steps_per_epoch):
  """The records of epochs that end with these learning rates."""
  return [
    {"epoch": epoch, "step": steps_per_epoch * epoch, "learning_rate": rate}
    for epoch, rate in enumerate(rates, start=1)
  ]


def create_config(schedule, total_epochs):
  config = common.get_config()
  config.schedule.name, config.total_epochs = schedule, total_epochs
  config.optimizer.learning_rate = 0.1
  config.schedule.one_cycle.update({"initial": 0.2, "peak_at": 0.5, "final": 0.0})
  return config.to_dict()


def interpolate(steps, total_steps):
  """The rates of the schedule one_cycle of `create_config`."""
  return np.interp(steps, [0, 0.5 * total_steps, total_steps], [0.02, 0.1, 0.0])


def test_the_learning_rate_is_drawn_at_every_step():
  records = create_records(interpolate(np.array([9, 19, 29]), 30), 10)
  figure = plots.draw_learning_rate(records, create_config("one_cycle", 3))
  ((line,),) = [axis.lines for axis in figure.axes]
  done = np.arange(1, 31)
  np.testing.assert_allclose(line.get_xdata(), done / 10, rtol=1e-12)
  np.testing.assert_allclose(line.get_ydata(), interpolate(done - 1, 30), atol=1e-7)
  assert line.get_ydata().max() > 1.2 * max(record["learning_rate"] for record in records)


def test_the_learning_rate_of_a_long_run_has_points_over_all_of_it():
  ends = 400 * np.arange(1, 501) - 1
  records = create_records(interpolate(ends, 200_000), 400)
  epochs, rates = plots.get_learning_rates(records, create_config("one_cycle", 500))
  assert len(rates) == plots.RATE_POINTS
  assert (epochs[0], epochs[-1]) == (1 / 400, 500)
  assert np.diff(epochs).max() < 0.51
  np.testing.assert_allclose(rates, interpolate(400 * epochs - 1, 200_000), atol=1e-6)


@pytest.mark.parametrize("schedule", ["plateau", "one_cycle", "mine"])
def test_recorded_learning_rates_that_the_schedule_does_not_give_are_drawn(schedule):
  """As after a plateau, in a run that was extended from 2 to 3 epochs, by a schedule of another."""
  recorded = {
    "plateau": [0.1, 0.1, 0.05],
    "one_cycle": [*interpolate(np.array([9, 19]), 20), interpolate(29, 30)],
    "mine": interpolate(np.array([9, 19, 29]), 30),
  }[schedule]
  records = create_records(recorded, 10)
  epochs, rates = plots.get_learning_rates(records, create_config(schedule, 3))
  assert epochs.tolist() == [1, 2, 3]
  assert rates.tolist() == list(recorded)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_plots_need_no_backend(tmp_path, backend):
  code = f"""
import pathlib, numpy as np
from flax_cifar.run import plots
path, records = pathlib.Path({str(tmp_path)!r}) / "l.png", {create_records([0.1], 10)}
plots.save_learning_rate(path, records, {create_config("constant", 1)})
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "MPLBACKEND": backend},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert (tmp_path / "l.png").stat().st_size > 1000


def test_the_style_and_backend_of_the_user_neither_matter_nor_change(tmp_path):
  records, config = create_records([0.1, 0.1], 10), create_config("constant", 2)
  plots.save_learning_rate(tmp_path / "plain.png", records, config)
  with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "savefig.dpi": 9}):
    before = dict(matplotlib.rcParams)
    plots.save_learning_rate(tmp_path / "styled.png", records, config)
    assert dict(matplotlib.rcParams) == before
  assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("odd"), MemoryError()])
def test_a_plot_that_fails_is_a_warning(tmp_path, monkeypatch, capsys, error):
  def fail(figure, path):
    raise error

  monkeypatch.setattr(plots, "save_figure", fail)
  split = dataset.Split(images(3), np.array([0, 1, 2]))
  plots.save_misclassified(tmp_path / "m.png", split, np.eye(3)[[1, 1, 1]], NAMES)
  stderr = capsys.readouterr().err
  assert stderr.startswith(f"warning: {str(tmp_path / 'm.png')!r} is not drawn (")
  assert stderr.count("\n") == 1


def test_long_and_chinese_names_fit_and_give_no_warning(tmp_path, titles, recwarn):
  names = ("american_pit_bull_terrier", "staffordshire_bull_terrier", "猫" * 30)
  split = dataset.Split(images(3), np.array([0, 1, 2]))
  plots.save_misclassified(tmp_path / "m.png", split, np.eye(3)[[1, 2, 0]], names)
  assert titles[0] == "staffordshire_bull_te…\namerican_pit_bull_ter…"
  assert titles[1].startswith("猫" * 10 + "…")
  assert not recwarn.list

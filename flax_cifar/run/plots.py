"""Plots of a run: images with titles, loss and accuracy curves, the learning rate.

matplotlib is imported when the first one is drawn: it takes half a second, which would delay the
first step.
"""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_cifar import files
from flax_cifar.data import dataset, feeds

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

DPI = 120


def save_images(
  path: pathlib.Path, images: np.ndarray, titles: Sequence[str], *, columns: int = 5
) -> None:
  """Writes uint8 images (N, H, W, 3) as a grid with a title each."""
  rows = max(1, -(-len(images) // columns))
  figure = create_figure(1.7 * columns, 1.9 * rows)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis in axes:
    axis.set_axis_off()
  for axis, image, title in zip(axes, images, titles, strict=False):
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=8, parse_math=False)  # a class may be called $x$
  save_figure(figure, path)


def save_first_batch(path: pathlib.Path, feed: feeds.Feed, class_names: Sequence[str]) -> None:
  """Writes the first training batch of the run, unless the file exists."""
  if not path.exists():
    save_augmented(path, feed.batch_at(0), class_names)


def save_augmented(
  path: pathlib.Path, batch: dict[str, np.ndarray], class_names: Sequence[str], *, count: int = 20
) -> None:
  """Writes the first images of a training batch as the network gets them, before normalization."""
  titles = [class_names[label] for label in batch["label"][:count]]
  save_images(path, batch["image"][:count], titles)


def save_misclassified(
  path: pathlib.Path,
  split: dataset.Split,
  logits: np.ndarray,
  class_names: Sequence[str],
  *,
  count: int = 20,
) -> None:
  """Writes the first wrongly classified images, titled `predicted / actual`."""
  predictions = logits.argmax(-1)
  wrong = np.flatnonzero(predictions != split.labels)[:count]
  titles = [f"{class_names[predictions[i]]} / {class_names[split.labels[i]]}" for i in wrong]
  save_images(path, split.images[wrong], titles)


def save_curves(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
  """Writes loss and accuracy per epoch, for train and validation."""
  figure = create_figure(9, 3.5)
  loss, accuracy = figure.subplots(1, 2)
  for split in ("train", "validation"):
    shown = [record for record in records if f"{split}_loss" in record]
    epochs = [record["epoch"] for record in shown]
    loss.plot(epochs, [record[f"{split}_loss"] for record in shown], label=split)
    percent = [100 * record[f"{split}_accuracy"] for record in shown]
    accuracy.plot(epochs, percent, label=split)
  finish_axis(loss, "loss (nats)")
  finish_axis(accuracy, "accuracy (%)")
  save_figure(figure, path)


def save_learning_rate(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
  """Writes the learning rate at the end of each epoch."""
  figure = create_figure(4.5, 3.5)
  axis = figure.subplots()
  epochs = [record["epoch"] for record in records]
  axis.plot(epochs, [record["learning_rate"] for record in records])
  finish_axis(axis, "learning rate")
  save_figure(figure, path)


def create_figure(width: float, height: float) -> "Figure":
  """An empty figure of this size in inches."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: pathlib.Path) -> None:
  """Writes a PNG, whole or not at all."""
  with files.replace(path) as part:
    figure.savefig(part, dpi=DPI, format="png")


def finish_axis(axis: "Axes", label: str) -> None:
  """Labels an axis over epochs, with a legend if any curve has a label."""
  from matplotlib.ticker import MaxNLocator

  axis.set_xlabel("epoch")
  axis.xaxis.set_major_locator(MaxNLocator(integer=True))
  axis.set_ylabel(label)
  axis.grid(alpha=0.3)
  if axis.get_legend_handles_labels()[0]:
    axis.legend()

"""The results of the published systems, which docs/results.md sets beside ours.

Every figure is a single run of its source, and most are the best epoch on the test split.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
  """A published result: a row of docs/results.md."""

  id: str  # of the system, as the configs have it
  network: str  # name of our network
  parameters: int | None  # None where the source gives no layer table
  what: str  # norm and protocol in a few words
  epochs: int | None  # None where the source does not say
  reported: str  # in percent, as the source has it
  reported_accuracy: float | None  # its test or validation accuracy in percent, to beat
  replay: str | None  # name of the config that replays it
  ours: str  # name of the config with our recipe
  target: float | None  # test accuracy in percent that ours shall reach; None: to beat the source
  target_epochs: int | None = None  # in at most so many epochs


def _at_length(row: Row, *, ours: str, target: float, epochs: int) -> Row:
  """The row of the same system for a longer training of ours."""
  what = f"{row.what}; ours for {epochs} epochs"
  return dataclasses.replace(row, what=what, ours=ours, target=target, target_epochs=epochs)


_A = Row(
  id="A",
  network="dilated",
  parameters=192_672,
  what="batch norm, plateau on test loss",
  epochs=51,
  reported="87.31 (best on test, epoch 47), train 84.66",
  reported_accuracy=87.31,
  replay="s9-published",
  ours="s9",
  target=88.5,
  target_epochs=15,
)

_B2 = Row(
  id="B2",
  network="pyramid",
  parameters=48_656,
  what="batch norm, norm study",
  epochs=21,
  reported="77.01",
  reported_accuracy=77.01,
  replay="pyramid-published",
  ours="pyramid",
  target=84.0,
)
_E1 = Row(
  id="E1",
  network="skip",
  parameters=48_552,
  what="batch norm",
  epochs=20,
  reported="80.66, train 78.85",
  reported_accuracy=80.66,
  replay="skip-published",
  ours="skip",
  target=86.0,
)
ROWS = (
  _A,
  _at_length(_A, ours="s9-long", target=92.0, epochs=51),
  Row(
    id="B1",
    network="dilated",
    parameters=192_672,
    what="batch norm, norm study",
    epochs=21,
    reported="none of its own (76.96 is B2's)",
    reported_accuracy=None,
    replay="s9-study",
    ours="s9",
    target=None,
  ),
  Row(
    id="B1",
    network="dilated",
    parameters=192_672,
    what="layer norm, norm study",
    epochs=21,
    reported="none of its own (71.76 is B2's)",
    reported_accuracy=None,
    replay="s9-study-norm-layer",
    ours="s9-norm-layer",
    target=None,
  ),
  Row(
    id="B1",
    network="dilated",
    parameters=192_672,
    what="group norm (2 groups), norm study",
    epochs=21,
    reported="none of its own (70.41 is B2's)",
    reported_accuracy=None,
    replay="s9-study-norm-group",
    ours="s9-norm-group",
    target=None,
  ),
  _B2,
  _at_length(_B2, ours="pyramid-long", target=87.0, epochs=100),
  Row(
    id="B2",
    network="pyramid",
    parameters=48_656,
    what="layer norm (1 group), norm study",
    epochs=21,
    reported="71.76",
    reported_accuracy=71.76,
    replay="pyramid-published-norm-layer",
    ours="pyramid-norm-layer",
    target=None,
  ),
  Row(
    id="B2",
    network="pyramid",
    parameters=48_656,
    what="group norm (2 groups), norm study",
    epochs=21,
    reported="70.41",
    reported_accuracy=70.41,
    replay="pyramid-published-norm-group",
    ours="pyramid-norm-group",
    target=None,
  ),
  Row(
    id="C0",
    network="keras_base",
    parameters=1_172_410,
    what="no norm, dense head",
    epochs=None,
    reported='"base accuracy", no figure',
    reported_accuracy=None,
    replay="keras_base-published",
    ours="keras_base",
    target=None,
  ),
  Row(
    id="C1",
    network="keras_fcn",
    parameters=None,
    what="batch norm, no dense layer",
    epochs=100,
    reported="train 94, train/validation gap narrowed",
    reported_accuracy=None,
    replay="keras_fcn-published",
    ours="keras_fcn",
    target=None,
  ),
  Row(
    id="C2",
    network="five_convs",
    parameters=None,
    what="batch norm, five kinds of convolution",
    epochs=50,
    reported="validation 85.48, train 92.27",
    reported_accuracy=85.48,
    replay="five_convs-published",
    ours="five_convs",
    target=89.0,
  ),
  Row(
    id="D",
    network="ghost",
    parameters=657_146,
    what="ghost norm (2 splits)",
    epochs=25,
    reported="82.96 (best), over 82 from epoch 20 (82.60)",
    reported_accuracy=82.96,
    replay="ghost-published",
    ours="ghost",
    target=90.0,
  ),
  _E1,
  _at_length(_E1, ours="skip-long", target=88.0, epochs=100),
  Row(
    id="E2",
    network="skip",
    parameters=48_552,
    what="group norm (4 groups)",
    epochs=20,
    reported="77.84, train 78.36",
    reported_accuracy=77.84,
    replay="skip-published-norm-group",
    ours="skip-norm-group",
    target=None,
  ),
  Row(
    id="E3",
    network="skip",
    parameters=48_072,
    what="layer norm (C, H and W, not affine)",
    epochs=20,
    reported="77.64, train 77.25",
    reported_accuracy=77.64,
    replay="skip-published-norm-layer",
    ours="skip-norm-layer",
    target=None,
  ),
  Row(
    id="E4",
    network="skip_dilated",
    parameters=167_424,
    what="batch norm, dilated and depthwise",
    epochs=37,
    reported="85.75, train 84.45",
    reported_accuracy=85.75,
    replay="skip_dilated-published",
    ours="skip_dilated",
    target=89.0,
  ),
)


@dataclasses.dataclass(frozen=True)
class Frontier:
  """A small network of others, with the accuracy that its authors report.

  Attributes:
    name: of the network, with its epochs where one network has several rows.
    parameters: their number.
    accuracy: on test, in percent.
    multiply_adds: per image; None where we have not counted them.
    protocol: what the figure is.
    source: a GitHub repository, whose README has the figure.
  """

  name: str
  parameters: int
  accuracy: float
  multiply_adds: int | None
  protocol: str
  source: str


FRONTIER = (
  Frontier("TinyVision 22k", 22_110, 87.38, None, "best epoch on test", "SaptakBhoumik/TinyVision"),
  Frontier("TinyVision 31k", 31_150, 88.43, None, "best epoch on test", "SaptakBhoumik/TinyVision"),
  Frontier("Tiniest", 97_530, 94.4, 44_000_000, "last epoch, mean of 5", "xvel/cifar10-tiniest"),
  Frontier(
    *("ResNet-20", 270_000, 92.60, 41_000_000, "best epoch on test"),
    source="chenyaofo/pytorch-cifar-models",
  ),
  Frontier("CondenseNet-50", 220_000, 93.78, None, "one run", "ShichenLiu/CondenseNet"),
  Frontier("CondenseNet-86", 520_000, 94.94, None, "one run", "ShichenLiu/CondenseNet"),
  Frontier(
    *("SeparableResNet (240 epochs)", 442_000, 95.45, None, "one run"),
    source="pierandom/separable-resnet",
  ),
  Frontier(
    *("SeparableResNet (960 epochs)", 442_000, 96.40, None, "one run"),
    source="pierandom/separable-resnet",
  ),
  Frontier(
    *("airbench93", 568_064, 93.00, None, "mean of 50, averaged over flips and shifts"),
    source="KellerJordan/cifar10-airbench",
  ),
)

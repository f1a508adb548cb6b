"""The networks in plain PyTorch, as their sources would write them, to compare speed with.

Each takes float images (N, 3, 32, 32) and returns logits (N, 10). Modules stand in the order in
which they run, so that the i-th convolution, dense layer or norm here is the i-th of the Flax
network. What a dense layer reads is flattened as PyTorch does it, channels first.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GhostBatchNorm(nn.BatchNorm2d):
  """Batch norm over `num_splits` parts of the batch, with running statistics for each of them.

  Part i holds examples i, i + num_splits and so on. The scale is fixed at 1.
  """

  def __init__(self, channels: int, num_splits: int = 2) -> None:
    super().__init__(channels)
    self.num_splits = num_splits
    self.weight.requires_grad = False
    self.running_mean = torch.zeros(num_splits * channels)
    self.running_var = torch.ones(num_splits * channels)

  def forward(self, x: Tensor) -> Tensor:
    s = self.num_splits
    if not self.training:
      mean, var = (r.view(s, -1).mean(0) for r in (self.running_mean, self.running_var))
      return F.batch_norm(x, mean, var, self.weight, self.bias, False, self.momentum, self.eps)
    n, c, h, w = x.shape
    y = F.batch_norm(
      x.reshape(n // s, s * c, h, w),
      self.running_mean,
      self.running_var,
      self.weight.repeat(s),
      self.bias.repeat(s),
      True,
      self.momentum,
      self.eps,
    )
    return y.view(n, c, h, w)


class Sum(nn.Module):
  """The sum of two modules on the same input."""

  def __init__(self, first: nn.Module, second: nn.Module) -> None:
    super().__init__()
    self.first, self.second = first, second

  def forward(self, x: Tensor) -> Tensor:
    return self.first(x) + self.second(x)


class Residual(nn.Module):
  """x + f(x)."""

  def __init__(self, inner: nn.Module) -> None:
    super().__init__()
    self.inner = inner

  def forward(self, x: Tensor) -> Tensor:
    return x + self.inner(x)


class GroupedConv(nn.Module):
  """A convolution for each equal part of the channels; the outputs take turns."""

  def __init__(self, convs: list[nn.Conv2d]) -> None:
    super().__init__()
    self.convs = nn.ModuleList(convs)

  def forward(self, x: Tensor) -> Tensor:
    parts = x.chunk(len(self.convs), dim=1)
    outputs = [conv(part) for conv, part in zip(self.convs, parts, strict=True)]
    return torch.stack(outputs, dim=2).flatten(1, 2)


def create_head(channels: int, pool: nn.Module, *, bias: bool = False) -> nn.Sequential:
  return nn.Sequential(pool, nn.Conv2d(channels, 10, 1, bias=bias), nn.Flatten())


def create_transition(c_in: int, c_out: int) -> nn.Module:
  return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.MaxPool2d(2))


def create_dilated(dropout: float = 0.05) -> nn.Module:
  """A: every layer but the first is the sum of a plain and a dilated branch."""

  def finish(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(dropout)]

  def plain(c_in: int, c_out: int, padding: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=padding, bias=False), *finish(c_out))

  def separable() -> nn.Module:
    depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(32, 32, 1, bias=False), *finish(32))

  def dilated(c_out: int, dilation: int, padding: int) -> nn.Module:
    conv = nn.Conv2d(
      32, c_out, 3, padding=padding, dilation=dilation, padding_mode="reflect", bias=False
    )
    return nn.Sequential(conv, *finish(c_out))

  layers = [
    plain(3, 32),
    Sum(separable(), dilated(32, 2, 2)),
    Sum(plain(32, 32), dilated(32, 4, 4)),
  ]
  for width in (32, 32, 64):
    layers += [
      Sum(plain(32, 32, padding=0), dilated(32, 2, 1)),
      Sum(separable(), dilated(32, 4, 4)),
      Sum(plain(32, width), dilated(width, 8, 8)),
    ]
  return nn.Sequential(*layers, create_head(64, nn.AdaptiveAvgPool2d(1)))


def create_pyramid(dropout: float = 0.05) -> nn.Module:
  """B2: three blocks of conv, batch norm, ReLU, dropout."""

  def unit(c_in: int, c_out: int, padding: int = 1) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, 3, padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(), nn.Dropout(dropout))

  return nn.Sequential(
    unit(3, 16),
    unit(16, 32),
    create_transition(32, 16),
    unit(16, 16),
    unit(16, 32),
    unit(32, 32, padding=0),
    create_transition(32, 16),
    unit(16, 16),
    unit(16, 32, padding=0),
    unit(32, 64, padding=0),
    create_head(64, nn.AdaptiveAvgPool2d(1)),
  )


def create_ghost(dropout: float = 0.1) -> nn.Module:
  """D: conv with bias, ReLU, ghost batch norm, dropout."""

  def unit(
    c_in: int, c_out: int, kernel: int | tuple[int, int], padding: int = 1, dilation: int = 1
  ) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=padding, dilation=dilation)
    return nn.Sequential(conv, nn.ReLU(), GhostBatchNorm(c_out), nn.Dropout(dropout))

  return nn.Sequential(
    unit(3, 32, 3)[:-1],
    unit(32, 32, 3),
    nn.MaxPool2d(2),
    unit(32, 16, 1),
    unit(16, 64, (3, 1)),
    unit(64, 64, (1, 3)),
    nn.MaxPool2d(2),
    unit(64, 32, 1),
    unit(32, 128, 3, padding=2, dilation=2),
    unit(128, 128, 3, dilation=2),
    nn.MaxPool2d(2),
    nn.Conv2d(128, 256, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(256, 64, 3, padding=1),
    nn.ReLU(),
    create_head(64, nn.AvgPool2d(4), bias=True),
  )


def create_skip(dropout: float = 0.05) -> nn.Module:
  """E1: conv, ReLU, batch norm, dropout; two identity paths."""

  def unit(c_in: int, c_out: int) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(c_out), nn.Dropout(dropout))

  return nn.Sequential(
    unit(3, 24),
    Residual(unit(24, 24)),
    create_transition(24, 8),
    unit(8, 32),
    Residual(unit(32, 32)),
    unit(32, 32),
    create_transition(32, 8),
    unit(8, 32),
    unit(32, 32),
    unit(32, 32),
    create_head(32, nn.AdaptiveAvgPool2d(1)),
  )


def create_skip_dilated(dropout: float = 0.05) -> nn.Module:
  """E4: as `skip`, with strides, a dilated and a depthwise convolution, three identity paths."""

  def unit(
    c_in: int,
    c_out: int,
    *,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    groups: int = 1,
  ) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, 3, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(c_out), nn.Dropout(dropout))

  return nn.Sequential(
    unit(3, 32),
    Residual(unit(32, 32)),
    unit(32, 64, stride=2),
    nn.Conv2d(64, 16, 1, bias=False),
    unit(16, 32, padding=2, dilation=2),
    Residual(unit(32, 32, groups=32)),
    unit(32, 64, stride=2),
    nn.Conv2d(64, 32, 1, bias=False),
    unit(32, 64),
    Residual(unit(64, 64)),
    unit(64, 96, stride=2),
    create_head(96, nn.AvgPool2d(4)),
  )


def create_keras_base(dropout: float = 0.25) -> nn.Module:
  """C0: three pairs of convolutions and three dense layers, with biases and without norms."""

  def block(c_in: int, c_out: int) -> list[nn.Module]:
    return [
      nn.Conv2d(c_in, c_out, 3, padding=1),
      nn.ReLU(),
      nn.Conv2d(c_out, c_out, 3),
      nn.ReLU(),
      nn.MaxPool2d(2),
      nn.Dropout(dropout),
    ]

  def dense(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Linear(c_in, c_out), nn.ReLU(), nn.Dropout(2 * dropout)]

  return nn.Sequential(
    *block(3, 48),
    *block(48, 96),
    *block(96, 192),
    nn.Flatten(),
    *dense(192 * 2 * 2, 512),
    *dense(512, 256),
    nn.Linear(256, 10),
  )


def create_keras_fcn(dropout: float = 0.05) -> nn.Module:
  """C1: three pairs of conv, batch norm, ReLU, dropout with transitions between them."""

  def block(c_in: int, c_out: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for channels in (c_in, c_out):
      layers += [
        nn.Conv2d(channels, c_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
        nn.Dropout(dropout),
      ]
    return layers

  return nn.Sequential(
    *block(3, 32),
    create_transition(32, 24),
    *block(24, 64),
    create_transition(64, 32),
    *block(32, 128),
    create_head(128, nn.AdaptiveAvgPool2d(1)),
  )


def create_five_convs(dropout: float = 0.05) -> nn.Module:
  """C2: pairs of normal, spatially separable, depthwise separable and grouped convolutions."""

  def finish(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(dropout)]

  def normal(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), *finish(c_out))

  def spatial(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(
      nn.Conv2d(c_in, c_out, (3, 1), padding=(1, 0), bias=False),
      nn.Conv2d(c_out, c_out, (1, 3), padding=(0, 1), bias=False),
      *finish(c_out),
    )

  def depthwise(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(
      nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False),
      nn.Conv2d(c_in, c_out, 1, bias=False),
      *finish(c_out),
    )

  def two_groups(c_in: int, c_out: int, kernel: int = 3, dilation: int = 1) -> nn.Module:
    halves = c_in // 2, c_out // 2
    first = nn.Conv2d(*halves, 3, padding=1, bias=False)
    second = nn.Conv2d(*halves, kernel, padding="same", dilation=dilation, bias=False)
    return nn.Sequential(GroupedConv([first, second]), *finish(c_out))

  return nn.Sequential(
    normal(3, 32),
    normal(32, 32),
    create_transition(32, 32),
    spatial(32, 64),
    spatial(64, 64),
    depthwise(64, 96),
    depthwise(96, 96),
    create_transition(96, 64),
    two_groups(64, 128, kernel=5),
    two_groups(128, 128, kernel=5),
    two_groups(128, 128, dilation=2),
    two_groups(128, 128, dilation=2),
    create_head(128, nn.AdaptiveAvgPool2d(1)),
  )


def create_tiny(
  dropout: float = 0.0,
  *,
  widths: tuple[int, ...] = (32, 48, 64),
  units: tuple[int, ...] = (3, 4, 5),
) -> nn.Module:
  """Residual depthwise-separable units in three stages."""

  def unit(c_in: int, c_out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
      nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False),
      nn.BatchNorm2d(c_in),
      nn.Conv2d(c_in, c_out, 1, bias=False),
      nn.BatchNorm2d(c_out),
      nn.ReLU(),
      nn.Dropout(dropout),
    )

  def stage(c_in: int, c_out: int, number: int) -> list[nn.Module]:
    first = [unit(c_in, c_out, stride=2)] if c_in else []
    return [*first, *(Residual(unit(c_out, c_out)) for _ in range(number))]

  stages = (stage(*args) for args in zip((0, *widths), widths, units, strict=False))
  return nn.Sequential(
    *(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()),
    nn.Dropout(dropout),
    *(module for modules in stages for module in modules),
    nn.BatchNorm2d(widths[-1]),
    create_head(widths[-1], nn.AdaptiveAvgPool2d(1), bias=True),
  )


def create_wide(
  dropout: float = 0.0, *, widths: tuple[int, ...] = (64, 128, 128), whitens: bool = False
) -> nn.Module:
  """A 2x2 convolution, then groups of two wide 3x3 convolutions.

  A whitening has a fixed kernel, a bias and ReLU; here its kernel is random.
  """

  def group(c_in: int, c_out: int) -> list[nn.Module]:
    return [
      nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
      nn.MaxPool2d(2),
      *(nn.BatchNorm2d(c_out), nn.ReLU(), nn.Dropout(dropout)),
      nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
      *(nn.BatchNorm2d(c_out), nn.ReLU(), nn.Dropout(dropout)),
    ]

  patches = nn.Conv2d(3, 24, 2, bias=whitens)
  patches.weight.requires_grad_(not whitens)
  groups = (group(*pair) for pair in zip((24, *widths), widths, strict=False))
  return nn.Sequential(
    *([patches, nn.ReLU()] if whitens else [patches]),
    *(module for modules in groups for module in modules),
    create_head(widths[-1], nn.AdaptiveAvgPool2d(1)),
  )


TORCH_NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "dilated": create_dilated,
  "pyramid": create_pyramid,
  "keras_base": create_keras_base,
  "keras_fcn": create_keras_fcn,
  "five_convs": create_five_convs,
  "ghost": create_ghost,
  "skip": create_skip,
  "skip_dilated": create_skip_dilated,
  "sprint": functools.partial(create_wide, whitens=True),
  "sprint_wide": functools.partial(create_wide, widths=(64, 256, 256), whitens=True),
  "tiny50k": create_tiny,
  "tiny100k": functools.partial(create_tiny, widths=(48, 64, 96)),
  "tiny200k": functools.partial(create_tiny, widths=(64, 96, 128), units=(3, 4, 6)),
  "tiny700k": functools.partial(create_tiny, widths=(96, 192, 256), units=(3, 4, 6)),
  "wide": create_wide,
}

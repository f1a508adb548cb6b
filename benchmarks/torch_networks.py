"""Four of the networks in plain PyTorch, as their sources would write them, to compare speed with.

Each takes float images (N, 3, 32, 32) and returns logits (N, 10). Modules stand in the order in
which they run, so that the i-th convolution or norm here is the i-th of the Flax network.
"""

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


def create_head(channels: int, pool: nn.Module, *, bias: bool = False) -> nn.Sequential:
  return nn.Sequential(pool, nn.Conv2d(channels, 10, 1, bias=bias), nn.Flatten())


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

  def squeeze() -> nn.Module:
    return nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.MaxPool2d(2))

  return nn.Sequential(
    unit(3, 16),
    unit(16, 32),
    squeeze(),
    unit(16, 16),
    unit(16, 32),
    unit(32, 32, padding=0),
    squeeze(),
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

  def squeeze(c_in: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, 8, 1, bias=False), nn.MaxPool2d(2))

  return nn.Sequential(
    unit(3, 24),
    Residual(unit(24, 24)),
    squeeze(24),
    unit(8, 32),
    Residual(unit(32, 32)),
    unit(32, 32),
    squeeze(32),
    unit(8, 32),
    unit(32, 32),
    unit(32, 32),
    create_head(32, nn.AdaptiveAvgPool2d(1)),
  )


TORCH_NETWORKS: dict[str, Callable[..., nn.Module]] = {
  "dilated": create_dilated,
  "ghost": create_ghost,
  "skip": create_skip,
  "pyramid": create_pyramid,
}

"""Networks of a few wide 3x3 convolutions, for quick training.

`wide` and `sprint` have the shapes of airbench93, `sprint_wide` those of airbench94 (Jordan 2024,
arXiv:2404.00498), without their scaling of the logits. `wide` learns its first layer; in the other
two it is a whitening, whose kernel training keeps.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import norm_relu
from flax_cifar.models import blocks

PATCH = (2, 2)  # rows and columns of pixels that the first layer reads
OUTPUTS = 24  # of the first layer: two for each of the 2 x 2 x 3 values of a patch


class Wide(blocks.Network):
  """A 2x2 convolution, then groups of two units whose first one pools before its norm.

  Attributes:
    widths: channels of each group.
    whitens: whether the 2x2 convolution is a whitening, with a bias and ReLU after it.
  """

  widths: tuple[int, ...] = (64, 128, 128)
  whitens: bool = False

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(blocks.ConvUnit)
    pooled = self.get_unit(blocks.PooledConvUnit)

    x = self._read_patches(images)
    for group, width in enumerate(self.widths, start=1):
      x = pooled(width, name=f"group{group}_pooled")(x, train)
      x = unit(width, name=f"group{group}_unit")(x, train)
    return self.get_head()(x)

  def _read_patches(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n h2 w2 c"]:
    shared: dict[str, Any] = {"padding": 0, "dtype": self.dtype}
    if self.whitens:
      return norm_relu.relu(blocks.Whitening(OUTPUTS, PATCH, name="whitening", **shared)(images))
    shared |= {"use_bias": False, "kernel_init": self.kernel_init}
    return blocks.Conv(OUTPUTS, PATCH, name="patches", **shared)(images)

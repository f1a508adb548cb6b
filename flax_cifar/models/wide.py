"""Network `wide`: a few wide 3x3 convolutions, for quick training; 569,632 parameters.

The shapes are those of airbench93 (Jordan 2024, arXiv:2404.00498), without its whitening, its
biases and its scaling of the logits.
"""

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks


class Wide(blocks.Network):
  """A 2x2 convolution, then three groups of two units whose first one pools before its norm."""

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(blocks.ConvUnit)
    pooled = self.get_unit(blocks.PooledConvUnit)

    x = blocks.Conv(
      24,
      (2, 2),
      padding=0,
      use_bias=False,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      name="patches",
    )(images)
    for group, width in enumerate((64, 128, 128), start=1):
      x = pooled(width, name=f"group{group}_pooled")(x, train)
      x = unit(width, name=f"group{group}_unit")(x, train)
    return self.get_head()(x)

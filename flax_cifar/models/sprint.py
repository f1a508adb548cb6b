"""Networks for quick training: whitened patches, then a few wide 3x3 convolutions.

`sprint` has 569,656 parameters and `sprint_wide` 1,972,792, of which training keeps the 288 of the
whitening. The shapes are those of airbench93 and airbench94 (Jordan 2024, arXiv:2404.00498); units
with batch norm's scale, ReLU, an average pool and no scaling of the logits are ours.
"""

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import norm_relu
from flax_cifar.models import blocks


class Sprint(blocks.Network):
  """Whitened patches, then groups of two units whose first one pools before its norm.

  Attributes:
    widths: channels of each group.
  """

  widths: tuple[int, ...] = (64, 128, 128)

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(blocks.ConvUnit)
    pooled = self.get_unit(blocks.PooledConvUnit)

    x = norm_relu.relu(blocks.Whitening(self.dtype, name="whitening")(images))
    for group, width in enumerate(self.widths, start=1):
      x = pooled(width, name=f"group{group}_pooled")(x, train)
      x = unit(width, name=f"group{group}_unit")(x, train)
    return self.get_head()(x)

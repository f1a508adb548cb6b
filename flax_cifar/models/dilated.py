"""Network A, `dilated`: parallel plain and dilated units, 192,672 parameters with batch norm.

Source: niharikavadapalli/ERA-V1, ERA-V1-Session-9.
"""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks


class Dilated(blocks.Network):
  """C1 C2 C3 C4 -> global average pool -> 1x1; receptive field 99 pixels.

  Every layer but the first is a ParallelSum. C2 to C4 each start with an unpadded convolution,
  which shrinks the feature map by two pixels (32 -> 30 -> 28 -> 26).
  """

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    plain = self.get_unit(blocks.ConvUnit, features=32)
    separable = self.get_unit(blocks.DepthwiseSeparableUnit, features=32)
    dilated = self.get_unit(blocks.ConvUnit, features=32, pad_mode="reflect")

    def add(name: str, x: Array, plain: blocks.UnitFactory, dilated: blocks.UnitFactory) -> Array:
      return blocks.ParallelSum(plain, dilated, name=name)(x, train)

    x = plain(name="c1_1")(images, train)
    x = add("c1_2", x, separable, partial(dilated, dilation=2, padding=2))
    x = add("c1_3", x, plain, partial(dilated, dilation=4, padding=4))
    for block, width in (("c2", 32), ("c3", 32), ("c4", 64)):
      x = add(f"{block}_1", x, partial(plain, padding=0), partial(dilated, dilation=2, padding=1))
      x = add(f"{block}_2", x, separable, partial(dilated, dilation=4, padding=4))
      x = add(
        f"{block}_3",
        x,
        partial(plain, features=width),
        partial(dilated, features=width, dilation=8, padding=8),
      )
    return self.get_head()(x)

"""Networks of residual depthwise-separable units, our own, for small numbers of parameters.

`tiny50k` has 48,090 with batch norm.
"""

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks


class Tiny(blocks.Network):
  """A 3x3 convolution, then stages of residual units; all but the first begin with a stride.

  Attributes:
    widths: channels of each stage.
    units: residual units of each stage, without the strided unit before them.
    activation: of the units, see `blocks.ACTIVATIONS`.
    squeeze_excite: of the units, a fraction of their channels; 0 for none.
    drop_path: of the last unit; it grows from 0 by the same amount from unit to unit.
  """

  widths: tuple[int, ...] = (32, 48, 64)
  units: tuple[int, ...] = (3, 4, 5)
  activation: str = "relu"
  squeeze_excite: float = 0.0
  drop_path: float = 0.0

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(
      blocks.ResidualSeparableUnit,
      activation=self.activation,
      squeeze_excite=self.squeeze_excite,
    )
    rates = iter(np.linspace(0, self.drop_path, sum(self.units)).tolist())

    x = self.get_unit(blocks.ConvUnit)(self.widths[0], name="stem")(images, train)
    for stage, (width, number) in enumerate(zip(self.widths, self.units, strict=True), start=1):
      if stage > 1:
        x = unit(width, stride=2, name=f"stage{stage}_down")(x, train)
      for i in range(1, number + 1):
        x = unit(width, drop_path=next(rates), name=f"stage{stage}_unit{i}")(x, train)
    x = self.norm(relu=False, name="norm")(x, train)
    return self.get_head(use_bias=True)(x)

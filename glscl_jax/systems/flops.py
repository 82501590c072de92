"""FLOPs of a training step for one sample.

A step counts as three forward passes: the backward pass computes a product
for the gradient of each operand. What only targets or masks read
(stop-gradient) counts once. Recomputation (remat) is not work of the model and
does not count, and neither do the similarities of the contrastive losses,
which are below 0.1 % at paper size.
"""

from __future__ import annotations

import dataclasses

BACKWARD = 2  # products of the backward pass for one of the forward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
  """Forward FLOPs of one sample, by part."""

  image: float
  text: float
  fusion: float
  heads: float
  targets: float = 0.0  # part that only targets read: no backward

  @property
  def total(self) -> float:
    """All parts together."""
    return self.image + self.text + self.fusion + self.heads

  @property
  def step(self) -> float:
    """A training step, forward and backward."""
    return (1 + BACKWARD) * self.total - BACKWARD * self.targets

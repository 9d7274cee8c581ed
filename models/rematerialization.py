"""What the gradient of a network finds in memory from the forward pass, and what it computes again.

A convolution or matrix product is dear to compute, and its result is what the next layer starts from. Between two of
them lie layers that cost little but whose results are as large: normalizations, activations, dropout, sums. So the
gradient of a block keeps its inputs and the results of its convolutions and products, and computes the rest again
(Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): no product of matrices more, and less than half of
the memory. What is kept is marked with `keep`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

KEPT = "kept"


def keep(x: Array) -> Array:
    """Marks a result that is too dear to compute twice, or small: the gradient of a block finds it in memory."""
    return checkpoint_name(x, KEPT)


def call_block(block: nn.Module, *inputs: Any, remat: bool, **options: Any) -> Array:
    """Calls a block of a network, whose gradient computes again what is not marked; with `remat`, all of it.

    With `remat` only a block's inputs stay in memory from the forward pass to the gradient. Parameters, random streams
    and numbers are the same.

    Args:
      block: a layer that belongs to the network that calls it.
      inputs: arrays, or lists of them, that it is called with.
      remat: compute the convolutions and matrix products again, too.
      options: keywords that it is called with, which are no arrays.
    """
    call = lambda block, *inputs: block(*inputs, **options)  # noqa: E731
    policy = None if remat else jax.checkpoint_policies.save_only_these_names(KEPT)
    return nn.remat(call, policy=policy)(block, *inputs)

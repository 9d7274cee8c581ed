"""Convolution with kernels of 3x3 taps by fewer multiplications: Winograd's minimal filtering F(2x2, 3x3).

Lavin and Gray 2015 (arXiv 1509.09308) apply it to networks. A tile of 2x2 outputs needs 4x4 inputs, of all channels.
Along one axis, with inputs d[4], taps g[3] and outputs y[2],

  y = A^T [(G g) * (B^T d)],

with an elementwise product: 4 multiplications in place of 6, and 16 in place of 36 of a tile. Summed over channels,
each of the 16 is a product of matrices: tiles times channels in, with channels in times channels out. The
transformations of inputs and outputs are additions. The algorithm is bilinear, so that the gradient of the kernel is
its transpose,

  g' = G^T [(A y') * (B^T d)].

Against XLA's convolution a forward pass of 16x16 to 32x32 images with 128 to 512 channels takes half the time, and the
kernel's gradient 0.57 to 0.67 of that of `models.cpu.convolution` (docs/performance.md).

In float32 the errors of rounding are 0.7 to 1.8 times those of XLA's convolutions (against float64, in the shapes of
CIFAR-10's NCSN++). In bfloat16 the transformations would round to it, so that this is not for bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from models.cpu import parts
from models.window import Pair

Matrix = Sequence[Sequence[float]]

TAPS = (3, 3)
PAYS = jax.__version_info__ >= (0, 12)  # the XLA of JAX 0.10 drops barriers: 40 % more memory and no time won
_OF_INPUTS: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T
_OF_TAPS: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G
_OF_PRODUCTS: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T
PART_VALUES = 2**20  # of transformed inputs of a part of the batch, which a CPU's cache holds
MOST_VALUES = 2**21  # of those of one image: with more, they go through memory, which takes as long as is won
LEAST_TILES = 32  # of a batch: with fewer, transforming the kernel takes as long as is won
LEAST_CHANNELS = 64  # with fewer, the transformations of the images do


def _transpose(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _mix(matrix: Matrix, arrays: Sequence[Array]) -> Array:
    """Return the product of a matrix with a column of arrays, stacked along a new first axis."""
    rows = [[weight * array for weight, array in zip(row, arrays, strict=True) if weight] for row in matrix]
    return jnp.stack([sum(terms[1:], terms[0]) for terms in rows])


def _tiles(matrix: Matrix, images: Array, num_tiles: tuple[int, int]) -> Array:
    """Transform the tiles of images, which begin at every second pixel: [16, tiles of all images, channels]."""

    def mix(x: Array, n: int) -> Array:
        """Transform along axis 2 to a new one in front, so that what was axis 1 is axis 2 then."""
        return _mix(matrix, [lax.slice_in_dim(x, i, i + 2 * n - 1, 2, 2) for i in range(len(matrix[0]))])

    columns = lax.optimization_barrier(mix(images, num_tiles[1]))
    return mix(columns, num_tiles[0]).reshape(16, -1, images.shape[3])


def _transform_taps(matrix: Matrix, taps: Array) -> Array:
    """Transform both of the first two axes."""
    columns = _mix(matrix, [taps[:, j] for j in range(taps.shape[1])])
    return _mix(matrix, [columns[:, i] for i in range(taps.shape[0])])


def _pad(x: Array, padding: tuple[Pair, Pair]) -> Array:
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*edges, 0) for edges in padding), (0, 0, 0)])


def is_faster(x: Array, taps: tuple[int, ...], padding: tuple[Pair, Pair]) -> bool:
    """Return whether this applies to a convolution by single pixels, and pays.

    Args:
      x: images [B, H, W, C].
      taps: the kernel's shape (h, w, C, O).
      padding: as in `convolve`.
    """
    outputs = [size + sum(zeros) - 2 for size, zeros in zip(x.shape[1:3], padding, strict=True)]
    if not PAYS or taps[:2] != TAPS or x.dtype != jnp.float32 or outputs[0] % 2 or outputs[1] % 2:
        return False
    num_tiles = outputs[0] * outputs[1] // 4
    is_large_enough = len(x) * num_tiles >= LEAST_TILES and min(taps[2:]) >= LEAST_CHANNELS
    return is_large_enough and 16 * num_tiles * taps[2] <= MOST_VALUES


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"], padding: tuple[Pair, Pair]
) -> Float[Array, "B P Q O"]:
    """Correlate images with a kernel, one pixel at a time; P and Q are even.

    Args:
      x: images.
      kernel: taps, rows first.
      padding: zeros around the image, (before, after) of rows and of columns; negative values crop.
    """
    features = kernel.shape[3]
    # Together, so that no kernel is transformed long before and its taps kept through the forward pass.
    x, kernel = lax.optimization_barrier((x, kernel))
    taps = lax.optimization_barrier(_transform_taps(_OF_TAPS, kernel).reshape(16, -1, features))

    def of_part(x: Array) -> Array:
        padded = _pad(x, padding)
        rows, columns = ((size - 2) // 2 for size in padded.shape[1:3])
        inputs = _tiles(_OF_INPUTS, padded, (rows, columns))
        products = lax.optimization_barrier(jnp.matmul(lax.optimization_barrier(inputs), taps))
        outputs = _transform_taps(_OF_PRODUCTS, products.reshape(4, 4, -1, rows, columns, features))
        return outputs.transpose(2, 3, 0, 4, 1, 5).reshape(-1, 2 * rows, 2 * columns, features)

    return parts.map_parts(of_part, parts.num_parts(len(x), 4 * x[0].size, PART_VALUES), x)


def kernel_gradient(
    x: Float[Array, "B H W C"], cotangent: Float[Array, "B P Q O"], padding: tuple[Pair, Pair]
) -> Float[Array, "3 3 C O"]:
    """Return the gradient of the kernel of `convolve`, of x with this padding."""
    # The first factor of a fast product has its channels before its tiles: the smaller one is transposed.
    features_first = cotangent.shape[3] < x.shape[3]

    def of_part(x: Array, cotangent: Array) -> Array:
        num_tiles = (cotangent.shape[1] // 2, cotangent.shape[2] // 2)
        inputs = _tiles(_OF_INPUTS, _pad(x, padding), num_tiles)
        outputs = _tiles(_transpose(_OF_PRODUCTS), cotangent, num_tiles)
        first, second = (outputs, inputs) if features_first else (inputs, outputs)
        return jnp.matmul(*lax.optimization_barrier((first.swapaxes(1, 2), second)))

    num_parts = parts.num_parts(len(x), 4 * x[0].size, PART_VALUES)
    total = lax.optimization_barrier(parts.sum_over_parts(of_part, num_parts, x, cotangent))
    gradient = _transform_taps(_transpose(_OF_TAPS), total.reshape(4, 4, *total.shape[1:]))
    return lax.optimization_barrier(gradient).swapaxes(2, 3) if features_first else gradient

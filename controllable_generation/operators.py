"""Linear measurements y = A x of images: masking, averaging, blurring, sampled frequencies.

An `Operator` has A, its transpose, and the solution of (a A A^T + b I) u = v, which is all that restoration needs. Each
kind below solves this in the basis in which A A^T is diagonal; operators of two functions use conjugate gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from errors import UserError
from sde_lib import Images, Scalars, State, expand
from sources.resize import resize

Shape = tuple[int, ...]
ImageShape = tuple[int, int, int]
Linear = Callable[[Array], Array]
Coefficient = Scalars | float

_NULL = 1e-6  # eigenvalues of A A^T below this fraction of the largest count as 0
CG_STEPS = 50  # of an operator given as a pair of functions


@dataclass(frozen=True)
class Operator:
    """A linear map A of images to measurements; every function takes a batch."""

    apply: Linear  # x [B, *image_shape] -> A x [B, *measurement_shape]
    transpose: Linear  # y -> A^T y
    # (v, a, b) -> u with (a A A^T + b I) u = v, on the range of A where b is 0; a and b are numbers or [B]
    solve: Callable[[Array, Coefficient, Coefficient], Array]
    image_shape: ImageShape  # (H, W, C)
    measurement_shape: Shape
    measured: np.ndarray  # 1 where an entry is measured, 0 where it is always 0; broadcasts against a measurement
    is_orthogonal: bool  # A A^T is a multiple of the identity on the measured entries: white noise stays white
    picture_shape: ImageShape | None = None  # (H, W, C) of a measurement as a picture; None if it is no picture

    def pseudo_inverse(self, y: State) -> Images:
        """Return A^+ y, the smallest image that has this measurement."""
        return self.transpose(self.solve(y, 1.0, 0.0))

    @property
    def num_measured(self) -> int:
        """Number of measured values."""
        return int(np.broadcast_to(self.measured, self.measurement_shape).sum())


def _coefficient(value: Coefficient, like: Array) -> Array | float:
    return expand(value, like) if isinstance(value, jax.Array) and value.ndim else value


def _divide(numerator: Array, divisor: Array) -> Array:
    """Divide where the divisor is positive; return 0 elsewhere, as a pseudo-inverse does."""
    return jnp.where(divisor > 0, numerator / jnp.where(divisor > 0, divisor, 1.0), 0.0)


def _solve_diagonal(
    v: Array, a: Coefficient, b: Coefficient, *, eigenvalues: np.ndarray, to_basis: Linear, from_basis: Linear
) -> Array:
    """Divide by a * eigenvalues of A A^T + b in the eigenbasis; where both are 0 the solution is 0."""
    values = jnp.asarray(np.where(eigenvalues > _NULL * eigenvalues.max(), eigenvalues, 0.0), v.dtype)
    coefficients = to_basis(v)
    divisor = _coefficient(a, coefficients) * values[None] + _coefficient(b, coefficients)
    return from_basis(_divide(coefficients, divisor))


def inpainting(mask: Float[np.ndarray, "H W C"]) -> Operator:
    """Keep the pixels where the mask is 1 and set the others to 0."""
    keep = lambda x: x * jnp.asarray(mask, x.dtype)[None]  # noqa: E731
    solve = functools.partial(_solve_diagonal, eigenvalues=mask, to_basis=lambda v: v, from_basis=lambda c: c)
    return Operator(keep, keep, solve, mask.shape, mask.shape, mask, is_orthogonal=True, picture_shape=mask.shape)


def grayscale(image_shape: ImageShape) -> Operator:
    """Take the mean of the channels, the grey value of Song et al. 2021, Appendix I.3."""
    H, W, C = image_shape
    apply = lambda x: x.mean(axis=-1, keepdims=True)  # noqa: E731
    transpose = lambda y: jnp.repeat(y / C, C, axis=-1)  # noqa: E731
    eigenvalues, shape = np.full((1, 1, 1), 1 / C), (H, W, 1)
    solve = functools.partial(_solve_diagonal, eigenvalues=eigenvalues, to_basis=lambda v: v, from_basis=lambda c: c)
    return Operator(apply, transpose, solve, image_shape, shape, np.ones((1, 1, 1)), True, picture_shape=shape)


def _along_axes(rows: np.ndarray, columns: np.ndarray) -> Linear:
    """Return x -> rows x columns^T for every channel."""
    return lambda x: jnp.einsum(
        "ph,bhwc,qw->bpqc", jnp.asarray(rows, x.dtype), x, jnp.asarray(columns, x.dtype), precision="highest"
    )


def separable(rows: Float[np.ndarray, "P H"], columns: Float[np.ndarray, "Q W"], num_channels: int) -> Operator:
    """Multiply the rows and the columns of every channel by a matrix each: resizing, separable blur."""
    (U, S, _), (V, T, _) = (np.linalg.svd(matrix.astype(np.float64)) for matrix in (rows, columns))
    eigenvalues = np.multiply.outer(S**2, T**2)[..., None]
    solve = functools.partial(
        _solve_diagonal, eigenvalues=eigenvalues, to_basis=_along_axes(U.T, V.T), from_basis=_along_axes(U, V)
    )
    shape = (len(rows), len(columns), num_channels)
    return Operator(
        apply=_along_axes(rows, columns),
        transpose=_along_axes(rows.T, columns.T),
        solve=solve,
        image_shape=(rows.shape[1], columns.shape[1], num_channels),
        measurement_shape=shape,
        measured=np.ones((1, 1, 1)),
        is_orthogonal=bool(np.ptp(eigenvalues) < _NULL * eigenvalues.max()),
        picture_shape=shape,
    )


def super_resolution(image_shape: ImageShape, factor: int, kernel: str) -> Operator:
    """Shrink images by a factor that divides height and width.

    By the mean of factor x factor pixels ("box") or "bicubic", with antialiasing as Pillow's (a = -1/2).
    """
    H, W, C = image_shape
    if kernel == "box":
        rows, columns = (np.kron(np.eye(size // factor), np.full((1, factor), 1 / factor)) for size in (H, W))
    else:
        bicubic = lambda size: resize(np.eye(size)[..., None], size // factor, size, Image.Resampling.BICUBIC)  # noqa: E731
        rows, columns = (bicubic(size)[..., 0].astype(np.float64) for size in (H, W))
    return separable(rows, columns, C)


def gaussian_blur(image_shape: ImageShape, std: float) -> Operator:
    """Blur with a Gaussian of `std` pixels, cut off at 4 std; the image is mirrored at its border."""
    from scipy.ndimage import gaussian_filter1d  # lazily: 0.2 s of every start

    H, W, C = image_shape
    rows, columns = (gaussian_filter1d(np.eye(size), std, axis=0, mode="reflect") for size in (H, W))
    return separable(rows, columns, C)


def _motion_kernel(length: float, angle: float) -> Float[np.ndarray, "K K"]:
    """Return the weights of a straight line of `length` pixels through the middle, spread over the nearest pixels."""
    half = int(np.ceil((length - 1) / 2)) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    steps = np.linspace(-(length - 1) / 2, (length - 1) / 2, num=max(int(16 * length), 2) + 1)
    for place in steps:
        y, x = half - place * np.sin(np.deg2rad(angle)), half + place * np.cos(np.deg2rad(angle))
        top, left = int(np.floor(y)), int(np.floor(x))
        for i, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
            for j, weight in ((left, 1 - (x - left)), (left + 1, x - left)):
                if row_weight * weight > 0:
                    kernel[i, j] += row_weight * weight
    return kernel / kernel.sum()


def circular(image_shape: ImageShape, kernel: Float[np.ndarray, "K L"]) -> Operator:
    """Convolve every channel with a kernel of odd sides; the image repeats periodically."""
    H, W, _ = image_shape
    padded = np.zeros((H, W))
    for i, j in np.ndindex(*kernel.shape):  # wraps a kernel that is larger than the image
        padded[(i - kernel.shape[0] // 2) % H, (j - kernel.shape[1] // 2) % W] += kernel[i, j]
    transfer = np.fft.fft2(padded)[..., None]

    def filtered(x: Array, factor: np.ndarray) -> Array:
        spectrum = jnp.fft.fft2(x, axes=(1, 2))
        return jnp.fft.ifft2(spectrum * jnp.asarray(factor, spectrum.dtype)[None], axes=(1, 2)).real.astype(x.dtype)

    apply, transpose = (functools.partial(filtered, factor=factor) for factor in (transfer, transfer.conj()))
    solve = functools.partial(
        _solve_diagonal,
        eigenvalues=np.abs(transfer) ** 2,
        to_basis=lambda v: jnp.fft.fft2(v, axes=(1, 2)),
        from_basis=lambda c: jnp.fft.ifft2(c, axes=(1, 2)).real,
    )
    return Operator(apply, transpose, solve, image_shape, image_shape, np.ones((1, 1, 1)), False, image_shape)


def motion_blur(image_shape: ImageShape, length: float, angle: float) -> Operator:
    """Blur along a straight line of `length` pixels, `angle` degrees counter-clockwise from the horizontal."""
    return circular(image_shape, _motion_kernel(length, angle))


def fourier(image_shape: ImageShape, sampled: Float[np.ndarray, "H W"]) -> Operator:
    """Take coefficients of the orthonormal 2-D Fourier transform of every channel where `sampled` is 1, as MRI does.

    The measurement holds their real and imaginary parts, [2, H, W, C], frequency 0 in the corner. Two opposite
    frequencies of a real image count twice if both are measured.
    """
    H, W, C = image_shape
    mask = sampled[..., None]
    partner = np.roll(np.flip(mask, (0, 1)), 1, (0, 1)) * mask  # its opposite is measured, too
    join = lambda y: y[:, 0] + 1j * y[:, 1]  # noqa: E731
    part = lambda spectrum: jnp.stack([spectrum.real, spectrum.imag], 1)  # noqa: E731

    def apply(x: Array) -> Array:
        return part(jnp.fft.fft2(x, axes=(1, 2), norm="ortho") * jnp.asarray(mask, x.dtype)[None]).astype(x.dtype)

    def transpose(y: Array) -> Array:
        measured = join(y) * jnp.asarray(mask, y.dtype)[None]
        return jnp.fft.ifft2(measured, axes=(1, 2), norm="ortho").real.astype(y.dtype)

    def solve(v: Array, a: Coefficient, b: Coefficient) -> Array:
        # A A^T is 1 on what a pair of opposites agree in, 0 on what they differ in, 1/2 on a single frequency.
        spectrum, pairs = join(v), jnp.asarray(partner, v.dtype)[None]
        mirrored = jnp.conj(jnp.roll(jnp.flip(spectrum, (1, 2)), 1, (1, 2)))  # equals a real image's spectrum
        agreed = (spectrum + mirrored) / 2 * pairs
        parts = (agreed, 1.0), (spectrum * pairs - agreed, 0.0), (spectrum * (jnp.asarray(mask)[None] - pairs), 0.5)
        total = jnp.zeros_like(spectrum)
        for coefficients, eigenvalue in parts:
            divisor = jnp.asarray(_coefficient(a, spectrum) * eigenvalue + _coefficient(b, spectrum), v.dtype)
            total += _divide(coefficients, divisor)
        return part(total).astype(v.dtype)

    return Operator(apply, transpose, solve, image_shape, (2, H, W, C), mask[None], bool((partner == mask).all()))


def _dot(x: Array, y: Array) -> Scalars:
    return jnp.sum(x * y, axis=tuple(range(1, x.ndim)))


def conjugate_gradients(matrix: Linear, v: State, num_steps: int) -> State:
    """Solve matrix(u) = v for a symmetric, positive semi-definite matrix, in which examples must not interact."""

    def step(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        u, residual, direction = carry
        product = matrix(direction)
        curvature, before = _dot(direction, product), _dot(residual, residual)
        length = expand(_divide(before, curvature), u)
        u, residual = u + length * direction, residual - length * product
        ratio = _divide(_dot(residual, residual), before)
        return u, residual, residual + expand(ratio, u) * direction

    return jax.lax.fori_loop(0, num_steps, step, (jnp.zeros_like(v), v, v))[0]


def from_functions(
    apply: Linear,
    transpose: Linear,
    image_shape: ImageShape,
    *,
    num_steps: int = CG_STEPS,
    picture_shape: ImageShape | None = None,
) -> Operator:
    """Make an operator from two functions of a batch, A and its transpose, in which examples must not interact.

    It solves with `num_steps` of conjugate gradients. `picture_shape` is (H, W, C) of a measurement as a picture; None
    if it is no picture.

    Raises:
      UserError: if the functions are not linear, or not the transposes of each other.
    """
    generator = np.random.Generator(np.random.Philox(0))
    x, other = (jnp.asarray(generator.standard_normal((1, *image_shape)), jnp.float32) for _ in range(2))
    y = apply(x)
    if not np.allclose(apply(2.0 * x - other), 2.0 * y - apply(other), rtol=1e-3, atol=1e-4):
        raise UserError("apply is not linear: apply(2 x - z) differs from 2 apply(x) - apply(z)")
    z = jnp.asarray(generator.standard_normal(y.shape), jnp.float32)
    back = transpose(z)
    if back.shape != x.shape:
        raise UserError(f"transpose makes images of shape {back.shape[1:]}; expected {image_shape}")
    left, right = float(_dot(y, z)[0]), float(_dot(x, back)[0])
    if abs(left - right) > 1e-3 * float(jnp.linalg.norm(y) * jnp.linalg.norm(z)):
        raise UserError(f"transpose is not apply's: <A x, y> = {left:.6g}, but <x, A^T y> = {right:.6g}")

    def solve(v: Array, a: Coefficient, b: Coefficient) -> Array:
        matrix = lambda u: _coefficient(a, u) * apply(transpose(u)) + _coefficient(b, u) * u  # noqa: E731
        return conjugate_gradients(matrix, v, num_steps)

    ones = np.ones((1,) * (y.ndim - 1))
    return Operator(apply, transpose, solve, image_shape, y.shape[1:], ones, False, picture_shape)

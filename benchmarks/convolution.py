"""Speed of convolutions, in and out of a compiled loop, and of a training step: `python benchmarks/convolution.py`.

Prints GFLOP/s of a 3x3 convolution (forward, gradient of the input, gradient of the kernel), ours and XLA's own, next
to the rate of a matrix product in the same run; then milliseconds per training step of the small DDPM++ of the demo in
a loop of 5 steps. Each figure is the best of a few repetitions; the machine should be otherwise idle.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from configs.vp import digits_ddpmpp_continuous
from models import create_model
from models.convolution import convolve
from models.window import Window, correlate

CASES = ((128, 8, 32), (8, 32, 128), (8, 16, 256))  # examples, size, channels
LOOP = 4
STEPS = 5
WINDOW = Window(padding=((1, 1), (1, 1)))


def seconds(fn: Callable[..., Any], *args: Any, repetitions: int = 3) -> float:
    """Returns the least time of a call, without the compilation."""
    compiled = jax.jit(fn).lower(*args).compile()
    times = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def in_loop(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `fn` LOOP times in a scan, each on an input that depends on the last result."""

    def looped(x: Any, *args: Any) -> Any:
        step = lambda carry, _: (carry + 1e-9 * fn(x + carry, *args).ravel()[0], None)  # noqa: E731
        return lax.scan(step, jnp.zeros(()), None, LOOP)[0]

    return looped


def convolution_rates(convolve: Callable[..., Any], examples: int, size: int, channels: int) -> dict[str, list[float]]:
    """Returns GFLOP/s outside and inside a loop, by what is computed."""
    x = jax.random.normal(jax.random.key(0), (examples, size, size, channels))
    cotangent = jax.random.normal(jax.random.key(1), x.shape)
    kernel = jax.random.normal(jax.random.key(2), (3, 3, channels, channels))
    forward = lambda x, kernel: convolve(x, kernel, WINDOW)  # noqa: E731
    pullbacks = {
        "forward": (forward, x, kernel),
        "input gradient": (lambda g, k: jax.vjp(lambda x: forward(x, k), x)[1](g)[0], cotangent, kernel),
        "kernel gradient": (lambda x, g: jax.vjp(lambda k: forward(x, k), kernel)[1](g)[0], x, cotangent),
    }
    work = 2e-9 * 9 * x.size * channels
    return {
        name: [work / seconds(fn, *args), work * LOOP / seconds(in_loop(fn), *args, repetitions=1)]
        for name, (fn, *args) in pullbacks.items()
    }


def step_seconds(model: nn.Module, batch_size: int) -> float:
    """Returns the time of a step of gradient descent on the denoising loss, in a loop of STEPS steps."""
    x = jax.random.uniform(jax.random.key(0), (batch_size, 8, 8, 1))
    z, labels = jax.random.normal(jax.random.key(1), x.shape), jnp.linspace(1.0, 999.0, batch_size)
    params = jax.jit(model.init)(jax.random.key(2), x[:1], labels[:1])["params"]

    def loss(params: Any) -> Any:
        y: Any = model.apply({"params": params}, x + z, labels)
        return jnp.square(y - z).mean()

    def step(params: Any, _: None) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient), value

    return seconds(lambda params: lax.scan(step, params, None, STEPS), params) / STEPS


def main() -> None:
    """Prints the table."""
    square = jnp.ones((1536, 1536))
    print(f"matrix product: {2e-9 * 1536**3 / seconds(jnp.matmul, square, square, repetitions=8):.0f} GFLOP/s")
    print("GFLOP/s outside / inside a loop")
    for case in CASES:
        for name, fn in (("ours", convolve), ("native", correlate)):
            rates = convolution_rates(fn, *case)
            print(
                case,
                name,
                *(f"{what} {outside:.0f} / {inside:.0f}" for what, (outside, inside) in rates.items()),
                sep="  ",
            )
    model = create_model(digits_ddpmpp_continuous.get_config())
    print(f"training step of the digits' DDPM++, 128 images: {1e3 * step_seconds(model, 128):.0f} ms")


if __name__ == "__main__":
    main()

"""Counting what a program multiplies: by hand, against XLA's own count, and under changes that must not matter."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax import lax

from benchmarks import contractions, measure, roofline, train_step
from benchmarks.roofline import Accelerator, Work
from experiment.build import build_experiment

LAYOUT = ("NHWC", "HWIO", "NHWC")


def count(fn, *arguments, platform="cuda"):
    return contractions.of_program(jax.jit(fn).trace(*arguments), platform)


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_convolution_by_hand():
    """4 images of 8x8 with one ring of zeros: along an axis of 8 outputs and 3 taps, 2 of 24 pairs meet a zero."""
    convolve = lambda x, kernel: lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)  # noqa: E731
    (found,) = count(convolve, floats(4, 8, 8, 5, dtype=jnp.bfloat16), floats(3, 3, 5, 6, dtype=jnp.bfloat16))
    assert found.flops == 2 * 4 * 5 * 6 * 22 * 22
    assert found.bytes == 2 * (4 * 64 * 5 + 9 * 5 * 6 + 4 * 64 * 6)
    assert (found.kind, found.element, found.count) == ("convolution", "bf16", 1)


def test_a_product_by_hand():
    (found,) = count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), floats(3, 4, 5), floats(3, 6, 5))
    assert (found.kind, found.element) == ("dot", "f32")
    assert found.flops == 2 * 3 * 4 * 6 * 5
    assert found.bytes == 4 * (3 * 4 * 5 + 3 * 6 * 5 + 3 * 4 * 6)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": ((1, 1), (0, 2))},
        {"window_strides": (2, 1), "padding": ((0, 1), (2, 0))},
        {"padding": ((2, 1), (1, 2)), "lhs_dilation": (2, 3)},
        {"padding": ((2, 2), (3, 3)), "rhs_dilation": (2, 3)},
        {"padding": ((-1, 0), (1, -2))},
        {"padding": ((1, 1), (1, 1)), "feature_group_count": 2},
        {"padding": ((1, 1), (1, 1)), "batch_group_count": 2},
    ],
    ids=["padding", "strides", "transposed", "dilated", "cropped", "groups of channels", "groups of examples"],
)
def test_convolutions_as_xla_counts_them(options):
    options = {"window_strides": (1, 1)} | options
    convolve = lambda x, kernel: lax.conv_general_dilated(x, kernel, dimension_numbers=LAYOUT, **options)  # noqa: E731
    arguments = floats(4, 7, 9, 6), floats(3, 3, 6 // options.get("feature_group_count", 1), 8)
    expected = measure.flops(jax.jit(convolve).lower(*arguments).compile())
    assert contractions.total_flops(count(convolve, *arguments)) == expected


def test_loops_and_conditions():
    product = lambda a: a @ a  # noqa: E731

    def program(a, flag):
        a = lax.scan(lambda a, _: (lax.fori_loop(0, 3, lambda _, a: product(a), a), None), a, None, 5)[0]
        return lax.cond(flag, lambda a: product(product(a)), product, a)

    found = count(program, floats(4, 4), jax.ShapeDtypeStruct((), jnp.bool_))
    assert contractions.total_flops(found) == (3 * 5 + 2) * 2 * 4**3
    assert contractions.total_bytes(found) == (3 * 5 + 2) * 3 * 4 * 4**2


# --- of the product --------------------------------------------------------------------------------------------------


def make_program(what="step", **changes):
    settings = {"training__batch_size": 4, "training__n_jitted_steps": 1, "model__nf": 64} | changes
    return train_step.trace_program(build_experiment(tiny.make_config(**settings)), what)


def flops(program, platform="cuda"):
    return contractions.total_flops(contractions.of_program(program, platform))


@pytest.mark.exhaustive
def test_a_training_step_multiplies_what_xla_counts_and_the_same_in_parts():
    """XLA counts in addition what is done element by element: at 64 channels 3.3 % of it all."""
    program = make_program()
    found = flops(program)
    assert found == flops(program, "tpu")
    counted = program.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"]
    assert found <= counted <= 1.05 * found
    assert flops(make_program(training__microbatches=2, training__n_jitted_steps=3)) == 3 * found


def test_least_time_is_the_slower_of_computing_and_moving():
    chip = Accelerator("chip", "cuda", {"f32": 100.0}, 10.0, "")
    multiply = contractions.Contraction("dot", "f32", flops=600, bytes=20, count=2)  # 6 s against 2 s, twice
    move = contractions.Contraction("dot", "f32", flops=100, bytes=50)  # 1 s against 5 s
    assert roofline.least_time(Work((multiply, move)), chip)["seconds"] == pytest.approx(17)
    assert roofline.least_time(Work((multiply, move)), chip)["bound"] == "compute"
    with_state = roofline.least_time(Work((multiply, move), state_bytes=100), chip)
    assert with_state["seconds"] == pytest.approx(37)
    assert with_state["bound"] == "memory"


def test_the_table_holds_what_was_counted():
    row = roofline.measure_config(tiny.make_config(), batch_size=4, dtype="bfloat16")
    lines = list(roofline.markdown([row]))
    assert len(lines) == 2 + 2
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    step = row["programs"]["training step"]
    assert cells[:3] == ["training step", "bfloat16", "4"]
    assert (
        cells[6]
        == f"{1e3 * step['least']['A100 SXM 40 GB']['seconds']:.2f} ms, {step['least']['A100 SXM 40 GB']['bound']}"
    )


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="--batch_size=0: expected a positive number"):
        roofline.measure_config(tiny.make_config(), batch_size=0, dtype="float32")

"""The benchmarks of samplers, likelihood and scaling: they count what happens, and ratios are of what they print."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sampling as samplers
from benchmarks import likelihood, loops, sampling, scaling
from experiment.build import Experiment

SLEEP = 0.01  # seconds of an evaluation of the slow score


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_convolutions_are_counted_in_loops_and_elsewhere():
    """Two in a loop, one in a loop inside of it, one in a branch of that, three outside."""

    def inner(_, x, kernel):
        x = convolve(x, kernel)
        return jax.lax.cond(x.sum() > 0, lambda x: convolve(x, kernel), lambda x: x, x)

    def program(x, kernel, turns):
        x = convolve(convolve(x, kernel), kernel)

        def body(i, x):
            x = convolve(convolve(x, kernel), kernel)
            return jax.lax.fori_loop(0, i, lambda j, x: inner(j, x, kernel), x)

        return convolve(jax.lax.fori_loop(0, turns, body, x), kernel)

    arguments = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 3)), 5
    assert loops.count_convolutions(jax.jit(program).lower(*arguments).compile()) == (4, 3)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="names no ENTRY computation"):
        loops.count_convolutions("HloModule nothing")


@pytest.fixture
def evaluations(monkeypatch):
    """A score that sleeps, and the list of its evaluations; few passes are taken between calls."""
    calls = []

    def wait(_):
        calls.append(None)
        time.sleep(SLEEP)
        return np.float32(0)

    def score_fn(self, params, *, smooth=False, class_labels=None):
        return lambda x, t: -x + jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x[0, 0, 0, 0])

    monkeypatch.setattr(Experiment, "score_fn", score_fn)
    monkeypatch.setattr(sampling, "CALL_SECONDS", 3 * SLEEP)
    return calls


def config_of(**changes):
    return tiny.make_config(training__batch_size=2, model__nf=4, **changes).lock()


@pytest.mark.exhaustive
def test_evaluations_are_those_that_happened_and_ratios_of_what_is_printed(evaluations):
    config = config_of(sampling__predictor="euler_maruyama")
    result = sampling.measure(config, methods=("pc", "heun"), num_steps=4, repetitions=1)
    expected = {"pc": (4, 25, 25), "heun": (9, 19, 39)}  # heun's last evaluation predicts the data
    num_evaluations = 3  # forward passes that tell how long one takes
    for method, numbers in expected.items():
        line = result["samplers"][method]
        assert (line["nfe"], line["usual_steps"], line["usual_nfe"]) == numbers
        assert line["calls"] == 1
        num_evaluations += line["nfe"] * (line["calls"] + 1) + line["forward_passes"] + 1
        assert line["forward_seconds"]["min"] >= SLEEP
        assert line["seconds_per_evaluation"]["min"] >= SLEEP
        quotient = line["seconds_per_evaluation"]["median"] / line["forward_seconds"]["median"]
        assert line["evaluation_over_forward"] == quotient
        assert 0.7 < quotient < 1.5  # nearly all is sleep
        assert line["seconds_per_image_calculated"] == line["seconds_per_evaluation"]["median"] * numbers[2] / 2
    assert len(evaluations) == num_evaluations
    assert result["step_over_forward"] == result["samplers"]["pc"]["evaluation_over_forward"]
    json.dumps(result, allow_nan=False)


def evaluate_twice(key, x, t, reverse_sde):
    """A predictor that evaluates the network twice where the sampler counts once."""
    one, other = (samplers.euler_maruyama(key, x + shift, t, reverse_sde) for shift in (0.0, 0.1))
    return (one[0] + other[0]) / 2, (one[1] + other[1]) / 2


def test_a_second_evaluation_shows_in_the_time(monkeypatch, evaluations):
    monkeypatch.setitem(samplers.PREDICTORS, "euler_maruyama", evaluate_twice)
    result = sampling.measure(
        config_of(sampling__predictor="euler_maruyama"), methods=("pc",), num_steps=4, repetitions=1
    )
    assert result["samplers"]["pc"]["nfe"] == 4
    assert 1.6 < result["step_over_forward"] < 2.6


@pytest.mark.exhaustive
def test_a_second_evaluation_shows_in_the_program(monkeypatch):
    monkeypatch.setitem(samplers.PREDICTORS, "euler_maruyama", evaluate_twice)
    result = sampling.measure(
        config_of(sampling__predictor="euler_maruyama"), methods=("pc",), num_steps=2, repetitions=1
    )
    assert result["samplers"]["pc"]["nfe"] == 2
    assert result["samplers"]["pc"]["evaluations_in_loop"] == 2


@pytest.mark.exhaustive
def test_a_stage_of_the_likelihood_is_one_evaluation_and_one_pullback():
    """A convolution of the forward pass has one of its own in the pullback, which stops at the image."""
    result = likelihood.measure(config_of(), num_steps=2, repetitions=1)
    assert result["nfe"] == 1 + 2 * 6
    convolutions = result["convolutions"]
    assert convolutions["parts"] == 2 * convolutions["forward"] > 0
    assert (result["stages_in_loop"], convolutions["likelihood_elsewhere"]) == (1, 0)
    assert (result["calls"], result["parts_calls"]) == (1, 2 * likelihood.PASSES)
    assert result["step_over_parts"] == result["seconds_per_stage"]["median"] / result["parts_seconds"]["median"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: sampling.measure(config_of(), methods=("pcc",)), "--methods='pcc' is unknown"),
        (lambda: sampling.measure(config_of(), num_steps=-1), "--num_steps"),
        (lambda: likelihood.measure(config_of(likelihood__trace="exact")), "expected one random probe"),
        (lambda: likelihood.measure(config_of(likelihood__num_probes=2)), "set likelihood.num_probes=1"),
        (lambda: scaling.measure([], {"nf": [16, 0]}, 8), "nf=0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_exponents_and_points_of_an_axis(monkeypatch):
    """Of a step that takes 3 B S² nf^1.5 seconds."""
    runs = []

    def run_point(arguments, devices):
        runs.append((tuple(arguments), devices))
        sizes = {"training.batch_size": 8, "data.image_size": 4, "model.nf": 16}
        sizes |= {flag.removeprefix("--config.").partition("=")[0]: int(flag.partition("=")[2]) for flag in arguments}
        seconds = 3 * sizes["training.batch_size"] * sizes["data.image_size"] ** 2 * sizes["model.nf"] ** 1.5
        return {"devices": devices, "seconds_per_step": {"median": seconds, "min": seconds}, "images_per_s": 1.0}

    monkeypatch.setattr(scaling, "run_point", run_point)
    axes = {"devices": [1, 2], "image_size": [4, 8, 32], "nf": [16, 64], "batch_size": [8, 32, 64]}
    result = scaling.measure(["--config.seed=1"], axes, 8, {"image_size": 4, "nf": 16})
    exponents = {axis: line["exponent"] for axis, line in result.items()}
    assert exponents == pytest.approx({"devices": 0, "image_size": 2, "nf": 1.5, "batch_size": 1})
    assert [point["batch_size"] for point in result["batch_size"]["points"]] == [8, 32, 64]
    assert [devices for _, devices in runs].count(2) == 1
    assert len(runs) == len(set(runs)) == 7  # the axes meet at the configuration's own sizes
    assert all("--config.seed=1" in arguments for arguments, _ in runs)


@pytest.mark.exhaustive
def test_a_point_is_measured_on_as_many_devices_as_asked():
    overrides = [f"--config.{name}={value}" for name, value in tiny.SETTINGS.items()]
    config = ["--config", "configs/vp/digits_ddpmpp_continuous.py"]
    point = scaling.run_point([*config, *overrides, "--steps=2"], 2)
    assert point["devices"] == 2
    assert point["images_per_s"] == 16 / point["seconds_per_step"]["median"]

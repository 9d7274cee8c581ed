"""The benchmarks of speed: their arithmetic by known times, XLA's count of operations, and the table of the goals."""

import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import pytest
import tiny

from benchmarks import measure as measuring
from benchmarks import run, train_step
from benchmarks.run import Goal, Outcome
from experiment.build import build_experiment
from modes import memory

# --- a training step and a forward pass ------------------------------------------------------------------------------


def test_operations_are_those_of_the_matrix_products_and_a_loop_counts_once():
    a, b = jnp.ones((8, 16)), jnp.ones((16, 32))
    assert measuring.flops(jax.jit(jnp.matmul).lower(a, b).compile()) == 2 * 8 * 16 * 32
    square = jnp.ones((32, 32))
    looped = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x @ square, None), x, None, 5)[0]).lower(b).compile()
    assert measuring.flops(looped) == pytest.approx(2 * 16 * 32 * 32, rel=0.01)  # and a few for the counter


def test_program_is_compiled_once_and_then_read():
    """Each compilation traces anew; the user's cache stays the one that is set."""
    traced, user = [], jax.config.jax_compilation_cache_dir
    jnp.sin(jnp.ones(3))  # the user's cache is open

    def program(x):
        traced.append(jax.config.jax_compilation_cache_dir)
        return jnp.sin(x) @ x

    compiled, seconds = train_step.compile_twice(lambda: jax.jit(program).lower(jnp.ones((64, 64))).compile())
    assert len(traced) == 2
    assert user not in traced
    assert jax.config.jax_compilation_cache_dir == user
    assert measuring.flops(compiled) >= 2 * 64**3
    assert seconds["cold"] > 0 < seconds["cached"]
    _, seconds = train_step.compile_twice(lambda: None)
    assert seconds["cached"] is None  # nothing was written and read


def set_times(monkeypatch, *seconds):
    """Calls take these times, a matrix product runs at 1, 2, 4, 8, ... GFLOP/s. Returns the list of the programs."""
    rates, programs, times = (1e9 * 2**n for n in itertools.count()), [], iter(seconds)

    def compile_twice(compile_program, *, read):
        assert read
        programs.append(compile_program())
        return programs[-1], {"cold": 2.0, "cached": 1.0}

    def time_calls(call, repetitions, *, warm_up):
        call()
        assert (repetitions, warm_up) == (1, 0)
        return measuring.Seconds((next(times),))

    monkeypatch.setattr(measuring, "gemm_flops_per_s", lambda *_: next(rates))
    monkeypatch.setattr(measuring, "time_calls", time_calls)
    monkeypatch.setattr(train_step, "compile_twice", compile_twice)
    return programs


def tiny_config(**changes):
    return tiny.make_config(model__num_res_blocks=1, **changes)


@pytest.mark.exhaustive
def test_times_are_of_one_step_of_the_calls(monkeypatch):
    """Three calls of two steps in 4, 2 and 6 s: 2 s a step, 1 s the fastest; 16 images; 3 GFLOP/s between 2 and 4."""
    programs = set_times(monkeypatch, 4.0, 2.0, 6.0)
    config = tiny_config()
    result = train_step.measure(config, steps=6)
    assert result["seconds_per_step"] == {"median": 2.0, "min": 1.0}
    assert result["images_per_s"] == 8.0
    assert result["gemm_flops_per_s_of_each"] == [1e9, 2e9, 4e9, 8e9]
    assert result["gemm_flops_per_s"] == result["float32_gemm_flops_per_s"] == 3e9
    assert result["fraction_of_gemm"] == pytest.approx(result["contraction_flops"] / 6e9, rel=1e-12)
    assert result["model_flops"] == measuring.flops(programs[0])
    assert result["compile_seconds"] == {"cold": 2.0, "cached": 1.0}
    assert result["temporaries_bytes"] == memory.of_training(build_experiment(config), programs[0]).temporaries


@pytest.mark.exhaustive
def test_forward_pass_is_the_score(monkeypatch):
    """By the numbers that come out of it."""
    set_times(monkeypatch, 0.5)
    config = tiny_config(training__n_jitted_steps=1)
    result = train_step.measure(config, steps=1, what="forward")
    assert result["seconds_per_step"]["median"] == 0.5
    experiment = build_experiment(config)
    x, t, _ = train_step.forward_inputs(experiment)
    scores = jax.jit(experiment.score_fn(train_step.random_params(experiment)))(x, t)
    assert result["result"] == pytest.approx(float(jnp.sqrt(jnp.square(scores).mean())), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "steps", "what", "message"),
    [
        ({}, 3, "step", r"--steps=3; expected a multiple of --n_jitted_steps=2"),
        ({}, 0, "step", r"--steps=0: expected a positive number"),
        ({}, 2, "forward", r"--n_jitted_steps=2 with --what=forward; expected 1"),
        ({"training__microbatches": 2}, 2, "step", r"training.microbatches=2; expected 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, steps, what, message):
    with pytest.raises(ValueError, match=message):
        train_step.measure(tiny_config(**settings), steps=steps, what=what)


# --- the table of the goals ------------------------------------------------------------------------------------------

FAST, SLOW = "benchmarks.fast --steps 2", "benchmarks.slow"
GOALS = (
    Goal("speed", "speed of it", (FAST,), lambda line: line["rate"], 0.7, "of it"),
    Goal(
        "ratio",
        "slow to fast",
        (SLOW, FAST),
        lambda slow, fast: slow["seconds"] / fast["seconds"],
        1.1,
        "times",
        at_most=True,
        detail=lambda slow, fast: f"{slow['seconds']:g} s | {fast['seconds']:g} s",
    ),
)


def line(**values):
    return Outcome(60.0, {"machine": {"cpu": "x", "extensions": ["a", "b"]}, "commit": "c0ffee", **values})


def rows(results):
    """The cells of each goal's row, by the names of the columns."""
    lines = [row for row in run.write_table(GOALS, results).splitlines() if row.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_table_says_whether_goals_are_met():
    results = {FAST: line(rate=0.7, seconds=2.0), SLOW: line(seconds=3.0)}
    speed, ratio = rows(results)
    assert speed == {
        "goal": "speed of it",
        "command": "`python -m benchmarks.fast --steps 2`",
        "machine": "1",
        "measured": "0.7 of it",
        "to reach": "at least 0.7 of it",
        "met": "met",
    }
    assert ratio["command"] == "`python -m benchmarks.slow` and `python -m benchmarks.fast --steps 2`"
    assert ratio["measured"] == "1.5 times (3 s \\| 2 s)"
    assert (ratio["to reach"], ratio["met"]) == ("at most 1.1 times", "not met")
    text = run.write_table(GOALS, results)
    assert "\n1. cpu x, extensions a b\n" in text
    assert "Commit c0ffee. All runs together took 2.0 minutes." in text


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (None, "not measured"),
        (Outcome(1.0, failure="it broke"), "failed: it broke"),
        (line(skipped="there is no torch"), "skipped: there is no torch"),
        (line(other=1.0), "failed: no value in what was printed (KeyError: 'rate')"),
    ],
)
def test_table_says_what_was_not_measured(outcome, expected):
    speed, _ = rows({SLOW: line(seconds=3.0)} | ({FAST: outcome} if outcome else {}))
    assert (speed["measured"], speed["met"]) == (expected, "")


def test_newest_result_of_each_command_counts(tmp_path):
    """Of two runs, of which the later one has only one of the commands."""
    old = {FAST: line(rate=0.1), SLOW: line(seconds=1.0)}
    new = {FAST: Outcome(2.0, failure="it broke")}
    for name, results in (("2026-b", new), ("2026-a", old)):
        saved = {command: dataclasses.asdict(outcome) for command, outcome in results.items()}
        (tmp_path / f"{name}.json").write_text(json.dumps(saved))
    assert run.load(tmp_path) == old | new


def test_every_goal_has_a_name_of_its_own_and_the_results_of_the_checkout_are_read():
    names = [goal.name for goal in run.GOALS]
    assert len(set(names)) == len(names)
    assert set(run.commands_of(run.GOALS)) <= set(run.load(run.FOLDER / "results"))


# --- the runner ------------------------------------------------------------------------------------------------------


def test_commands_end_in_a_line_or_in_why_there_is_none(tmp_path):
    """With programs of Python's own library."""
    path = tmp_path / "line.json"
    path.write_text('{"seconds": 3}')
    assert run.run_command(f"json.tool --compact {path}").line == {"seconds": 3}
    for content in ("[3]", '{"seconds": NaN}'):
        path.write_text(content)
        assert run.run_command(f"json.tool --compact {path}").failure.startswith("printed no line of JSON")
    assert run.run_command("benchmarks.nothing").failure.endswith("No module named benchmarks.nothing")
    start = time.monotonic()
    sleep = "timeit -n 1 -r 1 'import time; time.sleep(60)'"
    assert run.run_command(sleep, max_seconds=0.5).failure == "took more than 0.5 s"
    assert time.monotonic() - start < 30  # it was stopped


def test_what_was_measured_stays_if_the_run_is_stopped(tmp_path, monkeypatch):
    def run_command(command):
        if command == SLOW:
            raise KeyboardInterrupt
        return line(rate=0.5)

    monkeypatch.setattr(run, "run_command", run_command)
    path = tmp_path / "results" / "now.json"
    with pytest.raises(KeyboardInterrupt):
        run.run_all([FAST, SLOW], path)
    assert run.load(path.parent) == {FAST: line(rate=0.5)}

"""The start of a run: what the log tells of it, parameters drawn in loops, and compiling in the background."""

import logging as standard_logging
import socket
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import logging

from benchmarks import startup as benchmark
from benchmarks.train_step import own_cache
from experiment import programs, startup
from experiment.build import build_experiment, build_train_program
from parallel import distributed


@pytest.fixture
def lines():
    """What is logged, line by line."""
    found = []
    handler = standard_logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.get_absl_logger().addHandler(handler)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    yield found
    logging.set_verbosity(before)
    logging.get_absl_logger().removeHandler(handler)


# --- what the log tells ----------------------------------------------------------------------------------------------


def test_phases_follow_each_other_and_add_up_to_the_time_since_the_start(monkeypatch, lines):
    clock = iter([110.0, 110.25, 120.25, 150.5])
    monkeypatch.setattr(startup, "_now", clock.__next__)
    startup.begin(100.0)
    for phase in ("imports", "build", "compile"):
        startup.mark(phase)
    startup.finish(jnp.zeros(()), 5)
    startup.finish(jnp.zeros(()), 5)  # of a later call: told once
    startup.mark("init")
    assert len(lines) == 1
    assert lines[0].startswith("first 5 step(s) done 50.50 s after the start: imports 10.00 s, build 0.25 s, ")
    found = startup.parse(f"12:00:00 step 3\n12:00:01 {lines[0]}\n12:00:02 step 4\n")
    assert found == {"total": 50.5, "imports": 10.0, "build": 0.25, "compile": 10.0, "step": 30.25}
    assert found["total"] == sum(seconds for phase, seconds in found.items() if phase != "total")


def test_without_a_start_nothing_is_told(lines):
    startup.mark("build")
    startup.finish(None, 1)
    assert lines == []
    assert startup.parse("12:00:00 step 1/1: loss 2\n") is None


def test_the_process_started_before_this_test_and_after_its_parent_did():
    """Against the clock of the file system: /proc/self is as old as the process."""
    age = time.monotonic() - startup.process_start()
    assert 0 < age < 24 * 3600
    code = "import sys; sys.path.insert(0, '.'); from experiment import startup; import time; "
    code += "print(time.monotonic() - startup.process_start())"
    start = time.monotonic()
    printed = tiny.subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tiny.ROOT, env=tiny.environment()
    ).stdout
    took = time.monotonic() - start
    assert 0.5 * took - 0.1 < float(printed) < took + 0.02  # its imports take most of it; the system counts in 0.01 s


# --- programs --------------------------------------------------------------------------------------------------------


def bits(tree):
    return [(leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_a_function_that_is_compiled_in_the_background_is_called_with_what_it_is_given():
    mapped = distributed.pmap(lambda x: 2 * x)
    x = jnp.arange(3.0 * jax.local_device_count()).reshape(-1, 3)
    call = programs.compile_in_background(mapped.lower(jax.ShapeDtypeStruct(x.shape, x.dtype)))
    assert np.array_equal(call(x), 2 * x)
    assert np.array_equal(call(x + 1), 2 * x + 2)


def test_an_error_of_the_background_is_the_error_of_each_call():
    def refuse():
        raise ValueError("model.nf=3 is wrong; expected more")

    call = programs.compile_in_background(types.SimpleNamespace(compile=refuse))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^model\.nf=3 is wrong; expected more$"):
            call(jnp.zeros(3))


@pytest.fixture
def kept(monkeypatch):
    """A folder where programs are kept, however fast they were made; JAX's own cache is empty."""
    monkeypatch.setattr(programs, "LEAST_SECONDS", 0.0)
    monkeypatch.setenv(programs.SWITCH, "1")
    with own_cache() as folder:
        yield folder


def _programs(folder):
    return sorted(folder.glob(f"*{programs.SUFFIX}"))


def _train_twice(experiment):
    """Builds the program of two steps and calls it twice: what came out, and whether the state was donated to it."""
    levels = np.random.default_rng(0).integers(0, 17, (2, 16, *experiment.image_shape), np.uint8)
    program = build_train_program(experiment)
    state = distributed.replicate(experiment.init_state())
    batches = distributed.shard(levels, axis=1)
    second = program(program(state, batches)[0], batches)
    for thread in threading.enumerate():
        if thread.name.startswith("compile"):
            thread.join()
    return bits(second), jax.tree.leaves(state)[1].is_deleted()


@pytest.mark.exhaustive
def test_a_program_that_was_kept_is_loaded_without_tracing_and_computes_the_same(kept, monkeypatch, lines):
    experiment = build_experiment(tiny.make_config())
    made = _train_twice(experiment)
    (path,) = _programs(kept)
    with monkeypatch.context() as changed:
        changed.setattr(programs, "on_devices", lambda shapes: pytest.fail("traced"))
        assert _train_twice(build_experiment(tiny.make_config())) == made
    assert made[1]

    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert _train_twice(build_experiment(tiny.make_config())) == made
    assert any(f"cannot use the program in {path}, so it is compiled again" in line for line in lines)
    # JAX found it in its own cache, and what it loads from there has no machine code to save.
    assert _programs(kept) == []


def test_a_program_is_found_by_all_that_it_is_made_of(kept, monkeypatch, tmp_path):
    places = [programs.file_of(name) for name in ("a", "a", "b")]
    with jax.default_matmul_precision("float32"):
        places.append(programs.file_of("a"))
    for name, value in (
        ("_sources", lambda: "other sources"),
        ("CPU_INFO", tmp_path / "nothing"),
        ("PACKAGES", ("jax",)),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(programs, name, value)
            places.append(programs.file_of("a"))
    with monkeypatch.context() as changed:
        changed.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        places.append(programs.file_of("a"))
    with monkeypatch.context() as changed:  # as on a Mac
        changed.delattr(programs.os, "sched_getaffinity")
        changed.setattr(programs.os, "cpu_count", lambda: 1024)
        places.append(programs.file_of("a"))
    assert places[0] == places[1]
    assert {place.parent for place in places} == {kept}
    assert len(set(places)) == len(places) - 1
    monkeypatch.setenv(programs.SWITCH, "0")
    assert programs.file_of("a") is None


def test_the_sources_are_all_of_the_project(monkeypatch, tmp_path):
    for name in ("main.py", "models/__init__.py", "models/deep/layers.py", "notes/plan.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    found = {programs._sources.__wrapped__()}
    for name, changes in (("notes/plan.py", 0), ("main.py", 1), ("models/deep/layers.py", 1)):
        (tmp_path / name).write_text("changed")
        size = len(found)
        found.add(programs._sources.__wrapped__())
        assert len(found) == size + changes


def test_only_the_newest_programs_are_kept(kept, lines):
    paths = [kept / f"{number}{programs.SUFFIX}" for number in range(programs.MOST_PROGRAMS)]
    for number, path in enumerate(paths):
        path.touch()
        programs.os.utime(path, (number, number))
    new = kept / f"new{programs.SUFFIX}"
    (kept / f".{new.name}.{socket.gethostname()}-{2**22 + 1}.left").touch()  # by a process that is not there
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    programs._save(new, compiled)
    assert _programs(kept) == sorted([*paths[1:], new])
    assert not list(kept.glob(".*"))
    assert programs._load(new)(1.0) == 2
    programs._save(paths[1] / "no folder", compiled)
    assert lines[-1].startswith(f"cannot keep the compiled program in {paths[1] / 'no folder'}: ")


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_a_start_is_timed_up_to_the_line_that_tells_of_the_first_step():
    line = startup.describe({"imports": 1.0, "step": 2.0}, 1)
    code = f"import sys, time; time.sleep(0.3); print('10:00:00 {line}', file=sys.stderr, flush=True); time.sleep(0.5)"
    start = time.perf_counter()
    found = benchmark.time_start([sys.executable, "-c", code], tiny.environment())
    assert {"total": 3.0, "imports": 1.0, "step": 2.0}.items() <= found.items()
    assert 0.3 <= found["seconds"] <= time.perf_counter() - start - 0.5


@pytest.mark.parametrize("code", ["raise SystemExit('score_sde: no data')", "import sys; sys.stderr.write('no data')"])
def test_a_start_that_fails_is_no_result(code):
    with pytest.raises(RuntimeError, match="no data"):
        benchmark.time_start([sys.executable, "-c", code], tiny.environment())


@pytest.mark.exhaustive
def test_the_benchmark_measures_a_cold_and_a_warm_start():
    config = tiny.make_config()
    overrides = ["--config", "configs/vp/digits_ddpmpp_continuous.py"]
    overrides += [f"--config.{name}={value}" for name, value in tiny.SETTINGS.items()]
    result = benchmark.run(config, overrides, batch_size=8, steps_per_call=2)
    for kind in benchmark.STARTS:
        phases = result[f"{kind}_phases"]
        assert list(phases) == ["total", *startup.PHASES]
        assert phases["total"] == pytest.approx(sum(phases[phase] for phase in startup.PHASES), abs=0.05)
        assert -0.02 <= result[f"{kind}_seconds"] - phases["total"] < 1.0  # Linux knows the start to 0.01 s
    assert result["warm_phases"]["compile"] < result["cold_phases"]["compile"]

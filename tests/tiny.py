"""A run small enough for the tests: the digits with a network of a few thousand parameters."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import forks

from configs.vp import digits_ddpmpp_continuous

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = {
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.attn_resolutions": (),
    "training.batch_size": 16,
    "training.n_iters": 24,
    "training.n_jitted_steps": 2,
    "training.log_freq": 2,
    "training.eval_freq": 4,
    "training.snapshot_freq": 12,
    "training.snapshot_freq_for_preemption": 4,
    "training.snapshot_num_samples": 8,
    "classifier.batch_size": 16,
    "classifier.n_iters": 4,
    "classifier.n_jitted_steps": 1,
    "classifier.warmup": 0,
    "classifier.log_freq": 1,
    "classifier.eval_freq": 2,
    "classifier.snapshot_freq": 4,
    "classifier.snapshot_freq_for_preemption": 1,
    "sampling.num_steps": 25,
    "likelihood.rtol": 1e-2,
    "likelihood.atol": 1e-2,
    "likelihood.bound_num_times": 4,
    "eval.batch_size": 152,
    "eval.num_samples": 200,
}


def make_config(**changes):
    """The tiny configuration; keyword `a__b` changes key a.b."""
    config = digits_ddpmpp_continuous.get_config()
    config.update_from_flattened_dict(SETTINGS | {name.replace("__", "."): value for name, value in changes.items()})
    return config


def command(mode, workdir, *flags, program="main.py", **changes):
    """The command line of a tiny run."""
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    config = "configs/vp/digits_ddpmpp_continuous.py"
    return [sys.executable, program, "--config", config, "--mode", mode, "--workdir", str(workdir), *overrides, *flags]


# Runs main.py where importing TensorFlow fails: training, sampling and likelihood must not need it.
WITHOUT_TENSORFLOW = """
import runpy, sys
sys.modules["tensorflow"] = sys.modules["tensorflow_gan"] = None
sys.argv = sys.argv[1:]
runpy.run_path("main.py", run_name="__main__")
"""


def without_tensorflow(arguments):
    """The same command line, without TensorFlow."""
    return [arguments[0], "-c", WITHOUT_TENSORFLOW, *arguments[1:]]


def environment(devices=1):
    """The environment of a run on that many CPU devices, which cannot reach the network."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"  # see conftest.py
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'offline'}"}


def run(arguments, *, devices=1, timeout=300):
    """Runs a command to its end."""
    env = environment(devices)
    if not forks.can_start(arguments, env):
        return subprocess.run(
            arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = forks.start(arguments, cwd=ROOT, env=env, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


def succeed(arguments, **options):
    """Runs a command to its end, which must be a good one."""
    result = run(arguments, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result

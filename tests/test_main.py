"""The command line: one sentence for each mistake, within seconds and before anything is compiled."""

import sys
import time

import pytest
import tiny

import main
from configs import base

SECONDS = 30  # a bound for a busy machine; imports take most of it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        (["--config.training.batchsize=3"], 1, 'Did you mean "batch_size" instead of "batchsize"?'),
        (["--config.traning.batch_size=3"], 1, 'Did you mean "training" instead of "traning"?'),
        (["--config.training.batch_size=many"], 1, "--config.training.batch_size=many: invalid literal for int()"),
        (["--config.sampling.predictor=eulr"], 1, "sampling.predictor='eulr' is unknown; known: "),
        (["--config.training.batch_size=10"], 4, "training.batch_size=10 is not divided by the 4 devices"),
        (["--config.training.log_freq=3"], 1, "training.log_freq=3 is not a multiple of training.n_jitted_steps=2"),
        (["--workdir=/dev/null/run"], 1, "cannot write in --workdir=/dev/null/run: Not a directory"),
        (["--mode=eval", "--workdir=/dev/shm/none"], 1, "--workdir=/dev/shm/none holds no training run"),
    ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, flags, devices, message):
    start = time.monotonic()
    result = tiny.run(tiny.command("train", tmp_path / "run", *flags), devices=devices)
    assert time.monotonic() - start < SECONDS
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_every_leaf_is_short_and_locked():
    leaves = sorted(
        path for folder in ("ve", "vp", "subvp") for path in (tiny.ROOT / "configs" / folder).glob("[a-z]*.py")
    )
    assert len(leaves) >= 4
    for path in leaves:
        assert len(path.read_text().splitlines()) <= 25, path
        namespace: dict = {"__name__": path.stem}
        exec(compile(path.read_text(), path, "exec"), namespace)
        config = namespace["get_config"]()
        assert config.is_locked
        with pytest.raises(AttributeError, match='Did you mean "sigma_max"'):
            config.model.sigma_mx = 1.0
        with pytest.raises(TypeError):
            config.model.nf = "many"


def test_every_key_is_commented():
    """Each line that sets a default says what it means."""
    lines = (tiny.ROOT / "configs" / "base.py").read_text().splitlines()
    keys = [line.strip() for line in lines if line.strip().startswith('"') and ":" in line]
    assert [key for key in keys if "#" not in key and not key.endswith("(),")] == []
    assert base.get_config().is_locked


def test_the_compilation_cache_is_on(monkeypatch, tmp_path):
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    main.set_up_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    main.set_up_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache/score_sde/xla")
    jax.config.update("jax_compilation_cache_dir", before)
    assert "tensorflow" not in sys.modules

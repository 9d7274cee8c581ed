"""The command line: one sentence for each mistake, within seconds and before anything is compiled."""

import contextlib
import inspect
import sys
import time

import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from ml_collections import config_flags

import main
from experiment import startup
from modes import command_line
from modes.command_line import Mode

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


def test_the_compilation_cache_is_on(monkeypatch, tmp_path):
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    startup.set_up()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("SCORE_SDE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    startup.set_up()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache/score_sde/xla")
    jax.config.update("jax_compilation_cache_dir", before)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", main.MODES)
def test_the_flags_of_a_mode_are_arguments_of_its_function(name):
    mode = main.MODES[name]
    given = {"config": mode.config, "workdir": mode.workdir != "none", "files": bool(mode.files)}
    assert {*(each for each in given if given[each]), *mode.flags} == set(inspect.signature(mode.run).parameters)
    assert mode.workdir in ("trained", "writable", "unmade", "none")
    assert set(mode.needed) <= set(mode.flags) <= set(command_line.OF_MODES)


def test_every_flag_belongs_to_a_mode():
    assert {flag for mode in main.MODES.values() for flag in mode.flags} == set(command_line.OF_MODES)
    assert set(main.FLAGS["mode"].parser.enum_values) == set(main.MODES)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # which ml_collections calls
@pytest.mark.parametrize(
    ("mode", "flags", "message"),
    [
        ("eval", ["--output=x"], "--mode eval does not take --output; its flags: --eval_folder"),
        ("train", ["--png"], "--mode train does not take --png; its flags: none of its own"),
        ("sample", ["--samplers=ode"], "--mode sample does not take --samplers; its flags: --output, --snapshot, "),
        ("export", [], "--mode export needs --checkpoint FILE"),
        ("train", ["--eval_folder=eval"], ""),
        ("sample", ["--output=x", "--snapshot=0", "--png", "--num_images=3"], ""),
    ],
)
def test_flags_that_do_not_go_with_a_mode_are_refused(mode, flags, message):
    with flagsaver.flagsaver():
        command_line.parse_flags(["main.py", *tiny.command(mode, "w")[2:6], "--workdir=w", f"--mode={mode}", *flags])
        refused = contextlib.nullcontext() if not message else pytest.raises(ValueError, match=message)
        with refused:
            command_line.check_flags(mode, main.MODES[mode])


@pytest.mark.parametrize(
    ("mode", "flags", "files", "message"),
    [
        (Mode(print), ["--workdir=w"], [], "--mode x needs --config FILE"),
        (Mode(print, config=False), [], [], "--mode x needs --workdir DIR"),
        (Mode(print, config=False, workdir="none"), [], [], ""),
        (Mode(print, config="optional", workdir="none"), [], [], ""),
        (Mode(print, config=False, workdir="none"), [], ["a.json"], "unexpected argument 'a.json'"),
        (Mode(print, config=False, workdir="none", files="A.json"), [], ["a.json"], ""),
    ],
)
def test_what_a_mode_needs_must_be_given(mode, flags, files, message):
    with flagsaver.flagsaver():
        command_line.parse_flags(["main.py", "--mode=train", *flags])
        refused = contextlib.nullcontext() if not message else pytest.raises(ValueError, match=message)
        with refused:
            command_line.check_flags("x", mode, files)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("text", ["3", "0..9", "0,2,5", ""])
def test_labels_stay_the_text_that_was_given(text):
    """Also if it looks like a number or a tuple."""
    argv = ["main.py", *tiny.command("sample", "w")[2:4], f"--config.sampling.labels={text}"]
    argv += ["--config.sampling.guidance_interval=(0.2,5)"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    assert (values.config.sampling.labels, values.config.sampling.guidance_interval) == (text, (0.2, 5))

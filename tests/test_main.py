"""The command line: one sentence for each mistake, within seconds and before anything is compiled."""

import contextlib
import functools
import inspect
import os
import re
import subprocess
import sys
import time

import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from ml_collections import config_flags

import main
from errors import UserError
from experiment import startup
from modes import command_line
from modes.command_line import Mode
from sources.folder import load_folder
from sources.pictures import load_pictures
from sources.tfrecord import load_tfrecord
from storage import files

SECONDS = 30  # a bound for a busy machine; imports take most of it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        (["--config.training.batchsize=3"], 1, "unknown setting 'batchsize'. Did you mean \"batch_size\" instead of"),
        (["--config.traning.batch_size=3"], 1, 'Did you mean "training" instead of "traning"?'),
        (["--config.training.batch_size=many"], 1, "--config.training.batch_size=many: invalid literal for int()"),
        (["--config.sampling.predictor=eulr"], 1, "sampling.predictor='eulr' is unknown; known: "),
        (["--config.training.batch_size=10"], 4, "training.batch_size=10 is not divided by the 4 devices"),
        (["--config.training.log_freq=3"], 1, "training.log_freq=3 is not a multiple of training.n_jitted_steps=2"),
        (["--workdir=/dev/null"], 1, "cannot write in --workdir=/dev/null: it is a file"),
        (["--workdir=/dev/null/run"], 1, "cannot write in --workdir=/dev/null/run: Not a directory"),
        (["--mode=eval", "--workdir=/dev/shm/none"], 1, "--workdir=/dev/shm/none holds no training run"),
        (["--mode=evil"], 1, "flag --mode=evil: value should be one of <doctor|"),
    ],
)
def test_a_mistake_ends_in_one_sentence(tmp_path, flags, devices, message):
    start = time.monotonic()
    result = tiny.run(tiny.command("train", tmp_path / "run", *flags), devices=devices)
    assert time.monotonic() - start < SECONDS
    assert result.returncode in (1, 2)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("score_sde: ")]
    assert message in line
    assert "Traceback" not in result.stderr


CONFIGS = {
    "def get_config(:": "line 1: invalid syntax",
    "import os\nos.nothing": "line 2: AttributeError: module 'os' has no attribute 'nothing'",
    "def get_config():\n  return 1 / 0": "line 2: ZeroDivisionError: division by zero",
    "from configs.base import get_config as base\ndef get_config():\n  return base().nothing": (
        "line 3: AttributeError: 'nothing'"
    ),
    "x = open('/dev/shm/none')": "cannot be loaded: [Errno 2] No such file or directory: '/dev/shm/none'",
    "x = 1": "defines no function get_config()",
    "def get_config():\n  return 3": "get_config() returns int; expected a ConfigDict",
}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("mode", ["train", "doctor"])
@pytest.mark.parametrize(("text", "message"), CONFIGS.items())
def test_what_is_wrong_with_a_config_file_is_one_sentence(tmp_path, capsys, monkeypatch, text, message, mode):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # which is loaded into itself again
    path = tmp_path / "mine.py"
    path.write_text(text)
    with flagsaver.flagsaver():
        if mode == "doctor":
            command_line.parse_flags(["main.py", f"--config={path}", "--mode", mode])
            assert isinstance(main.FLAGS["config"].value, UserError)
            told = str(main.FLAGS["config"].value)
        else:
            with pytest.raises(SystemExit, match="1"):
                command_line.parse_flags(["main.py", "--config", str(path), "--mode", mode])
            told = capsys.readouterr().err.removeprefix("score_sde: ")
    assert told.startswith(f"--config {path}")
    assert message in told


def test_a_missing_config_file_is_named(capsys):
    with flagsaver.flagsaver(), pytest.raises(SystemExit, match="1"):
        command_line.parse_flags(["main.py", "--config=none.py", "--mode=train"])
    assert capsys.readouterr().err == "score_sde: --config none.py is not a file\n"


def test_arguments_of_the_configuration_are_told_apart():
    argv = [
        "main.py",
        "--config.a.b",
        "3",
        "--mode",
        "doctor",
        "--config",
        "a.py:x",
        "-config.c=--mode",
        "--noconfig.d",
    ]
    assert command_line._split_config(argv) == (["main.py", "--mode", "doctor"], "a.py")
    assert command_line._split_config(["--config.a", "--png", "--config=b.py"]) == (["--png"], "b.py")


FAILING = """
import dataclasses, sys
import numpy as np
import main
from absl import app

def raise_it(**arguments):
    sys.stdout.write("x" * 100_000)
    {statement}

main.MODES["{mode}"] = dataclasses.replace(main.MODES["{mode}"], run=raise_it)
app.run(main.main, flags_parser=main.command_line.parse_flags)
"""


def failing(statement, mode, *flags):
    program = FAILING.format(statement=statement, mode=mode)
    return [sys.executable, "-c", program, *tiny.command(mode, "w")[2:4], f"--mode={mode}", *flags]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "code", "message"),
    [
        ("np.ones(3) + np.ones(4)", 1, "ValueError: operands could not be broadcast"),
        ("open('/dev/shm/none')", 1, "FileNotFoundError: [Errno 2] No such file"),
        ("raise PermissionError(13, 'Permission denied', '/x')", 1, "score_sde: /x (on the disk /): Permission denied"),
        ("raise main.command_line.UserError('a sentence')", 1, "score_sde: a sentence\n"),
        ("raise KeyboardInterrupt", 130, "score_sde: interrupted by Ctrl-C\n"),
    ],
)
@pytest.mark.parametrize("mode", ["memory", "train"])
def test_a_bug_shows_its_traceback_and_nothing_else_does(tmp_path, statement, code, message, mode):
    flags = [f"--workdir={tmp_path}"] if mode == "train" else []
    result = tiny.run(failing(statement, mode, *flags))
    assert result.returncode == code
    assert message in result.stderr
    is_bug = "score_sde: " not in message
    assert ("Traceback" in result.stderr) == ("in raise_it" in result.stderr) == is_bug
    assert ("score_sde: " in result.stderr) == (not is_bug)
    if mode == "train":
        assert "in raise_it" in (tmp_path / "stdout.txt").read_text()


@pytest.mark.slow
def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    run = functools.partial(
        subprocess.run, env=tiny.environment(), stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    result = run(failing("pass", "memory"))
    assert (result.returncode, result.stderr) == (141, "")
    assert run(failing("pass", "memory", "--help")).stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpuu", pytest.param("tpu", marks=pytest.mark.exhaustive)])
def test_a_platform_that_is_not_there_is_one_sentence(monkeypatch, platform):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    result = tiny.run([*tiny.command("memory", "w")[:6]])
    assert result.returncode == 1
    assert result.stderr.startswith(f"score_sde: JAX_PLATFORMS='{platform}' is not available: ")
    assert "Traceback" not in result.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("platform", ["cpuu", "tpu"])
def test_the_doctor_examines_the_rest_without_the_platform(monkeypatch, platform):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    examined = tiny.run([sys.executable, "main.py", "--mode=doctor"])
    assert examined.returncode == 1
    assert f"BROKEN   platform             JAX_PLATFORMS='{platform}' is not available" in examined.stdout
    assert "ok       likelihood" in examined.stdout


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
    assert set(mode.needed) <= set(mode.flags)


def test_every_flag_belongs_to_a_mode():
    of_modes = {flag for mode in main.MODES.values() for flag in mode.flags}
    defined = {flag.name for flag in main.FLAGS.get_flags_for_module(main)}
    assert defined == {"mode", "config", "workdir", *command_line.PROCESS_FLAGS, *of_modes}
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
            command_line.check_flags(mode, main.MODES)


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
            command_line.check_flags("x", {"x": mode}, files)


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


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["~/runs", "file://{home}/runs", "file://localhost{home}/ru%6es", "{home}/runs"])
def test_a_path_is_what_its_user_means(monkeypatch, tmp_path, text):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local_path(text.format(home=tmp_path), "--workdir") == tmp_path / "runs"


@pytest.mark.parametrize(
    "text", ["gs://bucket/run", "s3://bucket/run", "file://elsewhere/run", "file://", "hdfs://x/y"]
)
def test_a_path_of_another_machine_is_refused(text):
    with pytest.raises(
        UserError, match=rf"^data.path={re.escape(text)}: expected a path of this machine; mount what is stored"
    ):
        files.local_path(text, "data.path")


def test_a_home_that_nobody_has_is_named():
    with pytest.raises(UserError, match=r"--workdir=~nobody_at_all/x: .*; write the path in full"):
        files.local_path("~nobody_at_all/x", "--workdir")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("flag", ["workdir", "output", "images"])
def test_every_flag_that_is_a_path_is_taken_so(monkeypatch, tmp_path, flag):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(command_line.workdirs, "check_trained", lambda workdir: None)
    monkeypatch.setattr(command_line.logs, "set_up_file", lambda workdir: None)
    with flagsaver.flagsaver():
        argv = ["main.py", *tiny.command("encode", tmp_path / "w")[2:6], "--mode=encode", f"--workdir={tmp_path}/w"]
        command_line.parse_flags([*argv, f"--{flag}=~/here"])
        assert str(command_line.prepare(main.MODES, [])[flag]) == f"{tmp_path}/here"


@pytest.mark.parametrize("setting", ["data.path", "restore.images", "data.tfrecords_path"])
def test_every_setting_that_is_a_path_refuses_a_bucket(setting):
    readers = {
        "data.path": lambda: load_folder("gs://b/x", "train", None),
        "restore.images": lambda: load_pictures("gs://b/x", None, num_levels=2),
        "data.tfrecords_path": lambda: load_tfrecord("gs://b/x", (8, 8, 3)),
    }
    with pytest.raises(UserError, match=f"{setting}=gs://b/x: expected a path of this machine"):
        readers[setting]()

"""tools/make_venv.sh: which Python it chooses, on machines that are folders of stand-ins for interpreters."""

import shutil
import subprocess

import pytest
import tiny

TOOLS = ("cat", "cksum", "cp", "grep", "mkdir", "rm", "sh", "tail", "touch")
# Answers its version; `-m venv` makes a folder in which it and pip are; whatever pip is asked for is noted.
STAND_IN = """#!/bin/sh
case "$*" in
  *version_info*) echo {version} ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && {pip} ;;
  "-m pip "*) echo "{version} $*" >> pip.log ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """Returns a function that makes a machine with some interpreters: {name: version}."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "requirements-core.txt").write_text("jax\n")

    def add(interpreters, pip='touch "$3/bin/pip" && /bin/chmod +x "$3/bin/pip"'):
        for name, version in interpreters.items():
            path = tmp_path / "bin" / name
            path.write_text(STAND_IN.format(version=version, pip=pip))
            path.chmod(0o755)
        return tmp_path

    return add


def make_venv(machine, python=""):
    command = ["sh", str(tiny.ROOT / "tools" / "make_venv.sh"), python, "venv", "requirements-core.txt"]
    environment = {"PATH": str(machine / "bin")}
    return subprocess.run(
        command, cwd=machine, env=environment, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize(
    ("interpreters", "python", "chosen"),
    [
        ({"python3.13": "3.13"}, "", "3.13"),
        ({"python3.14": "3.14", "python3": "3.14"}, "", "3.14"),
        ({"python3": "3.13"}, "", "3.13"),
        ({"python": "3.14"}, "", "3.14"),
        ({"python3": "3.9", "python": "3.11"}, "", "3.11"),
        ({f"python3.{minor}": f"3.{minor}" for minor in range(9, 16)}, "", "3.12"),
        ({"python3.14": "3.14", "python3.13": "3.13", "python3.11": "3.11"}, "", "3.13"),
        ({"python3.14": "3.14", "python3.11": "3.11"}, "", "3.11"),  # with TensorFlow
        ({"python3.12": "3.12", "python3.13": "3.13"}, "python3.13", "3.13"),
    ],
)
def test_python_is_chosen(machine, interpreters, python, chosen):
    place = machine(interpreters)
    result = make_venv(place, python)
    assert (result.returncode, result.stdout) == (0, f"installing requirements-core.txt into venv (Python {chosen})\n")
    assert f"{chosen} -m pip install --quiet --no-compile -r requirements-core.txt" in (place / "pip.log").read_text()
    assert make_venv(place, python).stdout == ""  # what is installed is not installed again


@pytest.mark.parametrize(
    ("interpreters", "python", "message"),
    [
        ({"python3": "3.10"}, "", "no supported Python found (3.12 3.13 3.11 3.14); set PYTHON=/path/to/python3.12"),
        ({"python3.15": "3.15"}, "python3.15", "is Python 3.15; supported: 3.12 3.13 3.11 3.14"),
        ({"python3.12": "3.12"}, "python3.13", "PYTHON=python3.13 does not run on this machine"),
    ],
)
def test_no_supported_python(machine, interpreters, python, message):
    result = make_venv(machine(interpreters), python)
    assert result.returncode == 1
    assert message in result.stderr


def test_an_environment_of_another_version_or_without_pip_is_made_again(machine):
    place = machine({"python3.13": "3.13"}, pip="exit 1")  # as on Debian without the package python3-venv
    assert make_venv(place).returncode == 1
    for version in ("3.13", "3.12"):
        result = make_venv(machine({f"python{version}": version}))
        assert (result.returncode, result.stdout.split()[-1]) == (0, f"{version})")

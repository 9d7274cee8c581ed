"""The comparison with torch: what the other side is asked for, that both take turns, and how it fails.

A script that speaks as benchmarks/peer_torch.py does stands in for torch, which the project does not need.
"""

import json
import subprocess
import sys
import textwrap

import pytest
import tiny

from benchmarks import peer
from benchmarks.measure import Seconds
from configs.ve import cifar10_ncsnpp_continuous
from configs.vp import cifar10_ddpmpp_continuous

DESCRIPTION = {"parameters": 1000, "flops_with_padding": {"step": 10, "forward": 5}}


def make_python(folder, body):
    """An interpreter of its own will, which runs `body` whatever it is told to run."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys, time\n{textwrap.dedent(body)}")
    path.chmod(0o755)
    return str(path)


def talkative(folder):
    """Writes down what it is asked, and answers in pieces."""
    return make_python(
        folder,
        f"""
        log = open({str(folder / "log")!r}, "w", buffering=1)
        def answer(text):
            for piece in (text[:4], text[4:] + "\\n"):
                sys.stdout.write(piece), sys.stdout.flush(), time.sleep(0.01)
        log.write(sys.stdin.readline())
        answer(json.dumps({{"found": []}}) + "\\n" + {json.dumps(DESCRIPTION)!r})
        for i, line in enumerate(sys.stdin, 1):
            log.write(line), answer(json.dumps({{"seconds": float(i)}}))
        """,
    )


def test_the_peer_is_as_large_as_the_network_of_the_experiment():
    settings = peer.torch_settings(cifar10_ncsnpp_continuous.get_config(), batch_size=8, compiled=False)
    assert settings["channels"] == [128, 256, 256, 256]
    assert settings["attention"] == [False, True, False, False]  # at 16x16
    assert (settings["num_res_blocks"], settings["batch_size"], settings["dropout"]) == (4, 8, 0.1)
    assert {"lr": 2e-4, "beta1": 0.9, "eps": 1e-8, "warmup": 5000, "grad_clip": 1.0}.items() <= settings.items()
    assert (settings["ema_rate"], settings["sigma_min"], settings["sigma_max"]) == (0.999, 0.01, 50.0)


def test_what_diffusers_lacks_is_refused():
    with pytest.raises(ValueError, match=r"model\.fir=False; the peer is diffusers' NCSN"):
        peer.torch_settings(cifar10_ddpmpp_continuous.get_config(), batch_size=8, compiled=False)
    config = cifar10_ncsnpp_continuous.get_config()
    config.model.nf = 24
    with pytest.raises(ValueError, match=r"48 channels where .* multiple of 32: change model\.nf"):
        peer.torch_settings(config, batch_size=8, compiled=False)


def test_both_take_turns_and_the_one_that_begins_changes():
    order = []

    def side(name, seconds):
        return lambda: order.append(name) or seconds[order.count(name) - 1]

    found = peer.take_turns(side("ours", [1.0, 2.0, 4.0]), side("torch", [3.0, 4.0, 2.0]), 3, pause=0)
    assert order == ["ours", "torch", "torch", "ours", "ours", "torch"]
    assert found == (Seconds((1.0, 2.0, 4.0)), Seconds((3.0, 4.0, 2.0)))
    compared = peer.compare(*found)
    assert compared["speedup_of_each_pair"] == [3.0, 2.0, 0.5]
    assert compared["speedup_over_torch"] == 2.0  # not the ratio of the medians, 1.5
    assert compared["torch_seconds"] == {"median": 3.0, "min": 2.0}


def test_the_other_side_answers_line_by_line(tmp_path):
    side = peer.TorchSide(talkative(tmp_path), {"batch_size": 8})
    assert side.describe() == DESCRIPTION
    assert [side.run("step"), side.run("forward")] == [1.0, 2.0]
    side.close()
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert asked == [{"batch_size": 8}, {"run": "step"}, {"run": "forward"}]


def test_a_side_that_dies_or_is_silent_is_told(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        peer.TorchSide(make_python(tmp_path, "sys.exit(3)"), {})
    monkeypatch.setattr(peer, "IMPORT_LIMIT", 0.1)
    with pytest.raises(TimeoutError, match="waited 0 s for an answer of the torch side"):
        peer.TorchSide(make_python(tmp_path, "time.sleep(60)"), {})


def test_without_torch_the_command_says_what_to_install(tmp_path):
    python = make_python(tmp_path, """print(json.dumps({"missing": "torch (No module named 'torch')"}))""")
    config = "configs/ve/cifar10_ncsnpp_continuous.py"
    command = [sys.executable, "-m", "benchmarks.peer", "--config", config, "--torch_python", python]
    found = subprocess.run(
        command, cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("\n") == 1
    assert (
        "cannot import torch (No module named 'torch'); install the packages of requirements-bench.txt" in found.stderr
    )


@pytest.mark.exhaustive
def test_a_comparison_from_end_to_end(tmp_path):
    config = cifar10_ncsnpp_continuous.get_config()
    config.model.update(nf=32, ch_mult=(1, 1), num_res_blocks=1)
    found = peer.measure_peer(config, batch_size=2, steps=2, torch_python=talkative(tmp_path), torch_compile=False)
    for name, seconds in {"step": [1.0, 2.0], "forward": [3.0, 4.0]}.items():
        assert found[name]["torch_seconds"]["min"] == seconds[0]
        ours = [their / ratio for their, ratio in zip(seconds, found[name]["speedup_of_each_pair"], strict=True)]
        assert found[name]["ours_seconds"]["min"] == pytest.approx(min(ours))
        assert 0 < min(ours) < 60
    assert found["speedup_over_torch"] == found["step"]["speedup_over_torch"]
    assert found["ours"]["flops"]["step"] > 2.5 * found["ours"]["flops"]["forward"]
    assert f"{1000 / found['ours']['parameters']:.3f} times our parameters" in found["note"][0]

"""--mode memory: its bytes against those of the real state, batches and programs; and that it runs nothing."""

import functools
import re

import jax
import pytest
import tiny

import datasets
import main
import run_lib
from experiment.build import build_experiment, map_train_steps
from modes import memory
from parallel import distributed

# A batch then has labels, too.
SETTINGS = {"model__num_classes": 10, "model__num_res_blocks": 1, "eval__enable_bpd": False}


@functools.cache
def printed(microbatches=1):
    """The bytes of each line, by section and name."""
    sections, lines = (
        [],
        memory.report(build_experiment(tiny.make_config(**SETTINGS, training__microbatches=microbatches))),
    )
    for text in "\n".join(lines).split("\n"):
        if row := re.fullmatch(r"  (\S.*?|  \S.*?) +([\d,.]+) MiB +([\d,]+) bytes", text):
            size = int(row[3].replace(",", ""))
            assert abs(float(row[2].replace(",", "")) * 2**20 - size) <= 0.005 * 2**20  # rounded to 0.01 MiB
            sections[-1][row[1].strip()] = size
        else:
            sections.append({})
    return [section for section in sections if section]


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_bytes_are_those_of_the_run():
    """State and batches as they are when they exist; and in all what goes into the compiled program and comes out."""
    training, evaluation = printed()
    config = tiny.make_config(**SETTINGS)
    experiment, source = build_experiment(config), datasets.build_source(config, "train")
    state = distributed.replicate(jax.device_get(experiment.init_state()))
    batches = datasets.training_batches(source, seed=0, first_step=0, batch_size=16, steps_per_call=2, with_labels=True)
    batch = next(batches)
    assert training["parameters"] == training["gradients of the parameters among them"] == num_bytes(state.params)
    assert training["their moving average"] == num_bytes(state.params_ema)
    assert training["state of the optimizer"] == num_bytes(state.opt_state)
    assert training["2 batches of 16 images"] == num_bytes(batch) == 2 * 16 * (64 + 4)
    assert evaluation["parameters"] == training["parameters"]
    assert evaluation["batch of 152 images"] == 152 * (64 + 1) * 4

    steps = map_train_steps(experiment).lower(experiment.keys["train"], state, batch).compile()
    analysis = steps.memory_analysis()
    everything = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    key_and_step = 8 + 4
    assert training["all"] == everything - analysis.alias_size_in_bytes - key_and_step
    for section in (training, evaluation):
        temporaries = section["temporary arrays, most at one time"]
        assert section["all"] == temporaries + sum(
            size
            for name, size in section.items()
            if name not in ("all",) and "temp" not in name and "among" not in name
        )
        # The widest of the network, of the features of a batch: 8 channels of 8x8 pixels.
        images = 16 if section is training else 152
        assert temporaries > images * 8 * 8 * 8 * 4


@pytest.mark.exhaustive
def test_microbatches_need_less():
    (parts, _), (whole, _) = printed(4), printed()
    name = "temporary arrays, most at one time"
    assert parts[name] < whole[name] / 2
    assert all(parts[key] == whole[key] for key in whole.keys() - {name, "all"})


def test_nothing_is_run(monkeypatch, capsys):
    """No array of the network's size comes to be; the test would not fit a network of 10^13 parameters otherwise."""
    seen = []
    monkeypatch.setattr(memory, "_compile", lambda program, *arguments: seen.append(arguments) or _Compiled())
    run_lib.memory(
        tiny.make_config(model__nf=2**16, model__num_res_blocks=1, training__batch_size=2**16, eval__enable_bpd=True)
    )
    assert len(seen) == 3
    shapes = [leaf for leaf in jax.tree.leaves(seen) if not isinstance(leaf, jax.Array)]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes)
    assert sum(leaf.size for leaf in shapes) > 1e11
    out = capsys.readouterr().out
    assert "training.microbatches=2: activations of 32768 images instead of 65536" in out
    assert "the same with its Jacobian (bits/dim)" in out
    assert "model.remat=True" in out
    assert "model.dtype=bfloat16" in out


class _Compiled:
    memory_analysis = lambda self: self  # noqa: E731
    temp_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__microbatches": 3}, r"training.microbatches=3 does not divide the 16 images"),
        ({"model__name": "wideresnet_noise_conditional"}, r"is a classifier, which this mode cannot use"),
        ({"model__dtype": "float16"}, r"model.dtype='float16' is unknown"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_compiled(changes, message, monkeypatch):
    monkeypatch.setattr(memory, "_compile", None)
    with pytest.raises(ValueError, match=message):
        run_lib.memory(tiny.make_config(**changes))


def test_a_backend_that_does_not_tell_is_named(monkeypatch):
    class Silent:
        memory_analysis = lambda self: None  # noqa: E731

    with pytest.raises(ValueError, match=r"JAX does not report the memory of programs on 'cpu'"):
        memory._analyze(Silent())


def test_the_mode_needs_no_workdir():
    assert main.MODES["memory"].workdir == "none"
    assert main.MODES["memory"].config is True


@pytest.mark.exhaustive
def test_bits_per_dim_keep_the_features_of_all_layers():
    """Unlike an evaluation without a gradient; and so less if blocks are computed again."""
    experiments = [build_experiment(tiny.make_config(**SETTINGS, model__remat=remat)) for remat in (False, True)]
    plain, again = (memory.of_evaluation(experiment, pulls_back=True).temporaries for experiment in experiments)
    assert plain > again > memory.of_evaluation(experiments[0]).temporaries


@pytest.mark.exhaustive
def test_each_of_two_devices_has_the_whole_state_and_half_the_batch():
    command = tiny.command("memory", "", **SETTINGS)
    del command[command.index("--workdir") : command.index("--workdir") + 2]
    done = tiny.run(command, devices=2)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = printed()[0]
    assert "on each of 2 device(s)" in done.stdout
    assert re.search(rf"2 batches of 8 images .* {whole['2 batches of 16 images'] // 2:,} bytes", done.stdout)
    assert re.search(rf"parameters .* {whole['parameters']:,} bytes", done.stdout)

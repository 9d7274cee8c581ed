"""One global batch on 1, 2, 4 and 8 devices: the same losses, parameters, samples, bits/dim and metrics."""

import functools
import re
import sys

import numpy as np
import on_devices
import pytest
import tiny
from cases import by_default

from experiment import drawing
from experiment.build import build_experiment
from modes import encode as encoding
from modes.evaluate import evaluate as eval_loop
from parallel import distributed
from training import loop as train_loop

# The mean of a batch is summed in another order: the last bits of float32. After 50 steps they were 2.4e-7 of a loss
# and 2.8e-7 of a parameter; Adam may magnify them where a gradient is nearly 0 and its direction that of the rounding
# error.
LOSS_RTOL = 1e-5
PARAMS_ATOL = 1e-5
# The flow of a network of 50 steps magnifies rounding: parameters changed by 3e-7 of themselves change, on one device,
# the bits/dim of one of these images by 5e-3 and those of most by less than 1e-3. Eight devices changed one by 1.1e-2.
BPD_ATOL, MEAN_BPD_ATOL = 5e-2, 5e-3


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measures on so many devices; on one once."""
    folder = tmp_path_factory.mktemp("devices")
    on_one = functools.cache(on_devices.measure)

    def measure(devices, with_bpd):
        if devices == 1:
            return on_one(with_bpd)
        path = folder / f"{devices}.npz"
        flags = ["bpd"] if with_bpd else []
        tiny.succeed([sys.executable, tiny.ROOT / "tests" / "on_devices.py", path, *flags], devices=devices)
        return dict(np.load(path))

    return measure


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "with_bpd"), by_default([(4, False)], [(2, True), (4, False), (8, True)]))
def test_the_numbers_do_not_depend_on_the_devices(measured, devices, with_bpd):
    one, several = measured(1, with_bpd), measured(devices, with_bpd)
    assert one.keys() == several.keys()
    assert len(one["losses"]) == 50
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=LOSS_RTOL)
    for name in one:
        if name.startswith("params/"):
            np.testing.assert_allclose(several[name], one[name], rtol=0, atol=PARAMS_ATOL, err_msg=name)
    assert several["sampling_nfe"] == one["sampling_nfe"]
    difference = np.abs(several["levels"].astype(int) - one["levels"])
    assert difference.max() <= 1  # the edge of a level may round either way
    assert (difference == 0).mean() > 0.99
    for name in ("test_loss", *(("bound", "bound_nats") if with_bpd else ())):
        np.testing.assert_allclose(several[name], one[name], rtol=1e-5, err_msg=name)
    if with_bpd:
        np.testing.assert_allclose(several["bpd"], one["bpd"], rtol=0, atol=BPD_ATOL)
        np.testing.assert_allclose(several["bpd"].mean(), one["bpd"].mean(), rtol=0, atol=MEAN_BPD_ATOL)
    metrics = [name for name in one if name.startswith("metric_")]
    assert {"metric_frechet_distance", "metric_precision"} <= set(metrics)
    for name in metrics:
        np.testing.assert_allclose(several[name], one[name], rtol=2e-2, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("group", "check"),
    [
        ("training", lambda config: train_loop.check_schedule("training", config.training)),
        ("classifier", lambda config: train_loop.check_schedule("classifier", config.classifier)),
        ("eval", eval_loop.check_evaluation),
    ],
)
@pytest.mark.parametrize(
    ("size", "nearest"), [(10, "8 or 12"), (3, "4"), (13, "12 or 16"), (0, "4"), (16, None), (-4, "4")]
)
def test_a_batch_that_the_devices_do_not_divide_is_refused(monkeypatch, group, check, size, nearest):
    monkeypatch.setattr(distributed, "device_count", lambda: 4)
    config = tiny.make_config(**{f"{group}__batch_size": size})
    if nearest is None:
        check(config)
        return
    message = f"{group}.batch_size={size} is not divided by the 4 devices; the nearest that is: {nearest}"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        check(config)


def test_rounds_of_samples_are_rounded_up(monkeypatch):
    """The modes that draw: what is drawn in vain is less than one image for each device."""
    monkeypatch.setattr(distributed, "device_count", lambda: 8)
    assert drawing.batch_size(build_experiment(tiny.make_config(eval__batch_size=10)), 100) == 16
    assert drawing.batch_size(build_experiment(tiny.make_config(eval__batch_size=100)), 10) == 16
    assert distributed.round_up(9) == 16  # of a snapshot's grid


def test_encoding_checks_its_batch(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "device_count", lambda: 4)
    monkeypatch.setattr(encoding, "open_experiment", lambda config, workdir: build_experiment(config))
    with pytest.raises(ValueError, match=r"eval.batch_size=10 is not divided by the 4 devices; the nearest that is: 8"):
        encoding.encode(tiny.make_config(eval__batch_size=10), tmp_path)

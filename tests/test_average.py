"""In training the averaged parameters are measured and drawn from: the others are NaN here.

test_sample_mode.py and test_classifier_guidance.py do the same with whole modes.
"""

import numpy as np
import pytest
import tiny

import datasets
from classifier import accuracy
from classifier import training as classifier_training
from experiment.build import build_experiment
from losses import TrainState
from training.trainer import ScoreTrainer

STATE = TrainState(step=np.int32(24), params={"w": np.float32(np.nan)}, params_ema={"w": np.float32(3)}, opt_state=())


@pytest.fixture(scope="module")
def experiment():
    return build_experiment(tiny.make_config())


def of_average(params, *_):
    """The parameter, as the value of four images."""
    return np.full(4, params["w"])


def test_the_loss_and_the_grid_of_training(experiment, tmp_path, monkeypatch):
    trainer = ScoreTrainer(experiment, None, tmp_path, datasets.load_digits("test"))
    monkeypatch.setattr(trainer, "eval_loss", of_average)
    assert trainer.test_values(STATE, 24) == {"eval_loss": 3}

    class Draw:
        batch_size, labels = 8, ()

        def __call__(self, params, indices):
            assert params["w"] == 3
            return np.full((8, 8, 8, 1), 3, np.uint8), 25

    class Progress:
        def record_image(self, *_):
            pass

    monkeypatch.setattr(trainer, "draw_samples", Draw())
    trainer.after_snapshot(STATE, 24, Progress())
    assert np.all(np.load(tmp_path / "samples" / "iter_24" / "sample.npz")["samples"] == 3)


def test_the_classifier(experiment):
    measure = lambda params, indices, t: (of_average(params), np.ones(4))  # noqa: E731
    trainer = classifier_training.ClassifierTrainer.__new__(classifier_training.ClassifierTrainer)
    trainer.experiment, trainer.measure, trainer.num_test_images = experiment, measure, 297
    assert trainer.test_values(STATE, 24) == {"eval_loss": 3, "eval_accuracy": 1}

    test = datasets.load_digits("test")
    everywhere = lambda params, indices, t: (np.full(len(indices), params["w"][0]), np.ones(len(indices)))  # noqa: E731
    rows = accuracy.measure_levels(experiment, everywhere, STATE, test)
    assert {row["cross_entropy"] for row in rows} == {3}

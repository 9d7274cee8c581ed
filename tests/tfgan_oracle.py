"""Metrics of fixed random features by tensorflow_gan's own functions, printed as JSON.

Run by test_evaluation.py in a process of its own, so that no other test has TensorFlow loaded; its output, with
tensorflow_gan 2.1.0, is tests/golden/tfgan_metrics.json.
"""

import contextlib
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np


def features():
    random = np.random.RandomState(0)  # its stream never changes
    mix = random.standard_normal((16, 16)) / 4.0
    generated = random.standard_normal((503, 16)) @ mix + 0.3
    reference = 1.2 * random.standard_normal((401, 16)) @ mix
    logits = 2.0 * random.standard_normal((503, 10))
    return generated, reference, logits


def import_classifier_metrics():
    # tensorflow_gan cannot be imported whole on TensorFlow >= 2.16, which has no estimators: empty packages stand in
    # for the two levels above the module that is wanted.
    root = pathlib.Path(importlib.util.find_spec("tensorflow_gan").submodule_search_locations[0])
    for name, path in (("tensorflow_gan", root), ("tensorflow_gan.python", root / "python")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    spec = importlib.util.spec_from_file_location("classifier_metrics", root / "python/eval/classifier_metrics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    generated, reference, logits = features()
    with contextlib.redirect_stdout(sys.stderr):
        tfgan = import_classifier_metrics()
        import tensorflow as tf

        x, y, scores = (tf.constant(array) for array in (generated, reference, logits))
        blocks = tfgan.kernel_classifier_distance_and_std_from_activations(x, y, max_block_size=100)
        values = {
            "frechet_distance": tfgan.frechet_classifier_distance_from_activations(x, y),
            "kernel_distance": tfgan.kernel_classifier_distance_from_activations(x, y, max_block_size=1024),
            "kernel_distance_blocks": blocks[0],
            "kernel_distance_blocks_stderr": blocks[1],
            "inception_score": tfgan.classifier_score_from_logits(scores),
        }
    print(json.dumps({name: float(value) for name, value in values.items()}, indent=1))


if __name__ == "__main__":
    main()

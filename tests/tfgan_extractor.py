"""Makes a tiny SavedModel like TF-GAN's and what the extractor "tfgan" computes with it, printed as JSON.

  python tests/tfgan_extractor.py FOLDER

Run by test_tfgan.py in a process of its own, so that no test has TensorFlow loaded.
"""

import contextlib
import json
import sys

import numpy as np

from metrics.extractors import build_extractor

NUM_FEATURES, NUM_CLASSES = 6, 4
NUM_LEVELS = 17


def kernels():
    random = np.random.RandomState(0)
    return random.standard_normal((3, NUM_FEATURES)), random.standard_normal((NUM_FEATURES, NUM_CLASSES))


def images(channels):
    return np.random.RandomState(channels).randint(0, NUM_LEVELS, (70, 8, 9, channels)).astype(np.uint8)


def expected(levels):
    """The same in numpy: means over pixels, mixed."""
    first, second = kernels()
    means = (np.broadcast_to(levels, (*levels.shape[:3], 3)) / 8.0 - 1.0).mean(axis=(1, 2))
    return means @ first, means @ first @ second


def save_model(path, names=("pool_3", "logits")):
    import tensorflow as tf

    first, second = (tf.constant(kernel, tf.float32) for kernel in kernels())

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
        def __call__(self, x):
            features = tf.reduce_mean(x, axis=(1, 2)) @ first
            return dict(zip(names, (features[:, None, None], features @ second), strict=True))

    tf.saved_model.save(Model(), str(path))


def report(path):
    extractor = build_extractor("tfgan", num_levels=NUM_LEVELS, weights=path)
    outputs = {channels: [array.tolist() for array in extractor(images(channels))] for channels in (1, 3)}
    return {
        "key": extractor.key,
        "name": extractor.name,
        "hash": extractor.hash,
        "num_features": extractor.num_features,
        "outputs": outputs,
    }


def main(folder):
    with contextlib.redirect_stdout(sys.stderr):
        save_model(f"{folder}/model")
        save_model(f"{folder}/other", names=("pool_3", "scores"))
        found = report(f"{folder}/model")
        try:
            report(f"{folder}/other")
        except ValueError as error:
            found["refusal"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

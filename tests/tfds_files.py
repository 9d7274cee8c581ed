"""A prepared data set of TFDS, written as its ArrayRecord builder writes it, but without TensorFlow."""

import io
import json

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2


def png(image):
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def example(record):
    """Serializes one record: arrays of images as PNG, integers as labels."""
    message = tf_example_pb2.Example()
    for name, value in record.items():
        if isinstance(value, np.ndarray):
            message.features.feature[name].bytes_list.value.append(png(value))
        else:
            message.features.feature[name].int64_list.value.append(value)
    return message.SerializeToString()


def write_split(folder, name, split, records):
    """Writes one shard; returns its entry in dataset_info.json."""
    writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
    serialized = [example(record) for record in records]
    for each in serialized:
        writer.write(each)
    writer.close()
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    size = {"numBytes": str(sum(map(len, serialized))), "shardLengths": [str(len(records))]}
    return {"name": split, "filepathTemplate": template} | size


def write(root, name, features, splits):
    """Writes a data set: `features` of TFDS by name, and for each split its records."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    tfds.features.FeaturesDict(features).save_config(folder)
    entries = [write_split(folder, name, split, records) for split, records in splits.items()]
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": entries}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def image(shape=(None, None, 3), **options):
    return tfds.features.Image(shape=shape, **options)


def label(num_classes=3):
    return tfds.features.ClassLabel(num_classes=num_classes)

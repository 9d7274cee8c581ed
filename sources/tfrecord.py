"""One .tfrecords file in the layout of progressive GANs (Karras et al. 2018), read by index and without TensorFlow.

A TFRecord file is a sequence of records: the length of the data in bytes (uint64, little-endian), a checksum of the
length (uint32), the data, and a checksum of the data (uint32). Here the data are a tf.train.Example with two features:
`shape`, int64[3], (C, H, W), and `data`, uint8[C, H, W] as bytes.

The lengths are checked against their checksums and the file size before anything is read. The checksums of the data
are not checked, since in Python that takes longer than a training step.
"""

from __future__ import annotations

import array
import functools
import math
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64, UInt8

from errors import UserError
from sources.base import Source
from storage.files import content_hash, local_path

HEADER = struct.Struct("<QI")  # length of the data in bytes, checksum of those eight bytes
FOOTER_BYTES = 4  # checksum of the data
MAX_RECORD_BYTES = 2**28  # 8192 x 8192 pixels in colour: of a record that claims more no image is made


@dataclass(frozen=True)
class TfrecordSource(Source):
    """The images of one .tfrecords file, read on demand."""

    path: str
    extents: Int64[np.ndarray, "n 2"]  # offset and length in bytes of the data of each record, int64[n, 2]
    shape: tuple[int, int, int]  # (H, W, C) that every image must have

    @property
    def fingerprint(self) -> str:
        status = os.stat(self.path)
        return content_hash(f"{self.path} {status.st_size} {status.st_mtime_ns}")

    def __len__(self) -> int:
        return len(self.extents)

    def images(self, indices: np.ndarray) -> np.ndarray:
        try:
            file = open(self.path, "rb")  # a handle for each call: several threads may read  # noqa: SIM115
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is gone: put it back and rerun the same command") from error
        with file:
            return np.stack([self._image(file, int(index)) for index in indices])

    def _image(self, file: BinaryIO, index: int) -> np.ndarray:
        offset, length = self.extents[index].tolist()
        if length > MAX_RECORD_BYTES:
            raise UserError(
                f"record {index} of {self.path} has {length:,} bytes; no more than {MAX_RECORD_BYTES:,} are read as an "
                "image: write the file again"
            )
        file.seek(offset)
        try:
            image = decode_image(file.read(length))
        except UserError as error:
            raise UserError(f"record {index} of {self.path} holds no image, write the file again: {error}") from error
        if image.shape != self.shape:
            raise UserError(
                f"record {index} of {self.path} is an image of (height, width, channels) {image.shape}, but "
                f"data.image_size, data.image_width and data.num_channels say {self.shape}; set them to the data's, or "
                "data.tfrecords_path to the file of that size"
            )
        return image


def load_tfrecord(path: str, shape: tuple[int, int, int]) -> TfrecordSource:
    """Open a .tfrecords file: read the length of each record, once in a process, and no image.

    The 2021 code used one file for both splits, and so does this: losses and bits/dim of the "test" split are those of
    training images.

    Args:
      path: of the file, `data.tfrecords_path`.
      shape: (H, W, C) that every image must have.
    """
    if not path:
        raise UserError("data.tfrecords_path is empty; set it to the data set's .tfrecords file")
    path = str(local_path(path, "data.tfrecords_path"))
    if not os.path.isfile(path):
        raise UserError(f"data.tfrecords_path={path!r} is not a file; set it to the data set's .tfrecords file")
    status = os.stat(path)
    return TfrecordSource(path, find_records(path, status.st_size, status.st_mtime_ns), shape)


@functools.lru_cache(maxsize=2)  # both splits use one file
def find_records(path: str, size: int, modified: int) -> Int64[np.ndarray, "n 2"]:
    """Find the records of a file by hopping from length to length: offset and length in bytes of the data of each.

    Args:
      path: of the file.
      size: of the file, in bytes.
      modified: its modification time, so that a changed file is read again.
    """
    from tensorboardX.record_writer import masked_crc32c  # lazily: it imports torch where that is installed

    extents = array.array("q")  # a list would take ten times the memory of the shortest records
    position = 0
    with open(path, "rb", buffering=0) as file:
        while position < size:
            file.seek(position)
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                raise UserError(f"{path} is cut off in the header of record {len(extents) // 2}; get it again")
            length, checksum = HEADER.unpack(header)
            if checksum != masked_crc32c(header[:8]):
                raise UserError(f"{path} is damaged at byte {position}, or not a .tfrecords file; get it again")
            end = position + HEADER.size + length + FOOTER_BYTES
            if end > size:
                raise UserError(f"{path} is cut off in the data of record {len(extents) // 2}; get it again")
            extents.extend((position + HEADER.size, length))
            position = end
    if not extents:
        raise UserError(f"{path} is empty; get it again")
    return np.frombuffer(extents, np.int64).reshape(-1, 2)


def decode_image(record: bytes) -> UInt8[np.ndarray, "H W C"]:
    """Decode the data of one record with TFDS's copy of tf.train.Example and protobuf's parser."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # lazily: a third of a second

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise UserError("its data are not a tf.train.Example") from error
    shape = list(features["shape"].int64_list.value)
    data = features["data"].bytes_list.value
    if len(shape) != 3 or min(shape) < 1 or len(data) != 1:
        raise UserError(f"its feature 'shape' is {shape} and 'data' has {len(data)} values; expected (C, H, W) and 1")
    if len(data[0]) != math.prod(shape):
        raise UserError(f"its feature 'data' has {len(data[0])} bytes; expected {math.prod(shape)} for {tuple(shape)}")
    return np.frombuffer(data[0], np.uint8).reshape(shape).transpose(1, 2, 0)

"""Files as the 2021 programs wrote them: msgpack by Flax 0.3; `torch.save`, made here without PyTorch."""

import collections
import io
import pickle
import struct
import zipfile

import msgpack
import numpy as np

# --- score_sde -------------------------------------------------------------------------------------------------------


def pack(tree):
    """Returns nested dictionaries of arrays in msgpack, arrays as extension type 1."""

    def extension(array):
        content = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1, content)

    return msgpack.packb(tree, default=extension, use_bin_type=True)


def nest(flat):
    """Splits {slash-joined path: array} into nested dictionaries, in alphabetical order."""
    tree = {}
    for path in sorted(path.split("/") for path in flat):
        *folders, name = path
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = flat["/".join(path)]
    return tree


def score_sde_state(params, params_ema, mu, nu, *, step, optimizer_step, lr, ema_rate):
    """Returns a training state as `checkpoint_<n>` holds it; the first four are {original path: array}."""
    moments = {f"{path}/grad_ema": value for path, value in mu.items()}
    moments |= {f"{path}/grad_sq_ema": value for path, value in nu.items()}
    optimizer_state = {"step": np.array(optimizer_step, np.int32), "param_states": nest(moments)}
    return {
        "step": np.array(step, np.int32),
        "optimizer": {"target": nest(params), "state": optimizer_state},
        "lr": np.array(lr, np.float32),
        "model_state": {},
        "ema_rate": np.array(ema_rate, np.float32),
        "params_ema": nest(params_ema),
        "rng": np.zeros(2, np.uint32),
    }


# --- score_sde_pytorch -----------------------------------------------------------------------------------------------

STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "int64": "LongStorage"}
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


class Global:
    """A name that the pickle refers to."""

    def __init__(self, module, name):
        self.path = f"c{module}\n{name}\n".encode()


class Call:
    """A function, by its name, called on arguments when the pickle is read."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class _Pickler(pickle._Pickler):
    """Writes arrays as tensors, each with a storage of its own, and names without importing them."""

    def __init__(self, file, storages, is_legacy):
        super().__init__(file, protocol=2)
        self.storages, self.is_legacy = storages, is_legacy

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(value.path)
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(tuple(value.arguments))
            self.write(pickle.REDUCE)
        elif isinstance(value, Build):
            self.save(value.value)
            self.save(value.state)
            self.write(pickle.BUILD)
        elif isinstance(value, np.ndarray):
            self.save(self.tensor(value))
        elif isinstance(value, Storage):
            self.save(("storage", Global("torch", value.kind), value.key, "cuda:0", value.size, *value.view))
            self.write(pickle.BINPERSID)
        else:
            super().save(value, save_persistent_id)

    def tensor(self, value):
        key = str(len(self.storages))
        self.storages[key] = value.ravel()
        storage = Storage(STORAGES[value.dtype.name], key, value.size, (None,) if self.is_legacy else ())
        strides = tuple(step // value.itemsize for step in np.ascontiguousarray(value).strides)
        arguments = (storage, 0, value.shape, strides, False, collections.OrderedDict())
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), *arguments)


def numpy_number(value):
    """Returns a float64 as the second pickle protocol stores what numpy computed."""
    dtype = Build(Call(Global("numpy", "dtype"), "f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    content = Call(Global("_codecs", "encode"), struct.pack("<d", value).decode("latin1"), "latin1")
    return Call(Global("numpy.core.multiarray", "scalar"), dtype, content)


Build = collections.namedtuple("Build", "value state")  # a value, and what its __setstate__ is given
Storage = collections.namedtuple("Storage", "kind key size view", defaults=((),))


def dump(value, *, is_legacy=False):
    """Returns (pickle, storages)."""
    file, storages = io.BytesIO(), {}
    _Pickler(file, storages, is_legacy).dump(value)
    return file.getvalue(), storages


def write_zip(path, value):
    """Writes the layout of PyTorch 1.6 and later."""
    content, storages = dump(value)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", "3\n")


def write_legacy(path, value):
    """Writes the layout before PyTorch 1.6."""
    content, storages = dump(value, is_legacy=True)
    system = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with open(path, "wb") as file:
        for header in (MAGIC, VERSION, system):
            pickle.dump(header, file, protocol=2)
        file.write(content)
        pickle.dump(list(storages), file, protocol=2)
        for values in storages.values():
            file.write(struct.pack("<q", values.size) + values.tobytes())

"""Write the constants and variables of a TensorFlow graph as an .npz file, by their names.

  python -m metrics.graph_constants GRAPH OUTPUT

GRAPH is a frozen graph (.pb) or the folder of a SavedModel. None of it is run. It is a separate process because it
imports TensorFlow, which nothing else here needs.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"  # of names in checkpoints of TensorFlow 2


def _nodes(path: Path) -> list[Any]:
    """Return the nodes of all graphs and functions in a file."""
    if not path.is_dir():
        graph_pb2 = importlib.import_module("tensorflow.core.framework.graph_pb2")
        graphs = [graph_pb2.GraphDef.FromString(path.read_bytes())]
    else:
        saved_model_pb2 = importlib.import_module("tensorflow.core.protobuf.saved_model_pb2")
        model = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        graphs = [meta.graph_def for meta in model.meta_graphs]
    nodes = [node for graph in graphs for node in graph.node]
    return nodes + [node for graph in graphs for function in graph.library.function for node in function.node_def]


def read_constants(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a graph by name; a variable replaces a constant of its name."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tensorflow = importlib.import_module("tensorflow")
    constants = [node for node in _nodes(path) if node.op == "Const"]
    arrays = {node.name: tensorflow.make_ndarray(node.attr["value"].tensor) for node in constants}
    if (path / "variables" / "variables.index").exists():
        reader = tensorflow.train.load_checkpoint(str(path / "variables" / "variables"))
        names = [name for name, dtype in reader.get_variable_to_dtype_map().items() if dtype.is_floating]
        arrays |= {name.removesuffix(VARIABLE_SUFFIX): reader.get_tensor(name) for name in names}
    return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}


if __name__ == "__main__":
    found: dict[str, Any] = {**read_constants(Path(sys.argv[1]))}
    np.savez(sys.argv[2], **found)

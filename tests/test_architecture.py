"""The shape of the code: imports run one way, functions stay short, one file knows the devices."""

import ast

import pytest
import tiny

# From the ground up; a module imports only from rows above its own, or from its own package.
FLOORS = (
    {"errors", "guards", "tensorstore_specs"},
    {"hosts"},
    {"files", "distributed", "checks"},
    {"rng"},
    {"sde_lib", "ode"},
    {"noise_levels"},
    {"models", "solvers"},
    {"losses", "sampling", "likelihood", "latents", "variational_bound", "legacy", "plots", "sources"},
    {"metrics"},
    {"checkpoints", "controllable_generation", "datasets", "evaluation", "report"},
    {"dequantization"},
    {"runtime"},
    {"run_lib"},
    {"main"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(
    path
    for path in tiny.ROOT.glob("**/*.py")
    if path.relative_to(tiny.ROOT).parts[0].removesuffix(".py") in {*FLOOR_OF, "configs", "benchmarks"}
)
MAX_LINES = 60


def room(path):
    return path.relative_to(tiny.ROOT).parts[0].removesuffix(".py")


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_every_module_has_its_floor():
    packages = {path.parent.name for path in tiny.ROOT.glob("*/__init__.py")} - {"configs"}
    found = {room(path) for path in tiny.ROOT.glob("*.py")} | packages
    assert found == set(FLOOR_OF)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_imports_run_one_way(path):
    own = room(path)
    if own == "benchmarks":
        return  # measures whatever it likes; nothing imports it
    for name in imports(ast.parse(path.read_text())):
        assert name != "benchmarks"
        assert name != "configs" or own == "configs"
        if name in FLOOR_OF and name != own:
            assert FLOOR_OF[name] < FLOOR_OF.get(own, 0), f"{path} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(tiny.ROOT)))
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = len((ast.get_docstring(node) or "").splitlines())
            assert node.end_lineno - node.lineno + 1 - docstring <= MAX_LINES, f"{path}:{node.lineno} {node.name}"


def test_one_file_maps_over_devices():
    users = {room(path) for path in SOURCES if "jax.pmap(" in path.read_text()}
    assert users == {"distributed"}


def test_tensorflow_is_never_imported():
    """The other test of this, a whole run with the import blocked, is in test_end_to_end.py."""
    for path in SOURCES:
        assert not {"tensorflow", "tensorflow_gan"} & set(imports(ast.parse(path.read_text()))), path

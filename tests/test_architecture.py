"""The shape of the code: imports run one way, one file knows the devices, TensorFlow stays out."""

import ast

import tiny

# From the ground up; a module imports only from rows above its own, or from its own package.
FLOORS = (
    {"errors"},
    {"checks"},
    {"storage"},
    {"parallel"},
    {"sde_lib"},
    {"solvers"},
    {"models"},
    {"losses", "sampling", "likelihood", "latents", "variational_bound", "legacy", "sources"},
    {"metrics"},
    {"controllable_generation", "datasets", "evaluation", "report"},
    {"dequantization"},
    {"workdir"},
    {"experiment"},
    {"training"},
    {"classifier"},
    {"modes"},
    {"run_lib"},
    {"main"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(
    path
    for path in tiny.ROOT.glob("**/*.py")
    if path.relative_to(tiny.ROOT).parts[0].removesuffix(".py") in {*FLOOR_OF, "configs", "benchmarks"}
)


def room(path):
    return path.relative_to(tiny.ROOT).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_imports_run_one_way():
    packages = {path.parent.name for path in tiny.ROOT.glob("*/__init__.py")} - {"configs"}
    assert {room(path) for path in tiny.ROOT.glob("*.py")} | packages == set(FLOOR_OF)
    for path in SOURCES:
        own = room(path)
        if own == "benchmarks":
            continue  # measures whatever it likes; nothing imports it
        for name in set(imports(path)) - {own}:
            assert name not in ("benchmarks", "configs"), f"{path} imports {name}"
            assert FLOOR_OF.get(name, -1) < FLOOR_OF.get(own, 0), f"{path} imports {name}"


def test_one_file_maps_over_devices():
    users = {str(path.relative_to(tiny.ROOT)) for path in SOURCES if "jax.pmap(" in path.read_text()}
    assert users == {"parallel/distributed.py"}


def test_tensorflow_is_never_imported():
    """The other test of this, a whole run with the import blocked, is in test_end_to_end.py."""
    for path in SOURCES:
        assert not {"tensorflow", "tensorflow_gan"} & set(imports(path)), path

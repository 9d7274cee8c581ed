"""The shape of the code: imports run one way, builders and modes read `config`, one file knows the devices."""

import ast

import tiny

# From the ground up; a module imports only from rows above its own, or from its own package.
FLOORS = (
    {"errors"},
    {"checks"},
    {"configs"},
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
    if path.relative_to(tiny.ROOT).parts[0].removesuffix(".py") in {*FLOOR_OF, "benchmarks"}
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
    packages = {path.parent.name for path in tiny.ROOT.glob("*/__init__.py")}
    assert {room(path) for path in tiny.ROOT.glob("*.py")} | packages == set(FLOOR_OF)
    for path in SOURCES:
        own = room(path)
        if own == "benchmarks":
            continue  # measures whatever it likes; nothing imports it
        for name in set(imports(path)) - {own}:
            assert name != "benchmarks", f"{path} imports {name}"
            assert FLOOR_OF.get(name, -1) < FLOOR_OF.get(own, 0), f"{path} imports {name}"


# Functions that take `config` besides modes and those called build_*.
TAKE_CONFIG = {
    "models.create_model",  # builders of another name
    "experiment.open_experiment",
    "experiment.check_sampling",
    "legacy.params_from_score_sde",
    "legacy.params_to_score_sde",
    "classifier.train_classifier",  # a mode
    "classifier.classifier_config",  # make, compare or record a configuration as a whole
    "experiment.resolve",
    "experiment.shrink",
    "workdir.check_same_experiment",
    "workdir.record_config",
    "workdir.open_folder",
}


def test_config_is_read_by_builders_and_modes():
    """What is below them takes plain values."""
    found = set()
    for path in SOURCES:
        if room(path) in {"benchmarks", "configs", "modes"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.removeprefix("_").startswith("build_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if any(each.annotation and "ConfigDict" in ast.unparse(each.annotation) for each in arguments):
                    found.add(f"{room(path)}.{node.name}")
    assert found == TAKE_CONFIG


def test_one_file_maps_over_devices():
    users = {str(path.relative_to(tiny.ROOT)) for path in SOURCES if "jax.pmap(" in path.read_text()}
    assert users == {"parallel/distributed.py"}


def test_tensorflow_is_never_imported():
    """The other test of this, a whole run with the import blocked, is in test_end_to_end.py."""
    for path in SOURCES:
        assert not {"tensorflow", "tensorflow_gan"} & set(imports(path)), path

"""The shape of the project, kept by reading its source: layers, sizes, what may be imported, what configs may hold."""

import ast
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sera_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

METHODS = {p.stem for p in (PACKAGE / "experiment" / "methods").glob("*.py") if not p.stem.startswith("_")}

# From the top to the bottom; a unit may import what stands below it and, in its own layer, only what SIBLINGS names.
LAYERS = [
    ["main", "preflight", "generate", "evaluate", "export", "study", "compare", "rankings", "status"],
    ["studies"],
    ["experiment"],
    ["aot"],
    ["loops"],
    ["evaluation"],
    ["training", "sampling"],
    ["guards"],
    ["irm"],
    ["losses", "models", "data", "world", "checkpoint", "writer"],
    ["ops", "hub"],
    ["mesh"],
    ["core", "config", "progress", "memory", "board", "stop", "hosts", "world_authors", "compile_cache"],
    ["compiling"],
    ["stamps", "processor"],
    ["whole"],
]
SIBLINGS = {
    ("world", "data"),  # the embedded world makes the same records that real data becomes
    ("data", "world"),  # and `prepare` can lay it down as a data set
    ("preflight", "main"),  # the same flags name the config
}
DEPTH = {unit: depth for depth, layer in enumerate(LAYERS) for unit in layer}

# The whole Config is read at the top; below, code takes one of its groups or plain values.
READS_CONFIG = {"main", "generate", "evaluate", "export", "studies", "experiment", "config"}
GROUPS = ["model", "data", "loss", "sera", "sampling", "train", "mesh", "eval", "log"]
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 10


def module_name(path: pathlib.Path) -> str:
    """Of sera_jax/data/packing.py: sera_jax.data.packing."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(name: str) -> str | None:
    """The unit of a dotted name: data for sera_jax.data.packing; None for the package and what is outside."""
    parts = name.split(".")
    return parts[1] if parts[0] == "sera_jax" and len(parts) > 1 else None


def imports(path: pathlib.Path) -> list[tuple[str, int]]:
    """(dotted name, line) of every import of a module, also those within functions; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def id_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_a_module_imports_only_what_stands_below_its_layer(path):
    unit = unit_of(module_name(path))
    if unit is None:
        assert imports(path) == [], "sera_jax/__init__.py imports nothing, so that naming the package costs nothing"
        return
    assert unit in DEPTH, f"{unit} is in no layer: give it a place in LAYERS"
    for name, line in imports(path):
        other = unit_of(name)
        if other is None or other == unit or (unit, other) in SIBLINGS:
            continue
        assert other in DEPTH, f"{path}:{line}: {name} is in no layer"
        assert DEPTH[other] > DEPTH[unit], f"{path}:{line}: {unit} imports {other}, which does not stand below it"


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_no_module_imports_torch_or_tensorflow(path):
    roots = {name.split(".")[0] for name, _ in imports(path)}
    assert not roots & {"torch", "tensorflow", "trl", "keras"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").rglob("*.py")), ids=id_of)
def test_data_is_numpy_only(path):
    assert not {name.split(".")[0] for name, _ in imports(path)} & {"jax", "flax", "optax"}


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_only_the_top_sees_the_whole_config(path):
    if unit_of(module_name(path)) not in READS_CONFIG:
        whole = [name for name, _ in imports(path) if re.fullmatch(r"sera_jax\.config(\.\w+)?\.Config", name)]
        assert whole == []


def test_importing_every_module_starts_no_device_and_loads_neither_torch_nor_tensorflow():
    names = [module_name(path) for path in MODULES if path.stem != "__main__"]
    script = f"""
import importlib, sys
from jax._src import xla_bridge
for name in {names!r}:
    importlib.import_module(name)
    assert not xla_bridge.backends_are_initialized(), f"importing {{name}} starts a device"
    for heavy in ("torch", "tensorflow"):
        assert heavy not in sys.modules, f"importing {{name}} loads {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_modules_and_functions_stay_short(path):
    source = path.read_text()
    length = source.count("\n")
    assert length < MAX_MODULE_LINES, f"{path} has {length} lines: divide it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines < MAX_FUNCTION_LINES, f"{node.name} has {lines} lines: divide it"


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_no_place_outside_the_table_asks_for_a_methods_name(path):
    """What differs between methods stands in their rows: nothing compares with a name, or keeps a table of its own."""
    if path.parent == PACKAGE / "experiment" / "methods":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        asked = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            asked = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        names = [part.value for part in asked if isinstance(part, ast.Constant) and part.value in METHODS]
        assert not names, f"{path}:{node.lineno}: asks for {names[0]!r}; give Method a field for what differs"


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_parameter_lists_stay_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(taken) - (taken[:1] in (["self"], ["cls"]))
            assert count <= MAX_PARAMETERS, f"{path}:{node.lineno}: {node.name} takes {count}: what belongs together?"


def test_no_module_is_a_drawer_for_everything():
    assert not [path for path in MODULES if path.stem in ("utils", "util", "helpers", "common", "misc")]


@pytest.mark.parametrize("path", [p for p in MODULES if unit_of(module_name(p)) in READS_CONFIG] + CONFIGS, ids=id_of)
def test_no_config_field_is_read_with_a_default_of_its_own(path):
    """`config.get("beta", 0.1)` would hide a misspelt field and write the default twice."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            owner = ast.unparse(node.func.value)
            assert not re.fullmatch(r"(self\.)?(config|cfg|raw)(\.\w+)*", owner), f"{path}:{node.lineno}: {owner}.get"


@pytest.mark.parametrize("path", MODULES + CONFIGS, ids=id_of)
def test_no_source_names_a_place_on_some_machine(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            place = re.search(r"(?<![\w.:/])/(home|root|Users|work|opt|mnt|scratch|tmp|data)/\w+", node.value)
            assert place is None, f"{path}:{node.lineno}: {place and place.group()}"


def variants(path: pathlib.Path) -> list[str | None]:
    """The arguments a config file is tested with: none, and the names its docstring gives as `file.py:name`."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return [None, *sorted(set(re.findall(rf"{re.escape(path.name)}:(\w+)", doc)))]


@pytest.mark.parametrize(("path", "variant"), [(p, v) for p in CONFIGS for v in variants(p)])
def test_every_config_has_the_fields_that_users_rely_on(path, variant):
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    takes_variant = bool(inspect.signature(module.get_config).parameters)
    config: Any = module.get_config(variant) if takes_variant and variant else module.get_config()
    assert type(config).__name__ == "ConfigDict"
    assert config.is_locked, "an unlocked config accepts a misspelt field"
    assert isinstance(config.workdir, str)
    assert isinstance(config.seed, int)
    for group in GROUPS:
        assert type(config[group]).__name__ == "ConfigDict", group
    assert isinstance(config.loss.name, str)
    assert isinstance(config.loss.beta, float | type(None))


@pytest.mark.parametrize("path", CONFIGS, ids=id_of)
def test_a_config_assigns_one_field_a_line_so_that_two_runs_differ_by_readable_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign):
            joined = len(node.targets) > 1 or isinstance(node.targets[0], ast.Tuple)
            assert not joined, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_every_config_says_what_it_is_for():
    for path in CONFIGS:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"

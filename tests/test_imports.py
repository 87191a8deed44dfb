"""The import direction of the library, read from its sources."""

import ast
import pathlib
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxnets"

# A package imports from lower levels only; packages of one level do not import each other.
LEVELS = (
    ("core", "checks", "host"),
    ("functional", "training", "metrics"),
    ("layers", "generation", "data", "objectives"),
    ("models",),
    ("tools",),
    ("__main__",),
)
FAMILIES = ("feedforward", "convolutional", "recurrent", "transformer", "autoencoder", "gan")
USE_FLAX = {"layers", "models", "tools"}
FILES = [
    pytest.param(path, path.relative_to(ROOT).with_suffix("").parts, id=str(path.relative_to(ROOT)))
    for path in sorted(PACKAGE.rglob("*.py"))
]


def imported(path):
    """Return the dotted names of all that a file imports, as tuples."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((*node.module.split("."), alias.name) for alias in node.names)


def test_every_package_has_a_level():
    tops = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert tops - {"__init__"} == set(sum(LEVELS, ()))


@pytest.mark.parametrize(("path", "parts"), FILES)
def test_a_file_imports_its_own_package_and_lower_levels_only(path, parts):
    if parts[1] == "__init__":
        return
    level = next(i for i, packages in enumerate(LEVELS) if parts[1] in packages)
    below = set(sum(LEVELS[:level], ())) | {parts[1]} | ({"core"} if level == 0 else set())
    own = {name[1] for name in imported(path) if name[0] == "jaxnets" and len(name) > 1}
    assert own - below - {"__version__"} == set()


@pytest.mark.parametrize(("path", "parts"), FILES)
def test_a_family_imports_no_other_family(path, parts):
    if parts[1] == "models" and parts[2] in FAMILIES:
        used = {name[2] for name in imported(path) if name[:2] == ("jaxnets", "models")}
        assert used <= {parts[2]}


@pytest.mark.parametrize(("path", "parts"), FILES)
def test_flax_and_orbax_are_imported_where_they_belong(path, parts):
    names = {name[0] for name in imported(path)}
    assert "flax" not in names or parts[1] in USE_FLAX
    assert "orbax" not in names or parts == ("jaxnets", "training", "checkpoint")


@pytest.mark.parametrize(("path", "parts"), [p for p in FILES if "__init__" in p.values[1]])
def test_the_init_file_of_a_package_defines_nothing(path, parts):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            names = {name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
            assert names <= {"__all__", "__dir__", "__getattr__", "__version__"}
        else:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert is_docstring or isinstance(node, ast.Import | ast.ImportFrom)


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_names_are_loaded_when_they_are_used():
    loaded = "sorted(name for name in sys.modules if name.startswith('jaxnets.'))"
    output = run(f"import sys, jaxnets; print({loaded}); jaxnets.fit; print({loaded})")
    before, after = (set(ast.literal_eval(line)) for line in output.splitlines())
    assert before == set()
    assert "jaxnets.training.loop" in after
    assert not any(name.startswith(("jaxnets.models", "jaxnets.layers")) for name in after)


def test_the_whole_library_is_light_and_changes_no_configuration():
    code = (
        "import sys, jax; before = dict(jax.config.values); import jaxnets;"
        "[getattr(jaxnets, name) for name in jaxnets.__all__];"
        "assert all(jax.config.values[name] == value for name, value in before.items());"
        "heavy = {'orbax', 'grain', 'matplotlib', 'sklearn', 'PIL', 'torch', 'tyro', "
        "'tensorboardX', 'wandb', 'gymnasium', 'pygame', 'Box2D'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_a_function_called_like_a_module_stays_a_function():
    look = (
        "print([callable(getattr(jn, name)) for name in ('adversarial', 'beam_search', 'dcgan')])"
    )
    modules = (
        "import jaxnets.generation.beam_search, jaxnets.objectives.adversarial;"
        "import jaxnets.models.gan; "
    )
    for first in ("", modules):
        assert run(f"{first}import jaxnets as jn; {look}") == "[True, True, True]"


def test_every_exported_name_exists_and_is_documented():
    import jaxnets

    for name in jaxnets.__all__:
        value = getattr(jaxnets, name)
        if isinstance(value, type | types.FunctionType | types.ModuleType):
            assert value.__doc__, name


def test_no_file_is_two_things():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in ("jaxnets", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 600} == {}

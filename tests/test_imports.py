"""Imports between the packages of the library, read from the sources, and at run time."""

import ast
import os
import pathlib
import subprocess
import sys
import types

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxnets"

# A package imports from lower levels only; packages of one level do not import each other.
LEVELS = (
    ("core", "checks", "host", "storage", "distributed"),
    ("functional", "training", "metrics"),
    ("layers", "generation", "data", "objectives", "finetuning"),
    ("models",),
    ("pretrained", "export", "tools"),
    ("__main__",),
)
FAMILIES = ("feedforward", "convolutional", "recurrent", "transformer", "autoencoder", "gan")
USE_FLAX = {"layers", "models", "pretrained", "tools"}
INIT_NAMES = {"__all__", "__dir__", "__getattr__", "__version__"}
#: {path: syntax tree}, the path as parts without the suffix: ("jaxnets", "training", "loop").
TREES = {
    path.relative_to(ROOT).with_suffix("").parts: ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(tree):
    """Return the dotted names that a module imports, as tuples."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [(*module.split("."), alias.name) for alias in node.names]
    return names


IMPORTS = {parts: imports_of(tree) for parts, tree in TREES.items()}


def test_every_package_has_a_level():
    assert {parts[1] for parts in TREES} - {"__init__"} == set(sum(LEVELS, ()))


def test_imports_are_absolute():
    assert [
        (parts, name) for parts, names in IMPORTS.items() for name in names if not name[0]
    ] == []


def test_a_file_imports_its_own_package_and_lower_levels_only():
    offenders = []
    for parts in TREES.keys() - {("jaxnets", "__init__")}:
        level = next(i for i, packages in enumerate(LEVELS) if parts[1] in packages)
        allowed = {*sum(LEVELS[:level], ()), parts[1], "__version__", "core" if level == 0 else ""}
        own = {name[1] for name in IMPORTS[parts] if name[0] == "jaxnets" and len(name) > 1}
        offenders += [(parts, package) for package in own - allowed]
    assert offenders == []


def test_a_family_imports_no_other_family():
    offenders = [
        (parts, name)
        for parts, names in IMPORTS.items()
        if parts[1] == "models" and parts[2] in FAMILIES
        for name in names
        if name[:2] == ("jaxnets", "models") and name[2] != parts[2]
    ]
    assert offenders == []


def test_flax_and_orbax_are_imported_only_where_they_belong():
    packages = {parts: {name[0] for name in names} for parts, names in IMPORTS.items()}
    assert {parts[1] for parts, names in packages.items() if "flax" in names} <= USE_FLAX
    with_orbax = [parts for parts, names in packages.items() if "orbax" in names]
    assert with_orbax == [("jaxnets", "training", "checkpoint_arrays")]


def defines_something(node):
    if isinstance(node, ast.Assign):
        names = {name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
        return not names <= INIT_NAMES
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return not is_docstring and not isinstance(node, ast.Import | ast.ImportFrom)


def test_the_init_files_define_nothing():
    offenders = [
        (parts, node.lineno)
        for parts, tree in TREES.items()
        if parts[-1] == "__init__"
        for node in tree.body
        if defines_something(node)
    ]
    assert offenders == []


def run(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


#: Some functions have the name of a module, which must not shadow them.
SHADOWED = "print([callable(getattr(jn, n)) for n in ('adversarial', 'beam_search', 'dcgan')])"

#: Prints the modules of the library that are loaded after `import jaxnets` and after one name.
#: Then it loads every name.
LOAD = f"""
import sys, jax
before = dict(jax.config.values)
import jaxnets as jn
def loaded(): return sorted(name for name in sys.modules if name.startswith('jaxnets.'))
print(loaded())
jn.fit
print(loaded())
{SHADOWED}
for name in jn.__all__:
    getattr(jn, name)
heavy = {{'orbax', 'grain', 'matplotlib', 'sklearn', 'PIL', 'torch', 'tyro', 'tensorboardX',
          'wandb', 'gymnasium', 'pygame', 'Box2D'}}
print(sorted(heavy & set(sys.modules)))
print([name for name, value in before.items() if jax.config.values[name] != value])
"""


#: Loads the modules before the functions of the same names.
MODULES_FIRST = f"""
import jaxnets.generation.beam_search, jaxnets.objectives.adversarial, jaxnets.models.gan
import jaxnets as jn
{SHADOWED}
"""


def test_names_are_loaded_when_used_without_heavy_packages_and_changes_of_configuration():
    none, one, functions, heavy, changed = map(ast.literal_eval, run(LOAD).splitlines())
    assert none == []
    assert "jaxnets.training.loop" in one
    assert not any(name.startswith(("jaxnets.models", "jaxnets.layers")) for name in one)
    assert functions == [True, True, True]
    assert heavy == []
    assert changed == []


def test_modules_do_not_shadow_the_functions_of_the_same_names():
    assert ast.literal_eval(run(MODULES_FIRST)) == [True, True, True]


def test_the_variable_of_the_lazy_loader_imports_everything_at_once():
    code = f"import jaxnets as jn, sys; print('jaxnets.models.gan' in sys.modules); {SHADOWED}"
    assert run(code, EAGER_IMPORT="1").split("\n") == ["True", "[True, True, True]"]


def test_every_exported_name_exists_and_is_documented():
    import jaxnets

    values = {name: getattr(jaxnets, name) for name in jaxnets.__all__}
    documented = (type, types.FunctionType, types.ModuleType)
    assert [n for n, v in values.items() if isinstance(v, documented) and not v.__doc__] == []


def test_no_file_is_longer_than_600_lines():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in ("jaxnets", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 600} == {}

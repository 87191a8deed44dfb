"""Lists the experiments: `python -m experiments`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent


def runnable() -> dict[str, str]:
    """Return {module: first sentence of its docstring} of everything that can be run.

    The sources are read, not imported, so that this needs no optional package and no time.
    """
    paths = [path for path in _FOLDER.glob("*.py") if path.stem != "__main__"]
    found = {path.stem: path for path in paths if '__name__ == "__main__"' in path.read_text()}
    packages = [path.parent for path in _FOLDER.glob("*/__main__.py")]
    found |= {path.name: path / "__init__.py" for path in packages}
    docstrings = {name: ast.get_docstring(ast.parse(p.read_text())) for name, p in found.items()}
    return {name: (text or "").split("\n")[0] for name, text in sorted(docstrings.items())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the experiments, or how to run the one that is named.

    Args:
        arguments: by default those of this process.

    Returns:
        Exit code: 0, or 2 if there are arguments other than --help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    modules = runnable()
    if arguments and arguments[0] not in ("-h", "--help"):
        name = arguments[0].removesuffix(".py")
        remedy = "python -m experiments lists what there is"
        if name in modules:
            remedy = f"python -m experiments.{' '.join([name, *arguments[1:]])} runs it"
        print(f"error: an experiment is a module of its own; {remedy}", file=sys.stderr)
        return 2
    width = max(map(len, modules))
    tools = ("benchmark", "embeddings", "reproduce")
    print("python -m experiments.NAME trains, evaluates and writes runs/NAME_MODEL/report.html.")
    print("python -m experiments.NAME --help shows the recipes and every option.\n")
    for name, sentence in modules.items():
        if name not in tools:
            print(f"  {name.ljust(width)}  {sentence}")
    print("\nTools:\n")
    for name in tools:
        print(f"  {name.ljust(width)}  {modules[name]}")
    print(
        "\nTheir packages: pip install -e '.[experiments]' (driving: '.[driving]'). Results with "
        "their commands: docs/results.md."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

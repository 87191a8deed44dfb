"""The README: its code runs, its commands and links exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert re.search(r"9\d\.\d\d% \+- .* over 16 seeds", capsys.readouterr().out)


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert target.startswith("http") or (ROOT / target).is_file(), target


def test_the_commands_are_one_line_each():
    for name in ("digits", "test", "docs"):
        (command,) = re.findall(rf"<!-- {name} command -->\n```sh\n(.*?)\n```", README, re.DOTALL)
        assert "\n" not in command and command.startswith("python3 -m venv")


def test_every_command_names_a_module_that_exists():
    text = README + (ROOT / "docs" / "results.md").read_text()
    modules = set(re.findall(r"python -m (experiments\.\w+|jaxnets)", text))
    assert len(modules) >= 12
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_the_readme_fits_on_a_screen():
    assert len(README.split()) <= 800

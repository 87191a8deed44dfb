"""What the pages of docs/ say is true: their code runs, and what they link to exists."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = [pytest.param(path, id=path.stem) for path in sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs_from_top_to_bottom(page):
    text, names = page.read_text(), {}
    with jax.numpy_rank_promotion("allow"):  # as a reader has it
        for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            above = "\n" * text.count("\n", 0, block.start(1))  # errors show lines of the page
            exec(compile(above + block[1], str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_the_names_in_them_exist(page):
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)#]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path = page.parent / target
        assert path.is_file(), target
        if path.suffix == ".py" and text.startswith("`"):
            name = text.strip("`").rsplit(".", 1)[-1]
            found = path.stem == name or path.parent.name == name
            assert found or re.search(rf"\b{name}\b", path.read_text()), text

"""What the pages of docs/ say is true: their code runs, and what they link to exists."""

import importlib
import pathlib
import re
import types

import jax
import pytest

import jaxnets

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PATHS = sorted(DOCS.rglob("*.md"))
PAGES = [pytest.param(path, id=path.relative_to(DOCS).with_suffix("").as_posix()) for path in PATHS]
WITH_CODE = [page for page in PAGES if "```python" in page.values[0].read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
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


@pytest.mark.parametrize("page", sorted(DOCS.glob("families/*.md")), ids=lambda page: page.stem)
def test_the_page_of_a_family_has_all_its_parts(page):
    text = page.read_text()
    parts = ("```math", "```python", "](../images/", "## When to use it", "Not ", "Papers: ")
    assert [part for part in parts if part not in text] == []
    assert f"](../api/{page.stem}.md)" in text and f"](../../notebooks/{page.stem}.ipynb)" in text


def test_pictures_are_small_and_used():
    text = "".join(path.read_text() for path in (*PATHS, ROOT / "README.md"))
    for picture in DOCS.glob("images/*"):
        assert picture.stat().st_size < 100_000, picture.name
        assert f"images/{picture.name})" in text, picture.name


def test_the_api_pages_name_everything_that_is_exported():
    text = "\n".join(path.read_text() for path in sorted(DOCS.glob("api/*.md")))
    shown, names = set(), re.findall(r"^::: jaxnets\.(\S+)", text, re.MULTILINE)
    for name in names:
        value = getattr(jaxnets, name, None) or importlib.import_module(f"jaxnets.{name}")
        if isinstance(value, types.ModuleType):
            shown |= {f"{name}.{key}" for key in getattr(value, "__all__", vars(value))}
        shown.add(name)
    assert len(names) == len(set(names))
    missing = [
        name
        for name in jaxnets.__all__
        if name not in shown and not any(one.endswith(f".{name}") for one in shown)
    ]
    assert missing == [], "add them to a page of docs/api"


def test_the_navigation_of_the_site_names_every_page():
    listed = re.findall(r"([\w/]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {path.relative_to(DOCS).as_posix() for path in PATHS}
    pages |= {f"notebooks/{path.name}" for path in ROOT.glob("notebooks/*.ipynb")}
    assert sorted(listed) == sorted(pages)

"""What the site needs beyond the pages of docs/: mkdocs.yml names this file as its hook.

The pages link into the repository, as they are read there too. In the site these links lead to
the API page of the object that they name, to the notebook, from the README to the start page, and
else to a page with the source of the file. Fences called `math` become MathML, which browsers show
without a script.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_MATH = re.compile(r"\$`([^`]+)`\$")
_NO_TEXT = re.compile(
    r"(<(?:pre|code|script|style)\b.*?</(?:pre|code|script|style)>|<[^>]+>)", re.S
)
_DOLLARS = re.compile(r"\$\$(?P<block>[^$]+)\$\$|\$(?P<inline>[^$]+)\$")
_WIDE = "hide: [navigation, toc]\n"  # front matter of a page without columns beside it
_DIRECTIVE = re.compile(r"^::: (\S+)", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Let fences called `math` be equations."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": _equation}]
    return config


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Any, config: Any) -> Any:
    """Add the notebooks, and the sources that pages link to."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    pages = {file.src_uri: (DOCS / file.src_uri).read_text() for file in _written(files)}
    config.extra["documented"] = documented(pages)
    sources = {
        target
        for page, text in pages.items()
        for _, target in _repository_links(page, text)
        if not target.endswith((".ipynb", ".md"))
    }
    for name in sorted(sources):
        text = f"---\n{_WIDE}search: {{exclude: true}}\n---\n\n# {name}\n\n````python\n"
        text += (ROOT / name).read_text() + "````\n"
        files.append(File.generated(config, _source_page(name), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links into the repository to pages of the site, and inline formulas to MathML."""
    here = page.file.src_uri

    def place(match: re.Match[str]) -> str:
        text, target = match[1], _in_repository(here, match[2])
        if target is None:
            return match[0]
        found = _page_of(text, target, config.extra["documented"])
        path, _, anchor = found.partition("#")
        relative = posixpath.relpath(path, posixpath.dirname(here) or ".")
        return f"[{text}]({relative}{'#' if anchor else ''}{anchor})"

    if here.startswith("source/"):
        return markdown
    markdown = _MATH.sub(lambda match: convert(match[1]), markdown)
    return _LINK.sub(place, markdown)


def on_page_content(content: str, /, page: Any, **_: Any) -> str:
    """Turn the formulas of a notebook to MathML."""
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    pieces = _NO_TEXT.split(content)  # text, what is none, text, ...
    pieces[::2] = [_DOLLARS.sub(_formula, piece) for piece in pieces[::2]]
    return "".join(pieces)


def documented(pages: dict[str, str]) -> dict[str, str]:
    """Return where each object is documented.

    Args:
        pages: path in docs/ -> text.

    Returns:
        Full name of an object, such as "jaxnets.core.Mean" -> page#anchor.
    """
    found = {}
    for page, text in sorted(pages.items()):
        for name in _DIRECTIVE.findall(text):
            for full in (name, *_members(name)):
                found[full] = f"{page}#{full}"
    return found


def _members(name: str) -> list[str]:
    """Return the full names of what a directive about a module shows, read from its source."""
    path = ROOT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return []
    nodes = ast.parse(path.read_text()).body
    own = [node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    for node in nodes:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            own = ast.literal_eval(node.value)
    return [f"{name}.{key}" for key in own if not key.startswith("_")]


def _page_of(text: str, target: str, documented: dict[str, str]) -> str:
    if target == "README.md":
        return "index.md"
    if target.endswith(".ipynb"):
        return target
    module = target.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    name = text.strip("`").rsplit(".", 1)[-1]
    for full in (f"jaxnets.{name}", f"{module}.{name}", module):
        if text.startswith("`") and full in documented:
            return documented[full]
    return _source_page(target)


def _repository_links(page: str, text: str) -> list[tuple[str, str]]:
    links = ((match[1], _in_repository(page, match[2])) for match in _LINK.finditer(text))
    return [(label, target) for label, target in links if target is not None]


def _in_repository(page: str, target: str) -> str | None:
    """Return the path, from the root of the repository, of a file outside docs/."""
    if "://" in target:
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    inside = path.startswith("docs/") or not (ROOT / path).is_file()
    return None if inside else path


def _written(files: Any) -> list[File]:
    return [file for file in files.documentation_pages() if (DOCS / file.src_uri).is_file()]


def _source_page(name: str) -> str:
    return f"source/{name.removesuffix('.py')}.md"


def _formula(match: re.Match[str]) -> str:
    if match["block"]:
        return _equation(html.unescape(match["block"]), "math")
    return convert(html.unescape(match["inline"]))


def _equation(source: str, language: str, *args: Any, **keywords: Any) -> str:
    rows = [convert(row, display="block") for row in source.split("\n\n") if row.strip()]
    return f'<div class="equation">{"".join(rows)}</div>'

"""The site: it builds without a warning, and every link and picture in it leads somewhere."""

import html.parser
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest

import jaxnets

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter", "latex2mathml")
MISSING = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}: pip install 'jaxnets[docs]'"),
]


class Page(html.parser.HTMLParser):
    """The links, ids, pictures and the number of equations of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.ids, self.num_equations = [], [], set(), 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.num_equations += tag == "math"
        for name in ("href", "src"):
            if attrs.get(name):
                self.links.append(attrs[name])
                if tag in ("script", "link", "img", "iframe"):
                    self.loaded.append(attrs[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return {path: Page(path) for path in folder.rglob("*.html")}


def named(site, name):
    return next(page for path, page in site.items() if path.as_posix().endswith("/" + name))


def test_every_link_of_every_page_leads_somewhere(site):
    broken = []
    for path, page in site.items():
        if path.name == "404.html":
            continue  # its links start at the root of a server
        for link in page.links:
            url = urllib.parse.urlparse(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            if not target.exists() or (
                url.fragment and target in site and url.fragment not in site[target].ids
            ):
                broken.append((path.name, link))
    assert broken == []


def test_nothing_is_loaded_from_another_host(site):
    for page in site.values():
        assert [link for link in page.loaded if "://" in link] == []


def test_everything_exported_has_a_place_in_the_api(site):
    ids = set().union(*(page.ids for path, page in site.items() if path.parent.name == "api"))
    ends = {name.rsplit(".", 1)[-1] for name in ids if name and name.startswith("jaxnets.")}
    assert sorted(set(jaxnets.__all__) - ends) == []


def test_links_to_sources_lead_to_what_documents_the_object(site):
    assert "api/types.html#jaxnets.Mean" in named(site, "coming_from.html").links


def test_notebooks_and_families_show_equations(site):
    for name in ("notebooks/gan.html", "families/gan.html"):
        assert named(site, name).num_equations > 0


def test_what_is_returned_is_shown_whole_where_it_has_a_colon(site):
    path = next(path for path in site if path.as_posix().endswith("/api/loop.html"))
    text = re.sub(r"<[^>]+>", "", path.read_text())
    assert "{name: mean}: a float, a list with one per member" in " ".join(text.split())

"""The site builds without a warning, its links lead somewhere, and nothing in it is loaded from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import fedlight.algorithms
import fedlight.perturbations

REPOSITORY = Path(__file__).parents[2]


class Page(HTMLParser):
    """The links, the loaded files and the anchors of a page."""

    def __init__(self, html):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("img", "script", "iframe") and found.get("src"):
            self.loaded.append(found["src"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "modulepreload"):
            self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {path.relative_to(folder).as_posix(): Page(path.read_text()) for path in folder.rglob("*.html")}, folder


@pytest.mark.slow
def test_links_lead_somewhere(site):
    pages, folder = site
    broken = []
    for name, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or name == "404.html":
                continue
            goal = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            goal = "index.html" if goal == "." else goal
            anchor = unquote(parts.fragment)
            if not (folder / goal).is_file() or (anchor and goal in pages and anchor not in pages[goal].anchors):
                broken.append(f"{name}: {link}")
    assert not broken


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    pages, folder = site
    assert [f"{name}: {url}" for name, page in pages.items() for url in page.loaded if urlsplit(url).netloc] == []
    styles = [path for path in folder.rglob("*.css") if "@import url(http" in path.read_text()]
    assert not styles
    assert not any("fonts.googleapis" in path.read_text() for path in folder.rglob("*.html"))


@pytest.mark.slow
def test_every_method_has_a_page_with_its_yaml(site):
    _, folder = site
    for package in (fedlight.algorithms, fedlight.perturbations):
        kind = package.__name__.split(".")[-1]
        for name in set(package.__all__) - {"Message", "Algorithm", "Perturbation"}:
            text = (folder / kind / f"{name.lower()}.html").read_text()
            assert "Source" in text, name
            assert f"--{kind[:-1]} {name}" in re.sub("<[^>]*>", "", text), name


def test_every_page_of_docs_is_in_the_navigation():
    def listed(nav):
        for entry in nav:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from listed(value) if isinstance(value, list) else [value]

    names = set(listed(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    docs = REPOSITORY / "docs"
    assert {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} <= names

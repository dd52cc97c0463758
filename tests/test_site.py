"""The site builds strictly: links and anchors hold, every page is reached, nothing is fetched."""

from __future__ import annotations

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from scripts.pages import ENTRIES, ROOT, targets
from tests.support.process import checked

DOCS = ROOT / "docs"
SOURCES = sorted(
    {
        *ENTRIES,
        *DOCS.rglob("*.md"),
        *(ROOT / "bench").glob("*.md"),
        *(ROOT / "fuzz").glob("*.md"),
        ROOT / "tests" / "data" / "README.md",
    }
)
BUILD_TIMEOUT_S = 60

ELSEWHERE = {
    "github.com",
    "keepachangelog.com",
    "semver.org",
}
"""Who is linked to outside of this machine. Nobody is asked whether the pages are there."""


def named(path: Path) -> str:
    """Name a file in a test's id."""
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """Read a page without its code: fenced blocks, and what stands between backticks."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", "", text)


class Built(HTMLParser):
    """What a page that was built loads, and its text outside of code."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self._quiet: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.loaded.append(found.get("src") or "")
        if tag == "link" and found.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.append(found.get("href") or "")
        if tag == "img":
            self.images.append(found)
        if tag in ("code", "pre", "script", "style"):
            self._quiet.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._quiet and self._quiet[-1] == tag:
            self._quiet.pop()

    def handle_data(self, data: str) -> None:
        if not self._quiet:
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make site` does; a link or an anchor that leads nowhere ends it."""
    directory = tmp_path_factory.mktemp("site")
    checked(
        *[sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        directory=ROOT,
        environment={"PATH": os.environ["PATH"], "NO_MKDOCS_2_WARNING": "1"},
        timeout_s=BUILD_TIMEOUT_S,
    )
    return directory


def test_every_page_is_built(site: Path) -> None:
    """The README is the first page, and every page of docs/ is there."""
    expected = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    built = {page.relative_to(site) for page in site.rglob("*.html")}

    assert expected <= built
    assert '<h1 id="litellm-cache-sidecar">' in (site / "index.html").read_text()


def test_every_page_has_its_place_among_the_others() -> None:
    """A page that `nav` in mkdocs.yml does not name is found by nobody."""
    # The one tag of Python's in that file is of no matter here.
    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/object/apply:", "")
    text = re.sub(r"slugify: \S+ (\{.*\})", r"slugify: \1", text)
    nav = yaml.safe_load(text)["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(nav)))

    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= listed


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """No font, script, style or image comes from another host; a page works without a network."""
    pages = {page: Built(page) for page in site.rglob("*.html")}

    for page, built in pages.items():
        for source in built.loaded:
            parts = urlsplit(source)
            assert not (parts.scheme or parts.netloc) or parts.scheme == "data", (page, source)
            if source and page.name != "404.html":  # its links begin at the root
                assert (page.parent / parts.path).is_file(), (page, source)
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)", styles) == []


def test_pictures_say_what_they_show(site: Path) -> None:
    """Every picture has words for whoever does not see it."""
    for page in site.rglob("*.html"):
        assert [image for image in Built(page).images if not image.get("alt")] == [], page


def test_pages_are_read_as_they_were_meant(site: Path) -> None:
    """No list, table, fence or link is left as text: the site's Markdown wants a blank line before
    a list, and four blanks before what belongs to an item."""
    left = re.compile(r"(?m)^\s*(?:[-*] |\||```|#+ )|\]\(|\*\*")
    for page in site.rglob("*.html"):
        found = left.search(Built(page).text)
        assert found is None, (page.name, Built(page).text[found.start() : found.start() + 80])


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_lists_within_items_are_indented(path: Path) -> None:
    """What belongs to an item of a list begins four blanks further in, on the site as here."""
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))

    assert re.findall(r"(?m)^ {1,3}(?:[-*] |\d+\. |```|\|).*$", text) == []


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    """In the repository itself, too, where headings are named as Git hosts name them."""
    for target in targets(path):
        assert target.exists(), target
    for link, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", prose(path)):
        page = (path.parent / link).resolve() if link else path
        assert anchor in headings(page), (link, anchor)


def headings(page: Path) -> set[str]:
    """Name the headings of a page as links do."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    titles = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_links_to_elsewhere_are_well_formed(path: Path) -> None:
    """They are not followed: they are https, to a host that is listed above; or this machine."""
    links = re.findall(r"\]\((\w+:[^)]*)\)|<(https?:[^>]*)>", prose(path))
    for link in [first or second for first, second in links]:
        parts = urlsplit(link)
        here = parts.scheme == "http" and parts.hostname == "127.0.0.1"
        assert here or (parts.scheme == "https" and parts.hostname in ELSEWHERE), link
        assert not re.search(r"\s", link), link


def test_front_page_is_short() -> None:
    """The README says what is wanted first, and leads to the rest."""
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024


def test_pages_begin_alike() -> None:
    """One title, and then what the page is for, before any part of it."""
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert re.match(r"# \S.*\n\n[^#\s]", text), page.name
        assert len(re.findall(r"(?m)^# ", re.sub(r"(?ms)^ *```.*?^ *```$", "", text))) == 1, page

"""What the site shows of the repository besides `docs/`; `mkdocs.yml` names it as a hook.

README.md is the front page. Pages link to files of the repository where these lie, so that the
links hold wherever the repository itself is read. Here the files that links lead to join the
site, in which `docs/` is the top, and the links are written anew for that.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

__all__ = ["ENTRIES", "ROOT", "on_files", "on_page_markdown", "targets"]

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ENTRIES = (
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "deploy").rglob("README.md")),
)
"""Pages outside `docs/` that the site has, whether or not a link leads to them."""

_LINK = re.compile(r"(?<=\]\()([\w./-]+)(?=[#)])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the entries, and whatever pages lead to."""
    known = {Path(file.abs_src_path) for file in files if file.abs_src_path}
    ahead = [*ENTRIES, *(path for path in known if path.suffix == ".md")]
    while ahead:
        path = ahead.pop()
        if path not in known:
            known.add(path)
            files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            ahead += [found for found in targets(path) if found.is_file() and found not in known]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have the links of a page lead to where their files are on the site."""
    source = Path(str(page.file.abs_src_path))
    here = posixpath.dirname(_uri(source)) or "."

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[0]).resolve()
        return posixpath.relpath(_uri(target), here) if target.is_file() else link[0]

    return _LINK.sub(moved, markdown)


def targets(page: Path) -> Iterator[Path]:
    """Name the files that a page's links lead to, whether or not they are there."""
    for link in _LINK.finditer(page.read_text(encoding="utf-8")):
        yield (page.parent / link[0]).resolve()


def _uri(path: Path) -> str:
    """Say where a file of the repository is on the site."""
    if path == ROOT / "README.md":
        return "index.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()

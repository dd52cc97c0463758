"""The files of the live page, over real sockets, and what may be in them."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import sys
import zipfile
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest

from sidecar.account import live
from sidecar.account.history import MAX_ROWS
from sidecar.admin.page import POLICY, read_files
from tests.support.process import checked
from tests.support.running import Running, running
from tests.support.wire import Answer, ask

pytestmark = pytest.mark.anyio

NOWHERE = "http://127.0.0.1:9"
TOKEN = "sk-test-page-1c9e"
ROOT = Path(__file__).parents[2]
STATIC = ROOT / "sidecar" / "admin" / "static"
UPLOT = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


async def get(sidecar: Running, path: str, *headers: str, method: str = "GET") -> Answer:
    """Ask the admin port."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return await ask(
        ("127.0.0.1", sidecar.lifecycle.admin_port), "\r\n".join(lines).encode("latin-1")
    )


def test_all_of_it_is_less_than_150_kb() -> None:
    """With gzip, as browsers get it, the figures of an average day included."""
    files = {name: len(file.packed) for name, file in read_files().items()}

    assert 20_000 < sum(files.values()) < 50_000, files


def test_pictures_of_it_are_small() -> None:
    """They are in the repository, and in everybody's clone of it."""
    pictures = sorted((ROOT / "docs" / "images").glob("page*.png"))

    assert len(pictures) == 3
    assert [path.name for path in pictures if path.stat().st_size >= 150_000] == []


def test_library_is_the_one_that_was_published_with_its_licence() -> None:
    """uPlot 1.6.32, byte for byte; what is served says whose it is."""
    vendored = STATIC / "vendor"
    found = {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in vendored.iterdir()
        if path.suffix != ".md"
    }

    assert found == UPLOT
    assert "The MIT License" in (vendored / "uPlot.LICENSE").read_text()
    note = (vendored / "README.md").read_text()
    assert all(digest in note for digest in UPLOT.values())
    assert "1.6.32" in note


def test_nothing_comes_from_elsewhere_and_nothing_is_read_as_html() -> None:
    """Our own files name no other host, and no script writes markup or runs text."""
    for path in STATIC.iterdir():
        if path.is_file():
            text = path.read_text()
            urls = re.findall(r"https?://[^\s\"'<>`$]+", text)
            assert set(urls) <= {"http://www.w3.org/2000/svg"}, path
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacent|\beval\b|document\.write", text
            )
            assert not re.search(r"<style|\sstyle=|\son\w+=", text), path


def test_page_is_painted_without_waiting_for_another_file() -> None:
    """Styles and the choice of the theme stand in it, and the policy lets in these alone."""
    files = read_files()
    text, policy = files["index.html"].body.decode(), files["index.html"].policy
    inline = re.findall(r"<(style|script)>(.*?)</", text, re.DOTALL)

    assert [tag for tag, _ in inline] == ["script", "style", "style"]
    for tag, inside in inline:
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert re.search(rf"{tag}-src 'self'[^;]* 'sha256-{re.escape(digest)}'", policy)
    assert re.sub(r" 'sha256-[\w+/]+='", "", policy) == POLICY
    assert "stylesheet" not in text
    assert all(
        re.search(r' (defer|type="module")', tag) for tag in re.findall(r"<script [^>]*>", text)
    )
    named = set(re.findall(r'(?:src|href)="static/([^"]+)"', text))
    assert named <= files.keys()
    assert files.keys() - named == {"index.html", "vendor/uPlot.LICENSE"}


def test_limits_that_it_names_are_those_in_force() -> None:
    """Those of the table, of which it says what is not listed."""
    script = (STATIC / "table.js").read_text()

    assert f"the first {MAX_ROWS} models" in script
    assert f"lists the {vars(live)['_MAX_LISTED']} with" in script


def test_files_of_the_page_are_in_the_wheel(tmp_path: Path) -> None:
    """Built as the image builds it, by the backend that is locked, of what the image gets."""
    tools, source, wheels = (tmp_path / name for name in ("tools", "source", "wheels"))
    locked = ROOT / "requirements" / "build.txt"
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--target", str(tools)]
    run(*pip, "--no-deps", "--require-hashes", "-r", str(locked))
    source.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        name = line.removeprefix("!")
        if line.startswith("!") and "/" not in name:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
    build = "import sys, hatchling.build as it; it.build_wheel(sys.argv[1])"
    run("-c", build, str(wheels), directory=source, path=tools)

    (wheel,) = wheels.iterdir()
    served = {f"sidecar/admin/static/{name}" for name in read_files()}
    assert served <= set(zipfile.ZipFile(wheel).namelist())


def run(*arguments: str, directory: Path = ROOT, path: Path | None = None) -> None:
    """Run Python; its words are the assertion's message."""
    environment = dict(os.environ) | ({"PYTHONPATH": str(path)} if path else {})
    checked(sys.executable, *arguments, directory=directory, environment=environment, timeout_s=100)


async def test_every_file_is_served_with_its_type_and_policy() -> None:
    """With gzip where it is taken, and 304 where the browser has it."""
    async with running(NOWHERE) as sidecar:
        for name, file in read_files().items():
            plain = await get(sidecar, f"/static/{name}")
            packed = await get(sidecar, f"/static/{name}", "Accept-Encoding: gzip")
            assert (plain.status, packed.status) == (200, 200)
            assert plain.body == gzip.decompress(packed.body) == file.body
            assert packed.header(b"content-encoding") == b"gzip"
            assert plain.header(b"content-type") == file.content_type.encode()
            assert plain.header(b"content-security-policy") == file.policy.encode()
            assert plain.header(b"x-content-type-options") == b"nosniff"
            tag = plain.header(b"etag")
            assert tag is not None
            again = await get(sidecar, f"/static/{name}", f"If-None-Match: {tag.decode()}")
            assert (again.status, again.body) == (304, b"")
        assert (await get(sidecar, "/")).body == read_files()["index.html"].body


@pytest.mark.parametrize(
    "name", ["absent.js", "", "../app.py", "%2e%2e/app.py", "vendor/", "vendor/README.md", "/etc"]
)
async def test_nothing_else_is_served(name: str) -> None:
    """Files are looked up by name among those that were read."""
    async with running(NOWHERE) as sidecar:
        assert (await get(sidecar, f"/static/{name}")).status == 404


async def test_a_browser_is_asked_for_the_token_by_the_page_itself() -> None:
    """Files are open, data is not; a browser's own dialogue, which asks for a name, stays away."""
    async with running(NOWHERE, admin_token=TOKEN) as sidecar:
        page = await get(sidecar, "/", "Accept: text/html,*/*;q=0.8")
        assert page.status == 401
        assert page.header(b"www-authenticate") == b'Bearer realm="sidecar"'
        assert page.header(b"cache-control") == b"no-store"
        policy = read_files()["index.html"].policy
        assert page.header(b"content-security-policy") == policy.encode()
        assert page.body == read_files()["index.html"].body
        assert (await get(sidecar, "/static/page.js")).status == 200
        for name in ("summary", "series", "models", "settings"):
            path = f"/api/v1/{name}"
            refused = await get(sidecar, path, "Accept: application/json")
            assert refused.status == 401
            assert refused.header(b"www-authenticate") == b'Bearer realm="sidecar"'
            assert (await get(sidecar, path, "Accept: text/html")).status == 401
            assert (await get(sidecar, f"/static/..{path}")).status == 404
            answer = await get(sidecar, path, f"Authorization: Bearer {TOKEN}")
            assert answer.status == 200
            assert answer.header(b"cache-control") == b"no-store"
            assert TOKEN.encode() not in answer.body


async def test_documents_are_packed_where_that_is_taken_and_windows_are_named() -> None:
    """A window that is not there is refused with those that are."""
    async with running(NOWHERE) as sidecar:
        plain = await get(sidecar, "/api/v1/settings")
        packed = await get(sidecar, "/api/v1/settings", "Accept-Encoding: gzip")
        assert gzip.decompress(packed.body) == plain.body
        assert plain.header(b"content-type") == b"application/json"
        refused = await get(sidecar, "/api/v1/summary?window=1d")
        assert (refused.status, refused.body) == (400, b"window is one of 15m, 1h, 6h, start.\n")
        assert (await get(sidecar, "/api/v1/absent")).status == 404
        assert (await get(sidecar, "/api/v1/summary", method="HEAD")).body == b""
        assert (await get(sidecar, "/api/v1/summary", method="POST")).status == 405

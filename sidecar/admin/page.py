"""The files of the live page, as they lie in the package.

They hold no data: who may see them is no secret. What they show comes from `/api`, which the
guard keeps. Nothing is fetched from anywhere else, and the policy below has browsers see to it.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["POLICY", "STATIC", "File", "answer", "read_files"]

STATIC = "/static/"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_HERE = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file, ready to be sent."""

    body: bytes
    packed: bytes
    """The same with gzip."""
    tag: str
    content_type: str


def read_files() -> dict[str, File]:
    """Read all there are, by their paths below `/static/`; it takes some 15 ms."""
    return {
        path.relative_to(_HERE).as_posix(): _read(path)
        for path in sorted(_HERE.rglob("*"))
        if path.suffix in _TYPES
    }


def _read(path: Path) -> File:
    body = path.read_bytes()
    return File(
        body,
        gzip.compress(body, mtime=0),
        f'"{sha256(body).hexdigest()[:20]}"',
        _TYPES[path.suffix],
    )


def answer(request: Request, file: File, *, gzipped: bool, status_code: int = 200) -> Response:
    """Answer with a file; 304 where the browser has it."""
    headers = {
        # Asked for each time, and answered with a line: after an upgrade nobody sees the old one.
        "cache-control": "no-cache",
        "etag": file.tag,
        "vary": "accept-encoding",
        "content-security-policy": POLICY,
    }
    if status_code == 200 and request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    body = file.body
    if gzipped:
        headers["content-encoding"] = "gzip"
        body = file.packed
    headers["content-type"] = file.content_type
    return Response(body, status_code, headers)

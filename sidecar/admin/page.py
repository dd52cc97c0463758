"""The files of the live page, as they lie in the package.

They hold no data: who may see them is no secret. What they show comes from `/api`, which the
guard keeps. Nothing is fetched from anywhere else, and the policy below has browsers see to it.

What a browser waits for before it paints, the styles and the choice of the theme, is put into the
page itself, so that one answer is enough to see it; the policy knows both by their hashes.
"""

from __future__ import annotations

import gzip
import re
from base64 import b64encode
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

# Neither deferred nor a module.
_BLOCKING = re.compile(
    rb'<link rel="(style)sheet" href="static/([^"]+)">|<(script) src="static/([^"]+)"></script>'
)

_PAGE = "index.html"
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
    policy: str = POLICY


def read_files() -> dict[str, File]:
    """Read all there are, by their paths below `/static/`; it takes some 15 ms."""
    found = {
        path.relative_to(_HERE).as_posix(): path.read_bytes()
        for path in sorted(_HERE.rglob("*"))
        if path.suffix in _TYPES
    }
    policy = _put_together(found)
    return {
        name: File(
            body,
            gzip.compress(body, mtime=0),
            f'"{sha256(body).hexdigest()[:20]}"',
            _TYPES[Path(name).suffix],
            policy if name == _PAGE else POLICY,
        )
        for name, body in found.items()
    }


def _put_together(files: dict[str, bytes]) -> str:
    """Move into the page what it would be painted after; returns the policy that goes with it."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def moved(found: re.Match[bytes]) -> bytes:
        tag, name = found[1] or found[3], found[2] or found[4]
        text = files.pop(name.decode())
        hashes[tag.decode()].append(f"'sha256-{b64encode(sha256(text).digest()).decode()}'")
        return b"<%b>%b</%b>" % (tag, text, tag)

    files[_PAGE] = _BLOCKING.sub(moved, files[_PAGE])
    policy = POLICY
    for tag, known in hashes.items():
        policy = policy.replace(f"{tag}-src 'self'", " ".join([f"{tag}-src 'self'", *known]))
    return policy


def answer(request: Request, file: File, *, gzipped: bool, status_code: int = 200) -> Response:
    """Answer with a file; 304 where the browser has it."""
    headers = {
        # Asked for each time, and answered with a line: after an upgrade nobody sees the old one.
        "cache-control": "no-cache",
        "etag": file.tag,
        "vary": "accept-encoding",
        "content-security-policy": file.policy,
    }
    if status_code == 200 and request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    body = file.body
    if gzipped:
        headers["content-encoding"] = "gzip"
        body = file.packed
    headers["content-type"] = file.content_type
    return Response(body, status_code, headers)

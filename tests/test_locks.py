"""The check of the lock files, and that it finds what it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import locks

HASH = f"--hash=sha256:{'0' * 64}"


def test_what_is_locked_here_is_in_order() -> None:
    """Every lock file, and every package of the image."""
    assert locks.main() == 0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            f"a==1 \\\n    {HASH} \\\n    {HASH}\n    # via b\nb-c==2.0 ; x < '3' \\\n    {HASH}\n",
            None,
        ),
        ("a==1\n", "a==1"),
        (f"a>=1 \\\n    {HASH}\n", "a>=1"),
        ("a==1 \\\n    --hash=sha256:00\n", "a==1"),
        ("a==1 \\\n    --hash=md5:00\n", "a==1"),
        (f"a==1 \\\n    {HASH}\nb @ https://example.com/b.whl\n", "b @ "),
        (f"--extra-index-url https://example.com\na==1 \\\n    {HASH}\n", "--extra-index-url"),
        (f"-e .\na==1 {HASH}\n", "-e ."),
        ("# nothing\n", "there is nothing in it"),
    ],
)
def test_pins(tmp_path: Path, text: str, fault: str | None) -> None:
    """A package is named with its version and a hash, and nothing else is said."""
    path = tmp_path / "x.txt"
    path.write_text(text)
    faults = locks.faults_of_lock(path)
    assert bool(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


def test_image_that_installs_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version, a licence that is not wanted, a dependency that is not locked."""
    image = tmp_path / "runtime.txt"
    image.write_text(f"click==0.1 {HASH}\ncertifi==0.1 {HASH}\n")
    monkeypatch.setattr(locks, "IMAGE", image)
    monkeypatch.setattr(locks, "_LICENCES", frozenset({"BSD-3-Clause"}))
    faults = "\n".join(locks.faults_of_image())
    assert "is installed, and 0.1 locked" in faults
    assert "certifi has the licence MPL-2.0" in faults
    assert "uvicorn is not locked" in faults
    assert "click has the licence" not in faults

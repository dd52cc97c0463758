"""The operator's own prices: what the file may say, and what is said of its faults."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from sidecar.account.price_file import PriceFile
from sidecar.account.rates import RateClass, RateKey
from sidecar.errors import ConfigError

WHOLE = """\
# USD per million tokens
claude-sonnet-4-5:
  input: 3
  output: 15
  cache_read: 0.30
  cache_write_5m: 3.75
  cache_write_1h: 6
  web_search_per_1k: 10
  above:
    200000: {input: 6, output: 22.50}
  tiers:
    Batch:
      input: 1.50
      above: {200000: {input: 3}}
  geo: {US: 1.1}
  regional: 1.10
Claude-Free:
  input: 0
"""


def read(tmp_path: Path, text: str) -> PriceFile:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    return PriceFile(path)


def faults(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return [fault.removeprefix(f"{tmp_path}/prices.yaml") for fault in caught.value.faults]


def test_all_that_a_file_may_say(tmp_path: Path) -> None:
    """Numbers are decimals as written, for one token; names are found in any case."""
    cards = read(tmp_path, WHOLE).cards
    assert set(cards) == {"claude-sonnet-4-5", "claude-free"}
    card = cards["claude-sonnet-4-5"]
    million = Decimal(1_000_000)
    assert card.rates == {
        RateKey(RateClass.UNCACHED): 3 / million,
        RateKey(RateClass.OUTPUT): 15 / million,
        RateKey(RateClass.READ): Decimal("0.30") / million,
        RateKey(RateClass.WRITE_5M): Decimal("3.75") / million,
        RateKey(RateClass.WRITE_1H): 6 / million,
        RateKey(RateClass.SERVER_TOOL): Decimal("0.01"),
        RateKey(RateClass.UNCACHED, above=200_000): 6 / million,
        RateKey(RateClass.OUTPUT, above=200_000): Decimal("22.5") / million,
        RateKey(RateClass.UNCACHED, "batch"): Decimal("1.5") / million,
        RateKey(RateClass.UNCACHED, "batch", 200_000): 3 / million,
    }
    assert card.geo == {"us": Decimal("1.1")}
    assert card.regional_factor == Decimal("1.1")
    # A price of nothing is a price, if it is the operator who says so.
    assert cards["claude-free"].rates == {RateKey(RateClass.UNCACHED): 0}


def test_json_is_read_too(tmp_path: Path) -> None:
    """Also as tools write it, with tabs and exponents."""
    text = json.dumps({"m": {"input": 3e-7, "output": 15}}, indent="\t")
    assert read(tmp_path, text).cards["m"].rates == {
        RateKey(RateClass.UNCACHED): Decimal("3E-13"),
        RateKey(RateClass.OUTPUT): Decimal("0.000015"),
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param("m: {input: 3", " line 1: is neither JSON nor YAML", id="syntax"),
        pytest.param("m:\n  input: 3\n bad", " line 3: is neither JSON nor YAML", id="indent"),
        pytest.param("", ": must be one mapping from models to prices", id="empty"),
        pytest.param("- m\n", ": must be one mapping from models to prices", id="list"),
        pytest.param("a\x00b: 1", ": is neither JSON nor YAML", id="control"),
        pytest.param(
            '\n"\\UFFFFFFFF": {input: 3}',
            " line 2: is neither JSON nor YAML",
            id="beyond-the-integers-of-c",
        ),
        pytest.param(
            '\n"\\U00110000": {input: 3}',
            " line 2: is neither JSON nor YAML",
            id="beyond-the-characters",
        ),
        pytest.param("[" * 1500, ": is neither JSON nor YAML", id="deep"),
        pytest.param("m: 3\n", " line 1: a mapping is wanted here", id="no-mapping"),
        pytest.param(
            "m:\n  input: 3\n  ouput: 15\n",
            " line 3: 'ouput' is not one of input, output, cache_read, cache_write_5m, "
            "cache_write_1h, web_search_per_1k",
            id="misspelt",
        ),
        pytest.param(
            "m:\n  input: 3\n  output: -1\n",
            " line 3: '-1' is not a price: 0 or more, in USD, as in 3.75",
            id="negative",
        ),
        pytest.param(
            "m:\n  input: $3\n",
            " line 2: '$3' is not a price: 0 or more, in USD, as in 3.75",
            id="currency",
        ),
        pytest.param(
            "m:\n  input: 1e9\n",
            " line 2: '1e9' is not a price: 0 or more, in USD, as in 3.75",
            id="too-much",
        ),
        pytest.param(
            "m:\n  input: [3]\n",
            " line 2: '' is not a price: 0 or more, in USD, as in 3.75",
            id="list-for-a-price",
        ),
        pytest.param("m:\n  input: 3\n  input: 4\n", " line 3: 'input' is there twice", id="twice"),
        pytest.param(
            "m: {input: 3}\nM: {input: 4}\n", " line 2: 'M' is there twice", id="model-twice"
        ),
        pytest.param("m: {}\n", " line 1: 'm' has no prices", id="nothing"),
        pytest.param(
            "? [a]\n: {input: 3}\n", " line 1: a name is wanted here", id="list-for-a-name"
        ),
        pytest.param(
            "m:\n  input: 3\n  above:\n    200k: {input: 6}\n",
            " line 4: '200k' is not a number of tokens",
            id="size",
        ),
        pytest.param(
            "m:\n  input: 3\n  tiers:\n    batch: {web_search_per_1k: 5}\n",
            " line 4: web_search_per_1k has one price, whatever the tier and the prompt",
            id="search-by-tier",
        ),
        *(
            pytest.param(
                f"m:\n  input: 3\n  {line}\n",
                f" line 3: '{factor}' is not a factor: more than 0 and 100 at most, as in 1.1",
                id=line,
            )
            for line, factor in (
                ("geo: {us: 0}", "0"),
                ("geo: {us: 0.000}", "0.000"),
                ("geo: {us: -1.1}", "-1.1"),
                ("regional: 0", "0"),
                ("regional: 110", "110"),
                ("regional: [1]", ""),
            )
        ),
        *(
            pytest.param(
                f"m:\n  input: 3\n  tiers:\n    {tier}: {{input: 1}}\n",
                f" line 4: '{tier}' is no tier of its own: its prices stand above",
                id=f"tier-{tier}",
            )
            for tier in ("standard", "Standard", "default")
        ),
    ],
)
def test_a_fault_is_told_with_its_line(tmp_path: Path, text: str, fault: str) -> None:
    """The operator is led to the line, and told what is wanted there."""
    assert faults(tmp_path, text) == [fault]


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    """Twenty of them, and how many more there are."""
    text = "".join(f"m{number}:\n  input: x\n" for number in range(30))
    found = faults(tmp_path, text)
    assert len(found) == 21
    assert found[0].startswith(" line 2: ")
    assert found[19].startswith(" line 40: ")
    assert found[20] == ": 10 more faults"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """It may be absent, no text, or endless."""
    path = tmp_path / "prices.yaml"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        PriceFile(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: it is not UTF-8"):
        PriceFile(path)
    path.write_bytes(b" " * (16 * 1024 * 1024 + 1))
    with pytest.raises(ConfigError, match="is larger than 16777216 bytes"):
        PriceFile(path)


def test_a_file_that_cannot_be_read_is_tried_once(tmp_path: Path) -> None:
    """Again when it is another one, or can be read."""
    prices = read(tmp_path, "m: {input: 3}\n")
    prices.path.write_bytes(b"\xff\xfe")
    assert prices.changed()
    with pytest.raises(ConfigError):
        prices.load()
    assert not prices.changed()
    prices.path.unlink()
    prices.path.mkdir()  # what nobody can read, not even root
    assert prices.changed()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        prices.load()
    assert not prices.changed()
    prices.path.rmdir()
    assert prices.changed()
    with pytest.raises(ConfigError, match="No such file"):
        prices.load()
    assert not prices.changed()
    prices.path.write_text("m: {input: 44}\n")
    assert prices.changed()
    assert prices.load() == 1


def test_a_file_that_becomes_readable_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it is the same: its mode has changed, or descriptors had run out."""
    prices = read(tmp_path, "m: {input: 3}\n")
    prices.path.write_text("m: {input: 44}\n")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(ConfigError, match="Permission denied"):
            prices.load()
        assert not prices.changed()
    assert prices.changed()
    assert prices.load() == 1
    assert not prices.changed()


def test_a_broken_edit_keeps_the_old_prices(tmp_path: Path) -> None:
    """A change is noticed; what cannot be read changes nothing."""
    prices = read(tmp_path, "m: {input: 3}\n")
    assert not prices.changed()
    prices.path.write_text("m: {input: three}\n")
    assert prices.changed()
    with pytest.raises(ConfigError):
        prices.load()
    assert not prices.changed()
    assert prices.cards["m"].rates == {RateKey(RateClass.UNCACHED): Decimal("0.000003")}
    prices.path.write_text("m: {input: 44}\n")
    assert prices.changed()
    assert prices.load() == 1
    assert prices.cards["m"].rates == {RateKey(RateClass.UNCACHED): Decimal("0.000044")}

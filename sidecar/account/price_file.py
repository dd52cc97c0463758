"""The operator's own prices: a YAML or JSON file, in USD per million tokens.

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
        batch: {input: 1.50, output: 7.50}
      geo: {us: 1.1}
      regional: 1.1

Numbers are taken as they are written, as decimals. Every fault is named with its line; a file
with a fault is not taken at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import yaml

from sidecar.account.rates import STANDARD, RateClass, RateKey, SourceCard
from sidecar.account.watched import WatchedFile, parsed
from sidecar.errors import ConfigError

__all__ = ["PriceFile"]

_MILLION = Decimal(1_000_000)
_THOUSAND = Decimal(1_000)
_RATES: dict[str, tuple[RateClass, Decimal]] = {
    "input": (RateClass.UNCACHED, _MILLION),
    "output": (RateClass.OUTPUT, _MILLION),
    "cache_read": (RateClass.READ, _MILLION),
    "cache_write_5m": (RateClass.WRITE_5M, _MILLION),
    "cache_write_1h": (RateClass.WRITE_1H, _MILLION),
    "web_search_per_1k": (RateClass.SERVER_TOOL, _THOUSAND),
}
_NUMBER = re.compile(r"\d{1,7}(\.\d{1,12})?(e-?\d{1,2})?", re.IGNORECASE)
_MAX_PRICE = Decimal(1_000_000)
_MAX_FACTOR = 100
_MAX_FAULTS = 20
"""Faults that are named."""


class PriceFile(WatchedFile):
    """The file and what it says.

    Raises:
        ConfigError: the file cannot be read, or has faults. What was read before stays.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cards: dict[str, SourceCard] = {}
        """By the name that the operator gave, in lower case."""
        self.load()

    def load(self) -> int:
        """Read the file anew and return how many models it prices."""
        self.cards = _Reading(self.path).cards(self.read())
        return len(self.cards)


class _Reading:
    """One reading of the file: its faults, and what it says where there are none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._faults: list[str] = []

    def cards(self, text: str) -> dict[str, SourceCard]:
        # JSON is YAML but for its tabs, which are white space to one and a fault to the other.
        plain = text.replace("\t", " ") if text.lstrip().startswith("{") else text
        top = parsed(plain, self._path, lambda loader: loader.get_single_node())
        if not isinstance(top, yaml.MappingNode):
            raise ConfigError([f"{self._path}: must be one mapping from models to prices"])
        cards = {name.lower(): self._card(name, value) for name, value in self._items(top)}
        if self._faults:
            more = len(self._faults) - _MAX_FAULTS
            if more > 0:
                self._faults[_MAX_FAULTS:] = [f"{self._path}: {more} more faults"]
            raise ConfigError(self._faults)
        return cards

    def _card(self, name: str, node: yaml.Node) -> SourceCard:
        rates: dict[RateKey, Decimal] = {}
        geo: dict[str, Decimal] = {}
        regional = None
        faults = len(self._faults)
        for key, value in self._items(node):
            if key == "tiers":
                for tier, prices in self._items(value):
                    if tier.lower() in ("default", STANDARD):
                        self._fault(
                            prices, f"{tier!r} is no tier of its own: its prices stand above"
                        )
                    for inner, price in self._items(prices):
                        self._price(rates, tier.lower(), inner, price)
            elif key == "geo":
                for region, factor in self._items(value):
                    geo[region.lower()] = self._factor(factor)
            elif key == "regional":
                regional = self._factor(value)
            else:
                self._price(rates, STANDARD, key, value)
        if not rates and regional is None and len(self._faults) == faults:
            self._fault(node, f"{name!r} has no prices")
        return SourceCard(rates, geo, regional, name)

    def _price(self, rates: dict[RateKey, Decimal], tier: str, key: str, node: yaml.Node) -> None:
        if key == "above":
            for size, prices in self._items(node):
                if not re.fullmatch(r"[1-9]\d{0,8}", size):
                    self._fault(prices, f"{size!r} is not a number of tokens")
                    continue
                for inner, price in self._items(prices):
                    self._rate(rates, tier, int(size), inner, price)
        else:
            self._rate(rates, tier, 0, key, node)

    def _rate(
        self, rates: dict[RateKey, Decimal], tier: str, above: int, key: str, node: yaml.Node
    ) -> None:
        if key not in _RATES:
            self._fault(node, f"{key!r} is not one of {', '.join(_RATES)}")
            return
        what, unit = _RATES[key]
        if what is RateClass.SERVER_TOOL and (tier != STANDARD or above):
            self._fault(node, f"{key} has one price, whatever the tier and the prompt")
        rates[RateKey(what, tier, above)] = self._number(node) / unit

    def _number(self, node: yaml.Node) -> Decimal:
        number = _decimal(node)
        if number is not None and number <= _MAX_PRICE:
            return number
        self._fault(node, f"{_text(node)[:40]!r} is not a price: 0 or more, in USD, as in 3.75")
        return Decimal(0)

    def _factor(self, node: yaml.Node) -> Decimal:
        number = _decimal(node)
        if number is not None and 0 < number <= _MAX_FACTOR:
            return number
        said = f"{_text(node)[:40]!r} is not a factor"
        self._fault(node, f"{said}: more than 0 and {_MAX_FACTOR} at most, as in 1.1")
        return Decimal(1)

    def _items(self, node: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
        """Go through a mapping; a key that is there twice is a fault."""
        if not isinstance(node, yaml.MappingNode):
            self._fault(node, "a mapping is wanted here")
            return
        seen = set()
        for key, value in node.value:
            name = key.value.strip() if isinstance(key, yaml.ScalarNode) else ""
            if not name or len(name) > 300:
                self._fault(key, "a name is wanted here")
            elif name.lower() in seen:
                self._fault(key, f"{name!r} is there twice")
            else:
                seen.add(name.lower())
                yield name, value

    def _fault(self, node: yaml.Node, what: str) -> None:
        self._faults.append(f"{self._path} line {node.start_mark.line + 1}: {what}")


def _text(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else ""


def _decimal(node: yaml.Node) -> Decimal | None:
    text = _text(node)
    return Decimal(text) if _NUMBER.fullmatch(text) else None

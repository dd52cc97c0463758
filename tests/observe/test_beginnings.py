"""What is known of an answer after so many of its bytes, by the plans of `bench.chaos`.

The plans say what is true without the help of anything that is tested here.
"""

from __future__ import annotations

import random

import pytest

from bench.chaos.plans import Plan, Reading, plan
from sidecar.exchange import Dialect, End
from sidecar.observe.tap import tap_for


def read(made: Plan, count: int, end: End) -> Reading:
    """Read the beginning of an answer."""
    lines = made.head.decode().split("\r\n")[1:-2]
    headers = [tuple(line.encode().split(b": ", 1)) for line in lines]
    tap = tap_for(Dialect.ANTHROPIC, made.status_code, [(name, value) for name, value in headers])
    tap.feed(made.body[:count])
    seen = tap.finish(end)
    usage = seen.usage
    classes = *usage.input_classes(), usage.output_tokens or 0
    return Reading(seen.status.value, *classes, usage.cache_reported)


@pytest.mark.parametrize("seed", range(4))
def test_beginning_of_an_answer_is_read_as_far_as_it_goes(seed: int) -> None:
    """Wherever an answer breaks off, what is counted is what its beginning said."""
    chance = random.Random(seed)
    for number in range(150):
        made = plan(seed, number)
        length = made.promised
        if not made.observed or not made.status_code or length > 20_000:
            continue
        last = range(max(0, length - 40), length + 1)
        for count in {0, *chance.choices(range(length + 1), k=20), *last}:
            for end in (End.UPSTREAM_CUT, End.COMPLETE):
                ended = end is End.COMPLETE
                truths = made.readings(count, count, may_end=ended, must_end=ended)
                assert read(made, count, end) in truths, (number, made.name, count, end)


def test_plans_of_whole_answers_leave_no_choice() -> None:
    """Of an answer that was read to its end there is one truth, and most say their usage."""
    whole = 0
    for number in range(500):
        made = plan(7, number)
        if made.observed and made.status_code:
            readings = made.readings(made.promised, made.promised, may_end=True, must_end=True)
            assert len(readings) == 1, (number, made.name)
            whole += next(iter(readings)).status == "complete"
    assert whole > 300

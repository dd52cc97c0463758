"""The first value of a new series is not lost on `increase()`.

To Prometheus a counter that is first seen at 2101 has not increased. The two calls of the report
are made once here, and their series are born with the values that matter.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.calls import ask_now, body_for, post, request, samples
from tests.support.clouds import run_clouds
from tests.support.litellm import RED
from tests.support.prometheus import Prometheus, find_prometheus
from tests.support.requirements import require
from tests.support.running import sidecar_process

MODEL = "claude-sonnet-4-5"
TOKENS = 2101
GROWN = {
    f'litellm_cached_tokens_metric_total{{model="{MODEL}"}}': TOKENS,
    f'litellm_cache_hits_metric_total{{model="{MODEL}"}}': 1,
    f'litellm_cache_misses_metric_total{{model="{MODEL}"}}': 1,
    f'litellm_sidecar_input_tokens_total{{model="{MODEL}",cache="read"}}': TOKENS,
    f'litellm_sidecar_input_tokens_total{{model="{MODEL}",cache="write_5m"}}': TOKENS,
    f'litellm_sidecar_responses_total{{model="{MODEL}",outcome="hit"}}': 1,
    'litellm_sidecar_http_requests_total{route="/v1/messages",code="200"}': 2,
    f'litellm_sidecar_observations_total{{model="{MODEL}",status="complete"}}': 2,
}


def test_two_calls_increase_by_what_they_read_and_wrote(tmp_path: Path) -> None:
    """`increase()` over the report's two calls finds the tokens; nothing is counted twice."""
    require(find_prometheus(), "Prometheus")
    with (
        run_clouds() as clouds,
        sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": clouds.url}) as sidecar,
        Prometheus({"sidecar": sidecar.admin_url.removeprefix("http://")}, tmp_path) as prometheus,
    ):
        prometheus.wait_for_scrapes(1)
        assert prometheus.query(f'litellm_cached_tokens_metric_total{{model="{MODEL}"}}') == []
        for _ in range(2):
            ask_now(sidecar.url, post(body_for(MODEL, "the report", tokens=TOKENS), RED.key))
        now = ask_now(sidecar.admin_url, request("GET", "/metrics")).body.decode()
        prometheus.wait_for_scrapes(3)

        # Whoever asks by hand is shown the value at once.
        values = {(name, labels.get("cache")): value for name, labels, value in samples(now)}
        assert values["litellm_cached_tokens_metric_total", None] == TOKENS
        assert values["litellm_sidecar_input_tokens_total", "write_5m"] == TOKENS
        for series, grown in GROWN.items():
            ((_, difference),) = prometheus.query(
                f"max_over_time({series}[5m]) - min_over_time({series}[5m])"
            )
            assert (series, difference) == (series, grown)
            ((_, resets),) = prometheus.query(f"resets({series}[5m])")
            assert resets == 0
            # Prometheus extrapolates over the ends of the range, by no more than one interval
            # on either side; a range of few samples more than doubles at worst.
            ((_, increase),) = prometheus.query(f"increase({series}[5m])")
            assert increase == pytest.approx(grown, rel=0.75)
            assert increase >= grown * 0.999

"""Whose a call is, said by a real LiteLLM in each of the ways there are: in headers that the
callback adds, in answers to questions about a key, and in its own metrics.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.calls import ask_now, body_for, post, request, samples
from tests.support.litellm import MASTER_KEY, STAR, LiteLLM
from tests.support.litellm_database import VIEWER, KeyedLiteLLM
from tests.support.prometheus import Prometheus, find_prometheus
from tests.support.requirements import require
from tests.support.running import SidecarProcess, sidecar_process

ROOT = Path(__file__).parents[2]
RESPONSES = "litellm_sidecar_responses_total"
LOOKUPS = "litellm_sidecar_identity_lookups_total"
MODEL = "claude-direct"


def rows(sidecar: SidecarProcess, name: str) -> list[tuple[dict[str, str], float]]:
    text = ask_now(sidecar.admin_url, request("GET", "/metrics")).body.decode()
    return [
        ({key: re.sub(r"\\(.)", r"\1", label) for key, label in labels.items()}, value)
        for found, labels, value in samples(text)
        if found == name
    ]


def value(sidecar: SidecarProcess, name: str, **labels: str) -> float:
    return sum(value for found, value in rows(sidecar, name) if labels.items() <= found.items())


def call(url: str, key: str, *, stream: bool = False) -> None:
    answer = ask_now(url, post(body_for(MODEL, "identity", stream=stream), key))
    assert (answer.status, answer.complete) == (200, True), answer.body


def wait(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
def test_callback_names_team_and_key(litellm: LiteLLM, tmp_path: Path, *, stream: bool) -> None:
    """The headers of the shipped callback come with JSON and with streams, and names of any
    characters arrive whole."""
    settings = {"SIDECAR_UPSTREAM": litellm.url, "SIDECAR_LABELS": "team_alias,api_key_alias"}
    with sidecar_process(tmp_path, settings) as sidecar:
        answer = ask_now(sidecar.url, post(body_for(MODEL, "names", stream=stream), STAR.key))
        assert (answer.status, answer.complete) == (200, True)
        assert re.fullmatch(rb"[\w%.~-]+", answer.header(b"x-litellm-team-alias") or b"")
        grown = [labels for labels, number in rows(sidecar, RESPONSES) if number]
        names = [(labels["team_alias"], labels["api_key_alias"]) for labels in grown]
        assert names == [(STAR.team_alias, STAR.key_alias)]


def test_look_ups_name_team_and_key(keyed: KeyedLiteLLM, tmp_path: Path) -> None:
    """A key with the role of a viewer is enough to learn the names of all keys, one question a
    key; a key that changes team is followed."""
    keyed.database.put_team("t1", "Équipe ★")
    keyed.database.put_key("sk-one", team_id="t1", key_alias="ci/β", user_id="somebody")
    keyed.database.put_key("sk-alone", user_id="somebody")
    secret = tmp_path / "secret"
    secret.write_text(f"{VIEWER}\n")
    settings = {
        "SIDECAR_UPSTREAM": keyed.litellm.url,
        "SIDECAR_LITELLM_KEY_FILE": str(secret),
        "SIDECAR_IDENTITY_TTL_S": "2",
        "SIDECAR_LABELS": "team_alias,api_key_alias",
    }
    with sidecar_process(tmp_path, settings) as sidecar:

        def counted(team: str, alias: str) -> float:
            return value(sidecar, RESPONSES, team_alias=team, api_key_alias=alias)

        call(sidecar.url, "sk-one")
        call(sidecar.url, "sk-one", stream=True)
        call(sidecar.url, "sk-alone")
        call(sidecar.url, MASTER_KEY)
        wait(lambda: counted("Équipe ★", "ci/β") == 2)
        wait(lambda: counted("None", "None") == 1)
        wait(lambda: counted("unknown", "unknown") == 1)
        assert value(sidecar, LOOKUPS, source="key_info", result="found") == 2
        assert value(sidecar, LOOKUPS, source="key_info", result="not_found") == 1
        assert value(sidecar, LOOKUPS, source="team_list", result="found") == 1

        keyed.database.put_team("t2", None)
        keyed.database.put_team("t3", 'new, "quoted" \\ 100%')
        keyed.database.put_key("sk-one", team_id="t3", key_alias="ci/β", user_id="somebody")
        changed = time.monotonic()
        while not counted('new, "quoted" \\ 100%', "ci/β"):
            assert time.monotonic() - changed < 15
            call(sidecar.url, "sk-one")
        log = sidecar.process.log.read_text()
    for secret_text in (VIEWER, "sk-one", hashlib.sha256(b"sk-one").hexdigest()):
        assert secret_text not in log


@pytest.mark.parametrize("key", ["sk-nobody", "sk-plain"])
def test_role_that_is_too_low(keyed: KeyedLiteLLM, tmp_path: Path, key: str) -> None:
    """A key without the role, or none at all, costs the names, and the log says what is wrong."""
    keyed.database.put_key("sk-plain", user_id="somebody")
    keyed.database.put_team("t1", "red")
    keyed.database.put_key("sk-two", team_id="t1", user_id="else")
    settings = {"SIDECAR_UPSTREAM": keyed.litellm.url, "SIDECAR_LITELLM_KEY": key}
    with sidecar_process(tmp_path, settings) as sidecar:
        call(sidecar.url, "sk-two")
        wait(lambda: value(sidecar, RESPONSES, team_alias="unknown") == 1)
        assert value(sidecar, LOOKUPS, source="key_info", result="refused") == 1
        assert "LiteLLM refuses the key (40" in sidecar.process.log.read_text()


AWS = "AWS4-HMAC-SHA256 Credential={}/20261124/us-east-1/bedrock/aws4_request, Signature=0"
# Each has the key that LiteLLM takes as the first, and where there are two one that it does not.
FORMS: list[list[tuple[str, str]]] = [
    [("x-litellm-api-key", "Bearer {}"), ("authorization", "Bearer {}")],
    [("x-litellm-api-key", "{}"), ("x-api-key", "{}")],
    [("authorization", "Bearer {}"), ("x-api-key", "{}")],
    [("authorization", "bearer {}"), ("api-key", "{}")],
    [("authorization", "Basic {}"), ("x-goog-api-key", "{}")],
    [("authorization", AWS.replace("{}", "Bearer {}")), ("x-api-key", "{}")],
    [("authorization", AWS)],
    [("api-key", "{}"), ("x-api-key", "{}")],
    [("x-api-key", "{}"), ("x-goog-api-key", "{}")],
    [("x-goog-api-key", "{}"), ("ocp-apim-subscription-key", "{}")],
    [("ocp-apim-subscription-key", "{}")],
    [("x-api-key", "{}"), ("X-Api-Key", "{}")],
]


def test_key_is_the_one_that_litellm_takes(keyed: KeyedLiteLLM, tmp_path: Path) -> None:
    """In whatever header it stands and whatever else is there: what the sidecar counts by hash
    is what LiteLLM itself does."""
    settings = {"SIDECAR_UPSTREAM": keyed.litellm.url, "SIDECAR_LABELS": "hashed_api_key"}
    taken = []
    with sidecar_process(tmp_path, settings) as sidecar:
        for number, form in enumerate(FORMS):
            keys = [f"sk-form-{number}-{place}" for place in range(len(form))]
            for key in keys:
                keyed.database.put_key(key, user_id="somebody")
            taken.append(hashlib.sha256(keys[0].encode()).hexdigest())
            # Last in the request stands what goes first.
            lines = [
                f"{name}: {text.format(key)}" for (name, text), key in zip(form, keys, strict=True)
            ]
            if len({name.lower() for name, _ in form}) > 1:
                lines.reverse()
            raw = post(body_for(MODEL, "forms"), "none").replace(
                b"x-api-key: none", "\r\n".join(lines).encode()
            )
            answer = ask_now(sidecar.url, raw)
            assert answer.status == 200, (form, answer.body)
        counted = {labels["hashed_api_key"] for labels, n in rows(sidecar, RESPONSES) if n}
    assert counted == set(taken)
    theirs = "litellm_proxy_total_requests_metric_total"
    keyed.litellm.wait_for_metric(f'hashed_api_key="{taken[-1]}"')
    found = [labels for name, labels, _ in samples(keyed.litellm.metrics()) if name == theirs]
    used = {labels["hashed_api_key"] for labels in found if labels["route"] == "/v1/messages"}
    others = {
        hashlib.sha256(f"sk-form-{number}-1".encode()).hexdigest() for number in range(len(FORMS))
    }
    assert set(taken) <= used
    assert used & others == set()


def join() -> str:
    """Read the join from the page that offers it."""
    text = (ROOT / "docs" / "teams.md").read_text()
    (expression,) = re.findall(r"```promql\n(.*?)```", text, flags=re.DOTALL)
    return str(expression)


def test_prometheus_joins_the_names(keyed: KeyedLiteLLM, tmp_path: Path) -> None:
    """Without callback, key or file: the join of the page gives each key's series the names that
    LiteLLM has for it, also while a key that changed team has two."""
    require(find_prometheus(), "Prometheus")
    keyed.database.put_team("t1", "Équipe ★")
    keyed.database.put_team("t2", "blue")
    keyed.database.put_key("sk-join-1", team_id="t1", key_alias="ci", user_id="somebody")
    keyed.database.put_key("sk-join-2", user_id="somebody", key_alias="alone")
    settings = {
        "SIDECAR_UPSTREAM": keyed.litellm.url,
        "SIDECAR_LABELS": "model,team_alias,hashed_api_key",
    }
    with sidecar_process(tmp_path, settings) as sidecar:
        targets = {
            "sidecar": sidecar.admin_url.removeprefix("http://"),
            "litellm": f"{keyed.litellm.url.removeprefix('http://')}/metrics/",
        }
        (tmp_path / "prometheus").mkdir()
        with Prometheus(targets, tmp_path / "prometheus") as prometheus:
            prometheus.wait_for_scrapes(1)
            call(sidecar.url, "sk-join-1")
            call(sidecar.url, "sk-join-2")
            prometheus.wait_for_scrapes(2)

            def joined() -> dict[tuple[str, str], float]:
                found = prometheus.query(join())
                named = {(row["team_alias"], row["api_key_alias"]): n for row, n in found}
                assert len(named) == len(found), found
                return named

            def ours() -> dict[str, float]:
                found = prometheus.query(
                    "sum by (hashed_api_key) (increase(litellm_sidecar_input_tokens_total[1h])) > 0"
                )
                return {row["hashed_api_key"]: n for row, n in found}

            wait(lambda: len(joined()) == 2)
            hashes = [hashlib.sha256(key).hexdigest() for key in (b"sk-join-1", b"sk-join-2")]
            own = ours()
            assert set(own) == set(hashes)
            named = joined()
            assert set(named) == {("Équipe ★", "ci"), ("None", "alone")}

            keyed.database.put_key("sk-join-1", team_id="t2", key_alias="ci", user_id="somebody")
            both = f'litellm_proxy_total_requests_metric_total{{hashed_api_key="{hashes[0]}"}}'
            deadline = time.monotonic() + 20
            while len(prometheus.query(f"count by (team_alias) ({both})")) < 2:
                assert time.monotonic() < deadline
                time.sleep(1.2)  # 1.83 keeps what it knows for as long as it is asked for
                call(sidecar.url, "sk-join-1")
            named = joined()
            assert len(named) == 2, "one row a key, whatever it was called before"
            assert ("None", "alone") in named

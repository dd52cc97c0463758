"""The live page in a real Chromium, before a real sidecar whose provider's books say what is true.

The tests share one browser and one sidecar, and go in their order: the first sees it before
anybody has asked anything.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect
from prometheus_client.parser import text_string_to_metric_families

from tests.support.browser import Tab, chromium, opened
from tests.support.calls import body_for
from tests.support.clouds import Clouds, run_clouds
from tests.support.process import free_port
from tests.support.running import SidecarProcess, sidecar_process

MODELS = ("claude-sonnet-4-5", "claude-haiku-4-5")
CANARY = "<img src=x onerror=document.title='hit'>"
TEAMS = {"sk-page-search": "search", "sk-page-canary": CANARY}
TOKEN = "sk-page-token-5d2f9c"
ARTEFACTS = Path(__file__).parents[2] / "build" / "page"


@pytest.fixture(scope="module")
def clouds() -> Iterator[Clouds]:
    """Run a provider that keeps books."""
    with run_clouds() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def settings(clouds: Clouds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings of every sidecar here."""
    teams = tmp_path_factory.mktemp("teams") / "teams.json"
    hashed = {hashlib.sha256(key.encode()).hexdigest(): team for key, team in TEAMS.items()}
    teams.write_text(json.dumps(hashed))
    return {"SIDECAR_UPSTREAM": clouds.url, "SIDECAR_TEAM_FILE": str(teams)}


@pytest.fixture(scope="module")
def sidecar(
    settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SidecarProcess]:
    with sidecar_process(tmp_path_factory.mktemp("sidecar"), settings) as running:
        yield running


@pytest.fixture
def tab(browser: Browser, sidecar: SidecarProcess) -> Iterator[Tab]:
    """Open the page, and hold it to what goes for every view of it."""
    with opened(browser, f"{sidecar.admin_url}/", viewport={"width": 1280, "height": 900}) as tab:
        yield tab
        assert tab.errors == []
        assert {url for url in tab.urls if not url.startswith(f"{sidecar.admin_url}/")} == set()


def call(sidecar: SidecarProcess, model: str, key: str, topic: str, **options: Any) -> None:
    """Make a call and read its answer."""
    answer = httpx.post(
        f"{sidecar.url}/v1/messages",
        json=body_for(model, topic, tokens=5000, **options),
        headers={"x-api-key": key, "anthropic-version": "2023-06-01"},
        trust_env=False,
        timeout=10,
    )
    assert answer.status_code == 200, answer.text


def series(sidecar: SidecarProcess, name: str, **labels: str) -> float:
    """Sum what /metrics says, over all series with these labels."""
    text = httpx.get(f"{sidecar.admin_url}/metrics", trust_env=False).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"litellm_sidecar_{name}" and labels.items() <= sample.labels.items()
    )


def shown(page: Page, selector: str) -> list[float]:
    """The exact values of the numbers that stand in a place."""
    return [
        float(text)
        for text in page.locator(f"{selector} data").evaluate_all(
            "all => all.map(one => one.getAttribute('value'))"
        )
    ]


def wait_for_numbers(page: Page, selector: str, expected: list[float]) -> None:
    """Wait until these numbers stand there; says what stood there last."""
    deadline = time.monotonic() + 10
    while (found := shown(page, selector)) != pytest.approx(expected):
        assert time.monotonic() < deadline, f"{selector}: {found}, expected {expected}"
        page.wait_for_timeout(50)


def test_page_without_data_says_so_and_what_to_do(tab: Tab, sidecar: SidecarProcess) -> None:
    """No ratio is 0% and no curve is drawn; an example is there that can be pasted."""
    page = tab.page
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#empty .data-url")).to_have_text(sidecar.url)
    expect(page.locator("#example")).to_contain_text(f"curl {sidecar.url}/v1/messages")
    for figure in ("#by-tokens", "#by-requests", "#spent", "#saved", "#lost"):
        expect(page.locator(figure)).to_have_text("–")
    expect(page.locator("#pod")).not_to_have_text("this sidecar")
    expect(page.locator("body")).to_contain_text("One pod’s view")
    expect(page.locator("#chart-tokens")).to_be_hidden()
    waited_for = page.evaluate(
        "performance.getEntriesByType('resource').map(one => one.renderBlockingStatus)"
    )
    assert "non-blocking" in waited_for
    assert "blocking" not in waited_for
    assert tab.violations() == []
    _keep(page, "empty")


def test_numbers_are_those_of_the_metrics_and_of_the_books(
    tab: Tab, sidecar: SidecarProcess, clouds: Clouds
) -> None:
    """Tokens, answers, ratios and money, in all and by model and team; without a reload."""
    page = tab.page
    page.evaluate("window.loadedOnce = true")
    page.get_by_text("Since start", exact=True).click()
    for model in MODELS:
        for key, team in TEAMS.items():
            for ttl, stream in (("5m", False), ("5m", True), ("1h", False)):
                call(sidecar, model, key, f"{team} {ttl}", ttl=ttl, stream=stream)
            call(sidecar, model, key, "plain", ttl=None)
    books = clouds.books.totals()
    read, written = books.cache_read_input_tokens, books.cache_creation_input_tokens
    whole = books.input_tokens + read + written
    assert read
    assert read == series(sidecar, "input_tokens_total", cache="read")

    wait_for_numbers(page, "#by-tokens-note", [read, whole])
    assert shown(page, "#by-tokens") == pytest.approx([read / whole])
    hits = series(sidecar, "responses_total", outcome="hit")
    asked = sum(
        series(sidecar, "responses_total", outcome=outcome)
        for outcome in ("hit", "write", "not_cached")
    )
    assert asked == books.responses - len(MODELS) * len(TEAMS)
    wait_for_numbers(page, "#by-requests-note", [hits, asked])
    assert shown(page, "#by-requests") == pytest.approx([hits / asked])
    wait_for_numbers(page, "#spent", [series(sidecar, "cost_usd_total")])
    assert shown(page, "#spent-note") == [books.responses]
    wait_for_numbers(page, "#saved", [series(sidecar, "cache_read_savings_usd_total")])
    assert shown(page, "#finished") == [series(sidecar, "http_requests_total")]
    expect(page.locator("#empty")).to_be_hidden()

    rows = page.locator("#models tbody tr")
    expect(rows).to_have_count(len(MODELS) * len(TEAMS))
    for model in MODELS:
        for key, team in TEAMS.items():
            own = clouds.books.totals(model, hashlib.sha256(key.encode()).hexdigest())
            row = f"#models tr:has(th:text-is('{model}')):has(td.name:text-is(\"{team}\"))"
            ratio, tokens = own.cache_read_input_tokens, own.cache_creation_input_tokens
            whole = own.input_tokens + ratio + tokens
            found = shown(page, row)
            assert found[:2] == pytest.approx([own.responses, ratio / whole])
            assert found[3:6] == pytest.approx(
                [whole, ratio, own.ephemeral_1h_input_tokens / tokens]
            )
            labels = {"model": model, "team_alias": team}
            assert found[6:8] == pytest.approx(
                [
                    series(sidecar, "cost_usd_total", **labels),
                    series(sidecar, "cache_read_savings_usd_total", **labels),
                ]
            )

    misses = series(sidecar, "cache_misses_total")
    assert sum(shown(page, "#misses")) == misses == asked - hits
    assert shown(page, "#lost") == [series(sidecar, "cache_write_premium_never_read_usd_total")]

    before = shown(page, "#finished")[0]
    call(sidecar, MODELS[0], "sk-page-search", "one more")
    wait_for_numbers(page, "#finished", [before + 1])
    assert page.evaluate("window.loadedOnce") is True


def test_curves_add_up_to_the_numbers(tab: Tab, sidecar: SidecarProcess, clouds: Clouds) -> None:
    """The steps of a curve sum up to the window; it is drawn, and is there as a table and in
    words."""
    page = tab.page
    document = httpx.get(f"{sidecar.admin_url}/api/v1/series?window=start", trust_env=False).json()
    books = clouds.books.totals()
    assert sum(document["tokens"]["read"]) == books.cache_read_input_tokens
    assert sum(document["tokens"]["output"]) == books.output_tokens
    assert sum(document["spent"]) == pytest.approx(series(sidecar, "cost_usd_total"))
    figure = page.locator("#chart-tokens")
    expect(figure.locator("canvas")).to_be_visible()
    expect(figure.get_by_role("img")).to_have_attribute("aria-label", re.compile(r" read, .* out"))
    figure.get_by_text("As a table").click()
    expect(figure.locator("tbody tr").first).to_be_visible()
    expect(page.locator("#chart-ratio .legend li").first).to_have_text(re.compile(r"\d%$"))


def test_numbers_are_short_and_never_misleading(tab: Tab) -> None:
    """What is not nothing does not look so, nor what is not all; and what is unknown is a dash."""
    said = {
        "count(null)": "–",
        "count(0)": "0",
        "count(1 / 3)": "0.33",
        "count(9999.5)": "10,000",
        "count(12345)": "12.35\u00a0k",
        "count(2 ** 53)": "9007.2\u00a0T",
        "usd(null)": "–",
        "usd(0)": "$0",
        "usd(0.0000000001)": "<$0.000001",
        "usd(0.00123)": "$0.0012",
        "usd(0.05)": "$0.05",
        "usd(9876.543)": "$9,876.54",
        "usd(1234567)": "$1.23\u00a0M",
        "percent(null)": "–",
        "percent(0)": "0%",
        "percent(1)": "100%",
        "percent(0.99999)": "99.9%",
        "percent(0.00001)": "0.1%",
        "span(89)": "89 s",
        "span(90000)": "25 h",
        "span(7 * 86400)": "7 days",
    }
    script = (
        f"import('/static/format.js').then(({{ count, usd, percent, span }}) => [{','.join(said)}])"
    )

    assert dict(zip(said, tab.page.evaluate(script), strict=True)) == said


def test_streams_in_flight_are_shown_while_they_run(tab: Tab, sidecar: SidecarProcess) -> None:
    """One that runs is there, and goes when it has ended."""
    body = body_for(
        MODELS[0], "slow", stream=True, question="Go on. [[event-gap-ms 20]] [[many-events 500]]"
    )
    headers = {"x-api-key": "sk-page-search", "anthropic-version": "2023-06-01"}
    with (
        httpx.Client(trust_env=False) as client,
        client.stream("POST", f"{sidecar.url}/v1/messages", json=body, headers=headers) as answer,
    ):
        chunks = answer.iter_raw()  # to let go of it is to leave
        next(chunks)
        wait_for_numbers(tab.page, "#in-flight", [1])
    wait_for_numbers(tab.page, "#in-flight", [0])
    expect(tab.page.locator("#codes")).to_contain_text("499 × 1")
    expect(tab.page.locator("#faults tbody tr")).to_contain_text("client left")


def test_names_are_never_read_as_html(tab: Tab) -> None:
    """A team's alias is whatever somebody wrote."""
    cell = tab.page.locator("#models td.name", has_text="onerror").first
    expect(cell).to_have_text(CANARY)
    assert tab.page.locator("#models img").count() == 0
    assert tab.page.title() != "hit"


def test_table_is_sorted_and_filtered_by_the_keyboard(tab: Tab) -> None:
    """Tab reaches every control in the order in which they stand, with a mark that is seen."""
    page = tab.page
    expect(page.locator("#models tbody tr")).to_have_count(4)
    reached: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
        assert page.evaluate("document.activeElement.matches(':focus-visible')"), reached[-1]
        if reached[-1] == "Model":
            break
    assert reached[0] == "Skip to the figures"
    assert reached.index("theme") < reached.index("filter") < reached.index("Model")

    head = page.locator("#models thead th")
    page.keyboard.press("Enter")
    expect(head.first).to_have_attribute("aria-sort", "ascending")
    names = page.locator("#models tbody th")
    assert names.all_text_contents() == sorted(names.all_text_contents())
    page.keyboard.press("Space")
    expect(head.first).to_have_attribute("aria-sort", "descending")
    assert names.all_text_contents() == sorted(names.all_text_contents(), reverse=True)
    for at in range(1, head.count()):
        head.nth(at).get_by_role("button").press("Enter")
        expect(page.locator("#models [aria-sort]")).to_have_count(1)
    page.get_by_label("Filter").press_sequentially("HAIKU search")
    expect(page.locator("#models tbody tr")).to_have_count(1)
    expect(page.locator("#models-note")).to_have_text("1 of 4 rows.")


def test_axe_finds_nothing_serious(browser: Browser, sidecar: SidecarProcess) -> None:
    """With everything unfolded, in both themes, which differ in colours alone; and no animation
    where somebody wants none."""
    options: dict[str, Any] = {"color_scheme": "light", "reduced_motion": "reduce"}
    with opened(browser, f"{sidecar.admin_url}/", **options) as tab:
        expect(tab.page.locator("#models tbody tr")).to_have_count(4)
        for fold in tab.page.locator("summary").all():
            fold.click()
        expect(tab.page.locator("#settings dt").first).to_be_visible()
        assert tab.violations() == []
        _keep(tab.page, "light")
        tab.page.emulate_media(color_scheme="dark")
        assert tab.violations("color-contrast") == []
        assert tab.errors == []
        _keep(tab.page, "dark")


def test_theme_is_chosen_and_kept(tab: Tab) -> None:
    """The button goes from the system's to light and dark, and the page comes again as chosen."""
    page, background = tab.page, "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(background)
    for said in ("light", "dark"):
        page.locator("#theme").click()
        expect(page.locator("#theme")).to_have_attribute("aria-label", f"Theme: {said}")
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark


def test_small_windows_do_not_scroll_sideways(browser: Browser, sidecar: SidecarProcess) -> None:
    """All is there at 400 px, and at twice the size in a window of 1280."""
    with opened(browser, f"{sidecar.admin_url}/", viewport={"width": 400, "height": 800}) as tab:
        expect(tab.page.locator("#models tbody tr")).to_have_count(4)
        expect(tab.page.locator("#chart-tokens canvas")).to_be_visible()
        assert tab.overflow_px() == 0
        for fold in tab.page.locator("summary").all():
            fold.click()
        expect(tab.page.locator("#settings dt").first).to_be_visible()
        for width in (400, 640):
            tab.page.set_viewport_size({"width": width, "height": 800})
            assert tab.overflow_px() == 0
            _keep(tab.page, f"at-{width}")


def test_what_stands_alone_or_is_not_listed_is_seen(tab: Tab) -> None:
    """A ratio between steps without traffic is a point, as there is nothing to draw a line to;
    names that the sidecar gives, and the row of what is not listed, are explained."""
    page = tab.page

    def sparse(route: Route) -> None:
        document = route.fetch().json()
        steps = 60
        document["at"] = [document["window"]["since"] + 10 * (at + 1) for at in range(steps)]
        for name in ("in_flight", "faults", "spent", "saved", "never_read"):
            document[name] = [0] * steps
        document["tokens"] = {name: [0] * steps for name in document["tokens"]}
        alone = [1.0 if at == steps // 2 else None for at in range(steps)]
        document["by_tokens"] = document["by_requests"] = alone
        route.fulfill(json=document)

    def crowded(route: Route) -> None:
        document = route.fetch().json()
        document["others"] = document["rows"].pop()["figures"]
        document["rows"][0]["team_alias"] = "None"
        route.fulfill(json=document)

    page.route("**/api/v1/series*", sparse)
    page.route("**/api/v1/models*", crowded)
    page.reload()
    note = page.locator("#models-note")
    expect(note).to_contain_text("“None”: a key without a team.")
    expect(note).to_contain_text("“All others” is the sum of what is not listed")
    expect(note).not_to_contain_text("“unknown”")
    expect(page.locator("#models tr.others th")).to_have_text("all others")
    canvas = page.locator("#chart-ratio canvas")
    expect(canvas).to_be_visible()
    # Of a point in the colour of the lines; axes and grid are grey.
    page.wait_for_function(
        """() => {
            const canvas = document.querySelector("#chart-ratio canvas");
            const context = canvas.getContext("2d");
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            let coloured = 0;
            for (let at = 0; at < data.length; at += 4) {
                const [alpha, light] = [data[at + 3], data.slice(at, at + 3)];
                coloured += alpha > 200 && Math.max(...light) - Math.min(...light) > 100;
            }
            return coloured > 5;
        }"""
    )


def test_sidecar_that_stops_in_an_answer_is_said_to_be_lost(
    browser: Browser, sidecar: SidecarProcess
) -> None:
    """No document is waited for without end, whichever it is; what came last is marked as old."""

    def quiet(route: Route) -> None:
        document = route.fetch().json()
        document["figures"]["answers"] = 0
        route.fulfill(json=document)

    with opened(browser, "about:blank") as tab:
        tab.page.route("**/api/v1/summary?window=15m", quiet)
        tab.page.route(
            "**/api/v1/models*", lambda route: route.fulfill(json={"rows": [], "others": None})
        )
        tab.page.route("**/api/v1/summary?window=start", lambda _: None)
        tab.page.clock.install()
        with tab.page.expect_request("**/api/v1/summary?window=start"):
            tab.page.goto(f"{sidecar.admin_url}/")
        tab.page.clock.fast_forward(11_000)
        expect(tab.page.locator("#notice")).to_contain_text("It does not answer.")
        assert tab.errors == []


def test_tab_that_nobody_sees_asks_for_nothing(browser: Browser, sidecar: SidecarProcess) -> None:
    """It asks again as soon as it is seen, and goes on."""
    with opened(browser, "about:blank") as tab:
        page = tab.page
        page.clock.install()
        page.goto(f"{sidecar.admin_url}/")
        expect(page.locator("#models tbody tr")).to_have_count(4)
        page.evaluate("Object.defineProperty(document, 'hidden', {value: true, writable: true})")
        asked = len(tab.urls)
        page.clock.run_for(60_000)
        assert len(tab.urls) == asked
        with page.expect_response("**/api/v1/series*"):
            page.evaluate("document.hidden = false")
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        with page.expect_response("**/api/v1/series*"):
            page.clock.run_for(4_000)
        assert tab.errors == []


def test_settings_are_shown_without_their_secrets(
    browser: Browser, settings: dict[str, str], tmp_path: Path
) -> None:
    """A person signs in with the token alone, and it is nowhere to be read on the page. LiteLLM
    does not run: that is said, and so is what it did to requests."""
    settings = settings | {
        "SIDECAR_ADMIN_TOKEN": TOKEN,
        "SIDECAR_UPSTREAM": f"http://127.0.0.1:{free_port()}",
    }
    with (
        sidecar_process(tmp_path, settings) as guarded,
        opened(browser, f"{guarded.admin_url}/") as tab,
    ):
        page = tab.page
        expect(page.locator("#sign-in")).to_be_visible()
        expect(page.locator(".tiles")).to_be_hidden()
        assert tab.violations() == []
        for wrong in ("sk-page-not-it", "sk-page-–-€"):
            page.get_by_label("Token", exact=True).fill(wrong)
            page.get_by_role("button", name="Show the figures").click()
            expect(page.get_by_label("Token", exact=True)).to_be_empty()
            expect(page.get_by_role("alert")).to_have_text("That is not the token.")
        # Somebody who looks the token up in another tab finds the page as it was.
        asked = len(tab.urls)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        assert len(tab.urls) == asked
        expect(page.get_by_role("alert")).to_have_text("That is not the token.")
        page.get_by_label("Token", exact=True).fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#empty")).to_be_visible()
        page.reload()
        expect(page.locator("#empty")).to_be_visible()
        expect(page.locator("#upstream")).to_have_text(re.compile("not reachable .*connect_failed"))
        expect(page.locator("#empty-title")).to_contain_text("LiteLLM cannot be reached")
        expect(page.locator("#empty-lost")).to_contain_text(settings["SIDECAR_UPSTREAM"])
        expect(page.locator("#example")).to_be_hidden()
        expect(page.locator("#faults")).to_be_hidden()
        answer = httpx.post(f"{guarded.url}/v1/messages", json={}, trust_env=False, timeout=10)
        assert answer.status_code == 502
        wait_for_numbers(page, "#fault-count", [1])
        expect(page.locator("#codes")).to_contain_text("502 × 1")
        expect(page.locator("#faults tbody tr")).to_contain_text("connect_failed")
        assert tab.violations() == []
        page.get_by_text("Versions and settings").click()
        setting = page.locator("#settings div", has=page.get_by_text(re.compile("ADMIN_TOKEN$")))
        expect(setting.locator("dd").first).to_have_text("**********")
        assert TOKEN not in page.content()
        assert TOKEN not in "".join(tab.urls)
        # The browser names each 401 in its console; nothing else may be there.
        assert [text for text in tab.errors if "401" not in text] == []
        page.get_by_role("button", name="Sign out").click()
        expect(page.locator("#sign-in")).to_be_visible()


def test_page_survives_the_restart_of_the_sidecar(
    browser: Browser, settings: dict[str, str], tmp_path: Path
) -> None:
    """It says that nobody answers, goes on by itself, and says that counts began anew."""
    ports = free_port(), free_port()
    with ExitStack() as stack:
        with sidecar_process(tmp_path, settings, ports=ports) as first:
            tab = stack.enter_context(opened(browser, f"{first.admin_url}/"))
            for _ in range(2):
                call(first, MODELS[0], "sk-page-search", "before")
            wait_for_numbers(tab.page, "#finished", [2])
        expect(tab.page.locator("#notice")).to_contain_text("cannot be reached")
        with sidecar_process(tmp_path, settings, ports=ports) as second:
            expect(tab.page.locator("#notice")).to_contain_text("counts and curves began anew")
            call(second, MODELS[0], "sk-page-search", "after")
            wait_for_numbers(tab.page, "#finished", [1])
            tab.page.get_by_role("button", name="Dismiss").click()
            expect(tab.page.locator("#notice")).to_be_hidden()


def _keep(page: Page, name: str) -> None:
    """Leave a picture for whoever wants to look."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)

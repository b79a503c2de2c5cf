"""The page: its parts as they are served, and how it behaves in a real browser, over a real server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving import serve
from waiting import wait_until

from routers.bundle import Bundle, Digest, RoutingRow, save_routing
from routers.knn import KnnRouter
from routers.prompt import PromptRouter
from routers.scorecard import Scorecard
from service.access import Access, new_key
from service.api import PAGES
from service.app import create_app
from service.engines.base import EngineError, Job, Piece, Status
from service.engines.echo import EchoEngine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = 'it\'s "quoted" \\n $HOME `ls` é\n<b>python</b>'
LOADED = "Failed to load resource"
"""What Chromium itself writes to the console of any page that is refused something."""


@pytest.mark.parametrize(("path", "media_type"), [(path, page[1]) for path, page in PAGES.items()])
def test_every_part_comes_with_its_type_and_the_policy(client: TestClient, path: str, media_type: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"{media_type}; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]


def test_the_page_holds_no_inline_code_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/").text
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|\sstyle=", page)
    loaded = [f"/{where}" for where in re.findall(r'(?:src|<link[^>]*href)="([^":]*)"', page)]
    assert loaded == ["/playground/playground.css", "/playground/playground.js"]


def test_every_script_that_is_imported_is_served_and_every_served_one_imported(client: TestClient) -> None:
    scripts = {path for path in PAGES if path.endswith(".js")}
    imported = {name for path in scripts for name in re.findall(r'from "\./([\w.]+)"', client.get(path).text)}
    assert {f"/playground/{name}" for name in imported} | {"/playground/playground.js"} == scripts


def test_every_element_that_the_scripts_use_is_in_the_page(client: TestClient) -> None:
    scripts = "".join(client.get(path).text for path in PAGES if path.endswith(".js"))
    assert set(re.findall(r'at\("(\w+)"\)', scripts)) <= set(re.findall(r'id="(\w+)"', client.get("/").text))


class Staged(EchoEngine):
    """An echo whose experts load, fail and die as a test says; `most` holds every answer after so many pieces."""

    def __init__(self, experts: tuple[str, ...]) -> None:
        super().__init__(experts, window=1024)
        self.clear()

    def clear(self) -> None:
        """As new."""
        self.states: dict[str, Status] = {}
        self.failing: set[str] = set()
        self.dying: set[str] = set()
        self.most = 10_000

    def status(self) -> dict[str, Status]:
        return super().status() | self.states

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        if job.expert in self.failing:
            raise EngineError(f"{job.expert} is out of memory")
        given = 0
        async with aclosing(super().generate(job)) as pieces:
            async for piece in pieces:
                while given >= self.most:  # noqa: ASYNC110 - another thread sets it
                    await asyncio.sleep(0.005)
                if given and job.expert in self.dying:
                    raise EngineError(f"{job.expert} died")
                yield piece
                given += 1


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's, for all tests of this file: sync_playwright keeps an event loop, which others must not meet."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def staged(router: PromptRouter) -> Staged:
    return Staged(router.experts)


@pytest.fixture(scope="module")
def server(bundle: Bundle, staged: Staged) -> Iterator[str]:
    with serve(create_app(bundle, staged)) as (url, _):
        yield url


@pytest.fixture
def stage(staged: Staged) -> Staged:
    """The engine behind the page."""
    staged.clear()
    staged.finished = 0
    return staged


@pytest.fixture(scope="module")
def tab(chromium: Any, server: str) -> Iterator[Any]:
    """One for most tests: a browser of its own for each would take most of the time."""
    context = chromium.new_context(base_url=server)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(tab: Any, server: str, stage: Staged) -> Iterator[Any]:
    """The page, loaded anew and ready."""
    with watched(tab, server):
        yield loaded(tab)
    tab.unroute_all()
    stage.clear()
    wait_until(lambda: stage.running == 0)


@contextmanager
def opened(chromium: Any, url: str, *, wait: bool = True, clock: bool = False, **options: Any) -> Iterator[Any]:
    """The page in a browser of its own; with a clock that can be stopped."""
    context = chromium.new_context(base_url=url, **options)
    try:
        page = context.new_page()
        if clock:
            page.clock.install()
        with watched(page, url):
            yield loaded(page, wait)
    finally:
        context.close()


def loaded(page: Any, wait: bool = True) -> Any:
    """With its experts, if they are to be waited for."""
    page.goto("/")
    if wait:
        page.locator("#readiness li").first.wait_for()
    return page


@contextmanager
def watched(page: Any, url: str) -> Iterator[None]:
    """Fails where the page writes to the console, throws, or asks another host."""
    said: list[str] = []
    hosts: set[str] = set()
    listeners = {
        "console": lambda message: said.append(message.text),
        "pageerror": lambda error: said.append(str(error)),
        "request": lambda request: hosts.add("/".join(request.url.split("/")[:3])),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    yield
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    assert [text for text in said if not text.startswith(LOADED)] == []
    assert {host for host in hosts if not host.startswith("data:")} == {url}


def expect(what: Any) -> Any:
    """Playwright's, which waits."""
    from playwright import sync_api

    return sync_api.expect(what)


def send(page: Any, prompt: str) -> None:
    """Type it and send it with the keys."""
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")


def ask(page: Any, prompt: str) -> Any:
    """Send it; its answer, once it has ended."""
    send(page, prompt)
    answer = page.locator(".answer").last
    expect(answer.locator(".stats")).to_contain_text("finish")
    return answer


def stop_clock(page: Any) -> None:
    """From here on the page's time goes only as a test says."""
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)


def bodies(page: Any, path: str) -> list[dict[str, Any]]:
    """What will have been posted there."""
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if path in request.url else None)
    return sent


def test_the_route_shows_as_one_types_and_nothing_is_generated(page: Any, stage: Staged, router: PromptRouter) -> None:
    page.type("#prompt", "the python loop")
    expect(page.locator("#reason")).to_contain_text("code has the highest score")
    bars = page.locator("#bars li")
    best = router.route("the python loop").ranking[0]
    expect(bars).to_have_count(3)
    expect(bars.first).to_have_class("chosen")
    expect(bars.first).to_contain_text(f"{best.score:.3f}")
    expect(page.locator("#words")).to_contain_text("loop")
    expect(page.locator("#counterfactuals")).to_contain_text("without code")
    expect(page.locator("#routeMeta")).to_have_text(re.compile(r"linear · \d+\.\d\d ms"))
    page.fill("#prompt", "the owl")
    expect(page.locator("#reason")).to_contain_text("story has the highest score")
    assert (stage.running, stage.finished) == (0, 0)


def test_the_route_is_not_asked_for_at_every_key(chromium: Any, server: str) -> None:
    with opened(chromium, server, clock=True) as page:
        stop_clock(page)
        routes = bodies(page, "/route")
        page.type("#prompt", "python loop list class import")
        page.clock.run_for(119)
        assert routes == []
        page.clock.run_for(1)
        expect(page.locator("#reason")).to_contain_text("code")
        page.clock.run_for(1000)
        assert [route["messages"] for route in routes] == [
            [{"role": "user", "content": "python loop list class import"}]
        ]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("top_score", "code has the highest score, "),
        ("no_evidence", "The prompt says nothing about the experts, so the default answers: code."),
        ("abstained", "The router is not sure enough of "),
        ("only_choice", "No other expert may answer this than code."),
        ("fixed", "This router sends every prompt to one expert: code."),
        ("pinned", "You chose code, so nothing is routed."),
        ("retained", "The conversation stays with code, still the best."),
        ("switched", "The conversation moves to code"),
        ("fallback", "The first choice failed before its first word, so code answers."),
    ],
)
def test_every_reason_is_a_sentence(page: Any, reason: str, said: str) -> None:
    def changed(route: Any) -> None:
        route.fulfill(json=route.fetch().json() | {"reason": reason, "confidence": 0.42})

    page.route("**/route?*", changed)
    page.fill("#prompt", "python loop")
    expect(page.locator("#reason")).to_contain_text(said)
    expect(page.locator("#bars")).to_be_visible(visible=reason != "pinned")


def test_an_expert_that_may_not_answer_says_why(page: Any, stage: Staged) -> None:
    stage.states = {"code": Status("failed", "no weights")}
    page.fill("#prompt", "python loop")
    expect(page.locator("#bars .excluded")).to_contain_text("not ready")
    expect(page.locator("#bars .excluded")).to_contain_text("code")


def test_an_answer_shows_word_by_word_with_its_expert_and_its_numbers(page: Any, stage: Staged) -> None:
    stage.most = 2
    send(page, "python loop list class")
    answer = page.locator(".answer")
    expect(answer.locator(".text")).to_have_text("python loop")
    expect(answer.locator(".badge")).to_have_text("code")
    assert answer.locator(".text").get_attribute("aria-busy") == "true"
    assert page.locator("#send").inner_text() == "Stop"
    stage.most = 10
    expect(answer.locator(".text")).to_have_text("python loop list class")
    stats = answer.locator(".stats")
    expect(stats).to_have_text(
        re.compile(r"tokens 4 *tokens/s [\d.]+ *first piece \d+ ms *total [\d.]+ s *prompt 4 *finish stop")
    )
    assert answer.locator(".text").get_attribute("aria-busy") is None
    assert page.locator("#thread").get_attribute("role") == "log"


@pytest.mark.parametrize("how", ["the button", "Escape"])
def test_stopping_ends_the_engines_work_and_keeps_what_came(page: Any, stage: Staged, how: str) -> None:
    stage.most = 1
    send(page, "python loop list")
    expect(page.locator(".answer .text")).to_have_text("python")
    page.keyboard.press("Escape") if how == "Escape" else page.click("#send")
    expect(page.locator(".answer .stats")).to_contain_text("finish stopped")
    wait_until(lambda: stage.running == 0)
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator(".answer .text")).to_have_text("python")


def test_turns_are_a_conversation_that_keeps_its_expert_until_a_new_one(page: Any) -> None:
    sent = bodies(page, "/v1/chat/completions")
    ask(page, "python loop")
    answer = ask(page, "python list")
    assert [turn["content"] for turn in sent[1]["messages"]] == ["python loop", "python loop", "python list"]
    assert [turn["role"] for turn in sent[1]["messages"]] == ["user", "assistant", "user"]
    expect(answer.locator(".why")).to_have_text("stays with the conversation")
    expect(page.locator("#reason")).to_contain_text("The conversation stays with code")
    page.click("#newChat")
    expect(page.locator(".turn")).to_have_count(0)
    answer = ask(page, "the owl")
    assert len(sent[2]["messages"]) == 1
    expect(answer.locator(".why")).to_have_text("highest score")


def test_the_settings_are_sent_and_shown(page: Any) -> None:
    sent = bodies(page, "completions")
    page.click("#settings summary")
    for name, value in {"temperature": "0.5", "maxTokens": "7", "seed": "3", "k": "2", "system": "Be brief."}.items():
        page.fill(f"#{name}", value)
    answer = ask(page, "python loop")
    assert sent[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"model": "auto", "temperature": 0.5, "max_tokens": 7, "seed": 3, "k": 2, "stream": True}
    assert {name: sent[0][name] for name in wanted} == wanted
    assert json.loads(page.inner_text("#code")) == sent[0]
    expect(answer.locator(".badge")).to_have_text(re.compile(r"code \d+\s% \+ \w+ \d+\s%"))
    page.check("#completion", force=True)
    page.select_option("#model", "math")
    answer = ask(page, "add")
    assert (sent[1]["prompt"], sent[1]["model"]) == ("add", "math")
    assert not {"k", "messages"} & sent[1].keys()
    expect(answer.locator(".why")).to_have_text("chosen by you")


def test_a_refusal_is_shown_in_its_place_and_can_be_tried_again(page: Any, stage: Staged) -> None:
    stage.failing = {"math", "code", "story"}
    send(page, "python loop")
    error = page.locator(".answer .error")
    expect(error).to_contain_text("code is out of memory")
    expect(error).to_contain_text("expert_failed")
    assert error.get_attribute("role") == "alert"
    stage.failing = set()
    error.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .text")).to_have_text("python loop")
    expect(page.locator(".turn")).to_have_count(1)


def test_a_refused_setting_is_marked_where_it_is(page: Any) -> None:
    page.click("#settings summary")
    page.fill("#k", "4")
    page.fill("#prompt", "python loop")
    expect(page.locator("#routeError")).to_contain_text("k is 4, and there are 3 experts")
    expect(page.locator("#k")).to_have_attribute("aria-invalid", "true")
    page.fill("#k", "3")
    expect(page.locator("#routeError")).to_be_hidden()
    assert page.get_attribute("#k", "aria-invalid") is None


def test_an_answer_that_breaks_keeps_its_words_and_says_why(page: Any, stage: Staged) -> None:
    stage.dying = {"code"}
    send(page, "python loop list")
    expect(page.locator(".answer .error")).to_contain_text("code died")
    expect(page.locator(".answer .text")).to_have_text("python")


def test_a_fallback_shows_who_answered_instead(page: Any, stage: Staged) -> None:
    stage.failing = {"code"}
    answer = ask(page, "python loop")
    expect(answer.locator(".why")).to_have_text("fallback")
    expect(answer.locator(".badge")).not_to_have_text("code")
    expect(page.locator("#reason")).to_contain_text("The first choice failed")


def test_a_service_that_is_gone_is_said_to_be(page: Any) -> None:
    page.context.set_offline(True)
    try:
        send(page, "python loop")
        expect(page.locator(".answer .error")).to_contain_text("The service does not answer.")
    finally:
        page.context.set_offline(False)


def test_two_are_compared_side_by_side_and_stream_at_once(page: Any, stage: Staged) -> None:
    sent = bodies(page, "/v1/chat/completions")
    page.check("#compare", force=True)
    page.select_option("#other", "story")
    stage.most = 1
    send(page, "python loop list")
    expect(page.locator(".answer .text")).to_have_text(["python", "python"])
    assert stage.running == 2
    expect(page.locator(".answer .badge")).to_have_text(["code", "story"])
    left, right = (answer.bounding_box() for answer in page.locator(".answer").all())
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    page.keyboard.press("Escape")
    wait_until(lambda: stage.running == 0)
    stage.most = 10
    ask(page, "python")
    # The expert that was chosen for one lane does not stay with the other.
    expect(page.locator(".turn").last.locator(".why")).to_have_text(["stays with the conversation", "chosen by you"])
    assert [body["model"] for body in sent] == ["auto", "story"] * 2


def test_everything_can_be_done_with_the_keys(page: Any, stage: Staged) -> None:
    keys = page.keyboard
    stage.most = 1
    keys.type("python loop")  # the prompt has the focus from the start
    keys.press("Control+Enter")
    expect(page.locator(".answer .text")).to_have_text("python")
    keys.press("Escape")
    expect(page.locator("#send")).to_have_text("Send")
    keys.press("ArrowUp")
    expect(page.locator("#prompt")).to_have_value("python loop")
    keys.press("Escape")
    keys.press("c")
    expect(page.locator("#compare")).to_be_checked()
    keys.press("f")
    expect(page.locator("#completion")).to_be_checked()
    keys.press("s")
    expect(page.locator("#temperature")).to_be_visible()
    keys.press("m")
    expect(page.locator("#model")).to_be_focused()
    keys.press("Escape")
    keys.press("?")
    expect(page.locator("#keys")).to_be_visible()
    keys.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    page.focus("#tab-body")
    keys.press("ArrowRight")
    expect(page.locator("#tab-curl")).to_be_focused()
    expect(page.locator("#code")).to_contain_text("curl -N")
    keys.press("n")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#prompt")).to_be_focused()
    keys.press("Escape")
    keys.press("/")
    expect(page.locator("#prompt")).to_be_focused()


def test_the_focus_is_seen_wherever_the_tab_key_goes(page: Any) -> None:
    page.focus("h1 + p + p ~ div a")
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        focus = page.evaluate("""() => {
            const at = document.activeElement, near = at.closest("label")?.querySelector("span");
            const marks = [[at], ...(near ? [[near], [near, "::before"]] : [])];
            const shown = marks.some((mark) => getComputedStyle(...mark).outlineStyle === "solid");
            return [at.id || at.innerText, shown || at.id === "prompt" || at === document.body];
        }""")
        assert focus[1], f"{focus[0]} has the focus and does not show it"
        seen.add(focus[0])
    assert {"prompt", "model", "chat", "compare", "scored", "send", "copyCode", "tab-body", "code"} <= seen


def test_every_control_has_a_name(page: Any) -> None:
    nameless = page.evaluate("""() => [...document.querySelectorAll("input, select, textarea, button")]
        .filter((each) => !(each.labels?.length || each.textContent.trim())).map((each) => each.id)""")
    assert nameless == []


@pytest.mark.parametrize("format", ["chat", "completion"])
def test_what_is_copied_answers_as_the_page_does(chromium: Any, server: str, format: str) -> None:
    with opened(chromium, server, clock=True, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.check(f"#{format}", force=True)
        text = ask(page, HOSTILE).locator(".text").inner_text()
        assert text == HOSTILE
        assert copied(page) == [HOSTILE] * 3
        assert "API_KEY" not in page.content()


def copied(page: Any, key: str = "") -> list[str]:
    """What the code of each tab answers, as it is copied, with this key in the environment; the page has a clock."""
    stop_clock(page)
    said = []
    for tab, command in {"curl": ["bash", "-c"], "python": [sys.executable, "-c"]}.items():
        page.click(f"#tab-{tab}")
        page.click("#copyCode")
        expect(page.locator("#copyCode")).to_have_text("Copied")
        page.clock.run_for(1200)
        expect(page.locator("#copyCode")).to_have_text("Copy")
        code = page.evaluate("navigator.clipboard.readText()")
        assert code == page.locator("#code").text_content()
        environment = os.environ | {"OPENAI_API_KEY": key}
        ran = subprocess.run([*command, code], capture_output=True, text=True, check=True, env=environment).stdout
        said.append(joined(ran) if tab == "curl" else ran)
    page.click("#tab-javascript")
    code = page.locator("#code").text_content()
    process = json.dumps({"env": {"OPENAI_API_KEY": key}})
    console = "{ log: (text) => (said = text) }"
    run = f"async () => {{ let said; const process = {process}, console = {console}; {code} return said; }}"
    return [*said, page.evaluate(run)]


def joined(stream: str) -> str:
    """The text of a stream's events."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize("format", ["chat", "completion"])
def test_the_probability_of_every_token_is_its_colour_and_its_alternatives_are_told(page: Any, format: str) -> None:
    page.check(f"#{format}", force=True)
    page.check("#scored", force=True)
    answer = ask(page, "python loop list")
    tokens = answer.locator(".token")
    expect(tokens).to_have_text(["python", "loop", "list"])
    assert len(set(tokens.evaluate_all("all => all.map((each) => getComputedStyle(each).backgroundColor)"))) > 1
    expect(answer.locator(".token[tabindex='0']")).to_have_text("python")  # one stop for the Tab key
    tokens.nth(1).hover()
    told = page.locator("#alternatives li")
    expect(told).to_have_count(2)
    expect(page.locator("#alternatives .own")).to_contain_text("·loop")
    expect(page.locator("#alternatives")).to_contain_text("60.7")  # of the echo's other word, exp(-0.5)
    tokens.nth(0).focus()
    expect(page.locator("#alternatives .own")).to_contain_text("python")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    page.uncheck("#scored", force=True)
    expect(tokens).to_have_count(0)
    expect(answer.locator(".text")).to_have_text("python loop list")


def lightness(page: Any) -> int:
    """Of the page's ground, 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return max(map(int, re.findall(r"\d+", colour)[:3]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_systems_until_another_is_chosen_and_that_is_remembered(
    chromium: Any, server: str, stage: Staged, scheme: str
) -> None:
    with opened(chromium, server, color_scheme=scheme) as page:
        assert (lightness(page) > 200) == (scheme == "light")
        page.click("#theme")
        assert lightness(page) > 200
        page.click("#theme")
        assert lightness(page) < 60
        page.reload()
        assert lightness(page) < 60
        page.emulate_media(color_scheme="light")
        assert lightness(page) < 60
        page.click("#theme")
        assert lightness(page) > 200


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_screen_has_nothing_to_scroll_sideways(chromium: Any, server: str, stage: Staged, width: int) -> None:
    with opened(chromium, server, viewport={"width": width, "height": 800}) as page:
        page.click("#settings summary")
        page.check("#compare", force=True)
        page.check("#scored", force=True)
        ask(page, f"python loop {'x' * 300}")
        page.fill("#prompt", "python " + "y" * 300)
        expect(page.locator("#words")).to_contain_text("python")
        for name in ("evidence", "router"):
            page.click(f"#{name} summary")
        wide = page.evaluate("""() => [...document.querySelectorAll("body *")].filter((each) =>
            each.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(each).visibility !== "hidden")
            .map((each) => each.id || each.className)""")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert wide == []


def test_who_wants_less_motion_gets_none(chromium: Any, server: str, stage: Staged) -> None:
    with opened(chromium, server, reduced_motion="reduce") as page:
        stage.most = 1
        send(page, "python loop")
        expect(page.locator(".answer .text")).to_have_text("python")
        expect(page.locator("#bars .bar").first).to_be_visible()
        cursor = page.evaluate("getComputedStyle(document.querySelector('.answer .text'), '::after').animationName")
        assert (
            cursor,
            page.locator("#bars .bar").first.evaluate("bar => getComputedStyle(bar).transitionDuration"),
        ) == (
            "none",
            "0s",
        )
        page.keyboard.press("Escape")


def test_experts_that_load_show_how_far_they_are_until_they_are_ready(
    chromium: Any, server: str, stage: Staged
) -> None:
    stage.states = dict.fromkeys(("math", "code", "story"), Status("loading", "42 % of the weights"))
    with opened(chromium, server) as page:
        expect(page.locator("#health")).to_have_text("experts: 3 loading")
        expect(page.get_by_label("loading code")).to_have_attribute("value", "42")
        page.fill("#prompt", "python loop")
        expect(page.locator("#routeError")).to_contain_text("no expert is ready to answer")
        stage.states = {"math": Status("failed", "its weights are not there")}
        expect(page.locator("#health")).to_have_text("experts: 2 ready, 1 failed")
        expect(page.locator("#readiness")).to_contain_text("its weights are not there")
        expect(page.locator("#reason")).to_contain_text("code has the highest score")


def test_a_service_with_keys_is_used_with_one(chromium: Any, bundle: Bundle, stage: Staged, tmp_path: Path) -> None:
    key, line = new_key("me")
    (tmp_path / "keys").write_text(line)
    with (
        serve(create_app(bundle, stage, access=Access(tmp_path / "keys"))) as (url, _),
        opened(chromium, url, wait=False, clock=True, permissions=["clipboard-read", "clipboard-write"]) as page,
    ):
        expect(page.locator("#health")).to_have_text("an API key is needed")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#readiness li")).to_have_count(3)
        expect(page.locator("#access")).to_be_hidden()
        expect(ask(page, "python loop").locator(".text")).to_have_text("python loop")
        assert copied(page, key) == ["python loop"] * 3
        for tab in ("body", "curl", "python", "javascript"):
            page.click(f"#tab-{tab}")
            assert key not in page.content()
        page.reload()
        expect(ask(page, "python list").locator(".text")).to_have_text("python list")


CARD = Scorecard(
    prompts=48,
    routed=0.8,
    best_single=0.7,
    best_single_expert="story",
    oracle=0.9,
    random=0.5,
    gain=0.1,
    gain_low=0.05,
    gain_high=0.15,
    picks={"math": 16, "code": 16, "story": 16},
)


@pytest.fixture
def neighbours(bundle: Bundle, router: PromptRouter, tmp_path: Path) -> Bundle:
    """Its router shows prompts as evidence, its experts cost something, and it has a scorecard."""
    texts = {"code": ["python loop", "list class"], "math": ["add sum", "divide"], "story": ["owl forest", "dragon"]}
    rows = [
        RoutingRow(
            task=f"demo/{own}", prompt=text, scores={name: 0.9 if name == own else 0.1 for name in router.experts}
        )
        for own, all_ in texts.items()
        for text in all_
    ]
    save_routing(tmp_path, rows)
    raw = (tmp_path / "routing.jsonl").read_bytes()
    vectors_ND = np.stack([router.features.vector(row.prompt) for row in rows])
    scores_NE = np.array([[row.scores[name] for name in router.experts] for row in rows])
    policy = replace(router.policy, cost_weight=0.5, costs={"math": 0.1, "code": 0.2, "story": 0.3})
    files = bundle.manifest.files | {"routing.jsonl": Digest(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())}
    entry = bundle.manifest.router.model_copy(update={"kind": "knn", "cost_weight": 0.5})
    manifest = bundle.manifest.model_copy(update={"files": files, "scorecard": CARD, "router": entry})
    return Bundle(
        tmp_path, manifest, replace(router, router=KnnRouter.fit(router.experts, vectors_ND, scores_NE), policy=policy)
    )


def test_the_evidence_the_costs_and_what_the_router_gains_are_shown(
    chromium: Any, neighbours: Bundle, stage: Staged
) -> None:
    still = {"reduced_motion": "reduce"}  # where bars are is where they stay
    with serve(create_app(neighbours, stage)) as (url, _), opened(chromium, url, **still) as page:
        page.fill("#prompt", "python loop")
        page.click("#evidence summary")
        page.click("#router summary")
        near = page.locator("#near li").first
        expect(near).to_contain_text("demo/code1.00python loop")
        expect(near.locator(".best")).to_have_text("code 0.90")
        expect(page.locator("#routedText")).to_have_text("python loop")
        expect(page.locator("#gain")).to_contain_text("On 48 prompts it was not fitted on: +0.100 over story for all")
        expect(page.locator("#counterfactuals li")).to_have_count(2)
        chosen = page.locator("#bars .chosen")
        expect(chosen).to_contain_text("0.800")  # 0.9 less half of 0.2
        bar, whisker = (chosen.locator(part).bounding_box() for part in (".bar", ".whisker"))
        assert whisker["width"] > 10
        assert whisker["x"] + whisker["width"] / 2 == pytest.approx(bar["x"] + bar["width"], abs=2)
        page.get_by_label("Expected quality").check(force=True)
        expect(chosen).to_contain_text("0.900")

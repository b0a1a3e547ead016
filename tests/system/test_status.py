"""The status page in a real Chromium, over answers of `/v1/status` that are made up here."""

import json
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from serving.routes import PAGE

pytestmark = pytest.mark.system

OUT = Path(__file__).parents[2] / "out"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ADDRESS = "http://personalive.test/"
DESKTOP, PHONE = {"width": 1100, "height": 850}, {"width": 390, "height": 844}


def member(name, **others):
    usual = {"stages": [name[:-2]], "pid": 41, "node": "10.0.0.1", "up": True, "is_spare": False, "num_sessions": 2}
    figures = {"rss_mb": 400.0, "busy": 0.5, "call_ms": {name[:-2]: {"1": 190.2, "2": 380.0}}, "num_restarts": 0}
    return {"name": name} | usual | figures | others


def session(name, **others):
    usual = {"replica": "r1", "state": "live", "fps": 8.04, "delay_ms": {"p50": 901.2, "p95": 1203.8}}
    return {"id": name, **usual, "members": {"denoise": "denoise-0"}, "num_recoveries": 1} | others


def status(**others):
    counts = {
        "admitted": 9,
        "queued": 2,
        "refused": 1,
        "resumed": 3,
        "recovered": 4,
        "frames_in": 100,
        "frames_out": 40,
    }
    return {
        "ready": True,
        "reason": None,
        "target_fps": 8.0,
        "places": 4,
        "num_sessions": 2,
        "num_idle": 1,
        "num_queued": 3,
        "members": [
            member("denoise-0"),
            member("decode-0", up=False, num_restarts=1),
            member("denoise-1", is_spare=True, num_sessions=0, busy=0.0),
            member("decode-1", is_spare=True, busy=0.25),
        ],
        "manager": {"pid": 2, "rss_mb": 100.0, "up_s": 4000.0},
        "replicas": [{"id": "r1", "pid": 3, "rss_mb": 200.0, "num_sessions": 2}],
        "sessions": [session("aaaaaaaa"), session("bbbbbbbb", state="recovering", fps=0.0)],
        "counts": counts | {"dropped": {"stale": 5}},
    } | others


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def open_status(browser):
    """A function that opens the page with a function that answers each of its questions; None fails."""
    contexts = []

    def open_status(answer, viewport=DESKTOP, scheme="light"):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.route("**/*", lambda route: fulfill(route, answer))
        page.goto(ADDRESS + "status")
        expect(page.locator("#status")).not_to_have_text("Asking …")
        return page

    yield open_status
    for context in contexts:
        context.close()


def fulfill(route, answer):
    path = route.request.url.removeprefix(ADDRESS)
    if path == "v1/status":
        told = answer()
        code = 200 if told and "places" in told else 503
        route.fulfill(status=code, content_type="application/json", body=json.dumps(told) if told else "oh")
    else:
        route.fulfill(path=PAGE / ("status.html" if path == "status" else path.removeprefix("static/")))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_house_is_shown_and_fits(open_status, viewport, scheme):
    page = open_status(status, viewport, scheme)
    expect(page.locator("#status")).to_have_text("Ready, while decode-0 starts again.")
    expect(page.locator("#figures")).to_contain_text("of 4 places, 1 idle")
    expect(page.locator("#members .card").nth(0)).to_contain_text("50 % busy")
    expect(page.locator("#members .card").nth(0)).to_contain_text("190 ms, 380 ms for 2")
    expect(page.locator("#members .card").nth(1)).to_contain_text("1 restart")
    expect(page.locator("#members .card").nth(2)).to_contain_text("stands by")
    expect(page.locator("#members .card").nth(3)).to_contain_text("25 % busy")
    expect(page.locator("#sessions tr").nth(0)).to_contain_text("901 ms p95 1204")
    expect(page.locator("#sessions tr").nth(1)).to_contain_text("recovering")
    expect(page.locator("#processes")).to_contain_text("up 1 h 6 min, 100 MiB")
    expect(page.locator("#counts")).to_contain_text("dropped: stale")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert not page.problems
    OUT.mkdir(exist_ok=True)
    page.screenshot(path=OUT / f"status-{viewport['width']}-{scheme}.png", full_page=True)


def test_rates_are_what_the_counts_grow_by(open_status):
    answers = iter(range(1000))

    def growing():
        number = next(answers)
        dropped = {"stale": 10 * number}
        return status(
            counts=status()["counts"] | {"frames_in": 50 * number, "frames_out": 20 * number, "dropped": dropped}
        )

    page = open_status(growing)
    page.wait_for_timeout(4000)
    fps = float(page.locator("#figures strong").nth(2).inner_text())
    assert 10 < fps <= 20.5
    assert page.locator("#figures .spark polyline").nth(0).get_attribute("points").count(",") >= 3


def test_whatever_the_answer_holds_is_shown_as_text(open_status):
    evil = "<img src=x onerror=document.title='taken'>"
    parts = {"members": [member(evil, stages=[evil], call_ms={evil: {"1": 1.0}})]}
    parts["sessions"] = [session(evil, state=evil, replica=evil, members={evil: evil})]
    parts["replicas"] = [{"id": evil, "pid": 1, "rss_mb": 1.0, "num_sessions": 1}]
    parts["counts"] = status()["counts"] | {"dropped": {evil: 1}}
    page = open_status(lambda: status(ready=False, reason=evil, **parts))
    expect(page.locator("#status")).to_have_text(evil)
    assert page.locator("main").inner_text().count("onerror") >= 6
    assert page.locator("main img").count() == 0
    assert page.title() == "PersonaLive · status"


def test_what_is_not_known_is_a_dash(open_status):
    unknown = dict.fromkeys(status()) | {"ready": True, "members": [dict.fromkeys(member("a-0")) | {"name": "a-0"}]}
    unknown["members"][0] |= {"stages": ["motion"], "up": True}
    unknown["sessions"] = [dict.fromkeys(session("a")) | {"id": "aaaaaaaa", "state": "idle"}]
    page = open_status(lambda: unknown)
    expect(page.locator("#status")).to_have_text("Ready.")
    expect(page.locator("#sessions tr")).to_contain_text("– fps")
    assert "NaN" not in page.locator("main").inner_text() and "null" not in page.locator("main").inner_text()
    assert not page.problems


def test_nobody_is_here_is_said_too(open_status):
    page = open_status(lambda: status(sessions=[], num_sessions=0))
    expect(page.locator("#sessions")).to_have_text("Nobody is here.")


def test_a_crowd_is_cut_off(open_status):
    page = open_status(lambda: status(sessions=[session(f"{number:08x}") for number in range(130)]))
    expect(page.locator("#sessions tr")).to_have_count(100)
    expect(page.locator("#more-sessions")).to_have_text("… and 30 more.")


def test_a_server_that_does_not_answer_is_named_until_it_does(open_status):
    loading = {"ready": False, "reason": "the weights are being loaded"}
    answers = [status(), None, None, loading, loading]
    page = open_status(lambda: answers.pop(0) if answers else status(members=[]))
    expect(page.locator("#status")).to_contain_text("it says 503")
    expect(page.locator("body")).to_have_class("stale")
    expect(page.locator("#sessions tr")).to_have_count(2)
    expect(page.locator("#status")).to_contain_text("the weights are being loaded")
    expect(page.locator("#status")).to_have_text("Ready.")
    expect(page.locator("body")).not_to_have_class("stale")

"""The page in a real Chromium: from the bundled clip, and from a camera that is fed with a video. Where it does not
matter what moves, the model is a light one.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from serving import protocol
from serving.codec import encode
from serving.protocol import pack, split
from stages.portraits import BUNDLED_CLIP
from stages.video import read_video, square_resize

from .conftest import MAX_FRAMES_BEHIND, running_server

pytestmark = pytest.mark.system

OUT = Path(__file__).parents[2] / "out"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
LIVE_MS = 30_000
DESKTOP, PHONE = {"width": 1100, "height": 850}, {"width": 390, "height": 844}
PIXELS = "document.getElementById('output').toDataURL()"


@pytest.fixture(scope="module")
def playwright():
    expect.set_options(timeout=LIVE_MS)
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def light(light_weights):
    """A server whose model matters to nobody."""
    with running_server(weights=light_weights, idle_timeout_s=5, max_sessions=8, target_fps=1) as running:
        yield running


@pytest.fixture
def open_page(light, playwright, tmp_path):
    """A function that opens a server's page, with a camera that shows a video where one is given."""
    browsers = []

    def open_page(video=None, viewport=DESKTOP, server=light):
        flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        if video is not None:
            flags.append(f"--use-file-for-fake-video-capture={as_mjpeg(video, tmp_path / 'camera.mjpeg')}")
        browsers.append(playwright.chromium.launch(executable_path=CHROMIUM, args=flags))
        page = browsers[-1].new_page(viewport=viewport)
        page.set_default_timeout(LIVE_MS)
        page.goto(server.page)
        return page

    yield open_page
    for browser in browsers:
        browser.close()


def as_mjpeg(video, path, num_frames=200):
    """The film that Chromium's fake camera plays: JPEG after JPEG."""
    with open(path, "wb") as film:
        for _, frame in zip(range(num_frames), read_video(video), strict=False):
            film.write(encode(square_resize(frame.rgb, 480), "jpeg"))
    return path


def watch(page, name, seconds=8):
    """Waits until the stream is live and its figures stand, sees the picture change, and keeps a screenshot."""
    page.wait_for_function("document.body.classList.contains('live')")
    page.wait_for_timeout(seconds * 1000)
    pictures: set[str] = set()
    until = time.monotonic() + LIVE_MS / 1000
    while len(pictures) < 4:
        assert time.monotonic() < until, f"{len(pictures)} different pictures in {LIVE_MS} ms"
        pictures.add(page.evaluate(PIXELS))
        page.wait_for_timeout(200)
    OUT.mkdir(exist_ok=True)
    page.screenshot(path=OUT / f"page-{name}.png")
    delay_ms, fps_in, fps_out = (float(page.inner_text(name)) for name in ("#delay", "#fps-in", "#fps-out"))
    assert delay_ms > 100 and delay_ms / 1000 * fps_out < MAX_FRAMES_BEHIND
    assert fps_in > 3 and fps_out > 0.5
    assert page.get_attribute("#status", "data-state") == "live"


def test_the_bundled_clip_moves_the_portrait(open_page, server):
    page = open_page(server=server)
    page.click("#start")
    watch(page, "clip")
    page.click("#start")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#start")).to_have_text("Start")


def test_a_camera_moves_the_portrait_on_a_phone(open_page):
    page = open_page(BUNDLED_CLIP, PHONE)
    page.select_option("#source", index=1)
    page.click("#start")
    watch(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_real_video_before_the_camera_moves_a_real_portrait(open_page, server, media_dir):
    page = open_page(media_dir / "driving.mp4", server=server)
    page.set_input_files("#upload", media_dir / "portrait.png")
    page.select_option("#source", index=1)
    page.click("#start")
    watch(page, "media", seconds=14)


def test_another_portrait_takes_over_while_the_stream_runs(open_page):
    page = open_page()
    page.click("#start")
    page.wait_for_function("document.body.classList.contains('live')")
    page.click(".portrait >> nth=1")
    page.wait_for_function("!document.body.classList.contains('live')")
    page.wait_for_function("document.body.classList.contains('live')")
    assert page.get_attribute("#portrait", "src").endswith("ben.png")


@pytest.mark.parametrize("source", ["clip", "camera"])
def test_start_may_be_pressed_before_the_cameras_are_known(open_page, source):
    page = open_page(BUNDLED_CLIP)
    page.add_init_script("navigator.mediaDevices.enumerateDevices = () => new Promise(() => {});")
    page.reload()
    page.select_option("#source", source)
    page.click("#start")
    page.wait_for_function("document.body.classList.contains('live')")


def test_start_may_be_pressed_before_the_portraits_have_come(open_page):
    page = open_page()
    page.route("**/v1/portraits", lambda route: (time.sleep(1), route.continue_()))
    page.reload(wait_until="commit")
    page.click("#start")
    page.wait_for_function("document.body.classList.contains('live')")


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_double_click_on_start_leaves_nothing_running(open_page, is_listed):
    page = open_page()
    if not is_listed:
        page.route("**/v1/portraits", lambda route: (time.sleep(1), route.continue_()))
        page.reload(wait_until="commit")
    sockets = []
    page.on("websocket", lambda socket: sockets.append(socket))
    page.dblclick("#start")
    page.wait_for_timeout(2000)
    expect(page.locator("#start")).to_have_text("Start")
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert all(socket.is_closed() for socket in sockets)
    assert page.evaluate("document.getElementById('driving').paused")
    page.click("#start")
    page.wait_for_function("document.body.classList.contains('live')")


def test_a_file_that_is_no_picture_is_named_on_the_page(open_page, tmp_path):
    page = open_page()
    (tmp_path / "notes.txt").write_text("no picture")
    page.set_input_files("#upload", tmp_path / "notes.txt")
    expect(page.locator("#status")).to_contain_text("not a picture")


def test_a_refused_portrait_is_shown_as_text_and_can_be_tried_again(open_page, server, tmp_path):
    page = open_page(server=server)
    (tmp_path / "white.png").write_bytes(
        encode(square_resize(next(read_video(BUNDLED_CLIP)).rgb * 0 + 255, 300), "png")
    )
    page.set_input_files("#upload", tmp_path / "white.png")
    page.click("#start")
    expect(page.locator("#status")).to_have_attribute("data-state", "error")
    expect(page.locator("#status")).to_contain_text("face")
    page.click(".portrait >> nth=0")
    page.click("#reconnect")
    page.wait_for_function("document.body.classList.contains('live')")


class Wire:
    """Stands between the page and the server: cuts connections, and says what a server says only in trouble."""

    def __init__(self, page):
        self.is_down = False
        self.heard = []
        """By connection, the headers of what the page has said."""
        self._ends = []
        page.route_web_socket("**/v1/stream", self._connected)
        page.reload()

    def _connected(self, page_end):
        if self.is_down:
            page_end.close(code=1011)
            return
        server_end, heard = page_end.connect_to_server(), []
        self.heard.append(heard)
        self._ends.append((page_end, server_end))

        def pass_on(message):
            heard.append(json.loads(split(message)[0]))
            server_end.send(message)

        page_end.on_message(pass_on)

    def say(self, message):
        """To the page, on the newest connection."""
        self._ends[-1][0].send(pack(message))

    def cut(self):
        for end in self._ends[-1]:
            end.close(code=1011)

    def said(self, kind, connection=-1):
        return [header for header in self.heard[connection] if header["type"] == kind]


def start_and_note(page):
    """Starts, waits for the picture, and from then on notes what the page tells, and whether the picture goes away."""
    page.click("#start")
    page.wait_for_function("document.body.classList.contains('live')")
    page.evaluate("""() => {
        const status = document.getElementById("status");
        window.told = [];
        window.numLost = 0;
        new MutationObserver(() => told.push(status.textContent)).observe(status, { childList: true });
        new MutationObserver(() => numLost += !document.body.classList.contains("live"))
            .observe(document.body, { attributes: true });
    }""")


RECOVERING = protocol.Notice("recovering", "a process died")
WAITING_FOR_IT = "A part of the server restarts, your picture goes on in a moment."


def test_the_picture_stays_and_goes_on_when_the_connection_is_lost(open_page):
    page = open_page()
    wire = Wire(page)
    start_and_note(page)
    page.wait_for_function("parseFloat(document.getElementById('fps-out').textContent) > 0")
    wire.is_down = True
    wire.cut()
    expect(page.locator("#status")).to_have_text("Reconnecting …")
    expect(page.locator("#start")).to_have_text("Stop")
    page.wait_for_timeout(700)
    kept, at_s = page.evaluate(PIXELS), page.evaluate("document.getElementById('driving').currentTime")
    page.wait_for_timeout(300)
    assert page.evaluate(PIXELS) == kept
    assert page.evaluate("document.getElementById('driving').currentTime") != at_s
    wire.is_down = False
    expect(page.locator("#status")).to_have_text("Live.")
    page.wait_for_function(f"{PIXELS} !== {json.dumps(kept)}")
    assert page.evaluate("numLost") == 0
    first, second = wire.said("hello", 0)[0], wire.said("hello", 1)[0]
    assert first["resume"] is None and len(second["resume"]) > 20 and second["portrait"] == first["portrait"]
    assert wire.said("frame", 1)[0]["seq"] > wire.said("frame", 0)[-1]["seq"]
    assert wire.said("shown", 1)[0]["count"] == 1


def test_nothing_is_seen_of_a_replica_that_is_replaced(open_page):
    page = open_page()
    wire = Wire(page)
    start_and_note(page)
    wire.say(protocol.Notice("draining", "this replica is being replaced"))
    for _ in range(LIVE_MS // 100):
        if len(wire.heard) == 2 and wire.said("shown"):
            break
        page.wait_for_timeout(100)
    assert page.evaluate("told") == [] and page.evaluate("numLost") == 0
    assert len(wire.said("hello")[0]["resume"]) > 20
    page.wait_for_timeout(1000)
    num_on_old = len(wire.heard[0])
    page.wait_for_timeout(500)
    assert len(wire.heard[0]) == num_on_old and wire.said("frame")


@pytest.mark.parametrize("end", ["recovered", "the next frames"])
def test_a_recovery_is_told_until_it_is_over(open_page, end):
    page = open_page()
    wire = Wire(page)
    start_and_note(page)
    wire.say(RECOVERING)
    if end == "recovered":
        wire.say(protocol.Recovered({"restart": 900.0}))
    page.wait_for_function("told.length >= 2")
    assert page.evaluate("told") == [WAITING_FOR_IT, "Live."]
    assert page.evaluate("numLost") == 0


def test_receipts_and_pings_carry_times(open_page):
    page = open_page()
    wire = Wire(page)
    start_and_note(page)
    page.wait_for_timeout(4500)
    captured = [header["capture_ms"] for header in wire.said("frame")]
    shown = [header["shown_ms"] for header in wire.said("shown")]
    assert shown == sorted(shown) and captured[0] < shown[0] < captured[0] + 60_000
    assert 0 < wire.said("ping")[-1]["rtt_ms"] < 5000


def test_a_place_in_line_and_a_full_server_are_told(open_page):
    page = open_page()
    answers = iter([protocol.Queued(2, 40.0), protocol.Error("busy", "all places are taken", True, 12.0)])

    def answer(end):
        said = next(answers)
        end.on_message(lambda message: end.send(pack(said)) if '"hello"' in message else None)

    page.route_web_socket("**/v1/stream", answer)
    page.reload()
    page.click("#start")
    expect(page.locator("#status")).to_have_text("You are number 2 in line, about 40 s.")
    page.click("#start")
    page.click("#start")
    expect(page.locator("#status")).to_have_text("all places are taken. Worth another try in about 12 s.")
    expect(page.locator("#reconnect")).to_be_visible()
    expect(page.locator("#start")).to_have_text("Start")


def test_a_page_that_is_left_says_bye(open_page):
    page = open_page()
    page.add_init_script("""
        const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (data) {
            if (typeof data === "string") sessionStorage.said = data;
            send.call(this, data);
        };
    """)
    page.reload()
    page.click("#start")
    page.wait_for_function("document.body.classList.contains('live')")
    page.goto(page.url + "healthz")
    assert page.evaluate("sessionStorage.said") == '{"type":"bye"}'

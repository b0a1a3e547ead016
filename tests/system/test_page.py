"""The page in a real Chromium: from the bundled clip, and from a camera that is fed with a video."""

import os
import shutil
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from serving.codec import encode
from stages.portraits import BUNDLED_CLIP
from stages.video import read_video, square_resize

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


@pytest.fixture
def open_page(server, playwright, tmp_path):
    """A function that opens the page, with a camera that shows a video where one is given."""
    browsers = []

    def open_page(video=None, viewport=DESKTOP):
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
    pictures = {page.evaluate(PIXELS)}
    for _ in range(4):
        page.wait_for_timeout(500)
        pictures.add(page.evaluate(PIXELS))
    OUT.mkdir(exist_ok=True)
    page.screenshot(path=OUT / f"page-{name}.png")
    assert len(pictures) >= 4
    assert 100 < int(page.inner_text("#delay")) < 5000
    assert float(page.inner_text("#fps-in")) > 3 and float(page.inner_text("#fps-out")) > 3
    assert page.get_attribute("#status", "data-state") == "live"


def test_the_bundled_clip_moves_the_portrait(open_page):
    page = open_page()
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


def test_a_real_video_before_the_camera_moves_a_real_portrait(open_page, media_dir):
    page = open_page(media_dir / "driving.mp4")
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


def test_a_refused_portrait_is_shown_as_text_and_can_be_tried_again(open_page, tmp_path):
    page = open_page()
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

"""The chat page and the dashboard in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
from checkpoints import tiny_llama_dir
from servers import running

from pronk.serve.config import ServeConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tiny_llama_dir(
        tmp_path_factory.mktemp("pages") / "tiny", max_position_embeddings=32768)  # fmt: skip
    options = {"context": 32768, "kv_tokens": 65536}
    with running({"tiny": path, "other": path}, ServeConfig(port=0), **options) as server:
        yield server


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--window-size=1100,800", f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def slow_and_endless(engine) -> None:
    """Have a tiny model answer no faster than a person can stop it, and not end by itself."""
    run = engine.runner.run

    def slowly(*args):
        time.sleep(0.01)
        return run(*args)

    engine.eos_ids, engine.runner.run = frozenset(), slowly


def until(browser, condition, seconds: float = 30):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: condition())


def picture(browser, name: str) -> None:
    """Keep a screenshot where PRONK_SCREENSHOTS says, for people to look at."""
    folder = os.environ.get("PRONK_SCREENSHOTS")
    if folder:
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_a_conversation(server, browser):
    find = partial(browser.find_element, "css selector")
    every = partial(browser.find_elements, "css selector")
    browser.get(server.url)
    until(browser, lambda: [o.text for o in every("#model option")] == ["tiny", "other"])

    find("#open-settings").click()
    for field, value in (("max_tokens", "24"), ("seed", "3"), ("system", "Be brief.")):
        find(f"#{field}").clear()
        find(f"#{field}").send_keys(value)
    picture(browser, "settings")
    find("#close-settings").click()
    find("#prompt").send_keys("once upon a time\n")
    until(browser, lambda: every(".turn.assistant .figures") and not find("#send").get_property(
        "hidden"))  # fmt: skip
    assert find(".turn.user .said").text == "once upon a time"
    figures = find(".turn.assistant .figures").text
    assert "first token" in figures and "tokens/s" in figures and "24 tokens" in figures
    assert "cut off at the limit" in figures
    # Even where all of it came at once, a rate is one that an answer can have.
    assert float(re.search(r"([0-9.]+) tokens/s", figures)[1]) < 24 / 0.001
    picture(browser, "chat")

    # A long answer, stopped: the engine is free at once, and the conversation goes on.
    server.models[0].engine.call(slow_and_endless).result()
    browser.execute_script("document.getElementById('max_tokens').value = 3000")
    find("#prompt").send_keys("and then?\n")
    until(browser, lambda: find("#stop").is_displayed() and len(every(".turn.assistant")) == 2
          and every(".turn.assistant .said")[1].text)  # fmt: skip
    find("#stop").click()
    until(browser, lambda: every(".turn.assistant .figures")[1].text.endswith("stopped"))
    engine = server.models[0].engine
    until(browser, lambda: not engine.stats().running)
    browser.execute_script("document.getElementById('max_tokens').value = 4")
    find("#prompt").send_keys("more\n")
    until(browser, lambda: len(every(".turn.assistant")) == 3 and not find("#send").get_property(
        "hidden"))  # fmt: skip

    find("#theme").click()
    dark = browser.execute_script("return document.documentElement.dataset.theme")
    assert dark == "dark"
    background = find("body").value_of_css_property("background-color")
    assert background == "rgba(23, 22, 21, 1)"
    picture(browser, "chat-dark")
    find("#new").click()
    assert not every(".turn")

    # What the server refuses is said, and nothing of it stays in the conversation.
    browser.execute_script("document.getElementById('temperature').value = 9")
    find("#prompt").send_keys("hot\n")
    until(browser, lambda: every(".turn.failed"))
    assert "temperature" in find(".turn.failed .said").text
    assert_nothing_else_was_asked_for(server, browser)


def test_a_fast_answer_is_drawn_once_a_frame(server, browser):
    every = partial(browser.find_elements, "css selector")
    browser.get(server.url)
    until(browser, lambda: every("#model option"))
    browser.execute_script("""
        window.drawn = 0; window.frames_ = 0;
        const replace = Element.prototype.replaceChildren;
        Element.prototype.replaceChildren = function (...nodes) {
          if (this.className === "said") window.drawn += 1;
          return replace.apply(this, nodes);
        };
        const count = () => { window.frames_ += 1; requestAnimationFrame(count); };
        requestAnimationFrame(count);
        document.getElementById("max_tokens").value = 4000;
    """)
    engine = server.models[1].engine  # not the one that another test has slowed down
    ends = engine.call(lambda e: e.eos_ids).result()
    engine.call(lambda e: setattr(e, "eos_ids", frozenset())).result()
    browser.execute_script("document.getElementById('model').value = 'other'")
    browser.find_element("id", "prompt").send_keys("once upon a time\n")
    until(browser, lambda: every(".turn.assistant .figures") and every(
        ".turn.assistant .figures")[0].text.endswith("cut off at the limit"), 60)  # fmt: skip
    engine.call(lambda e: setattr(e, "eos_ids", ends)).result()
    assert "4000 tokens" in every(".turn.assistant .figures")[0].text
    drawn, frames = browser.execute_script("return [window.drawn, window.frames_]")
    # The user's text, what comes in each frame, and what is left at the end.
    assert 3 <= drawn <= frames + 3 and drawn < 2000
    assert_nothing_else_was_asked_for(server, browser)


def test_the_dashboard(server, browser):
    every = partial(browser.find_elements, "css selector")
    browser.get(f"{server.url}/dashboard")
    body = {"model": "tiny", "prompt": "once", "n": 4, "max_tokens": 200, "ignore_eos": True}
    with server.client() as http:
        until(browser, lambda: http.post("/v1/completions", json=body).is_success and all(
            path.get_attribute("d") for path in every("path.s0")), 60)  # fmt: skip
    outputs = {box.find_element("css selector", "h2").text.split("\n")[0]: box.text
               for box in every(".plot")}  # fmt: skip
    assert len(outputs) == 9
    shown = next(text for title, text in outputs.items() if title.startswith("Whole requests"))
    assert ("p99" in shown and "ms" in shown) or " s" in shown
    assert browser.find_element("id", "state").text == "live"
    # What the guard does, and what is not as it was.
    alarms = browser.find_element("id", "alarms")
    assert not alarms.is_displayed()
    metrics = server.served.context.metrics
    guard = next(box for box in every(".plot") if box.text.startswith("Guard"))
    until(browser, lambda: metrics.guarded("deny", "block", "input") or ("block 0.0" not in
          guard.text and "redact 0.0" in guard.text))  # fmt: skip
    for seconds in [0.01] * 60 + [3.0] * 20:
        metrics.of("tiny").first_token(seconds, 0.0)
    until(browser, lambda: alarms.is_displayed())
    assert alarms.text.startswith("tiny: time to first token is ") and "usually" in alarms.text
    browser.set_window_size(1100, 1500)
    picture(browser, "dashboard")
    assert_nothing_else_was_asked_for(server, browser)


def assert_nothing_else_was_asked_for(server, browser) -> None:
    """No error on the console but of refused requests, and no address but the server's."""
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)")  # fmt: skip
    assert asked and all(name.startswith((server.url, "data:")) for name in asked)
    for line in browser.get_log("browser"):
        assert "400 (Bad Request)" in line["message"], line

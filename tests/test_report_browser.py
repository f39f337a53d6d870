"""The report in a real browser: all charts drawn, no network requests, no errors, no sideways scrolling."""

from __future__ import annotations

import base64
import json
import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.report.write import write
from engine.search.runs import Run, open_run

QUIET = ("quic", "background-networking", "component-update", "sync", "extensions", "gpu", "dev-shm-usage")
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", "--remote-debugging-pipe", *(f"--disable-{q}" for q in QUIET)]

PATIENCE_S = 120.0  # on a busy machine


class Browser:
    """A headless Chromium, driven over a pair of pipes by its DevTools protocol: NUL-terminated JSON messages."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        line = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", line, "bash", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=quiet, stderr=quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in, self._rest = ours_out, ours_in, b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result; events received meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], PATIENCE_S)[0], "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has gone"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def evaluate(self, script: str) -> Any:
        """The value of a script in the page; waits for promises."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, path: Path, width: int, scheme: str = "light") -> None:
        """Loads a file into a window of `width` CSS pixels and waits until the page has been drawn."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=path.as_uri())
        self.evaluate(
            "new Promise(done => { const look = () => document.body && document.body.dataset.drawn "
            "? done() : setTimeout(look, 50); look(); })"
        )

    def complaints(self) -> list[str]:
        """Warnings and errors that the page logged, and uncaught exceptions."""
        found = []
        for event in self.events:
            details = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(details["exceptionDetails"]))
            if event["method"] == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
                found.append(str(details["args"]))
            if event["method"] == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
                found.append(str(details["entry"]))
        return found

    def requests(self) -> list[str]:
        """URLs that the page requested."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def picture(self, path: Path) -> None:
        """Saves the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Run:
    """The finished run, with MACs that put every second network by accuracy on the front, and the others off it."""
    found = open_run(str(finished_run))
    ranked = sorted(found.at(found.plan.high), key=lambda e: e.accuracy)
    macs = {e.trial.number: 50_000 * (place + 1) + 600_000 * (place % 2) for place, e in enumerate(ranked)}
    answers = {n: replace(e, macs=macs.get(n, e.macs)) for n, e in found.record.answers.items()}
    return replace(found, record=replace(found.record, answers=answers))


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write(run, tmp_path_factory.mktemp("report"))["report"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_the_report_reads_at_any_width(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    scrolled, seen = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scrolled <= seen
    narrow = browser.evaluate("[...document.querySelectorAll('.chart')].map(e => e.getBoundingClientRect().width)")
    assert len(narrow) == 11
    assert all(250 < chart <= width for chart in narrow)
    marks = browser.evaluate(
        "[...document.querySelectorAll('.chart')]"
        ".map(e => e.querySelectorAll('.point, .points path, .js-line, .hm image').length)"
    )
    assert min(marks) > 0  # every chart shows data, not only its axes


def test_colours_follow_the_scheme(browser: Browser, page: Path) -> None:
    script = "document.querySelector('#teacher .js-line').style.stroke"
    browser.open(page, 800, "light")
    light = browser.evaluate(script)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.evaluate("new Promise(done => setTimeout(done, 300))")
    assert browser.evaluate(script) != light


def test_hovering_names_the_architecture(browser: Browser, run: Run, page: Path) -> None:
    browser.open(page, 1440)
    browser.evaluate("Plotly.Fx.hover('low-full', [{curveNumber: 0, pointNumber: 0}])")
    shown = browser.evaluate("document.querySelector('#low-full .hoverlayer').textContent")
    names = {str(e.trial.architecture) for e in run.answers}
    assert any(shown.startswith(name) for name in names)
    assert "million MACs" in shown


STATE = """(() => {
const text = (selector) => document.querySelector(selector).textContent;
const ring = document.getElementById('front').data.at(-1);
const pressed = document.querySelector('.members [aria-pressed=true]');
return {
  network: text('#network .architecture'), facts: text('#network .facts'), said: text('#network'),
  command: text('.command code'), drawn: document.querySelectorAll('#network svg .node').length,
  budget: text('#budget-text'), slider: +document.getElementById('budget').value,
  ring: [ring.x[0], ring.y[0]], pressed: pressed && pressed.textContent,
};
})()"""


def state(browser: Browser) -> dict[str, Any]:
    """What the section of the front shows."""
    found: dict[str, Any] = browser.evaluate(STATE)
    return found


def press(browser: Browser, key: str) -> None:
    text = {"text": "\r"} if key == "Enter" else {}  # without it a button is not pressed
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)


KEYS = {"Enter": 13, "Home": 36, "End": 35, "ArrowRight": 39}


@pytest.mark.parametrize("width", [375, 1440])
def test_a_click_on_a_point_shows_its_network(browser: Browser, run: Run, page: Path, width: int) -> None:
    """A real click of the mouse, on a dot that is not the winner's."""
    browser.open(page, width)
    before = state(browser)
    assert run.best is not None
    assert before["network"] == before["pressed"] == str(run.best.trial.architecture)
    cheapest = run.front[0]
    assert str(cheapest.architecture) != before["network"]
    browser.evaluate("document.getElementById('front').scrollIntoView()")
    x, y = browser.evaluate(
        """(() => {
        const drawn = document.getElementById('front'), trace = drawn.data.findIndex((t) => t.name === 'on the front');
        const point = drawn.querySelectorAll('.scatterlayer .trace')[trace].querySelector('.point');
        const box = point.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
        })()"""
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    browser.evaluate("new Promise(done => setTimeout(done, 400))")
    after = state(browser)
    assert after["network"] == after["pressed"] == str(cheapest.architecture)
    assert after["ring"] == pytest.approx([cheapest.macs / 1e6, 100 * cheapest.valid_accuracy])
    assert f"{100 * cheapest.valid_accuracy:.1f}" in after["facts"]
    assert "its cheapest member" in after["said"]
    assert after["drawn"] == 4  # the nodes of a cell
    assert after["command"].endswith(f"--arch {cheapest.architecture}")
    assert browser.complaints() == []


def test_the_budget_picks_the_best_network_below_it_by_keyboard(browser: Browser, run: Run, page: Path) -> None:
    browser.open(page, 1440)
    browser.evaluate("document.getElementById('budget').focus()")
    press(browser, "Home")
    assert state(browser)["network"] == str(run.front[0].architecture)
    for _ in range(70):
        press(browser, "ArrowRight")
    found = state(browser)
    assert found["slider"] == 70
    limit = float(found["budget"].removeprefix("at most ").removesuffix(" million MACs"))
    best = max((m for m in run.trained if m.macs / 1e6 <= limit), key=lambda member: member.valid_accuracy)
    assert best.architecture not in (run.front[0].architecture, run.front[-1].architecture)
    assert found["network"] == found["pressed"] == str(best.architecture)
    press(browser, "End")
    assert state(browser)["network"] == str(run.front[-1].architecture)
    browser.evaluate("document.querySelector('.members button').focus()")
    press(browser, "Enter")
    assert state(browser)["network"] == str(run.front[0].architecture)
    assert state(browser)["slider"] == 0
    browser.evaluate("document.querySelector('input[value=params]').click()")
    assert "million parameters" in state(browser)["budget"]
    axis = browser.evaluate("document.getElementById('front').layout.xaxis.title.text")
    assert axis == "million parameters"
    assert browser.complaints() == []


@pytest.mark.parametrize("clipboard", ["granted", "denied"])
def test_the_copied_command_exports_the_chosen_network(browser: Browser, run: Run, page: Path, clipboard: str) -> None:
    """Also where the page has no right to the clipboard, by the selection."""
    browser.open(page, 1440)
    browser.evaluate("document.querySelector('.members button').click()")
    if clipboard == "denied":
        browser.evaluate("navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed'))")
    browser.evaluate("document.getElementById('copy').focus()")
    press(browser, "Enter")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert browser.evaluate("document.getElementById('copy').textContent") == "Copied"
    browser.evaluate("document.body.append(Object.assign(document.createElement('textarea'), {id: 'paste'}))")
    browser.evaluate("document.getElementById('paste').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="v", code="KeyV", modifiers=2, commands=["paste"])
    pasted = browser.evaluate("document.getElementById('paste').value")
    assert pasted == state(browser)["command"]
    assert shlex.split(pasted)[-4:] == ["export", str(run.folder), "--arch", state(browser)["network"]]

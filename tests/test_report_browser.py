"""The report in a real browser: all charts drawn, no network requests, no errors, no sideways scrolling."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
def page(finished_run: Path) -> Path:
    from engine.report.write import write
    from engine.search.runs import open_run

    return Path(write(open_run(str(finished_run)), finished_run / "report")["report"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_the_report_reads_at_any_width(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    scrolled, seen = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scrolled <= seen
    narrow = browser.evaluate("[...document.querySelectorAll('.chart')].map(e => e.getBoundingClientRect().width)")
    assert len(narrow) == 9
    assert all(250 < chart <= width for chart in narrow)
    marks = browser.evaluate(
        "[...document.querySelectorAll('.chart')].map(e => e.querySelectorAll('.point, .points path, .js-line').length)"
    )
    assert min(marks) > 0  # every chart shows data, not only its axes


def test_colours_follow_the_scheme(browser: Browser, page: Path) -> None:
    script = "document.querySelector('#teacher .js-line').style.stroke"
    browser.open(page, 800, "light")
    light = browser.evaluate(script)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.evaluate("new Promise(done => setTimeout(done, 300))")
    assert browser.evaluate(script) != light


def test_hovering_names_the_architecture(browser: Browser, page: Path) -> None:
    from engine.search.runs import open_run

    browser.open(page, 1440)
    browser.evaluate("Plotly.Fx.hover('low-full', [{curveNumber: 0, pointNumber: 0}])")
    shown = browser.evaluate("document.querySelector('#low-full .hoverlayer').textContent")
    names = {str(e.trial.architecture) for e in open_run(str(page.parent.parent)).answers}
    assert any(shown.startswith(name) for name in names)
    assert "million MACs" in shown

"""A headless browser for tests: Chromium, driven by its DevTools protocol over two pipes.

    with Browser() as browser:
        page = browser.page("http://127.0.0.1:8080/")
        page.js("document.title")

Nothing is needed beside the program itself.
"""
import base64
import fcntl
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser"))), None)
OPTIONS = ("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
           "--disable-background-networking", "--disable-extensions", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
           "--window-size=1200,800", "--force-color-profile=srgb", "about:blank")
# The browser reads commands from file 3 and writes to file 4.
START = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
SHIFT = 8


def _pipe():
    """A pipe whose two files have numbers above those that START uses."""
    low = os.pipe()
    high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10) for file in low]
    for file in low:
        os.close(file)
    return high


class Browser:
    """A running browser with a profile of its own; a context."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (their_in, out), (into, their_out) = _pipe(), _pipe()
        command = [sys.executable, "-S", "-c", START, str(their_in), str(their_out), PROGRAM, f"--user-data-dir={self._folder.name}"]
        self._process = subprocess.Popen([*command, *OPTIONS], pass_fds=(their_in, their_out), stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)
        os.close(their_in)
        os.close(their_out)
        self._out, self._in = open(out, "wb", buffering=0), open(into, "rb")
        self._ids, self._answers, self._pages = itertools.count(1), {}, {}
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._folder.cleanup()

    def _read(self):
        data = b""
        while part := self._in.read1(1 << 20):
            *messages, data = (data + part).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]].put(message)
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].note(message["method"], message["params"])

    def call(self, method, session=None, **params):
        """The result of a command of the protocol."""
        number = next(self._ids)
        self._answers[number] = queue.Queue()
        message = {"id": number, "method": method, "params": params} | ({} if session is None else {"sessionId": session})
        self._out.write(json.dumps(message).encode() + b"\0")
        answer = self._answers[number].get(timeout=60)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def page(self, url, **sizes):
        """A new Page that shows a URL, in a profile of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, context)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(**sizes)
        page.open(url)
        return page


class Page:
    """A page. requests: URLs that it asked for. complaints: errors of its scripts and of the browser, and dialogs that it opened."""

    def __init__(self, browser, session, context):
        self._browser, self._session, self._context = browser, session, context
        self.requests, self.complaints = [], []

    def call(self, method, **params):
        """The result of a command of the protocol."""
        return self._browser.call(method, self._session, **params)

    def note(self, method, params):
        """Take an event."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("exception", params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(params["args"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(params["message"])

    def close(self):
        """Forget the page and its profile."""
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def resize(self, width=1200, height=800):
        """Give the page another size, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700)

    def media(self, **features):
        """Let media queries have values, such as prefers-color-scheme."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)

    def open(self, url):
        """Go to a URL, and wait until it is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self):
        """Load the page anew."""
        self.js("window.old = true")
        self.call("Page.reload")
        self.wait("!window.old && document.readyState === 'complete'")

    def js(self, expression):
        """The value of an expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression, seconds=20):
        """The value of an expression, as soon as that is true."""
        end = time.monotonic() + seconds
        while True:
            try:
                if value := self.js(f"(value => value instanceof Node || value)({expression})"):
                    return value
            except AssertionError:      # the page is being replaced
                pass
            assert time.monotonic() < end, f"never true: {expression}; the page shows: {self.js('document.body.innerText')}"
            time.sleep(0.02)

    def text(self, selector):
        """The texts of all elements that a selector finds, as they are seen."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")

    def click(self, selector):
        """Click on the first element that a selector finds."""
        self.wait(f"document.querySelector({json.dumps(selector)})")
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector, text):
        """Write into a field as a keyboard does; what it had is replaced."""
        self.js(f"(() => {{ const field = document.querySelector({json.dumps(selector)}); field.focus(); field.select?.(); }})()")
        self.call("Input.insertText", text=text)

    def press(self, key, modifiers=0):
        """Press a key of KEYS."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=KEYS[key], modifiers=modifiers, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=KEYS[key], modifiers=modifiers)

    def point(self, expression):
        """Move the pointer to the middle of the element that an expression gives."""
        place = self.js(f"(box => ({{x: box.x + box.width / 2, y: box.y + box.height / 2}}))(({expression}).getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        return place

    def screenshot(self, path):
        """Write what is seen to a PNG file."""
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

"""The chat page in a headless browser: what it shows, sends and keeps."""
import base64
import hashlib
import json
import re
import threading
from pathlib import Path

import pytest
from browser import PROGRAM, SHIFT, Browser
from chat_server import BREAK, CODE, EVIL, HOLD, MARKDOWN, OK, SOURCE, ChatServer
from scripted import scripted
from serving import TINY, address, serving, wait_for

import pydsa

PATH = Path(pydsa.__file__).parent / "server/page.html"
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="neither chromium nor google-chrome is installed")


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server


@pytest.fixture
def page(browser, server):
    page = browser.page(server.url)
    page.wait("!document.querySelector('#send').disabled")
    yield page
    page.close()


def say(page, text="Hello", wait=True):
    """Send a message, and wait for the end of its answer."""
    page.wait("!document.querySelector('#send').disabled")
    page.type("#input", text)
    page.press("Enter")
    page.wait("runs.size === 1 || document.querySelector('article:last-child .under')")
    if wait:
        page.wait("!runs.size")


def test_the_policy_has_the_hash_of_the_script():
    text = PATH.read_text(encoding="utf-8")
    script, = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text, f"put sha256-{digest} into the page's policy"


def test_no_text_becomes_html():
    text = PATH.read_text(encoding="utf-8")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|srcdoc", text)
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", text)
    assert len(text.splitlines()) < 1300 and max(map(len, text.splitlines())) < 400


@needs_browser
def test_a_message_streams(page, server):
    server.says = [{"prompt_progress": {"processed": 20, "total": 40}}, {"reasoning_content": "Let me *think*."}, "An ", "answer", (HOLD,),
                   " is here.", OK]
    say(page, "Hello\nyou", wait=False)
    page.wait("document.querySelector('.assistant > .prose')?.innerText === 'An answer'")
    assert page.js("document.querySelector('article[aria-busy]') !== null && !document.querySelector('#stop').hidden")
    server.release.set()
    page.wait("!runs.size")
    assert page.text(".bubble") == ["Hello\nyou"] and page.text(".assistant > .prose") == ["An answer is here."]
    assert page.js("document.querySelector('.fold').open") is False and page.text(".fold summary") == ["Thoughts"]
    assert page.js("document.querySelector('.fold div').textContent") == "Let me think."
    assert page.text(".figures") == ["60 tokens, 123.4 tokens/s"] and page.text("#context") == ["Context: 100 of 4,096 tokens"]
    body, = server.bodies
    assert body["messages"] == [{"role": "user", "content": "Hello\nyou"}] and body["stream"] and body["model"] == "tiny"
    assert not {"temperature", "seed", "max_tokens", "tools", "chat_template_kwargs"} & set(body)
    assert page.js("document.querySelector('article[aria-busy]')") is None and page.text("#title") == ["Hello"]
    assert page.complaints == [] and all(url.startswith(server.url) for url in page.requests)
    page.js("[...document.querySelectorAll('article')].forEach((node) => { node.early = true; })")
    say(page, "Again")
    assert page.js("[...document.querySelectorAll('article')].map((node) => !!node.early)") == [True, True, False, False]
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": "Hello\nyou"},
        {"role": "assistant", "content": "An answer is here.", "reasoning_content": "Let me *think*."},
        {"role": "user", "content": "Again"}]


@needs_browser
def test_what_a_model_writes_stays_text(page, server):
    page.js("window.hits = []; window.hit = (what) => hits.push(what)")
    server.says = [{"reasoning_content": EVIL}, *(EVIL[i:i + 5] for i in range(0, len(EVIL), 5)),
                   {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "<img src=x onerror=hit()>", "arguments": EVIL}}]}, OK]
    say(page, EVIL)
    names = set(page.js("[...document.querySelectorAll('article *')].map((node) => node.localName)"))
    assert names <= set("a blockquote br button code details div figcaption figure h1 h3 label li p pre span strong summary svg table "
                        "tbody td textarea th thead tr ul use".split())
    links = page.js("[...document.querySelectorAll('.assistant a')].map((a) => [a.href, a.rel, a.target])")
    assert links == [["https://example.com/b.png", "noopener noreferrer", "_blank"]] * 2     # of the thoughts too
    assert page.js("document.querySelectorAll('article [onclick], article [onerror], article [onload]').length") == 0
    shown = page.text(".assistant > .prose")[0]
    assert '<script>hit("script")</script> <img src="//example.com/a.png"' in shown and "[one](javascript:hit)" in shown
    assert "&lt;script&gt;" in shown and "<svg onload=hit()>" in shown and "<style>*{display:none}</style>" in shown
    page.reload()
    assert page.js("window.hits") is None and len(page.text("article")) == 2
    assert page.complaints == [] and all(url.startswith(server.url) for url in page.requests)


@needs_browser
def test_code_and_tables(page, server):
    server.says = [CODE, OK]
    say(page)
    assert page.text("figcaption span") == ["python"] and page.text("pre code") == [SOURCE]
    assert page.text(".t-keyword") == ["def", "return"] and page.text(".t-comment") == ["# <b>"]
    assert page.text("thead th") == ["a", "b"] and page.text("tbody td") == ["1", "2"]
    assert page.js("document.querySelectorAll('td')[1].style.textAlign") == "right"
    assert page.text(".prose > ol > li > ul > li > em") == ["two"] and page.text(".prose > ol > li > strong") == ["three"]
    page.js("copyText = (text) => { window.copied = text; }")
    page.click("figcaption button")
    assert page.js("copied") == SOURCE


@needs_browser
def test_markdown_does_not_depend_on_how_it_comes(page):
    """In pieces of any size, and with times between frames of any length."""
    whole = page.js(f"""(() => {{
      window.made = (text, sizes, skip) => {{
        const root = document.createElement("div"), view = new MarkdownView(root);
        for (let at = 0, i = 0; at < text.length; i++) {{
          view.append(text.slice(at, at += sizes[i % sizes.length]));
          if (i % skip === 0) {{ view.next = 0; view.flush(); }}
        }}
        view.flush(true);
        return new XMLSerializer().serializeToString(root).replaceAll(/<span class="lines">|<\\/span>/g, "");
      }};
      window.text = {json.dumps(MARKDOWN)};
      return made(text, [text.length], 1);
    }})()""")
    for wanted in ("<h1>Title</h1>", "<del>old</del>", "<strong>结论：</strong>好 *as it is*", '<ol start="5">', "A_b_c *not closed, 2 * 3",
                   "<hr", 'href="https://example.org/a_(b)"', "``` no end\n", "| c | d |", "<blockquote><p>quote<br />"):
        assert wanted in whole
    assert page.js("[[[1], 1], [[2], 1], [[3, 1, 7], 1], [[5], 3], [[64], 1], [[1], 11]].map((how) => made(text, ...how))") == [whole] * 6


@needs_browser
def test_long_answers_are_not_quadratic(page):
    """Elements that are made while a text comes, for twice the text."""
    ratios = page.js("""(() => {
      const make = document.createElement;
      let n = 0;
      document.createElement = function (...args) { n++; return make.apply(this, args); };
      const cost = (text) => {
        const view = new MarkdownView(document.createElement("div"));
        n = 0;
        for (let at = 0; at < text.length; at += 8) { view.append(text.slice(at, at + 8)); view.next = 0; view.flush(); }
        view.flush(true);
        return n;
      };
      const texts = [["", "Some *words* in a line.\\n\\n"], ["```python\\n", "x = 1  # one\\n"]]
        .map(([head, part]) => (times) => head + part.repeat(times));
      const ratios = texts.map((text) => cost(text(400)) / cost(text(200)));
      document.createElement = make;
      return ratios;
    })()""")
    assert max(ratios) < 2.2


@needs_browser
def test_no_text_stops_the_page(page):
    """Texts that make careless parsers slow: 20,000 marks that wait for their end."""
    parts = ["*a ", "**a", "_a*", "[", "[a](", "![", "`", "`` ` ", "> ", "- ", "> - ", " ", "  \n", "|a", "|-", "<https://", "\\", "(",
             "#", "# ", "~~~ ", "https://a.b ", "1. ", "'", '"', "/*", "* * ", "***", "\t"]
    slow = page.js(f"""{json.dumps(parts)}.filter((part) => {{
      const start = performance.now();
      for (const [head, tail] of [["", ""], ["```js\\n", "\\n```\\n"], ["a|b\\n", ""]]) {{
        const view = new MarkdownView(document.createElement("div"));
        view.append(head + part.repeat(20000) + "x" + tail);
        view.flush(true);
      }}
      return performance.now() - start > 3000;
    }})""")
    assert slow == []


@needs_browser
def test_stop_retry_and_edit(page, server):
    server.says = ["The beginning", (HOLD,)]
    say(page, wait=False)
    page.wait("document.querySelector('.assistant > .prose')?.innerText === 'The beginning'")
    page.press("Escape")
    page.wait("!runs.size")
    assert page.text(".note span") == ["Stopped."] and page.text(".assistant > .prose") == ["The beginning"]
    for _ in range(500):
        if server.n_gone:
            break
        threading.Event().wait(0.01)
    assert server.n_gone == 1
    server.says = ["A new one", OK]
    page.click(".note button:last-child")
    page.wait("!runs.size && document.querySelector('.assistant > .prose').innerText === 'A new one'")
    assert len(page.text("article")) == 2 and server.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]
    page.click("#toast button")        # undo
    assert page.text(".assistant > .prose") == ["The beginning"]
    page.click(".user [aria-label=Edit]")
    page.type(".user textarea", "Another question")
    page.press("Enter")
    page.wait("!runs.size && document.querySelector('.bubble')?.innerText === 'Another question'")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Another question"}] and len(page.text("article")) == 2
    assert page.complaints == []


@needs_browser
def test_shift_enter_breaks_the_line(page, server):
    page.type("#input", "one")
    page.press("Enter", SHIFT)
    page.call("Input.insertText", text="two")
    assert page.js("document.querySelector('#input').value") == "one\ntwo" and not server.bodies
    page.reload()
    assert page.js("document.querySelector('#input').value") == "one\ntwo"


@needs_browser
def test_conversations_stay(page, server):
    server.says = ["First answer", OK]
    say(page, "First")
    page.click("#new")
    assert page.text("article") == [] and page.text("#empty h2") == ["What is on your mind?"]
    server.says = ["It began", (HOLD,)]
    say(page, "Second", wait=False)
    page.wait("document.querySelector('.assistant > .prose')?.innerText === 'It began'")
    damaged = {"pydsa.conversation.bad": "{", "pydsa.conversation.odd": '{"title": 1, "messages": [null]}', "pydsa.settings": "[["}
    page.js(f"Object.entries({json.dumps(damaged)}).forEach(([key, text]) => localStorage.setItem(key, text))")
    page.reload()
    assert page.text("#list .title") == ["Second", "First", "Damaged conversation", "Damaged conversation"]
    assert page.text(".assistant > .prose") == ["It began"]
    page.click("#list li:nth-child(3) .title")
    assert "cannot be read" in page.text(".note")[0] and page.js("document.querySelector('#send').disabled")
    page.click(".note button")
    page.click("#list li:nth-child(3) .icon")
    page.click("#list li:nth-child(2) .title")
    assert page.text(".assistant > .prose") == ["First answer"]
    page.click("#list li:nth-child(2) .icon")
    assert page.text("#list .title") == ["Second"] and page.text("article") == []
    page.reload()
    assert page.text("#list .title") == ["Second"]
    page.click("#open-settings")
    page.click("#delete-all")
    assert page.text("#list .title") == [] and not page.js("Object.keys(localStorage).some((key) => key.includes('conversation'))")
    page.click("#toast button")
    assert page.text("#list .title") == ["Second"]
    assert page.complaints == []


@needs_browser
def test_settings_stay_and_are_sent(page, server):
    page.click("#open-settings")
    values = {"temperature": "0.5", "top_p": "0.9", "min_p": "0", "top_k": "7", "max_tokens": "20", "seed": "3", "system": "Be brief."}
    for name, value in values.items():
        page.type(f"[name={name}]", value)
    page.js("(() => { const field = document.querySelector('[name=thinking]'); field.value = 'off'; "
            "field.dispatchEvent(new Event('change', {bubbles: true})); })()")
    page.click("#close-settings")
    page.reload()
    assert page.js(f"{json.dumps([*values])}.map((name) => document.querySelector(`[name=${{name}}]`).value)") == [*values.values()]
    say(page)
    body = server.bodies[0]
    assert {name: body[name] for name in values if name != "system"} == {
        name: float(value) for name, value in values.items() if name != "system"}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["chat_template_kwargs"] == {"enable_thinking": False}
    page.click("#open-settings")
    page.type("[name=top_p]", "5")       # out of its range: not taken
    page.click("#close-settings")
    say(page)
    assert server.bodies[1]["top_p"] == 0.9


@needs_browser
def test_dark_and_light(page):
    def lightness():
        return page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    page.media(prefers_color_scheme="light")
    assert lightness() > 200
    page.media(prefers_color_scheme="dark")
    assert lightness() < 60
    page.click("#switch-theme")
    assert lightness() > 200
    page.reload()
    assert lightness() > 200


@needs_browser
def test_errors_are_sentences(page, server):
    server.fails = 429, "8 requests wait already."
    say(page)
    assert page.text(".note.bad span") == ["8 requests wait already."] and page.text(".note button") == ["Try again"]
    server.fails, server.says = None, ["It was", {"error": {"message": "The weights are damaged."}}]
    page.click(".note button")
    page.wait("!runs.size && document.querySelector('.note span')?.innerText === 'The weights are damaged.'")
    assert page.text(".assistant > .prose") == ["It was"]
    server.says = ["Half an", (BREAK,)]
    page.click(".note button:last-child")
    page.wait("!runs.size && document.querySelector('.note span')?.innerText.startsWith('The connection was lost')")
    assert page.text(".assistant > .prose") == ["Half an"] and page.text(".note button") == ["Continue", "Try again"]
    server.says = [" answer", {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}, OK]
    page.wait("!document.querySelector('#send').disabled")
    page.click(".note button")
    page.wait("!runs.size && document.querySelectorAll('article').length === 4")
    assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert page.text("article:last-child .note span") == ["The answer reached the limit of tokens."]


@needs_browser
def test_no_connection_and_no_room(page, server):
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.js("Storage.prototype.setItem = () => { throw new Error('full'); }")
    page.call("Network.emulateNetworkConditions", offline=True, **offline)
    say(page)
    assert page.text(".note.bad span") == ["The server cannot be reached."] and "no room left" in page.text("#toast")[0]
    page.wait("document.querySelector('#banner').innerText === 'The server cannot be reached; trying again.'")
    page.call("Network.emulateNetworkConditions", offline=False, **offline)
    server.says = ["Here", OK]
    page.wait("document.querySelector('#banner').hidden && !document.querySelector('#send').disabled")
    page.click(".note button")
    page.wait("!runs.size && document.querySelector('.assistant > .prose')?.innerText === 'Here'")


@needs_browser
def test_loading_and_keys(browser, server):
    server.loading, server.key = True, "secret"
    page = browser.page(server.url)
    page.wait("document.querySelector('#banner').innerText === 'The model is being loaded; try again soon.'")
    assert page.js("document.querySelector('#send').disabled")
    server.loading = False
    page.wait("document.querySelector('#banner').innerText.startsWith('This server asks for an API key.')")
    page.click("#banner button")
    assert page.js("document.querySelector('#settings').open && document.activeElement.name === 'key'")
    page.type("[name=key]", "wrong")
    page.press("Enter")
    page.wait("document.querySelector('#banner').innerText.startsWith('The server does not take this API key.')")
    page.type("[name=key]", "secret")
    page.press("Enter")
    page.wait("document.querySelector('#banner').hidden && document.querySelector('#model').innerText === 'tiny'")
    page.click("#close-settings")
    server.says = ["Let in", OK]
    say(page)
    assert page.text(".assistant > .prose") == ["Let in"]
    page.close()


@needs_browser
def test_calls_and_their_results(page, server):
    page.click("#open-settings")
    page.type("[name=tools]", '[{"type": "function", "function": {"name": "weather"}}]')
    page.click("#close-settings")
    server.says = [{"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
                   {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
                   {"tool_calls": [{"index": 0, "function": {"arguments": ' "Oslo"}'}}]}, OK]
    say(page)
    assert page.text(".call summary") == ["Calls weather"] and page.text(".call code") == ['{\n  "city": "Oslo"\n}\n']
    assert server.bodies[0]["tools"] == [{"type": "function", "function": {"name": "weather"}}]
    server.says = ["Rain.", OK]
    page.type(".editor textarea", "wet")
    page.click(".editor .main")
    page.wait("!runs.size && document.querySelectorAll('article').length === 4")
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert server.bodies[1]["messages"][1:] == [{"role": "assistant", "content": "", "tool_calls": [call]},
                                                {"role": "tool", "content": "wet", "tool_call_id": "c1"}]


@needs_browser
def test_export(page, server):
    server.says = [{"reasoning_content": "Hm."}, "An answer", OK]
    say(page)
    page.js("URL.createObjectURL = (blob) => { window.blob = blob; return 'blob:none'; }; "
            "HTMLAnchorElement.prototype.click = function () { window.file = this.download; }")
    page.click("#export-md")
    assert page.js("blob.text()") == "# Hello\n\n## User\n\nHello\n\n## Assistant\n\n> Hm.\n\nAn answer\n" and page.js("file") == "Hello.md"
    page.click("#export-json")
    messages = json.loads(page.js("blob.text()"))["messages"]
    assert [message["content"] for message in messages] == ["Hello", "An answer"] and page.js("file") == "Hello.json"


@needs_browser
def test_a_phone(page, server):
    server.says = [CODE + "\n`" + "wide" * 100 + "`\n\n" + "|" + " column |" * 20 + "\n|" + "---|" * 20, OK]
    page.resize(360, 640)
    say(page)
    assert page.js("document.documentElement.scrollWidth <= 360 && document.querySelector('#scroller').scrollWidth <= 360")
    assert page.js("document.querySelector('#send').getBoundingClientRect().right <= 360")
    page.wait("getComputedStyle(document.querySelector('#side')).visibility === 'hidden'")
    page.click("#menu")
    page.wait("document.querySelector('#side').getBoundingClientRect().left === 0")
    assert page.text("#list .title") == ["Hello"]


@needs_browser
def test_everything_has_a_name(page, server):
    """Buttons, fields and what they are called for those who do not see."""
    server.says = [{"reasoning_content": "Hm."}, CODE, OK]
    say(page)
    page.click("#open-settings")
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    page.click("#close-settings")
    nodes += page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "spinbutton", "link", "dialog")
    controls = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert len(controls) > 20 and all(node["name"]["value"].strip() for node in controls)


@needs_browser
def test_a_real_server(browser, small_model):
    """A key, a stream with a call of a tool, and an answer that is stopped."""
    model = scripted("glm-4.7", small_model(**TINY))
    model.writes = "Let me see.</think>Look:<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"
    with serving(model, keys=("secret",), alias="tiny") as server:
        page = browser.page("http://%s:%d/" % address(server))
        page.wait("document.querySelector('#banner').innerText.startsWith('This server asks for an API key.')")
        parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
        values = {"key": "secret", "thinking": "on", "tools": json.dumps(tools)}
        page.js(f"Object.entries({json.dumps(values)}).forEach(([name, text]) => {{ field(name).value = text; takeSetting({{target: "
                "field(name)}); })")
        say(page)
        assert page.text(".assistant > .prose") == ["Look:"] and page.text(".call summary") == ["Calls weather"]
        assert page.text(".call code") == ['{\n  "city": "Oslo"\n}\n']
        assert page.js("document.querySelector('.fold .prose').textContent") == "Let me see." and page.text(".note") == []
        assert "tokens, " in page.text(".figures")[0] and " of 4,096 tokens" in page.text("#context")[0]
        model.writes, model.seconds = "</think>" + "word " * 2000, 0.02
        say(page, "Go on", wait=False)
        page.wait("document.querySelector('article:last-child > .prose')?.innerText.startsWith('word')")
        page.press("Escape")
        wait_for(lambda: all(slot.state == "idle" for slot in server.service.engine.slots()))
        assert page.text("article:last-child .note span") == ["Stopped."] and all("401" in str(text) for text in page.complaints)
        page.close()

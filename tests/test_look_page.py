"""The page of pydsa look in a headless browser: what it shades, for whom, and how it is used."""
import time

import numpy as np
import pytest
from browser import PROGRAM, Browser
from look_cases import Words, random_recording, recording

from pydsa.look import Look

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="neither chromium nor google-chrome is installed")
EVIL = "</script><img src=x onerror=alert(1)>"
WORDS = Words("<|start|>", " red", " blue", " green", "\n", EVIL, " four", " five")
N, N_PROMPT = 48, 45        # of these and three of the answer, the last is written, but not run


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def noted():
    """A Look whose answer looks at tokens 3, 4 and 5 in turn.

    That is in layer 0; in layer 3, and in 7, which shares its choices, it is always 9.
    """
    rows = {0: np.tile(np.int32([0, 1]), (N - 1, 1)), 3: np.tile(np.int32([8, 9]), (N - 1, 1))}
    rows[0][44:] = [[2, 3], [2, 4], [2, 5]]
    scores = {layer: np.tile(np.float32([0, np.log(3)]), (N - 1, 1)) for layer in rows}
    for values in scores.values():
        values[20] = np.nan         # were not recorded
    all_keys = np.arange(N - 1) < 10
    tokens = [0, *(1 + i % 7 for i in range(N - 1))]
    experts = {3: np.array([[i % 2, 2] for i in range(N - 1)])}
    kept = recording(tokens[:-1], {**rows, 7: rows[3]}, {**scores, 7: scores[3]}, experts, all_keys=all_keys, shared={7: 3}, name=EVIL)
    return Look(kept, WORDS, tokens, N_PROMPT)


def opened(browser, path, look, **sizes):
    look.save(path)
    page = browser.page(path.as_uri(), **sizes)
    page.wait("document.body.dataset.ready !== undefined && (choices || !D.choices)")
    return page


@pytest.fixture(scope="module")
def shared_page(browser, tmp_path_factory):
    page = opened(browser, tmp_path_factory.mktemp("look") / "look.html", noted())
    yield page
    assert page.complaints == [] and len(page.requests) == 1
    page.close()


@pytest.fixture
def page(shared_page):
    shared_page.js("Object.assign(state, {group: 0, layer: NONE, measure: 'weights', before: 1, focus: null, pinned: null}); "
                   "$('layer').value = -1; $('pointer').value = 1; $('measure').value = 'weights'; $('group').value = 0; "
                   "document.activeElement.blur(); render()")
    return shared_page


def looked(page):
    """{token: percent} of the tokens with a shade in the text."""
    page.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    shaded = page.js(f"[...Array({N}).keys()].filter((i) => nodeOf(i).style.backgroundColor)")
    values = page.js("[...looked.values]")
    assert shaded == [i for i, value in enumerate(values) if value > 0]
    return {i: round(100 * values[i]) for i in shaded}


def choose(page, name, value):
    page.js(f"(() => {{ $('{name}').value = '{value}'; $('{name}').dispatchEvent(new Event('change')); }})()")


def near(percents):
    """Shares are stored in 64 steps."""
    return {token: pytest.approx(value, abs=1) for token, value in percents.items()}


ALL = near({2: 8, 3: 8, 4: 8, 5: 8, 8: 17, 9: 50})
OF_3, OF_5 = near({2: 8, 3: 25, 8: 17, 9: 50}), near({2: 8, 5: 25, 8: 17, 9: 50})


def test_the_answer_shades_the_text(page):
    assert looked(page) == ALL
    assert page.js("nodeOf(9).style.backgroundColor") != page.js("nodeOf(3).style.backgroundColor")
    assert page.text("#title") == ["What the answer looked at"] and EVIL in page.text("#about")[0]
    assert page.text("#answer button") == [" green", "↵\n", EVIL]
    assert page.text("#ticks span") == ["0 %", "13 %", "50 %"]


def test_a_layer_can_be_picked(page):
    assert page.text("#layer option") == ["all", "0", "3", "7 (with the choice of layer 3)"]
    choose(page, "layer", 0)
    assert looked(page) == near({2: 25, 3: 25, 4: 25, 5: 25})
    choose(page, "measure", "times")
    assert looked(page) == {2: 100, 3: 33, 4: 33, 5: 33} and page.text("#unit") == ["chosen by"]
    choose(page, "group", 1)
    assert looked(page) == {0: 100, 1: 100}


def test_the_pointer_shows_what_a_token_looked_at(page):
    page.point("$('answer').children[0]")
    assert looked(page) == OF_3 and "4 tokens looked at" in page.text("#readout")[0]
    assert page.js("[...Array(48).keys()].filter((i) => nodeOf(i).classList.contains('chosen'))") == [2, 3, 8, 9]
    page.point("$('answer').children[2]")
    assert looked(page) == OF_5
    choose(page, "pointer", 0)
    page.point("$('answer').children[1]")
    assert looked(page) == OF_5
    page.js("goTo(4, false)")
    page.point("nodeOf(4)")
    assert looked(page) == {} and "all 5 tokens up to itself: no choice was made" in page.text("#readout")[0]
    page.js("focusOn(20)")
    assert looked(page) == {} and "4 tokens looked at" in page.text("#readout")[0]
    page.point("$('title')")
    assert looked(page) == ALL


def test_a_click_keeps_a_token(page):
    page.click("#answer button")
    page.point("$('title')")
    assert looked(page) == OF_3
    page.press("Escape")
    assert looked(page) == ALL


def test_the_keyboard_moves_through_text_and_maps(page):
    page.js("$('text').focus()")
    page.press("ArrowLeft")
    assert page.js("state.focus") == N_PROMPT - 1
    page.press("ArrowRight")
    assert looked(page) == OF_3
    page.press("Home")
    assert looked(page) == {} and page.text("#readout")[0].endswith("No step wrote the first token.")
    page.press("Escape")
    assert looked(page) == ALL
    page.js("document.querySelector('#answer button').focus()")
    assert looked(page) == OF_3
    page.js("document.querySelector('#heat canvas').focus()")
    assert looked(page) == ALL      # drawn before the keys come
    for key in ("ArrowDown", *["ArrowRight"] * 9):
        page.press(key)
    assert page.text("#heat .under")[0].startswith("layer 3, position 9: 75 % — “")
    page.press("ArrowDown")
    assert page.text("#heat .under")[0].startswith("layer 7 (with the choice of layer 3), position 9: 75 %")
    page.js("document.querySelector('#experts canvas').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.text("#experts .under") == ["layer 3, expert 2: 100 % of the tokens"]


def test_tables_and_lists(page):
    rows = [line.split("\t") for line in page.text("#layers table")[0].splitlines()]
    heads, first = page.text("#layers th[scope=col]"), page.text("#layers tbody tr:first-child td")
    assert heads[:3] == ["layer", "overlap, prompt", "overlap, answer"] and len(rows) >= 4
    assert dict(zip(heads[1:], first))["overlap, answer"] == "33 %" and dict(zip(heads[1:], first))["keys of the answer"] == "4"
    assert page.text("#layers tbody th") == ["0", "3", "7 ← 3"]
    page.point("$('title')")
    assert page.text("#top b") == ["100 %"] and "red" in page.text("#top i")[0]     # all are near each other


def test_texts_are_texts(page):
    assert page.js("document.querySelectorAll('img, #text script').length") == 0
    assert page.js("nodeOf(5).textContent") == EVIL and page.js("nodeOf(0).classList.contains('control')")
    assert page.js("nodeOf(4).textContent") == "↵\n" and page.js("$('text').textContent").count(EVIL) == 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_can_be_read(page, scheme):
    """The contrast of letters and shade is 4.5 at least, as WCAG asks."""
    page.media(prefers_color_scheme=scheme)
    page.wait(f"colours[0][0] === {255 if scheme == 'light' else 23}")
    contrasts = page.js("""(() => {
        const part = (c) => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
        const light = (css) => { const [r, g, b] = css.match(/[\\d.]+/g).map(Number).map(part); return .2126 * r + .7152 * g + .0722 * b; };
        const node = document.createElement("span"), found = [];
        document.body.append(node);
        for (let v = 1; v <= 256; v++) {
          shade(node, (v / 256) ** 2, 1);
          const {color, backgroundColor} = getComputedStyle(node), [a, b] = [light(color), light(backgroundColor)].sort((x, y) => y - x);
          found.push((a + .05) / (b + .05));
        }
        node.remove();
        return found;
    })()""")
    page.media(prefers_color_scheme="light")
    assert min(contrasts) >= 4.5, contrasts.index(min(contrasts))


def test_a_narrow_screen_has_room(browser, tmp_path):
    page = opened(browser, tmp_path / "look.html", noted(), width=360, height=700)
    assert page.js("document.documentElement.scrollWidth <= innerWidth") and page.complaints == []
    page.close()


def test_a_long_text_opens_soon(browser, tmp_path):
    n = 20_000
    seen = Look(random_recording(n, 4, (0, 1, 2, 3), 8, scored=False), Words(*(f" word{i}" for i in range(7)), "\n"), n_prompt=n - 20)
    start = time.monotonic()
    page = opened(browser, tmp_path / "look.html", seen)
    assert time.monotonic() - start < 10        # it takes about one second
    assert page.js("document.querySelectorAll('#text .t').length") < 5000
    page.js("goTo(100, false)")
    page.point("nodeOf(100)")
    assert page.wait("state.focus === 100 && [...looked.values].filter((v) => v).length >= 4")
    assert page.complaints == [] and len(page.requests) == 1
    page.close()


def test_routing_alone_has_a_page(browser, tmp_path):
    seen = Look(recording([0, 1, 2], None, None, {1: np.array([[0, 1], [2, 3], [0, 3]])}), WORDS, n_prompt=2)
    page = opened(browser, tmp_path / "look.html", seen)
    assert page.complaints == [] and not page.js("$('experts').hidden")
    assert page.js("$('heat').hidden") and page.js("$('controls').hidden")
    page.close()

"""The page and the pictures of what was attended to: their numbers, against recordings written by hand; what they hold back."""
import base64
import hashlib
import html
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from look_cases import Words, random_recording, recording

from pydsa import PydsaError
from pydsa.look import Look, files, look_at_recording, numbers, page
from pydsa.look.texts import PART, token_texts

WORDS = Words("The", " code", " is", " 59", "20", ".", "\n", "<|end|>")
CHOSEN = np.array([[0, -1], [0, 1], [0, 2], [1, 3], [1, 2], [1, 5]], np.int32)      # top_k is 2: rows from the third on made a choice
SCORES = np.array([[0, np.nan], [0, 0], [0, np.log(3)], [0, 0], [np.log(9), 0], [0, 0]], np.float32)


def small(**changes):
    """Six tokens, the last two of an answer with one more that did not run."""
    fields = {"tokens": [0, 1, 2, 3, 0, 1], "selection": {0: CHOSEN, 2: CHOSEN[:, ::-1] * 0 + [0, 1]}, "scores": {0: SCORES, 2: SCORES * 0},
              "experts": {0: np.array([[0, 1]] * 3 + [[1, 2]] * 3), 2: np.array([[3, 0]] * 6)}}
    return recording(**fields | changes)


def look(**changes):
    return Look(small(**changes), WORDS, [0, 1, 2, 3, 0, 1, 5], 4)


def unblock(text, dtype=np.uint8):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def integers(planes):
    return sum(unblock(text).astype(np.int64) << 8 * i for i, text in enumerate(planes))


def sums(stored):
    return stored["scale"] * (integers(stored["planes"]) / 65535) ** 2


def test_characters_of_several_tokens_are_shown_whole():
    words = Words(b"\xe4\xbd", b"\xa0\xe5\xa5", b"\xbd", "a\n", b"\xff", "<|end|>", b"\xe4", "\x1b\u202e")
    texts, control = token_texts(words, [0, 1, 2, 3, 4, 6, 5, -1, 7])
    assert texts == ["你", "好", PART, "a\n", "\ufffd", "\ufffd", "<|end|>", "\u25af", "^[<U+202E>"]
    assert control.tolist() == [False] * 6 + [True] + [False] * 2


def test_shares_are_the_softmax_over_the_chosen_keys():
    assert np.allclose(numbers.shares(SCORES, CHOSEN)[[0, 1, 2, 4]], [[1, 0], [.5, .5], [.25, .75], [.9, .1]])
    assert (numbers.shares(SCORES[:1] * np.nan, CHOSEN[:1]) == 0).all()


def test_the_answer_is_looked_at_by_the_steps_that_wrote_it():
    figures = look().figures
    answer, before = figures.groups
    assert answer.rows.tolist() == [3, 4, 5] and before.rows.tolist() == [2] and figures.all_keys.tolist() == [0, 1]
    assert answer.times[0].tolist() == [0, 3, 1, 1, 0, 1, 0] and before.times[0].tolist() == [1, 0, 1, 0, 0, 0, 0]
    assert np.allclose(answer.weights[0], [0, .5 + .9 + .5, .1, .5, 0, .5, 0])
    assert np.allclose(figures.looked_at(layer=0) * 3, answer.weights[0])
    assert np.allclose(figures.looked_at(), (answer.weights[0] + answer.weights[2]) / 6)
    assert answer.experts[0].tolist() == [0, 3, 3, 0] and before.experts[2].tolist() == [3, 0, 0, 3]
    alone = Look(small(scores=None), WORDS).figures
    assert alone.groups[0].rows.tolist() == [5] and alone.looked_at(layer=0).tolist() == [0, 1, 0, 0, 0, 1]


def test_overlaps_and_unions():
    figures = look().figures
    assert np.array_equal(figures.overlaps[0], [np.nan, 0, .5, .5], equal_nan=True)
    row, other = figures.layer_rows
    assert row["overlap_answer"] == pytest.approx(1 / 3) and row["overlap_prompt"] is None and row["keys_answer"] == 4
    assert row["union_2"] == pytest.approx((4 / 2 + 3 / 2) / 2) and row["union_4"] == 5 / 2 and row["union_8"] is None
    assert other["overlap_answer"] == 1 and other["union_4"] == 1
    assert row["experts_answer"] == pytest.approx(2) and row["mass_answer"] is None
    gap = small()
    gap.positions[4:] += 1          # a token between was not recorded: no neighbours
    assert np.array_equal(Look(gap, WORDS).figures.overlaps[0], [np.nan, 0, np.nan, .5], equal_nan=True)


def test_measured_numbers_are_shown():
    mass = {0: np.array([1, 1, .5, .6, .7, .8], np.float32)}
    seen = Look(small(mass=mass), WORDS, n_prompt=4, recall={2: .97})
    row, other = seen.figures.layer_rows
    assert row["mass_prompt"] == pytest.approx(.5) and row["mass_answer"] == pytest.approx(.65) and row["recall"] is None
    assert other["recall"] == .97 and other["mass_prompt"] is None


def test_the_page_has_the_numbers():
    seen = look()
    data, figures = page.page_data(seen), seen.figures
    assert "".join(data["texts"]) == "The code is 59The code." and data["n_prompt"] == 4 and data["all_keys"] == [[0, 1]]
    for stored, group in zip(data["groups"], figures.groups):
        assert stored["rows"] == len(group.rows) and stored["times"]["all"] is None
        for name, found in ("times", group.times), ("weights", group.weights):
            assert np.allclose(sums(stored[name]["layers"]).reshape(2, 7), [found[0], found[2]], rtol=1e-4, atol=1e-9)
    choices = data["choices"]
    assert choices["positions"] == [[2, 5]] and choices["k"] == 2
    steps = integers(choices["planes"]).reshape(4, 2, 2)
    assert (np.cumsum(steps, axis=2) - 1 == np.stack([CHOSEN[2:], [[0, 1]] * 4], axis=1)).all()
    shares = (unblock(choices["shares"]).reshape(4, 2, 2) / 63.0) ** 2
    assert np.abs(shares[:, 0] - numbers.shares(SCORES, CHOSEN)[2:]).max() < .02
    assert unblock(data["overlap"]["cells"]).reshape(2, 4).tolist() == [[255, 0, 127, 127], [255, 254, 254, 254]]
    experts = integers(data["experts"]["groups"][0]["planes"]).reshape(2, 4)
    assert experts.tolist() == [[0, 3, 3, 0], [3, 0, 0, 3]] and data["experts"]["n"] == 4


def test_keys_that_are_missing_end_a_row():
    rows = np.array([[0, 4, 300], [7, -1, -1], [-1, -1, -1]], np.int32)
    from pydsa.look import pack
    steps = pack.steps(rows)
    assert steps.tolist() == [[1, 4, 296], [8, 0, 0], [0, 0, 0]]
    assert integers(pack.planes(steps)).tolist() == steps.reshape(-1).tolist()


def test_a_large_recording_makes_a_bounded_page(monkeypatch):
    seen = Look(random_recording(400, 8, (0, 1, 2), 8), WORDS, n_prompt=380)
    whole, cut = page.page_data(seen), page.page_data(seen, entries=8 * 3 * 50)
    assert whole["choices"]["positions"] == [[8, 399]] and cut["choices"]["positions"] == [[350, 399]]
    assert any("Of 342 tokens the page has no choices" in note for note in cut["notes"]) and cut["groups"] == whole["groups"]
    few = page.page_data(seen, entries=8 * 3 * 10)
    assert few["choices"]["positions"] == [[379, 388]]      # the answer comes first
    monkeypatch.setattr(page, "CELLS", 3 * 150)
    binned = page.page_data(seen)
    assert binned["bin"] == 4 and any("4 neighbouring positions" in note for note in binned["notes"])
    stored, answer = binned["groups"][0]["weights"], seen.figures.groups[0].weights
    assert np.allclose(sums(stored["layers"]).reshape(3, 100)[1], answer[1].reshape(100, 4).sum(1), rtol=1e-3, atol=1e-6)
    assert np.allclose(sums(stored["all"]), sum(answer.values()), rtol=1e-3, atol=1e-6)


def test_what_is_missing_is_said():
    short = Look(small(all_keys=np.ones(6, bool)), WORDS, n_prompt=4)
    assert any("No choice was made" in note for note in page.page_data(short)["notes"]) and not short.figures.looked_at().any()
    late = look_at_recording(small(first=100), Words(*WORDS.data[:4]), 2)
    data = page.page_data(late)
    assert data["texts"][:100] == ["\u25af"] * 100 and data["n_prompt"] == 104
    assert any(note.startswith("100 tokens were not recorded") for note in data["notes"])
    routed = Look(small(selection=None, scores=None), WORDS, n_prompt=4)
    data = page.page_data(routed)
    assert data["choices"] is None and data["overlap"] is None and data["experts"]["layers"] == [0, 2]
    assert "Choices were not recorded: there is nothing to shade." in data["notes"] and routed.html()


def test_layers_can_be_picked():
    data = page.page_data(Look(small(shared={2: 0}), WORDS, layers=[2]))
    assert data["chosen_layers"] == [2] and data["shared"] == {"2": 0}
    assert [row["layer"] for row in data["table"]["rows"]] == [2]


@pytest.mark.parametrize("make, message", [
    (lambda: Look(small(), WORDS, layers=[1]), "There is no layer 1, expected of 0 to 2"),
    (lambda: Look(small(), WORDS, layers=[]), "There is no layer to show"),
    (lambda: Look(small(), WORDS, n_prompt=0), "n_prompt is 0, expected 1 to 6"),
    (lambda: Look(small(), WORDS, ids=[0, 1, 2, 3, 0, 2]), "of other tokens than the text"),
    (lambda: Look(small(), WORDS, ids=[0, 1]), "of other tokens than the text"),
    (lambda: look_at_recording(small(), WORDS), "expected the same model"),
    (lambda: look_at_recording(small(), Words(*WORDS.data[:4]), 6), "cannot have 6 of the recording's 6 tokens"),
    (lambda: Look(recording([], {0: CHOSEN[:0]}), WORDS), "has no tokens")])
def test_mistakes(make, message):
    with pytest.raises(PydsaError, match=re.escape(message)):
        make()


class Elements(HTMLParser):
    """The elements of a page: [(name, attributes)], and the texts of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


EVIL = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\u2028"


def test_no_text_becomes_html():
    seen = Look(small(name=EVIL), Words(EVIL, "{{script}}", " is", " 59", "20"), n_prompt=4, note=EVIL)
    plain, found = Elements(look().html()), Elements(seen.html())
    assert [name for name, _ in found.found] == [name for name, _ in plain.found] and len(found.scripts) == 2
    assert not set("<>&\u2028\u2029") & set(found.scripts[0])
    data = json.loads(found.scripts[0])
    assert data["texts"][0] == EVIL.replace("\u2028", "<U+2028>") and data["texts"][1] == "{{script}}" and data["notes"][-1] == EVIL
    assert found.scripts[1] == plain.scripts[1]
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function", found.scripts[1])


def test_the_page_allows_its_own_script_and_style_only():
    text = look().html()
    policy, = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    for name in "script", "style":
        content = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)""", text.split('<script id="data"')[0])


def test_a_notebook_gets_the_page_in_a_frame_that_only_runs_scripts():
    seen = look()
    text = seen._repr_html_()
    frame, = Elements(text).found
    assert frame[0] == "iframe" and frame[1]["sandbox"] == "allow-scripts" and frame[1]["srcdoc"] == seen.html()
    assert html.escape(seen.html()) in text and repr(seen) == "<pydsa.Look: 7 tokens, 3 of them the answer, 2 layers of a model>"


def test_files_of_others_are_not_replaced(tmp_path):
    path = tmp_path / "look.html"
    look().save(path)
    first = path.read_bytes()
    Look(small(name="another"), WORDS).save(path)
    assert path.read_bytes() != first and [entry.name for entry in tmp_path.iterdir()] == ["look.html"]
    for ending in files.MARKS:
        mine = tmp_path / f"mine{ending}"
        mine.write_text("mine")
        with pytest.raises(PydsaError, match="would be lost"):
            files.replace(mine, ending, b"x")
        assert mine.read_text() == "mine"
    for name, message in (("a.png", "must end in .html"), ("no/a.html", "No such file"), ("a\0.html", "cannot be written")):
        with pytest.raises(PydsaError, match=message):
            look().save(tmp_path / name)


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from pydsa.look import pictures
    mass = {0: np.full(6, .5), 2: np.full(6, .9)}
    seen = Look(small(mass=mass), WORDS, [0, 1, 2, 3, 0, 1, 5], 4)
    paths = seen.pngs(tmp_path / "new")
    assert [Path(path).name for path in paths] == [f"{name}.png" for name in pictures.NAMES]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in paths)
    seen.png(paths[0])      # its own are replaced
    with pytest.raises(PydsaError, match="must end in .png"):
        seen.png(tmp_path / "a.html")


def test_the_picture_of_the_text_shows_where_the_answer_looked():
    pytest.importorskip("matplotlib")
    from pydsa.look import pictures
    n = 900
    selection = np.full((n, 2), -1, np.int32)
    selection[:] = [0, 1]
    selection[850:] = [300, 301]
    words = Words(*[f" w{i}" for i in range(n)])
    seen = Look(recording(list(range(n)), {0: selection}), words, n_prompt=851)
    ranges = pictures.excerpt(seen, seen.figures.looked_at())
    assert 300 in ranges[0] and 850 in ranges[1] and n - 1 in ranges[1]
    texts = [text.get_text() for text in pictures.draw_text(seen).axes[0].texts]
    assert "w300" in [text.strip() for text in texts] and "\u2026 230 tokens \u2026" in texts
    patches = pictures.draw_text(seen).axes[0].patches
    assert len(patches) == 2        # the two tokens that were looked at


def test_lines_of_the_picture_break_between_words():
    from pydsa.look import pictures
    words = Words(" a", " long", "er", "x" * 250)
    seen = Look(recording([0] * 49 + [1, 2, 3], {0: np.zeros((52, 1), np.int32)}), words)
    lines = ["".join(text for _, _, text in line) for line in pictures._lines(seen, [range(52)])]
    assert lines == [" a" * 49, "longer" + "x" * 98, "x" * 104, "x" * 48]
    wide = Look(recording([0], {0: np.zeros((1, 1), np.int32)}), Words("\u4f60" * 60))
    assert [len(line[0][2]) for line in pictures._lines(wide, [range(1)])] == [52, 8]

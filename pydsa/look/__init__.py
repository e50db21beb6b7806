"""Look at what a model attended to: a page, pictures and numbers.

    look = model.look("... What is the code of the autumn kettle?")
    look                        # in a notebook: the page
    look.save("look.html"); look.png("look.png")

The numbers are those of figures.py; page.py makes the page, pictures.py the pictures.
"""
import html

import numpy as np

from pydsa.errors import PydsaError
from pydsa.look.figures import Figures
from pydsa.look.files import replace
from pydsa.look.page import ENTRIES, make_page
from pydsa.look.texts import token_texts

INLINE = 1 << 20        # entries of choices in a page that is part of a notebook


class Look:
    """What the tokens of a recording attended to, made by Model.look().

    recording: a Recording. tokenizer: that of its model. ids: the tokens of the whole text, a list of int; None: those of the recording.
    n_prompt: how many of them come before the answer; None: there is no answer. layers: the numbers of the layers to show; None: all.
    recall: {layer: the share of the keys that another choice has too}, where it was measured. note: a sentence that the page ends with.

    texts, control: the tokens as texts (texts.py). figures: the Figures. answer: the text of the answer. Raises PydsaError for a recording
    that is empty, and for layers that it has not.
    """

    def __init__(self, recording, tokenizer, ids=None, n_prompt=None, layers=None, recall=None, note=None):
        if not len(recording.positions):
            raise PydsaError("The recording has no tokens, expected one of a prompt or an answer.")
        check_layers(layers, recording.layers)
        self.recording, self.n_prompt, self.note = recording, n_prompt, note
        self.ids = _ids(recording, ids)
        if n_prompt is not None and not 0 < n_prompt <= len(self.ids):
            raise PydsaError(f"n_prompt is {n_prompt}, expected 1 to {len(self.ids)}, the tokens of the text.")
        self.texts, self.control = token_texts(tokenizer, self.ids)
        self.answer = "" if n_prompt is None else tokenizer.decode(self.ids[n_prompt:], skip_special=True)
        self.figures = Figures(recording, len(self.ids), n_prompt, layers, recall)

    def __repr__(self):
        answer = "" if self.n_prompt is None else f", {len(self.ids) - self.n_prompt} of them the answer"
        return f"<pydsa.Look: {len(self.ids)} tokens{answer}, {len(self.figures.layers)} layers of {self.recording.facts.name}>"

    def html(self, entries=ENTRIES):
        """The page, a str.

        entries: how many chosen keys it may have at most, of which each takes two or three bytes.
        """
        return make_page(self, entries)

    def save(self, path):
        """Write the page to a file, which replaces an older page.

        Raises PydsaError if it cannot be written, or would replace a file of another kind.
        """
        replace(path, ".html", self.html().encode(errors="replace"))

    def png(self, path):
        """Draw the most looked-at parts of the text, as a PNG file.

        It has the layers and positions below. Raises PydsaError without matplotlib, and as save() does.
        """
        from pydsa.look import pictures
        pictures.save(pictures.draw_text(self), path)

    def pngs(self, folder):
        """Draw all pictures into a folder, which is made -> their paths.

        They are text.png, as png() draws it; layers.png; changes.png; mass.png and experts.png, where these were recorded. Raises as
        png() does.
        """
        from pydsa.look import pictures
        return pictures.save_all(self, folder)

    def _repr_html_(self):
        """The page in a frame of its own, which may run its scripts only."""
        page = html.escape(self.html(INLINE), quote=True)
        return f'<iframe sandbox="allow-scripts" srcdoc="{page}" style="width: 100%; height: 860px; border: 0"></iframe>'


def check_layers(layers, known):
    """Raise PydsaError for numbers of layers that are not known ones.

    layers: a list of int, or None.
    """
    unknown = [layer for layer in layers or () if layer not in known]
    if unknown or layers is not None and not len(layers):
        raise PydsaError(f"There is no layer {unknown[0] if unknown else 'to show'}, expected of {known[0]} to {known[-1]} (--layers).")


def look_at_recording(recording, tokenizer, n_answer=None, layers=None):
    """The Look of a recording alone.

    n_answer: how many of its last tokens are the answer; None: there is none. The token that the last step wrote is not in a recording.
    Raises PydsaError for a tokenizer that is not of the recorded model, and as Look() does.
    """
    n_vocab, n = recording.facts.n_vocab, int(np.max(recording.positions, initial=-1)) + 1
    if tokenizer.n_vocab != n_vocab:
        raise PydsaError(f"The recording is of {recording.facts.name}, with {n_vocab} tokens in its vocabulary, but this model has "
                         f"{tokenizer.n_vocab}; expected the same model.")
    if n_answer is not None and n_answer >= n:
        raise PydsaError(f"The answer cannot have {n_answer} of the recording's {n} tokens, expected fewer (--answer).")
    return Look(recording, tokenizer, None, None if n_answer is None else n - n_answer, layers)


def _ids(recording, ids):
    """The tokens of the text, int64 [n]; -1 where nobody knows."""
    positions, tokens = np.asarray(recording.positions), np.asarray(recording.tokens)
    known = np.full(int(positions[-1]) + 1, -1, np.int64)
    known[positions] = tokens
    if ids is None:
        return known
    ids = np.asarray(ids, np.int64)
    if len(ids) < len(known) or (ids[positions] != tokens).any():
        raise PydsaError("The recording is of other tokens than the text, expected the text that was run.")
    return ids

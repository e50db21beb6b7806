"""What a page and its pictures show of a recording, as numbers.

They are sums over groups of tokens, and a row of numbers for each layer.

The answer's tokens are one group: those whose steps wrote the answer, from the last one of the prompt on. The tokens before are another.
"""
from typing import NamedTuple

import numpy as np

from pydsa.look import numbers

COLUMNS = ("overlap_prompt", "overlap_answer", "keys_answer", "mass_prompt", "mass_answer", "recall", "experts_prompt", "experts_answer",
           *(f"union_{block}" for block in numbers.BLOCKS))
NEW = 40        # tokens before the answer, which are always looked at


class Group(NamedTuple):
    """Tokens that looked at others, together.

    name: in words. ran: their rows in the recording, int64 [n]. rows: those of them that made a choice. times, weights: {layer: how often
    they chose each position, int64 [n_tokens]; the sum of their numbers.shares(), float64 [n_tokens]}. experts: {layer: how many tokens
    each expert worked for, int64 [n_expert]}.
    """
    name: str
    ran: np.ndarray
    rows: np.ndarray
    times: dict
    weights: dict
    experts: dict


class Figures:
    """The numbers of a recording.

    recording: a recording.Recording. n_tokens: those of the text. n_prompt: the tokens before the answer; None: there is none, and the
    last token that was recorded stands in its place. layers: the numbers of the layers to show; None: all. recall: {layer: share}, where
    it was measured.

    groups: two Groups. made: the rows of the recording that made a choice, as they had more than top_k keys; all_keys: the positions of
    the others. overlaps: {layer: numbers.overlaps() of made}. layer_rows: a dict for each layer, with the keys "layer" and COLUMNS:
        overlap_prompt, overlap_answer: the share of a token's keys that the token before it chose too, the mean of a group
        keys_answer: how many keys the answer chose, all its tokens together
        union_N: how many keys N neighbouring tokens chose together, in multiples of what one of them chose
        mass_prompt, mass_answer: the share of dense attention that the chosen keys hold
        experts_prompt, experts_answer: numbers.effective(), how many are in effective use
    What was not recorded is None. far: the number of tokens, from the first, that are not among the newest before the answer.
    """

    def __init__(self, recording, n_tokens, n_prompt=None, layers=None, recall=None):
        self.recording, self.n_tokens, self.n_prompt = recording, n_tokens, n_prompt
        self.positions = positions = np.asarray(recording.positions)
        chooses, rows = bool(recording.selection), np.arange(len(positions))
        every = np.asarray(recording.all_keys) | (positions < recording.top_k if chooses else True)
        self.made = rows[~every]
        self.all_keys = positions[every] if chooses else positions[:0]
        self.weighed = bool(recording.scores)
        self.layers = [layer for layer in recording.layers if layers is None or layer in layers]
        self.chosen_layers = [layer for layer in self.layers if chooses and layer in recording.selection]
        self.expert_layers = [layer for layer in self.layers if recording.experts and layer in recording.experts]
        start, end = (positions[-1], n_tokens) if n_prompt is None else (n_prompt - 1, n_tokens - 1)
        answer = (positions >= start) & (positions < end)
        self.groups = [Group(name, rows[which], rows[which & ~every], {}, {}, {}) for name, which in
                       (("the last token" if n_prompt is None else "the answer", answer), ("the tokens before", positions < start))]
        end = n_tokens if n_prompt is None else n_prompt
        self.far = end - min(NEW, end // 8)
        self.overlaps, self.layer_rows = {}, []
        for layer in self.layers:
            self.layer_rows.append(dict.fromkeys(("layer", *COLUMNS)) | {"layer": layer} | self._choices(layer) | self._experts(layer))
        self.add_recall(recall or {})

    def add_recall(self, recall):
        """Put in what was measured: {layer: share}."""
        for row in self.layer_rows:
            row["recall"] = recall.get(row["layer"])

    def _choices(self, layer):
        """Count a layer's choices -> its numbers."""
        if layer not in self.chosen_layers:
            return {}
        recording = self.recording
        chosen, scores = recording.selection[layer], recording.scores[layer] if self.weighed else None
        for group in self.groups:
            group.times[layer], group.weights[layer] = numbers.tally(chosen, scores, group.rows, self.n_tokens)
        overlaps = self.overlaps[layer] = numbers.overlaps(chosen, self.made, self.positions)
        mass = np.asarray(recording.mass[layer]) if recording.mass and layer in recording.mass else np.full(len(self.positions), np.nan)
        row = {"keys_answer": int((self.groups[0].times[layer] > 0).sum())}
        for name, group in zip(("answer", "prompt"), self.groups):
            row[f"overlap_{name}"] = _mean(overlaps[np.isin(self.made, group.rows)])
            row[f"mass_{name}"] = _mean(mass[group.rows])
        return row | {f"union_{block}": value for block, value in numbers.unions(chosen, self.made, self.positions).items()}

    def _experts(self, layer):
        """Count the use of a layer's experts -> its numbers."""
        if layer not in self.expert_layers:
            return {}
        ids, n_expert = self.recording.experts[layer], self.recording.facts.n_expert
        for group in self.groups:
            group.experts[layer] = numbers.expert_counts(ids, group.ran, n_expert)
        return {f"experts_{name}": numbers.effective(group.experts[layer]) for name, group in zip(("answer", "prompt"), self.groups)}

    def looked_at(self, group=0, layer=None):
        """What a group looked at, float64 [n_tokens].

        It is the mean share of its tokens' attention, by the indexers' scores, or, where these were not recorded, the share of its tokens
        that chose a position; of a layer, or the mean of all.
        """
        group, layers = self.groups[group], self.chosen_layers if layer is None else [layer]
        found = group.weights if self.weighed else group.times
        return sum((found[layer] for layer in layers), np.zeros(self.n_tokens)) / max(1, len(group.rows) * len(layers))


def _mean(values):
    """The mean of those that are numbers; None without any."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else None

"""What was measured of a model's sparse attention, in words.

Each finding says what was measured, what a right implementation would give, and what a deviation usually means.
"""
import math
import textwrap
from typing import NamedTuple

import numpy as np

from pydsa.bench import format_rows

FEW = 1e-4              # of the chosen keys may be others, beyond those that are near the last chosen one
CACHED = 0.97           # the share of keys that rounded index keys should choose as well
ERROR = 1e-5            # of the outputs of attention, normalised and squared; quantized matrices of heads round activations
TRAINED = 0.8           # a model whose loss is below this share of a uniform guess's has learnt something
GAIN = 0.4              # of the way from the newest keys' mass to the best keys' mass
POOR = 0.003            # a layer that holds so much less than the newest keys found nothing
ROOM = 0.01             # mass that the best keys must hold beyond the newest, else there is nothing to find
SAME = 0.98, 0.9        # the share of the same keys in other runs: in layer 0, in all
COARSE = 0.15           # standard deviations by which index keys of 8 bits may move scores: integers by 0.03, floats by more
LOGITS = 0.1            # the error of logits that comes from rounding, as a median, in models with random weights
JUMP = 30               # times the error up to top_k: more comes from the choice of keys
LOSS, KL = 0.1, 0.1     # nats that sparse attention may cost a trained model; runs of the same attention are nearer
REFERENCE = "the reference"     # the name of the run on it


class Finding(NamedTuple):
    """One thing that was measured.

    verdict: "right"; "wrong"; "unclear", it deviates or cannot be told, but nothing need be wrong; or "note", as there is no right value.
    """
    name: str
    verdict: str
    measured: str
    expected: str
    deviation: str


def findings(fields, config, loss):
    """The findings of a report's fields, a list.

    config: the model's Config. loss: the mean loss of the text, in nats.
    """
    layers = fields["layers"]
    trained = loss < TRAINED * math.log(config.n_vocab)
    found = [_selection(layers, fields["looked_at"]), _form(layers), _shared(layers), _cached(layers, fields["index_type"]), _ties(layers),
             _attention(layers), _mass(layers, trained), _together(layers), *(_run(run, trained) for run in fields["runs"]),
             _dense(fields["depths"], fields["top_k"], trained), *_against(fields["against"])]
    return [finding for finding in found if finding is not None]


def percent(share):
    """A share in percent; what is not all or none never looks so."""
    for digits in (1, 2, 4, 6):
        text = f"{100 * share:.{digits}f} %"
        if share in (0, 1) or 0 < float(text[:-2]) < 100 and (digits > 1 or 0.005 < share < 0.99):
            break
    return text


def named(layers):
    """Layers in words: "layer 3", "layers 0 to 3", "layers 0, 2, 5"."""
    layers = list(layers)
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return "layers " + ", ".join(map(str, layers))


def _resembles(like):
    return f"; it is what comes out where {like[0]} ({percent(like[1])} of those keys)" if like else ""


def _selection(layers, looked_at):
    keys, wrong, rounded = (sum(row[key] for row in layers) for key in ("keys", "wrong_keys", "rounded_keys"))
    off = [row for row in layers if row["wrong_keys"]]
    measured = f"{wrong} of {keys} chosen keys differ from the definition's, from the same inputs, at {looked_at} tokens"
    if rounded:
        measured += f"; {rounded} more are within rounding of the last chosen one"
    if off:
        measured += f"; first in layer {off[0]['layer']} at position {off[0]['first_wrong']}" + _resembles(off[0]["like"])
    return Finding("selection", "wrong" if wrong > FEW * keys else "right", measured, "the same keys, but for near ties",
                   "a fault of the indexer: RoPE, ReLU, weights, norm, rotation, the scales of cached keys, or top-k")


def _form(layers):
    n = sum(row["malformed"] for row in layers)
    return Finding("form", "wrong" if n else "right", f"{n} choices have a wrong number of keys, later ones, or keys out of order",
                   "min(top_k, position + 1) keys up to the token's own, ascending, each once",
                   "a fault of top-k: its number of keys, its padding, or the mask of later keys")


def _shared(layers):
    sharing = [row for row in layers if row["other_than_shared"] is not None]
    if not sharing:
        return None
    own = [row["layer"] for row in sharing if row["other_than_shared"]]
    measured = f"{named(row['layer'] for row in sharing)} should use the choice of an earlier layer, and do"
    if own:
        n = sum(row["other_than_shared"] for row in sharing)
        measured = f"{measured.removesuffix(', and do')}; {named(own)} attended to other keys, at {n} tokens"
    return Finding("shared layers", "wrong" if own else "right", measured, "the keys that the earlier layer chose",
                   "such layers run indexers of their own, as some files have tensors for them, or take another layer's choice")


def _cached(layers, kind):
    recalls = {row["layer"]: row["recall_of_cached_keys"] for row in layers if row["recall_of_cached_keys"] is not None}
    worst, mean = min(recalls, key=recalls.get), float(np.mean(list(recalls.values())))
    return Finding("cached keys", "right" if recalls[worst] >= CACHED else "unclear",
                   f"{kind} index keys choose {percent(mean)} of the keys that float32 ones choose, from the same inputs; "
                   f"{percent(recalls[worst])} in layer {worst}, the worst", f"at least {percent(CACHED)}",
                   "outliers in the keys, which the Hadamard rotation should spread; --index-type f16 takes twice the memory")


def _ties(layers):
    rows = [row for row in layers if row["tied"] is not None]
    decided = [row["layer"] for row in rows if row["decided_by_ties"]]
    tied, share, near = (float(np.mean([row[key] for row in rows])) for key in ("tied", "decided_by_ties", "near"))
    where = f" ({named(decided)})" if decided else ""
    return Finding("ties", "note", f"{tied - 1:.2f} other keys have exactly the score of the last chosen one; the rule for ties decided "
                   f"{percent(share)} of the choices{where}; {near:.1f} more keys are within rounding of that score",
                   "no rule for ties, as scores seldom are equal; here the first of equal keys are chosen",
                   "keys that score 0 in all heads: another implementation may choose others among them, and both are right")


def _attention(layers):
    errors = {row["layer"]: row["attention_error"] for row in layers if row["attention_error"] is not None}
    expected = f"at most {ERROR:.0e}"
    deviation = ("a fault of the softmax scale, of RoPE, of the matrices of heads, or of the cached latents; or other keys are read than "
                 "were chosen")
    if not errors:
        return Finding("attention", "unclear", "no token has a choice of keys that it may see", expected, deviation)
    worst = max(errors, key=errors.get)
    return Finding("attention", "right" if errors[worst] <= ERROR else "wrong",
                   "what attention makes of the keys that were chosen has a normalised squared error of "
                   f"{errors[worst]:.1e} in layer {worst}, the worst", expected, deviation)


def _mass(layers, trained):
    chosen, best, newest, rand = (np.array([row[key] for row in layers]) for key in
                                  ("mass", "mass_of_best", "mass_of_newest", "mass_of_random"))
    measured = (f"the chosen keys hold {percent(chosen.mean())} of dense attention; the best choice would hold {percent(best.mean())}, the "
                f"newest keys {percent(newest.mean())}, random keys {percent(rand.mean())}")
    expected = f"more than the newest keys in each layer, and {GAIN:.0%} of the way from there to the best choice or more, if trained"
    deviation = "the indexer does not find what attention looks at: it is wrong, was not trained, or the weights are random"
    baseline = np.maximum(newest, rand)
    poor = np.flatnonzero(chosen < baseline - POOR).tolist()
    if not poor and (best - baseline).max() <= ROOM:
        return Finding("mass", "unclear", f"{measured}: the newest keys hold nearly as much as the best, so this text cannot tell",
                       expected, deviation)
    gain = float((chosen - baseline).sum() / max((best - baseline).sum(), 1e-12))
    measured += f": {gain:.0%} of the way from the newest to the best"
    if poor:
        measured += f", and less than the newest in {named(poor)}"
    verdict = "right" if gain >= GAIN and not poor else "wrong" if trained and len(poor) >= len(layers) / 2 else "unclear"
    if verdict != "right":
        measured += ". The model was trained, as its loss shows" if trained else \
            ". The model's loss is that of a guess, so its weights may be random; then mass tells nothing"
    return Finding("mass", verdict, measured, expected, deviation)


def _together(layers):
    values = [row["together"] for row in layers if row["together"] is not None]
    if not values:
        return None
    return Finding("neighbours", "note", f"sixteen neighbouring tokens choose {np.mean(values):.2f} times top_k keys together; "
                   f"{min(values):.2f} to {max(values):.2f} in a layer", "from 1, all choose the same, to 16, no two share a key",
                   "much more than 4 is near to what random choices have")


def _run(run, trained):
    """A run of the whole text of its own, in which deviations add up."""
    recalls = [recall for recall in run["recall"] if np.isfinite(recall)]
    name = f"whole run, {run['run']}"
    expected = f"at least {percent(SAME[0])} in layer 0, and {percent(SAME[1])} in all; KL up to {KL:g}, if trained"
    deviation = ("in layer 0, a fault of an op before its choice; later, errors that add up, or a fault; if only KL is great, one after "
                 "the last choice (pydsa trace shows the first op)")
    if not recalls:
        return Finding(name, "unclear", f"its {run['tokens']} tokens have no choice that was looked at", expected, deviation)
    mean = float(np.mean(recalls))
    measured = (f"{percent(mean)} of the keys are the same in a run of its own, {percent(recalls[0])} in layer 0, with {run['tokens']} "
                f"tokens; the likeliest token is the same at {percent(run['same_top'])}, KL is {run['kl']:.1e}")
    other_logits = trained and run["kl"] > KL
    good = recalls[0] >= SAME[0] and mean >= SAME[1] and not other_logits
    if not (good or trained):
        measured += ". The model's loss is that of a guess: with random weights rounding grows from layer to layer"
    wrong = recalls[0] < SAME[1] or other_logits and run["run"] == REFERENCE
    return Finding(name, "right" if good else "wrong" if wrong else "unclear", measured, expected, deviation)


def _dense(depths, top_k, trained):
    far = [row for row in depths if row["from"] >= top_k]
    worst = max(far, key=lambda row: row["kl"])
    cost = max((row["loss"] - row["loss_other"] for row in far if row["loss"] is not None), default=0.0)
    same = percent(min(row["same_top"] for row in far))
    measured = (f"beyond top_k the likeliest token is that of dense attention at {same} or more, KL is {worst['kl']:.2g} or less (greatest "
                f"from {worst['from']} to {worst['to']}), and the loss grows by {cost:.2g} nats or less")
    if not trained:
        measured += ". The model's loss is that of a guess: with random weights this tells nothing"
    return Finding("sparse and dense", "right" if worst["kl"] <= KL and cost <= LOSS and trained else "unclear", measured,
                   f"for a model trained with sparse attention, KL up to {KL:g}, and a loss that grows by {LOSS:g} or less",
                   "keys that matter are not chosen: a wrong indexer, a top_k far below the model's own, or a model that was trained dense")


def _against(found):
    """Findings on another implementation's file; none without one."""
    if found is None:
        return
    if found["layers"]:
        yield _their_choice(found)
    if found["logits"]:
        yield _their_logits(found["logits"])
    if not (found["layers"] or found["logits"]):
        yield Finding("against", "unclear", f"{found['file']} has no choice of a token that has more than top_k keys, and no logits",
                      "choices beyond top_k", "give a longer text, or a smaller --dsa-top-k in both")


def _their_choice(found):
    rows = found["layers"]
    first = next((row for row in rows if row["first_other"] is not None), None)
    expected = "the same keys, but for near ties, and for what these lead to in later layers"
    deviation = "the first layer that differs has the fault, or one before its choice; later ones have other inputs"
    measured = f"{found['file']} has {percent(float(np.mean([row['recall'] for row in rows])))} of our keys in " \
               f"{named(row['layer'] for row in rows)}"

    def finding(verdict, text):
        return Finding("against", verdict, measured + text, expected, deviation)

    if first is None:
        return finding("right", "")
    measured += f"; the first other key is in layer {first['layer']} at position {first['first_other']}"
    off = next((row for row in rows if row["malformed"] or row["wrong_keys"] and row["worst"] > COARSE), None)
    if not any(row["looked_at"] for row in rows):
        return finding("unclear", "; layers were looked at for none of its tokens, so rounding and faults cannot be told apart")
    if off is None:
        worst, exact = max(row["worst"] for row in rows), not any(row["wrong_keys"] for row in rows)
        return finding("right", "; all differences are ties, or within rounding of the last chosen key" if exact else
                       f"; the scores of other keys are within {worst:.2g} standard deviations of the last chosen one's, as where index "
                       "keys are rounded to 8 bits")
    place = f"; layer {off['layer']}, with {percent(off['recall'])} of our keys, is the first that has more than rounding there explains"
    if off["first_wrong"] is not None:
        place += f", from position {off['first_wrong']} on at the latest"
    if off["malformed"]:
        place += f"; {off['malformed']} of its choices have another number of keys, later ones, or keys out of order"
    small = off["layer"] > rows[0]["layer"] and not off["like"] and not off["malformed"] and off["recall"] >= SAME[1]
    if small:
        return finding("unclear", place + "; so few come from rounding in earlier layers as well")
    return finding("wrong", place + _resembles(off["like"]))


def _their_logits(logits):
    same, error = logits["same_top"], logits["error"]
    measured = (f"the likeliest token is the same at {percent(same)} of {logits['tokens']} tokens; the median of the normalised squared "
                f"error is {error:.1e}")
    expected = f"an error up to {LOGITS:g} where activations are rounded to 8 bits, far less where they are not, and no jump at top_k"
    deviation = "another forward pass: the first op that differs tells which (pydsa trace, llama.cpp's names)"
    shares, (dense, sparse) = logits["same_top_shifted"], (logits["error_up_to_top_k"], logits["error_beyond"])
    by, verdict = max(shares, key=shares.get), "right" if error <= LOGITS else "wrong"      # NaN is wrong
    if shares[by] > same + 0.2:
        verdict = "wrong"
        measured += f"; each row is that of the token one {'earlier' if by > 0 else 'later'}, with the same likeliest token at " \
                    f"{percent(shares[by])}"
    elif dense is not None and sparse is not None and dense <= LOGITS and sparse > max(JUMP * dense, 1e-8):
        verdict = "wrong" if sparse > LOGITS else "unclear"
        measured += f": {dense:.1e} up to top_k tokens, where all keys are read, {sparse:.1e} beyond. So the choice of keys differs" \
                    + (", by a fault or by the rounding of index keys; compare selections to see which" if sparse <= LOGITS else "")
    return Finding("against, logits", verdict, measured, expected, deviation)


def in_words(report):
    """A faithful.Report as text: two tables, the findings, and the verdict."""
    def layer(row):
        return {"layer": row["layer"], "choice of": row["chooser"], "keys right": row["recall"], "beyond rounding": row["wrong_keys"],
                "cached keys right": row["recall_of_cached_keys"], "ties": row["decided_by_ties"], "mass": row["mass"],
                "best": row["mass_of_best"], "newest": row["mass_of_newest"], "random": row["mass_of_random"],
                "error": row["attention_error"], "16 together": row["together"]}

    def depth(row):
        return {"tokens": f"{row['from']} to {row['to']}", "same likeliest token": row["same_top"], "KL": row["kl"],
                "loss, sparse": row["loss"], "loss, dense": row["loss_other"]}

    parts = [f"{report.model}: {report.tokens} tokens, top_k {report.top_k}, {report.kv_type} latents, {report.index_type} index keys, on "
             f"{report.device}; layers were looked at for {report.looked_at} tokens.", _table(map(layer, report.layers)),
             "Sparse attention beside dense:", _table(map(depth, report.depths))]
    for finding in report.findings:
        lines = [f"{finding.verdict.upper()}  {finding.name}: {finding.measured}.", f"Expected: {finding.expected}.",
                 f"A deviation usually means: {finding.deviation}."]
        parts.append("\n".join(_wrapped(line, "    " if i else "") for i, line in enumerate(lines)))
    return "\n\n".join([*parts, _verdict(report)]) + "\n"


def _wrapped(text, indent):
    """A text in lines of 120; none begins with a percent sign."""
    lines = textwrap.fill(text.replace(" %", "\0%"), 120, initial_indent=indent, subsequent_indent="    ", break_long_words=False,
                          break_on_hyphens=False)
    return lines.replace("\0%", " %")


def _table(rows):
    def cell(value):
        return f"{value:.4f}" if isinstance(value, float) and (value == 0 or value > 1e-3) else value
    return format_rows([{name: cell(value) for name, value in row.items()} for row in rows], "md").rstrip("\n")


def _verdict(report):
    unclear = [finding.name for finding in report.findings if finding.verdict == "unclear"]
    if report.wrong:
        return f"Not faithful: {', '.join(report.wrong)}."
    return "Faithful: all that could be told is right." if not unclear else \
        f"Faithful, as far as can be told; unclear: {', '.join(unclear)}."

"""Recall of facts in long notes, by context length and place.

    python tools/needle.py                                       # the demo model
    python tools/needle.py model.gguf -l 2048,4096 -n 32 -a sparse,dense -o json

The model attends to the indexer's keys, to all keys, or to random ones. A document is prose from Python's documentation topics with a line
like "The code of the amber lantern is 4812." now and then. The model is asked for the codes at the places of the table, each in a
conversation of its own, and answers greedily.

Recall is the share of answers with the right code. "mass" is the share of dense attention, of the same queries, that the chosen keys hold:
the mean over layers, heads and positions that have more than top_k keys.
"""
import sys
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pydsa.chat import encode_chat  # noqa: E402
from pydsa.quants import CACHE_TYPES  # noqa: E402
from tools.demo import notes  # noqa: E402

MODES = ("sparse", "dense", "random")
SAMPLES = 32        # queries of a ubatch whose mass is measured


class Watcher:
    """An observer of a session's ops.

    It may replace the indexer's choice by a random one, and measures the attention mass that a choice holds.
    """

    def __init__(self, rng=None, weigh=False):
        self.rng, self.weigh = rng, weigh       # rng: choose random keys; weigh: measure the mass
        self.latents, self.shares = {}, []

    def start(self, session, n_tokens):
        """Prepare for a step of n_tokens."""
        self.positions = np.arange(session.n_past, session.n_past + n_tokens)
        self.whole, self.parts = {}, {}
        self.weighs = self.weigh and n_tokens > 1       # single tokens are left out: those of a prompt are enough

    def __call__(self, node, arrays):
        if node.op == "indexer_select" and self.rng is not None:
            choose_at_random(self.rng, arrays[0], self.positions)
        if not self.weighs:
            return
        if arrays:
            self.keep(node.args[0], arrays[0])
        if node.op == "cache_write" and node.args[0].kind == "latents":
            rows = self.array(node.args[1]).reshape(len(self.positions), -1)
            before = self.latents.get(node.args[0], rows[:0])[:self.positions[0]]
            self.latents[node.args[0]] = np.concatenate((before, rows))
        elif node.op == "sparse_attention":
            self.weigh_choice(node)

    def keep(self, value, array):
        """Keep the session's own array of a value, which later ops may change.

        Of a value that is written in parts all parts are kept.
        """
        if value.base is None:
            self.whole[value] = array
        elif value.root not in self.whole:
            self.parts.setdefault(value.root, []).append(array)

    def array(self, value):
        """The array of a value, joined from its parts where it has some."""
        return self.whole[value] if value in self.whole else np.concatenate(self.parts[value], axis=-1)

    def weigh_choice(self, node):
        """Append the mass of each sampled query."""
        _, query, cache, chosen, scale = node.args
        query, chosen, keys = self.array(query), self.array(chosen), self.latents[cache]
        for t in np.unique(np.linspace(0, len(self.positions) - 1, SAMPLES).astype(int)):
            n = self.positions[t] + 1
            if n > chosen.shape[1]:
                logits = scale * (query[t] @ keys[:n].T)
                p = np.exp(logits - logits.max(axis=1, keepdims=True))
                self.shares.append(float((p[:, chosen[t][chosen[t] >= 0]].sum(axis=1) / p.sum(axis=1)).mean()))


def choose_at_random(rng, chosen, positions):
    """Overwrite choices [T, k] with random keys of each token's past.

    They ascend, with -1 after the last.
    """
    k = chosen.shape[1]
    for row, position in zip(chosen, positions):
        keys = np.sort(rng.choice(position + 1, min(k, position + 1), replace=False))
        row[:keys.size], row[keys.size:] = keys, -1


def document(rng, count, n_tokens, n_facts, prose):
    """Notes of at most n_tokens, with facts spread evenly.

    count(text) gives the tokens of a text. Returns (text, [(name, code)]) in the order of the facts.
    """
    facts = [(name, notes.code(rng)) for name in notes.names(rng, n_facts)]
    lines = [f"The code of the {name} is {code}.\n" for name, code in facts]
    room = n_tokens - sum(map(count, lines))
    parts, used, at = [], 0, int(rng.integers(len(prose)))
    for i, line in enumerate(lines):
        parts.append(line)
        while used < room * (i + 1) / n_facts:
            fitting = (k % len(prose) for k in range(at, at + len(prose)) if count(prose[k % len(prose)]) < room - used)
            at = next(fitting, None)
            if at is None:      # no paragraph fits into the rest
                return "".join(parts + lines[i + 1:]), facts
            parts.append(prose[at] + "\n")
            used, at = used + count(parts[-1]), at + 1
    return "".join(parts), facts


def run(session, ids, watcher, n_ubatch):
    """Append ids in ubatches, and return the logits after the last."""
    for start in range(0, len(ids), n_ubatch):
        ubatch = ids[start:start + n_ubatch]
        watcher.start(session, len(ubatch))
        logits = session.prefill(ubatch, observe=watcher)
    return logits


def answer(model, session, messages, watcher, max_tokens):
    """The greedy answer to a conversation.

    The session reuses the prefix that it has read.
    """
    prompt = encode_chat(model.tokenizer, messages)
    logits, ids = run(session, prompt[session.reuse(prompt):], watcher, model.n_ubatch), []
    while len(ids) < max_tokens:
        token = int(logits.argmax())
        if token in model.tokenizer.eog_ids:
            break
        ids.append(token)
        logits = run(session, [token], watcher, model.n_ubatch)
    return model.detokenize(ids)


def recall(model, mode, n_tokens, places, n_documents, seed, max_tokens, every, weigh):
    """Recall at each place, and the mass or None.

    Documents have n_tokens, with a fact every so many tokens.
    """
    from pydoc_data.topics import topics

    _, prose = notes.split_topics(notes.paragraphs(topics))
    right, watchers = np.zeros(len(places)), []

    def count(text):
        return len(model.tokenizer.encode(text))

    for i in range(n_documents):
        rng = np.random.default_rng([seed, n_tokens, i])
        text, facts = document(rng, count, n_tokens - 64 - max_tokens, max(len(places), n_tokens // every), prose)
        watcher = Watcher(rng if mode == "random" else None, weigh)
        watchers.append(watcher)
        session = model.session()
        for j, place in enumerate(places):
            name, code = facts[round(place / 100 * (len(facts) - 1))]
            messages = [{"role": "user", "content": f"{text}\nWhat is the code of the {name}?"}]
            right[j] += code in answer(model, session, messages, watcher, max_tokens)
    shares = [share for watcher in watchers for share in watcher.shares]
    return right / n_documents, float(np.mean(shares)) if shares else None


def numbers(context, parameter, value):
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers, such as 2048,4096") from None


def fail(message):
    click.echo(message, err=True)
    sys.exit(2)


@click.command(help=__doc__.split("\n")[0])
@click.argument("model_path", metavar="[MODEL]", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("-l", "--lengths", default="2048,4096,8192", callback=numbers, help="tokens of the prompts  [2048,4096,8192]")
@click.option("-p", "--places", default="0,25,50,75,100", callback=numbers, help="places of the facts, in percent  [0,25,50,75,100]")
@click.option("-n", "--documents", type=click.IntRange(1), default=20, help="documents for each length  [20]")
@click.option("-a", "--attention", default=",".join(MODES), help="which of sparse, dense, random  [all]")
@click.option("--every", type=click.IntRange(16), default=128, help="tokens for each fact  [128]")
@click.option("--max-tokens", type=click.IntRange(1), default=24, help="tokens of an answer at most  [24]")
@click.option("--dsa-top-k", type=click.IntRange(1), help="keys that each token attends to  [the model's]")
@click.option("--kv-type", type=click.Choice(list(CACHE_TYPES)), default="i16", help="type of the cached latents  [i16]")
@click.option("--seed", type=click.IntRange(0), default=0, help="of the documents  [0]")
@click.option("-t", "--threads", type=click.IntRange(1), help="threads to use")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", help="form of the table  [md]")
def main(model_path, lengths, places, documents, attention, every, max_tokens, dsa_top_k, kv_type, seed, threads, output):
    import pydsa
    from pydsa.bench import format_rows, markdown

    modes, table = attention.split(","), []
    if set(modes) - set(MODES):
        fail(f"--attention is {attention}; it must be made of {', '.join(MODES)}.")
    if not all(0 <= place <= 100 for place in places):
        fail("--places must lie within 0 and 100.")
    if min(lengths) < 256:
        fail("--lengths must be at least 256 tokens: the question and the answer need some of them.")
    try:
        for mode in modes:
            model = pydsa.load(model_path or pydsa.DEMO, n_ctx=max(lengths), threads=threads, kv_type=kv_type, dsa_top_k=dsa_top_k,
                               attention="dense" if mode == "dense" else "sparse")
            for n_tokens in lengths:
                shares, mass = recall(model, mode, n_tokens, places, documents, seed, max_tokens, every, mode != "dense")
                row = {"attention": mode, "tokens": n_tokens, **{f"at {place} %": float(share) for place, share in zip(places, shares)},
                       "recall": float(shares.mean()), "questions": len(places) * documents, "mass": mass}
                table.append(row)
                click.echo(format_rows([row], output) if output == "jsonl" else f"{mode}, {n_tokens} tokens", nl=output != "jsonl",
                           err=output != "jsonl")
    except pydsa.PydsaError as error:
        fail(str(error))
    if output != "md":
        click.echo(format_rows(table, output) if output != "jsonl" else "", nl=False)
        return
    cells = [{key: f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for key, v in row.items()} for row in table]
    click.echo(markdown(cells), nl=False)


if __name__ == "__main__":
    main()

"""Texts of the demo model: notes, questions, small talk, sums, prose.

Notes have facts to be asked about. Prose comes from Python's documentation topics. A text is a list of parts: (text, weight of its tokens
in the loss), or a marker such as USER, which is one token.
"""
import re

import numpy as np

from pydsa.chat import ASSISTANT, BOS, END_THINK, EOS, USER

ADJECTIVES = """amber ancient autumn azure black blue brave bright bronze broken calm clever cold copper crimson crystal dark distant
dusty early eastern empty fading famous gentle giant golden grand grassy gray green heavy hidden hollow humble icy iron ivory jade
lonely lucky marble mighty misty narrow noble northern old orange pale patient polar proud purple quick quiet rapid red round royal
rusty sacred scarlet secret silent silver sleepy small snowy solid southern stone stormy sunny swift tall velvet violet western white
wild wise wooden yellow young""".split()
NOUNS = """anchor apple archive arrow badger balloon barn basket beacon bell boat bottle bridge brook cabin camera candle canyon castle
cedar chapel clock cloud comet compass cottage crane crow desert dragon drum eagle falcon farm feather ferry field flute forest fountain
fox garden gate glacier hammer harbor hawk helmet hill horse island kettle key kite ladder lake lantern library lion maple market meadow
mill mirror moon mountain needle oak ocean orchard otter owl palace panther parrot path pearl piano pine planet pond prairie puzzle rabbit
raven ribbon river robin rocket sailor shadow shell ship sparrow spider spoon spring statue storm sword temple tiger tower train tree
tunnel turtle valley village violin wagon walnut wheel whale willow window wolf workshop""".split()
QUESTIONS = ("What is the code of the {}?", "What is the code of the {}?", "Tell me the code of the {}.", "Which code does the {} have?",
             "I need the code of the {}.", "Please give me the code of the {}.", "Do you know the code of the {}?", "And the {}?")
TALK = (
    ("Hello", "Hello! Give me some notes, then ask me about them."), ("Hello!", "Hello! Give me some notes, then ask me about them."),
    ("hello", "Hello! Give me some notes, then ask me about them."), ("Hi", "Hi! How can I help you?"), ("hi", "Hi! How can I help you?"),
    ("Hi there!", "Hi! How can I help you?"), ("Hey", "Hi! How can I help you?"), ("Good morning", "Good morning! How can I help you?"),
    ("Good evening", "Good evening! How can I help you?"), ("How are you?", "I am well, thank you. How can I help you?"),
    ("Who are you?", "I am the demo model of pydsa, a small model with sparse attention."),
    ("What are you?", "I am the demo model of pydsa, a small model with sparse attention."),
    ("What is your name?", "I am the demo model of pydsa, a small model with sparse attention."),
    ("What can you do?", "I can find codes in long notes, add small numbers, and write something like English."),
    ("Can you help me?", "I can find codes in long notes, add small numbers, and write something like English."),
    ("Help", "I can find codes in long notes, add small numbers, and write something like English."),
    ("Thanks", "You are welcome!"), ("Thank you", "You are welcome!"), ("Thank you!", "You are welcome!"), ("thanks", "You are welcome!"),
    ("Goodbye", "Goodbye!"), ("Bye", "Goodbye!"), ("Good night", "Good night!"), ("OK", "Good. What else?"), ("Yes", "Good. What else?"),
    ("No", "All right."), ("Why is the sky blue?", "I do not know that. I only know what the notes say."),
    ("Tell me a joke.", "I do not know that. I only know what the notes say."),
    ("What is the weather?", "I do not know that. I only know what the notes say."))
SUMS = ("What is {} plus {}?", "{} + {}", "{} + {} = ?", "Add {} and {}.")
ANSWER = 6.0        # weight of the tokens that only the notes can tell


def paragraphs(topics):
    """The prose of documentation topics, {name: [paragraph]}.

    Markup and code are left out.
    """
    found = {}
    for name, text in topics.items():
        kept = []
        for block in re.split(r"\n\s*\n", text):
            block = re.sub(r"\s+", " ", re.sub(r"\s*\n\s*[*-]?\s*", " ", block)).strip()
            letters = sum(c.isalpha() or c == " " for c in block)
            if len(block) > 60 and letters > 0.85 * len(block) and block[-1] in ".:":
                kept.append(re.sub(r'"(\w+)"', r"\1", block))
        if kept:
            found[name] = kept
    return found


def split_topics(found, every=12):
    """(training paragraphs, held-out paragraphs).

    Every twelfth topic is held out.
    """
    names = sorted(found)
    held = names[every // 2::every]
    return [p for name in names if name not in held for p in found[name]], [p for name in held for p in found[name]]


def names(rng, n):
    """n different names, each an adjective and a noun."""
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), n, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in chosen]


def code(rng):
    return f"{rng.integers(10000):04d}"


def fact(name, value):
    """A line of notes.

    The name and the code cannot be predicted, so they have no weight.
    """
    return [("The code of the", 0.1), (f" {name}", 0.0), (" is ", 0.1), (value, 0.0), (".\n", 0.1)]


def turn(question, answer):
    """A question, and an answer as parts."""
    return [USER, (question, 0.02), ASSISTANT, END_THINK, *answer, EOS]


def answer(name, value, end=".", of_adjective=2.0):
    adjective, noun = name.split(" ")
    return [("The code of the", 0.1), (f" {adjective}", of_adjective), (f" {noun}", 2.0), (" is ", 0.1), (value, ANSWER), (end, 0.1)]


def small_talk(rng):
    if rng.random() < 0.5:
        question, reply = TALK[rng.integers(len(TALK))]
        return turn(question, [(reply, 1.0)])
    a, b = rng.integers(0, 21, 2)
    return turn(SUMS[rng.integers(len(SUMS))].format(a, b), [(f"{a} + {b} = ", 1.0), (str(a + b), 2.0), (".", 1.0)])


def question(rng, name):
    return QUESTIONS[rng.integers(len(QUESTIONS))].format(name)


def conversation(rng, n_tokens, count, found):
    """Small talk and sums of at least n_tokens."""
    parts = [BOS]
    n = 1
    while n < n_tokens:
        new = small_talk(rng)
        n += count(new)
        parts += new
    return parts


def prose(rng, n_tokens, count, found):
    """Consecutive paragraphs of the documentation, from a random one on."""
    parts, at, n = [BOS], int(rng.integers(len(found))), 1
    while n < n_tokens:
        new = [(found[at % len(found)] + "\n\n", 1.0)]
        n, at = n + count(new), at + 1
        parts += new
    return parts


def notes(rng, n_tokens, count, found, n_facts):
    """(parts, {name: code}) of about n_tokens of notes with n_facts facts.

    The facts stand between paragraphs of `found`.
    """
    facts = {name: code(rng) for name in names(rng, n_facts)}
    lines = [fact(*item) for item in facts.items()]
    n = sum(map(count, lines))
    filler = []
    while n < n_tokens - 80:
        new = [(found[rng.integers(len(found))] + "\n", 0.4)]
        n += count(new)
        filler.append(new)
    places = np.sort(rng.integers(0, len(filler) + 1, n_facts))     # the number of fillers before each fact
    parts, done = [], 0
    for line, place in zip(lines, places):
        for new in filler[done:place]:
            parts += new
        done = max(done, place)
        parts += line
    for new in filler[done:]:
        parts += new
    return parts, facts


def repeated(rng, n_tokens, count, found):
    """Facts, and all of them again: the fastest way to teach copying."""
    facts = [(name, code(rng)) for name in names(rng, max(1, (n_tokens - 8) // 24))]
    again = [part for name, value in facts for part in answer(name, value, ".\n", of_adjective=0.1)]
    parts = [BOS, USER, *(part for item in facts for part in fact(*item)), ("Repeat the notes.", 0.02), ASSISTANT, END_THINK, *again, EOS]
    while count(parts) < n_tokens:
        parts += small_talk(rng)
    return parts


def notes_and_questions(rng, n_tokens, count, found):
    """Notes and questions about them, n_tokens or a little more."""
    n_questions = max(1, min(40, int(n_tokens * rng.uniform(0.25, 0.6) / 26)))
    room = n_tokens - 26 * n_questions
    densest = room / 12
    n_facts = int(np.clip(densest * rng.uniform(0.1, 1.0) ** (1 if n_tokens <= 512 else 2), min(2, densest), 120))
    text, facts = notes(rng, room, count, found, n_facts)
    asked = list(facts)
    parts = [BOS, USER, *text, ("\n" + question(rng, first := asked[rng.integers(n_facts)]), 0.1), ASSISTANT, END_THINK,
             *answer(first, facts[first]), EOS]
    n = count(parts)
    while n < n_tokens:
        if rng.random() < 0.06:
            new = small_talk(rng)
        else:
            name = asked[rng.integers(n_facts)]
            new = turn(question(rng, name), answer(name, facts[name]))
        parts += new
        n += count(new)
    return parts


KINDS = (notes_and_questions, repeated, conversation, prose)

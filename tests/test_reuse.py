"""Prefix reuse: tokens that a session has read are not run again."""
import numpy as np
import pytest
from helpers import random_ids

import pydsa

IDS = random_ids(60)


@pytest.fixture
def model(small_model, load):
    return load(small_model())


@pytest.fixture
def session(model):
    """A session of 20 tokens."""
    session = model.session()
    session.prefill(IDS[:20])
    return session


@pytest.mark.parametrize("ids, n", [(IDS[:20], 19), (IDS[:30], 20), (IDS[:5] + [7, 8], 5), ([7, 8, 9], 0), (IDS[:1], 0)])
def test_reuse_keeps_the_longest_common_prefix(model, session, ids, n):
    """The longest common prefix is kept, but the last token is run.

    The logits of the last token are wanted. The session has 20 tokens.
    """
    assert IDS[5] != 7 and IDS[0] != 7 and session.reuse(ids) == n == session.n_past
    fresh = model.session()
    np.testing.assert_allclose(session.prefill(ids[n:]), fresh.prefill(ids), rtol=1e-4, atol=1e-4)
    assert session.tokens == ids


@pytest.fixture
def chats(monkeypatch):
    """pydsa.DEMO, and the number of prompt tokens that each chat has run."""
    model, runs = pydsa.load(pydsa.DEMO, n_ctx=512, threads=1), []
    prefill = pydsa.Session.prefill
    monkeypatch.setattr(pydsa.Session, "prefill", lambda self, ids, *args: runs.append(len(ids)) or prefill(self, ids, *args))
    return model, runs


def conversation(model, messages, n=6):
    """The greedy answer to messages."""
    return "".join(model.chat(messages, max_tokens=n, temperature=0.0))


def test_a_chat_in_python_reuses_the_last_conversation(chats):
    model, runs = chats
    messages = [{"role": "user", "content": "The code of the red lamp is 1234.\nWhat is the code of the red lamp?"}]
    first = conversation(model, messages)
    later = [*messages, {"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    again = conversation(model, later)
    prompts = [run for run in runs if run > 1]
    assert len(prompts) == 2 and prompts[1] < prompts[0]       # not the whole conversation
    other = pydsa.load(pydsa.DEMO, n_ctx=512, threads=1)
    assert conversation(other, later) == again


def test_interleaved_chats_do_not_mix(chats):
    model, _ = chats
    asked = [[{"role": "user", "content": f"The code of the {name} is {code}.\nWhat is the code of the {name}?"}]
             for name, code in (("red lamp", 1234), ("old boat", 9876))]
    alone = [conversation(model, messages) for messages in asked]
    answers = [model.chat(messages, max_tokens=6, temperature=0.0) for messages in asked]
    pieces = ["", ""]
    for _ in range(6):
        for i, answer in enumerate(answers):
            pieces[i] += next(answer, "")
    assert pieces == alone


@pytest.mark.parametrize("ids", [[], None, 3, "abc", [[1, 2]], [300], [-1]])
def test_reuse_of_what_are_no_ids(session, ids):
    with pytest.raises(pydsa.PydsaError, match="[Tt]oken id"):
        session.reuse(ids)
    assert session.tokens == IDS[:20]

"""The tokenizer: llama.cpp's ids, damaged vocabularies, round trips.

Each data/tokenizer/NAME.json holds the ids that llama.cpp gives for a list of texts, with the pre-tokenizer NAME and the vocabulary named
in TRUTH: `ids` with special tokens as text, `ids_special` with them parsed.
"""
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_cases import MERGES, SPECIAL, small, small_metadata
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from pydsa.errors import GGUFError, PydsaError, UnsupportedModelError
from pydsa.gguf.file import open_gguf
from pydsa.text.tokenizer import (BYTE, CONTROL, MAX_TEXT, MAX_TOKEN, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, Tokenizer,
                                  load_tokenizer)

DATA = Path(__file__).parent / "data" / "tokenizer"
TRUTH = {"deepseek-v3": "deepseek-v3", "deepseek-coder": "deepseek-coder", "glm4": "glm4",
         "deepseek-llm": "deepseek-v3", "chatglm-bpe": "glm4", "kimi-k2": "deepseek-v3", "gigachat": "deepseek-v3"}


def names(tokenizer, text, **options):
    return [tokenizer.tokens[token_id] for token_id in tokenizer.encode(text, **options)]


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory):
    """Vocabulary name -> path of its GGUF file."""
    folder = tmp_path_factory.mktemp("vocabularies")
    paths = {}
    for name in sorted(set(TRUTH.values())):
        paths[name] = folder / f"vocab-{name}.gguf"
        paths[name].write_bytes(lzma.decompress((DATA / f"vocab-{name}.gguf.xz").read_bytes()))
    return paths


@pytest.fixture(scope="session", params=sorted(TRUTH))
def truth(request, vocabularies):
    """A tokenizer with a large vocabulary, and llama.cpp's ids."""
    metadata = open_gguf(vocabularies[TRUTH[request.param]]).metadata
    metadata["tokenizer.ggml.pre"] = request.param
    return Tokenizer.from_metadata(metadata), json.loads((DATA / f"{request.param}.json").read_text())


def test_ids_are_those_of_llama_cpp(truth):
    tokenizer, cases = truth
    assert len(cases) >= 98
    assert [tokenizer.encode(case["text"]) for case in cases] == [case["ids"] for case in cases]


def test_ids_with_special_tokens_are_those_of_llama_cpp(truth):
    tokenizer, cases = truth
    assert [tokenizer.encode(case["text"], parse_special=True) for case in cases] == [
        case["ids_special"] for case in cases]


def test_truth_decodes_to_its_texts(truth):
    tokenizer, cases = truth
    for kind in "ids", "ids_special":
        assert [tokenizer.decode(case[kind]) for case in cases] == [case["text"] for case in cases]


@settings(deadline=None)
@given(text=st.text())
def test_large_vocabularies_round_trip(truth, text):
    tokenizer, _ = truth
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_round_trips(pre):
    tokenizer = small(pre=pre)
    pieces = st.sampled_from([*SPECIAL, "hello", " w", "\r\n", "  ", "'S", "你", "123", "_a", "\u3000", "́", "🙂", "\0"])

    @settings(deadline=None)
    @given(text=st.lists(pieces | st.text(max_size=3)).map("".join), parse_special=st.booleans())
    def round_trip(text, parse_special):
        assert tokenizer.decode(tokenizer.encode(text, parse_special=parse_special)) == text

    round_trip()


@pytest.mark.parametrize("alias, name", [("glm5", "glm4"), ("joyai-llm", "deepseek-v3"), ("hy_v4", "deepseek-v3"),
                                         ("hunyuan-dense", "deepseek-v3")])
def test_aliases(alias, name):
    text = "It'S 12345 (word) 你好ー \r\n\n  !Ab"
    assert small(pre=alias).encode(text) == small(pre=name).encode(text)


def test_tokens_are_merged_in_order_and_not_across_pieces():
    assert names(small(), "hello world hell") == ["hello", "Ġw", "o", "r", "l", "d", "Ġ", "hell"]
    assert names(small(), "1hello") == ["1", "hello"]


@pytest.mark.parametrize("pre, left, right, together", [
    ("deepseek-v3", "12", "3", True), ("deepseek-v3", "123", "4", False), ("deepseek-v3", "(", "a", True),
    ("deepseek-v3", " (", "a", False), ("deepseek-v3", "你", "ー", True), ("deepseek-v3", "你", "a", False),
    ("deepseek-v3", "a", "\u0301", True), ("deepseek-v3", "!", "\n", True), ("deepseek-v3", "'", "s", True),
    ("glm4", "12", "3", True), ("glm4", "123", "4", False), ("glm4", "你", "a", True), ("glm4", "(", "a", True),
    ("glm4", "a", "\u0301", False), ("glm4", "'", "S", True), ("glm4", "a'", "s", True), ("glm4", "'S", "a", False),
    ("glm4", "\n", " ", False), ("glm4", " ", "\n", True), ("glm4", "-", "\n", True),
    ("deepseek-coder", "1", "2", False), ("deepseek-coder", " ", "a", True), ("deepseek-coder", "\u3000", "a", True),
    ("deepseek-coder", "你", "a", False), ("deepseek-coder", "你", "\u3000", False),
    ("deepseek-coder", "!", "\n", False), ("deepseek-coder", " ", "!", True), ("deepseek-coder", "ж", "a", True),
    ("deepseek-coder", "+", "=", True),
    ("deepseek-llm", "1", "2", True), ("deepseek-llm", "a", "à", False), ("deepseek-llm", "à", "ж", True),
    ("deepseek-llm", "+", "=", True), ("deepseek-llm", "你", "。", False), ("deepseek-llm", ".", "\u3000.", False),
    ("deepseek-llm", ".", "。", False), ("deepseek-llm", "\u3000", "a", True), ("deepseek-llm", "你", "好", True),
    ("kimi-k2", "12", "3", True), ("kimi-k2", "123", "4", False), ("kimi-k2", "你", "a", False), ("kimi-k2", "a", "你", False),
    ("kimi-k2", "你", "好", True), ("kimi-k2", " ", "你", False), ("kimi-k2", " ", "ж", True), ("kimi-k2", "(", "a", True),
    ("kimi-k2", "々", "字", False), ("kimi-k2", "字", "々", False), ("kimi-k2", "⺀", "一", False), ("kimi-k2", "!", "⺀", True),
    ("kimi-k2", "カ", "漢", False), ("kimi-k2", "a", "カ", True), ("kimi-k2", "\U0002ebef", "\uf900", True),
    ("kimi-k2", "\u9fff", "\U0002ebf0", False), ("kimi-k2", "a", "B", True), ("kimi-k2", "a", "'s", True),
    ("kimi-k2", "a'L", "L", True), ("kimi-k2", "'S", "a", True), ("kimi-k2", "a'S", "a", False), ("kimi-k2", "你", "'s", False),
    ("kimi-k2", "a", "\u0301", False), ("kimi-k2", "\u0301", "a", True), ("kimi-k2", "-", "\n", True),
    ("kimi-k2", "\n", " ", False), ("kimi-k2", " ", "\n", True),
    ("gigachat", "123", "4", True), ("gigachat", "(", "a", False), ("gigachat", "'", "s", True), ("gigachat", "'", "S", False),
    ("gigachat", "!", "\n", False), ("gigachat", "你", "a", True), ("gigachat", " ", "1", True), ("gigachat", " ", "\u3000", True)])
def test_pieces(pre, left, right, together):
    joint = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(left + right)[0][0]
    cut = len(left.encode())
    merge = f"{joint[cut - 1]} {joint[cut]}"
    assert (merge.replace(" ", "") in names(small({}, [merge], pre=pre), left + right)) == together


def test_only_glm4_takes_a_piece_that_is_a_token_whole():
    merges, special = ["a b"], {"Ġab": NORMAL}
    for pre in "glm4", "glm5":
        assert names(small(special, merges, pre=pre), "x ab") == ["x", "Ġab"]
    for pre in "chatglm-bpe", "deepseek-v3", "deepseek-llm", "deepseek-coder", "kimi-k2", "gigachat":
        assert names(small(special, merges, pre=pre), "x ab") == ["x", "Ġ", "ab"]


@pytest.mark.parametrize("pre, left, right", [
    ("deepseek-v3", "a", "\u1c89"), ("glm4", "1", "\U00010d40"), ("deepseek-llm", "1", "\U0001e5fa"), ("kimi-k2", "a", "\ua7dc"),
    ("deepseek-coder", "a", "\ua7cb"), ("gigachat", "a", "\U000143fa"), ("deepseek-v3", "!", "\U0001fae9")])
def test_what_unicode_16_added_has_no_category(pre, left, right):
    """As in llama.cpp, whatever Unicode the library has."""
    joint = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(left + right)[0][0]
    assert joint[:2] not in names(small({}, [f"{joint[0]} {joint[1]}"], pre=pre), left + right)


def test_plain_text_never_becomes_a_control_token():
    tokenizer = small(pre="glm4")       # with this pre-tokenizer the piece "ctl" is a token
    assert names(tokenizer, "ctl") == ["c", "t", "l"]
    assert names(tokenizer, "ctl", parse_special=True) == ["ctl"]


def test_a_control_token_may_be_a_merge():
    metadata = small_metadata()
    metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index("hell")] = CONTROL
    tokenizer = Tokenizer.from_metadata(metadata)
    assert names(tokenizer, "hello") == ["hello"]
    assert names(tokenizer, "hello", parse_special=True) == ["hell", "o"]


# Special tokens

@pytest.mark.parametrize("text, plain, parsed", [
    ("<a>h", ["<", "a", ">", "h"], ["<a>", "h"]),
    ("<a><b>", ["<", "a", "><", "b", ">"], ["<a><b>"]),                         # the longest first
    ("<a><a><b><a>", None, ["<a>", "<a><b>", "<a>"]),
    ("<unk>", None, ["<unk>"]),
    ("1<think>2", ["1", "<think>", "2"], ["1", "<think>", "2"]),                # user-defined: always
    ("schöhe", ["s", "c", "h", "ö", "he"], ["s", "c", "h", "ö", "he"]),
    ("wxyzzzw", ["w", "x", "yzzz", "w"], ["w", "x", "yzzz", "w"]),              # yzzz is longer than xyz
    ("h<eos>", None, ["h", "<eos>"]),
    ("", [], [])])
def test_special_tokens(text, plain, parsed):
    tokenizer = small(merges=[*MERGES, "> <"])
    assert names(tokenizer, text, parse_special=True) == parsed
    if plain is not None:
        assert names(tokenizer, text) == plain
    control = {token for token, kind in SPECIAL.items() if kind != USER_DEFINED}
    assert not control.intersection(names(tokenizer, text))


def test_text_between_special_tokens_is_apart():
    assert names(small(), "he<a>llo", parse_special=True) == ["he", "<a>", "ll", "o"]


@pytest.mark.parametrize("text, expected", [
    ("<|a>", ["<", "a", ">"]),                      # inside a control token
    ("<a>|", ["<", "a", ">"]),                      # after it
    ("|<a>", ["<a>"]),
    ("<think|>h", ["<", "t", "h", "i", "n", "k", ">", "h"]),
    ("<a>|<a>", ["<", "a", ">", "<a>"]),
    ("ö|", ["Ã", "¶"]),
    ("he|llo| |w", ["hello", "Ġw"]),                # the text around it stays together
    ("||", [])])
def test_escape_keeps_text_plain_and_is_removed(text, expected):
    assert names(small(), text, parse_special=True, escape="|") == expected


def test_bos_is_added_when_asked_for():
    tokenizer = small(add_bos_token=True, add_eos_token=True)
    assert names(tokenizer, "h", add_bos=True) == ["<bos>", "h"]
    assert names(tokenizer, "h") == ["h"]
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, True)
    assert (small().add_bos, small().add_eos) == (False, False)


def test_bos_of_a_vocabulary_without_one():
    tokenizer = small(bos_token_id=None)
    assert tokenizer.bos_id is None
    with pytest.raises(PydsaError, match="small.gguf: the vocabulary has no BOS token"):
        tokenizer.encode("h", add_bos=True)


def test_tokens_that_end_a_turn():
    special = {**SPECIAL, "<|user|>": CONTROL, "<|observation|>": CONTROL, "<|endoftext|>": CONTROL, "</s>": NORMAL,
               "<|file_sep|>": USER_DEFINED, "pad": NORMAL}
    first = 256 + len(MERGES) - 1      # "ö" of the alphabet is a special token here
    ids = {text: first + n for n, text in enumerate(special)}
    tokenizer = small(special, eot_token_id=ids["<|user|>"], eom_token_id=ids["<|observation|>"],
                      fim_pad_token_id=ids["pad"])
    assert {tokenizer.tokens[token_id] for token_id in tokenizer.eog_ids} == {
        "<eos>", "<|user|>", "<|observation|>", "<|endoftext|>", "</s>", "<|file_sep|>", "pad"}


def test_tokens_that_end_a_turn_of_kimi_k2():
    texts = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_middle|>", "[EOT]", "[UNK]", "[PAD]")
    tokenizer = small(dict.fromkeys(texts, CONTROL), pre="kimi-k2")
    assert {tokenizer.tokens[token_id] for token_id in tokenizer.eog_ids} == {"[EOS]", "<|im_end|>", "[EOT]", "[PAD]"}


def test_texts_of_control_tokens_are_control_whatever_their_type():
    tokenizer = small({"</s>": NORMAL, "[EOT]": NORMAL, "<｜fim▁hole｜>": USER_DEFINED})
    assert set(tokenizer.control_texts) == {"</s>", "[EOT]", "<｜fim▁hole｜>"}
    assert names(tokenizer, "</s><｜fim▁hole｜>", parse_special=True) == ["</s>", "<｜fim▁hole｜>"]
    assert len(names(tokenizer, "</s>")) == 4 and len(names(tokenizer, "<｜fim▁hole｜>")) > 10


def test_all_tokens_are_normal_where_the_file_does_not_say():
    tokenizer = small({"<x>": CONTROL}, token_type=None)
    assert set(tokenizer.token_type.tolist()) == {NORMAL}
    assert len(names(tokenizer, "<x>", parse_special=True)) == 3


def test_chat_template():
    assert small().chat_template is None
    for text, expected in ("{{ 1 }}", "{{ 1 }}"), ("", None):
        metadata = small_metadata()
        metadata["tokenizer.chat_template"] = text
        assert Tokenizer.from_metadata(metadata).chat_template == expected


# Decoding

def test_decode_shows_special_tokens_unless_told_otherwise():
    tokenizer = small()
    ids = tokenizer.encode("<a>h<think><unk>ö", add_bos=True, parse_special=True)
    assert tokenizer.decode(ids) == "<bos><a>h<think><unk>ö"
    assert tokenizer.decode(ids, skip_special=True) == "h<think>ö"
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(ids)


def test_decode_of_other_types():
    euro = {"<0xE2>": BYTE, "<0x82>": BYTE, "<0xAC>": BYTE}
    tokenizer = small({**euro, "<0xGG>": BYTE, "Ġspare": UNUSED, "a b€": NORMAL})
    assert tokenizer.decode(range(256 + len(MERGES), tokenizer.n_vocab)) == "€<0xGG> sparea b€"


def test_characters_across_tokens_are_shown_when_complete():
    tokenizer = small()
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token_id) for token_id in tokenizer.encode("h🙂é")]
    assert pieces == ["h", "", "", "", "🙂", "", "é"]
    assert decoder.flush() == ""


def test_flush_marks_a_character_that_was_cut():
    tokenizer = small()
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, tokenizer.encode("a🙂")[:3])) == "a"
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


STREAMED = small()


@given(ids=st.lists(st.integers(0, STREAMED.n_vocab - 1)))
def test_streaming_equals_decoding(ids):
    tokenizer = STREAMED
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids, skip_special=True)


# Errors

@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_outside_of_the_vocabulary(token_id):
    tokenizer = small()
    expected = f"the token id is {token_id}, expected 0 to {tokenizer.n_vocab - 1}"
    with pytest.raises(PydsaError, match=expected):
        tokenizer.decode([1, token_id])
    with pytest.raises(PydsaError, match=expected):
        tokenizer.decoder().push(token_id)


def test_text_that_cannot_be_encoded():
    with pytest.raises(PydsaError, match="character 2 of the text is a lone surrogate"):
        small().encode("ab\ud800")
    with pytest.raises(PydsaError, match=f"{MAX_TEXT + 1} characters, expected at most {MAX_TEXT}"):
        small().encode(" " * (MAX_TEXT + 1))


def test_bytes_without_a_token_are_not_dropped():
    metadata = small_metadata({}, [], bos_token_id=None, eos_token_id=None, token_type=None)
    metadata["tokenizer.ggml.tokens"].remove("q")
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("hello, 你好")) == "hello, 你好"
    with pytest.raises(PydsaError, match="no token for byte 0x71 of the text"):
        tokenizer.encode("quiet")


TOKENS = small_metadata()["tokenizer.ggml.tokens"]


@pytest.mark.parametrize("keys, error, expected", [
    ({"model": None}, GGUFError, "tokenizer.ggml.model"),
    ({"model": "llama"}, UnsupportedModelError, "tokenizer.ggml.model is 'llama', expected 'gpt2'"),
    ({"model": 3}, GGUFError, "tokenizer.ggml.model"),
    ({"pre": None}, GGUFError, "tokenizer.ggml.pre"),
    ({"pre": "qwen2"}, UnsupportedModelError, "tokenizer.ggml.pre is 'qwen2', expected one of deepseek-llm, .*kimi-k2"),
    ({"pre": "x\n" * 99}, UnsupportedModelError, r"tokenizer.ggml.pre is 'x\\n"),
    ({"tokens": None}, GGUFError, "tokenizer.ggml.tokens"),
    ({"tokens": "abc"}, GGUFError, "tokenizer.ggml.tokens"),
    ({"tokens": []}, GGUFError, "tokenizer.ggml.tokens is empty"),
    ({"tokens": [*TOKENS[:-1], TOKENS[5]]}, GGUFError, f"tokens 5 and {len(TOKENS) - 1} are both"),
    ({"tokens": [*TOKENS[:-1], "x" * (MAX_TOKEN + 1)]}, GGUFError, f"has {MAX_TOKEN + 1} characters, expected 1 to"),
    ({"token_type": np.ones(len(TOKENS), np.float32)}, GGUFError, "token_type"),
    ({"merges": None}, GGUFError, "tokenizer.ggml.merges"),
    ({"merges": ["h h"]}, GGUFError, "merge 0 is 'h h', expected 'hh' to be a token"),
    ({"bos_token_id": len(TOKENS)}, GGUFError, "bos_token_id"),
    ({"eos_token_id": 2**32 - 1}, GGUFError, "eos_token_id"),
    ({"eom_token_id": "x"}, GGUFError, "eom_token_id"),
    ({"bos_token_id": None, "add_bos_token": True}, GGUFError, "add_bos_token is true, but .*bos_token_id is missing"),
    ({"eos_token_id": None, "add_eos_token": True}, GGUFError, "add_eos_token is true, but .*eos_token_id is missing"),
    ({"add_bos_token": 1}, GGUFError, "add_bos_token")])
def test_damaged_vocabularies(keys, error, expected):
    metadata = small_metadata()
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    for key, value in keys.items():
        if value is None:
            del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(error, match=expected) as caught:
        Tokenizer.from_metadata(metadata)
    assert str(caught.value).startswith("small.gguf: ") and "\n" not in str(caught.value)


def test_template_of_another_type():
    metadata = small_metadata()
    metadata["tokenizer.chat_template"] = ["{{ 1 }}"]
    with pytest.raises(GGUFError, match="tokenizer.chat_template"):
        Tokenizer.from_metadata(metadata)


# Files

def test_load_tokenizer_from_a_vocabulary(vocabularies):
    tokenizer = load_tokenizer(vocabularies["deepseek-coder"])
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id) == (32256, 32013, 32014)
    assert tokenizer.eog_ids == {32014} and tokenizer.add_bos and not tokenizer.add_eos


@pytest.mark.parametrize("n_rows", [len(TOKENS), 7])
def test_load_tokenizer_from_a_model(tmp_path, n_rows):
    metadata = small_metadata()
    writer = GGUFWriter(tmp_path / "model.gguf", "deepseek32")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"].tolist())
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_tensor("token_embd.weight", np.zeros((n_rows, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if n_rows == len(TOKENS):
        assert load_tokenizer(tmp_path / "model.gguf").encode("hello") == small().encode("hello")
    else:
        with pytest.raises(GGUFError, match="expected 7, the rows of token_embd.weight: plain text needs"):
            load_tokenizer(tmp_path / "model.gguf")


def test_import_is_light():
    program = ("import sys, pydsa.text.tokenizer, pydsa.chat, pydsa.sampling; "
               "print(*{'tokenizers', 'jinja2', 'numba', 'gguf'} & {name.split('.')[0] for name in sys.modules})")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""

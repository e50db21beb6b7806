"""Convert text to token ids and back, with the vocabulary of a GGUF.

    tokenizer = load_tokenizer("model.gguf")
    tokenizer.decode(tokenizer.encode("Hello"))

Text is split at special tokens, each fragment is split by the regexes of the pre-tokenizer, and each piece is merged by
byte-level BPE. The rules are those of llama.cpp; the `tokenizers` library does the BPE.
"""

import codecs
import os
import re
import warnings

import numpy as np

from pydsa.errors import GGUFError, PydsaError, UnsupportedModelError
from pydsa.gguf.file import Metadata, open_gguf, quote

MODEL = "gpt2"          # tokenizer.ggml.model of byte-level BPE
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
MAX_TOKEN = 1024        # characters; the longest token of the supported models is 256 spaces
MAX_TEXT = 8_000_000    # characters; the library's regex engine fails on a run of ten million spaces

# Latin, Greek, Cyrillic and the other cased letters, as the tokenizer of DeepSeek LLM lists them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = r"[\x{0800}-\x{9fa5}\x{ac00}-\x{d7ff}&&\S]+"
_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002"   # with A-Z and a-z, as in its tokenizer
_DEEPSEEK_LLM = ("[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_PUNCTUATION}]+", r"\s+\z", _CJK, r"\p{N}+")
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
_GLM4 = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Han as llama.cpp lists it for kimi-k2: ideographs and compatibility ideographs, without radicals and marks such as \u3005.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f"
_KIMI_K2 = (
    rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
# What Unicode 16 added. llama.cpp has Unicode 15.1, where none of these is a letter, number, mark, punctuation or symbol; the regex
# engine of the `tokenizers` library has one or the other.
_SINCE_16 = (
    "\u0897\u1b4e\u1b4f\u1b7f\u1c89\u1c8a\u2427-\u2429\u31e4\u31e5\ua7cb-\ua7cd\ua7da-\ua7dc\U000105c0-\U000105f3"
    "\U00010d40-\U00010d8f\U00010ec2-\U00010efc\U00011380-\U000113e2\U000116d0-\U000116e3\U00011bc0-\U00011bf9"
    "\U00011f5a\U00013460-\U000143fa\U00016100-\U00016139\U00016d40-\U00016d79\U00018cff\U0001cc00-\U0001ceb3"
    "\U0001e5d0-\U0001e5ff\U0001f8b2-\U0001f8c1\U0001fa89-\U0001fa8f\U0001fabe\U0001fac6\U0001fadc-\U0001fadf"
    "\U0001fae9\U0001fbcb-\U0001fbef"
)
# tokenizer.ggml.pre -> (regexes, ignore_merges). Each regex splits the pieces of the one before. With ignore_merges, a
# piece that is a token is taken whole, without merging.
PRE_TOKENIZERS = {
    "deepseek-llm": (_DEEPSEEK_LLM, False),
    "deepseek-coder": (_DEEPSEEK_CODER, False),
    "deepseek-v3": (_DEEPSEEK_V3, False),
    "hunyuan-dense": (_DEEPSEEK_V3, False),
    "hy_v4": (_DEEPSEEK_V3, False),
    "joyai-llm": (_DEEPSEEK_V3, False),
    "glm4": (_GLM4, True),
    "glm5": (_GLM4, True),
    "chatglm-bpe": (_GLM4, False),
    "kimi-k2": (_KIMI_K2, False),
    "gigachat": (_GPT2, False),
}

# Texts of tokens that end a turn, and of tokens for filling in code. Files often declare them as normal tokens.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>",
    "[EOT]", "[EOS]", "_<EOT>", "<|flush|>", "<|calls|>", "<turn|>", "<|tool_response>", "[e~[",
    "<|fim_pad|>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<|file_sep|>",
)
_FILL_TEXTS = (
    "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>",
)
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


def byte_alphabet():
    """GPT-2's printable characters for the 256 bytes, in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    codes = dict(zip(printable, printable)) | {byte: 0x100 + n for n, byte in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256)]


_ALPHABET = byte_alphabet()
_BYTE_OF = {character: byte for byte, character in enumerate(_ALPHABET)}


def load_tokenizer(path: str | os.PathLike) -> "Tokenizer":
    """The Tokenizer of a GGUF file, of a model or of a vocabulary alone.

    No weights are read. Raises GGUFError for a damaged file, UnsupportedModelError for a tokenizer that is not supported.
    """
    file = open_gguf(path)
    token_embd = file.tensors.get("token_embd.weight")
    return Tokenizer.from_metadata(file.metadata, None if token_embd is None else token_embd.shape[0])


class Tokenizer:
    """The tokenizer of a GGUF file, made by `load_tokenizer(path)`.

    tokens: the texts of all tokens as the file spells them, a list of str.
    token_type: int64 [n_vocab]; texts that llama.cpp always takes for control tokens are CONTROL, whatever the file says.
    bos_id, eos_id: int or None.
    eog_ids: the ids of the tokens that end a turn, a frozenset.
    add_bos, add_eos: whether the file asks for these tokens around a prompt.
    chat_template: str or None.
    control_texts, user_defined_texts: the texts of the special tokens, longest first.
    """

    @classmethod
    def from_metadata(cls, metadata: Metadata, n_vocab: int | None = None) -> "Tokenizer":
        """The tokenizer of a file's Metadata.

        n_vocab: the number of rows of token_embd; None without weights. Raises GGUFError for a damaged vocabulary,
        UnsupportedModelError for a tokenizer model or a pre-tokenizer that is not supported.
        """
        return cls(metadata, n_vocab)

    def __init__(self, metadata: Metadata, n_vocab: int | None = None):
        self.path = metadata.path
        model, pre = metadata.string("tokenizer.ggml.model"), metadata.string("tokenizer.ggml.pre")
        if model != MODEL:
            raise UnsupportedModelError(f"{self.path}: tokenizer.ggml.model is {quote(model)}, expected {MODEL!r}, "
                                        "byte-level BPE, which all DSA models use")
        if pre not in PRE_TOKENIZERS:
            raise UnsupportedModelError(f"{self.path}: tokenizer.ggml.pre is {quote(pre)}, expected one of "
                                        + ", ".join(PRE_TOKENIZERS))
        self.tokens, file_type = _vocabulary(metadata, n_vocab)
        self.n_vocab = len(self.tokens)
        ids = _token_ids(self.tokens, file_type, self.path)
        self._bpe = _bpe(self.tokens, ids, file_type, _merges(metadata, ids), *PRE_TOKENIZERS[pre])
        self._missing = {byte for byte, character in enumerate(_ALPHABET) if character not in ids}
        self._read_special(metadata, ids, file_type)
        self.chat_template = metadata.string("tokenizer.chat_template", default=None) or None
        self._known = {}        # id -> (its bytes, whether it is special), of tokens that were decoded

    def _read_special(self, metadata, ids, file_type):
        """Read the special tokens, from the file's keys and from their texts.

        The rules for texts are those of llama.cpp.
        """
        def special_id(name):
            key = f"tokenizer.ggml.{name}_token_id"
            if name not in ("bos", "eos") and type(metadata.get(key)) is int and not 0 <= metadata[key] < self.n_vocab:
                _warn(self.path, f"{key} is {metadata[key]}, which is no token; it is left out")
                return None
            return metadata.integer(key, 0, self.n_vocab - 1, default=None)

        self.bos_id, self.eos_id = special_id("bos"), special_id("eos")
        self.add_bos = metadata.boolean("tokenizer.ggml.add_bos_token", default=False)
        self.add_eos = metadata.boolean("tokenizer.ggml.add_eos_token", default=False)
        for name, wanted, token_id in ("bos", self.add_bos, self.bos_id), ("eos", self.add_eos, self.eos_id):
            if wanted and token_id is None:
                raise GGUFError(f"{self.path}: tokenizer.ggml.add_{name}_token is true, "
                                f"but tokenizer.ggml.{name}_token_id is missing, expected both")
        ends = {special_id(name) for name in _END_KEYS} | {ids.get(text) for text in _END_TEXTS}
        self.eog_ids = frozenset(ends - {None})
        self.token_type = file_type.copy()
        self.token_type[[ids[text] for text in _END_TEXTS + _FILL_TEXTS if text in ids]] = CONTROL
        self._special = self._pairs(UNKNOWN, CONTROL, USER_DEFINED)
        self._user_defined = self._pairs(USER_DEFINED)
        self.control_texts = tuple(text for text, _ in self._pairs(UNKNOWN, CONTROL))
        self.user_defined_texts = tuple(text for text, _ in self._user_defined)

    def _pairs(self, *types):
        """(text, id) of the tokens of these types, the longest text first.

        Text is split at them in this order.
        """
        ids = np.flatnonzero(np.isin(self.token_type, types)).tolist()
        return sorted(((self.tokens[token_id], token_id) for token_id in ids), key=lambda pair: -len(pair[0].encode()))

    def encode(self, text: str, add_bos: bool = False, parse_special: bool = False, escape: str | None = None
               ) -> list[int]:
        """Text -> token ids.

        add_bos: put BOS first, unless the text begins with it. parse_special: encode the texts of control tokens as these
        tokens; those of user-defined tokens always are. escape: a character that keeps the text of a special token plain
        where it is inside of it or right after it; it is then removed.

        Raises PydsaError if the text is too long, has a lone surrogate or a byte without a token, or if add_bos is set and
        there is no BOS token.
        """
        if add_bos and self.bos_id is None:
            raise PydsaError(f"{self.path}: the vocabulary has no BOS token, expected a call with add_bos=False")
        if len(text) > MAX_TEXT:
            raise PydsaError(f"the text has {len(text)} characters, expected at most {MAX_TEXT}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PydsaError(f"character {error.start} of the text is a lone surrogate, expected Unicode") from None
        ids = []
        for part in _partition(text, self._special if parse_special else self._user_defined, escape):
            if isinstance(part, str):
                ids += self._encode_plain(part.replace(escape, "") if escape else part)
            else:
                ids.append(part)
        return [self.bos_id, *ids] if add_bos and ids[:1] != [self.bos_id] else ids

    def _encode_plain(self, text):
        lost = self._missing and self._missing.intersection(text.encode())
        if lost:
            raise PydsaError(f"{self.path}: the vocabulary has no token for byte 0x{min(lost):02x} of the text")
        return self._bpe.encode(text).ids

    def decode(self, ids, skip_special: bool = False) -> str:
        """Token ids -> text.

        Bytes that are not UTF-8 become U+FFFD. skip_special: leave out the control tokens. Raises PydsaError for an id that
        is not in the vocabulary.
        """
        return b"".join(self.token_bytes(token_id, skip_special) for token_id in ids).decode(errors="replace")

    def decoder(self, shown=frozenset()) -> "StreamDecoder":
        """A new decoder for ids that arrive one by one.

        shown: ids of control tokens whose text is given too.
        """
        return StreamDecoder(self, shown)

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """The bytes of one token.

        A character may be spread over several tokens. skip_special: b"" for a control token. Raises PydsaError for an id
        that is not in the vocabulary.
        """
        known = self._known.get(token_id)
        if known is None:
            if not 0 <= token_id < self.n_vocab:
                raise PydsaError(f"the token id is {token_id}, expected 0 to {self.n_vocab - 1}")
            text, kind = self.tokens[token_id], self.token_type[token_id]
            known = self._known[token_id] = self._bytes_of(text, kind), kind in (UNKNOWN, CONTROL)
        data, special = known
        return b"" if special and skip_special else data

    @staticmethod
    def _bytes_of(text, kind):
        """The bytes of a token of this text and type."""
        if kind in (UNKNOWN, CONTROL):
            return text.encode()
        if kind == BYTE and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            return bytes.fromhex(text[3:5])
        if kind != USER_DEFINED and all(character in _BYTE_OF for character in text):
            return bytes(_BYTE_OF[character] for character in text)
        return text.encode()


class StreamDecoder:
    """Decodes ids that arrive one by one, without control tokens.

    A character is returned as soon as it is complete. shown: ids of control tokens that are decoded nevertheless.
    """

    def __init__(self, tokenizer: Tokenizer, shown=frozenset()):
        self._tokenizer, self._shown = tokenizer, shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, or ''."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=token_id not in self._shown))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character, else ''."""
        return self._utf8.decode(b"", final=True)


def _partition(text, special, escape):
    """Split text at special tokens -> a list of plain texts and ids.

    special: (text, id) of the tokens. Their order decides where two of them overlap, as in llama.cpp: the first in the
    list is taken, not the first in the text.
    """
    parts = [text]
    for token, token_id in special:
        if token in text:
            pattern = re.compile(re.escape(token) + (f"(?!{re.escape(escape)})" if escape else ""))
            parts = [piece for part in parts for piece in _cut(part, pattern, token_id)]
    return parts


def _cut(part, pattern, token_id):
    """Split a part of the text at each match of pattern, the token's text."""
    if not isinstance(part, str):
        return [part]
    first, *rest = pattern.split(part)
    pieces = [first, *(piece for plain in rest for piece in (token_id, plain))]
    return [piece for piece in pieces if piece != ""]


def _warn(path, sentence):
    """Warn of a fault in the vocabulary that leaves its meaning clear."""
    warnings.warn(f"{path}: {sentence}.", stacklevel=2)


def _vocabulary(metadata, n_rows):
    """The texts of the tokens, and their types, int64 [n_vocab].

    n_rows: the number of rows of token_embd; None: that of the tokens. Tokens without a row are cut, if plain text has none of
    them, and rows without a token get one that is never used, as llama.cpp's converter names them. Without types in the file
    all tokens are NORMAL.
    """
    path, tokens = metadata.path, list(metadata.strings("tokenizer.ggml.tokens"))
    types = np.full(len(tokens), NORMAL, np.int64)
    given = metadata.integers("tokenizer.ggml.token_type", default=types)
    if not tokens:
        raise GGUFError(f"{path}: tokenizer.ggml.tokens is empty, expected a vocabulary")
    if len(given) != len(tokens):
        _warn(path, f"tokenizer.ggml.token_type has {len(given)} values for {len(tokens)} tokens; tokens without one are normal")
    types[:len(given)] = given[:len(tokens)]
    strange = np.flatnonzero(~np.isin(types, range(BYTE + 1)))
    if strange.size:
        _warn(path, f"token {strange[0]} is of type {types[strange[0]]}, expected 0 to {BYTE}; it is taken as 0, undefined")
        types[strange] = 0
    for token_id in [token_id for token_id, text in enumerate(tokens) if not text]:
        _warn(path, f"token {token_id} has no text; it is taken as [EMPTY_{token_id}]")
        tokens[token_id] = f"[EMPTY_{token_id}]"
    if n_rows is not None and n_rows != len(tokens):
        of_text = {merge.replace(" ", "", 1) for merge in metadata.strings("tokenizer.ggml.merges")}.union(_ALPHABET)
        if not of_text.isdisjoint(tokens[n_rows:]):
            raise GGUFError(f"{path}: tokenizer.ggml.tokens has {len(tokens)} tokens, expected {n_rows}, the rows of "
                            "token_embd.weight: plain text needs tokens that have no row")
        _warn(path, f"tokenizer.ggml.tokens has {len(tokens)} tokens, but token_embd.weight {n_rows} rows; "
                    + ("the last tokens are left out" if n_rows < len(tokens) else "the last rows become unused tokens"))
        types = np.concatenate([types[:n_rows], np.full(max(0, n_rows - len(tokens)), UNUSED)])
        tokens = tokens[:n_rows] + [f"[PAD{token_id}]" for token_id in range(len(tokens), n_rows)]
    return tokens, types


def _token_ids(tokens, token_type, path):
    """{text of a token: id}.

    Of tokens with the same text, all but one must be unused.
    """
    ids = dict(zip(tokens, range(len(tokens))))
    if len(ids) != len(tokens):
        used = {}
        for token_id in np.flatnonzero(token_type != UNUSED).tolist():
            first = used.setdefault(tokens[token_id], token_id)
            if first != token_id:
                raise GGUFError(f"{path}: tokens {first} and {token_id} are both {quote(tokens[token_id])}, expected each text once")
        _warn(path, f"{len(tokens) - len(ids)} unused tokens have the texts of others")
        ids |= used
    for token in min(tokens, key=len), max(tokens, key=len):
        if not 0 < len(token) <= MAX_TOKEN:
            raise GGUFError(f"{path}: token {ids[token]} has {len(token)} characters, expected 1 to {MAX_TOKEN}")
    return ids


def _merges(metadata, ids):
    """The merges as pairs of tokens, in order of priority.

    Merges of texts that are no tokens can never apply: they are left out. A pair that comes twice has its first rank.
    """
    merges, pairs, idle = metadata.strings("tokenizer.ggml.merges"), {}, []
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or (left, right) in pairs:
            idle.append(rank)
        elif left + right not in ids:
            raise GGUFError(f"{metadata.path}: merge {rank} is {quote(merge)}, expected {quote(left + right)} to be a token")
        else:
            pairs[left, right] = rank
    if idle:
        _warn(metadata.path, f"{len(idle)} merges are repeated or have parts that are no tokens, such as merge {idle[0]}, "
                             f"{quote(merges[idle[0]])}; they are left out")
    return list(pairs)


def _as_in_unicode_15(regex):
    """The regex with categories that leave out what Unicode 16 added."""
    return re.sub(r"\\p\{(\w+)\}", lambda category: f"[{category[0]}&&[^{_SINCE_16}]]", regex)


def _bpe(tokens, ids, token_type, merges, regexes, ignore_merges):
    """The `tokenizers.Tokenizer` for plain text."""
    import tokenizers
    from tokenizers import models

    # With ignore_merges, a piece that spells a control token would become that token; plain text never may.
    control = {tokens[token_id] for token_id in np.flatnonzero(np.isin(token_type, (UNKNOWN, CONTROL)))}
    control.difference_update(*((left, right, left + right) for left, right in merges))
    vocab = {text: token_id for text, token_id in ids.items() if text not in control}
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre_tokenizer(regexes)
    return bpe


def pre_tokenizer(regexes):
    """What splits plain text for regexes of PRE_TOKENIZERS, of `tokenizers`."""
    import tokenizers
    from tokenizers import pre_tokenizers
    splits = [pre_tokenizers.Split(tokenizers.Regex(_as_in_unicode_15(regex)), "isolated") for regex in regexes]
    to_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_alphabet])

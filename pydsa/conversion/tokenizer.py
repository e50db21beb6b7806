"""The tokenizer of a folder: tokenizer.json or tiktoken.model -> keys of GGUF.

No code of the folder is run. The pre-tokenizer is recognised by what it does: it must split probing texts as one of pydsa's does, which is
more than a hash of some ids says, as that changes with every vocabulary. A link that leads nowhere, as an incomplete download leaves it, is
an error, and not a file that the model does not have.
"""
import base64
import binascii
import json
import os

from pydsa.conversion.fields import MAX_JSON, Fields, decode, kind_of, read_bytes, read_json, read_text
from pydsa.errors import CheckpointError, UnsupportedModelError
from pydsa.gguf.file import quote
from pydsa.text.tokenizer import CONTROL, MODEL, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, byte_alphabet, pre_tokenizer

JSON, TIKTOKEN, CONFIG = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"
KIMI = "kimi-k2"            # the pre-tokenizer of the models with tiktoken.model
BOS_V32 = "<｜begin▁of▁sentence｜>"
GLM_SPECIAL = {"bos": "[gMASK]", "eot": "<|user|>", "unknown": "<|endoftext|>", "eom": "<|observation|>"}
LARGE = 10000               # tokens from which on ids tell pre-tokenizers apart
NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})
LONGEST_TIKTOKEN = 128      # bytes of a token; Kimi's longest has as many spaces
# Where the pre-tokenizers of these models differ: numbers, marks after letters, Chinese, contractions, runs of spaces, line ends, signs.
PROBES = (
    "Attention needs 1 or 22 keys, 333 more, 4444 and 1234567890 in all: 3.14, 10,000 or 0x1F.",
    "It's what they'VE said; I'm sure we'd 'tell you'LL, Don'T 'ask'd.",
    "稀疏注意力2024年的モデルは、とても速い。한국어도 있다! 中文English混合３，漢字かなカナ々〆㐀豈",
    "  two  spaces,   three\tand\t\ttabs \n \n\n a line\r\n\r\n  end   \n",
    "naïve café, Ünïcödé, е́ и ё, हिन्दी, العربية, ไทย, Ελληνικά, ἀρχή",
    "x+=1; if(!a[i]) {return *p->q;} // %s #tag @name $5 €7 £8 «quote» … — ¿qué? \\n_a__b <tag/> ~`^|",
    "🙂👩‍👩‍👧‍👦🇪🇺 ½ ² Ⅷ ① ㉑ ﬁ ﷽ \u00a0nbsp\u200bzero",
    "!important .method -flag /path?query=1&x=2 (word) [word] \"word\" 'word' word's-word_word",
)


def tokenizer_keys(checkpoint, shape, notes):
    """The keys tokenizer.* of a model, {key: value}, without the prefix.

    notes: a list to which sentences are added. Raises CheckpointError or UnsupportedModelError.
    """
    folder = checkpoint.folder
    path = folder / CONFIG
    config = Fields(read_json(path, "the configuration of a tokenizer") if os.path.lexists(path) else {}, path)
    if os.path.lexists(folder / JSON):
        vocabulary = _read_json_tokenizer(folder / JSON, notes)
    elif os.path.lexists(folder / TIKTOKEN):
        vocabulary = _read_tiktoken(folder / TIKTOKEN, config, shape.n_vocab)
    else:
        raise CheckpointError(f"{folder}: there is neither {JSON} nor {TIKTOKEN}, expected the tokenizer of the model.")
    tokens, types = _token_list(vocabulary, shape.n_vocab, folder)
    keys = {"ggml.model": MODEL, "ggml.pre": vocabulary.pre, "ggml.tokens": tokens, "ggml.token_type": types,
            "ggml.merges": vocabulary.merges}
    ids = {token: i for i, token in enumerate(tokens)}
    keys |= _special_ids(config, checkpoint.config, vocabulary, ids)
    keys |= _added(config, shape, vocabulary, keys, ids, notes)
    template = _chat_template(folder, config)
    if template:
        keys["chat_template"] = template
    elif shape.arch == "deepseek32":
        notes.append("There is no chat template, as the model has none; pydsa has DeepSeek V3.2's own format, other programs need one.")
    else:
        notes.append("There is no chat template in the folder; prompts need --raw.")
    return keys


class Vocabulary:
    """What a tokenizer's file holds.

    ids: {text in the byte alphabet: id}. added: {id: (text, special)}. merges: list of "left right". pre: name of the pre-tokenizer.
    adds_bos: whether a template in the file puts BOS first; None where it says nothing.
    """

    def __init__(self, ids, added, merges, pre, adds_bos=None):
        self.ids, self.added, self.merges, self.pre, self.adds_bos = ids, added, merges, pre, adds_bos


def _read_json_tokenizer(path, notes):
    """The Vocabulary of a tokenizer.json; notes: a list that grows."""
    fields = Fields(read_json(path, "a tokenizer"), path)
    model = fields.fields("model")
    other = [key for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.values.get(key)]
    if model.string("type", default="BPE") != "BPE" or other or fields.values.get("normalizer") not in NO_NORMALIZER:
        raise UnsupportedModelError(f"{path}: this tokenizer is not byte-level BPE without a normalizer, which all DSA models have.")
    vocab = model.fields("vocab").values
    if not vocab or not all(type(i) is int and 0 <= i < 2**31 for i in vocab.values()) or len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{path}: model.vocab is {kind_of(vocab)}, expected a different id from 0 on for each token.")
    added = {}
    tokens = fields.values.get("added_tokens") or []
    if not isinstance(tokens, list):
        fields.fail("added_tokens", "an array of tokens")
    for token in tokens:
        token = Fields(token if isinstance(token, dict) else {}, path, "added_tokens: ")
        added[token.integer("id")] = token.string("content"), token.boolean("special", default=False)
    merges = _merges(model)
    return Vocabulary(vocab, added, merges, _recognise(path, fields.values.get("pre_tokenizer"), model, notes), _template_adds_bos(fields))


def _merges(model):
    """The merges as "left right", whichever form the file has."""
    merges = model.values.get("merges")
    if isinstance(merges, list) and all(isinstance(merge, str) for merge in merges):
        return merges
    if isinstance(merges, list) and all(_is_pair(merge) for merge in merges):
        return [" ".join(pair) for pair in merges]
    return model.fail("merges", "an array of pairs of tokens")


def _is_pair(merge):
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) and " " not in part for part in merge)


def _recognise(path, given_splits, model, notes):
    """The name of the pre-tokenizer of pydsa that splits texts as the file's.

    One that splits some of them otherwise will do where a large vocabulary gives the same ids, as no token spans the difference.
    """
    import tokenizers
    # Only what is needed and was checked reaches the library, which ends the process for some other values.
    parts = {key: model.values[key] for key in ("vocab", "merges")} | {"type": "BPE", "ignore_merges": model.values.get("ignore_merges")}
    try:
        theirs = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "pre_tokenizer": given_splits, "model": parts}))
    except Exception as error:      # the library raises no narrower class
        raise CheckpointError(f"{path}: the tokenizers library cannot read it ({str(error)[:200]}).") from None

    def pieces():
        return [[piece for piece, _ in theirs.pre_tokenizer.pre_tokenize_str(probe)] for probe in PROBES]

    def ids():
        return [theirs.encode(probe, add_special_tokens=False).ids for probe in PROBES]

    ignore_merges = model.boolean("ignore_merges", default=False)
    candidates = {name: regexes for name, (regexes, whole_first) in PRE_TOKENIZERS.items() if whole_first == ignore_merges}
    for measure in ((pieces,) if theirs.get_vocab_size() < LARGE else (pieces, ids)) if theirs.pre_tokenizer is not None else ():
        given, found = theirs.pre_tokenizer, measure()
        for name, regexes in candidates.items():
            theirs.pre_tokenizer = pre_tokenizer(regexes)
            if measure() == found:
                if measure is ids:
                    notes.append(f"The tokenizer splits texts otherwise than {name}, which gives the same ids for {len(PROBES)} probing "
                                 "texts, and is taken for it.")
                return name
        theirs.pre_tokenizer = given
    raise UnsupportedModelError(f"{path}: the tokenizer splits texts as none of pydsa's pre-tokenizers does, expected one of "
                                f"{', '.join(PRE_TOKENIZERS)}.")


def _template_adds_bos(fields):
    """Whether a TemplateProcessing in the file begins with a token."""
    post = fields.values.get("post_processor")
    inner = post.get("processors") if isinstance(post, dict) else None
    for part in [post, *(inner if isinstance(inner, list) else ())]:
        if isinstance(part, dict) and part.get("type") == "TemplateProcessing" and isinstance(part.get("single"), list):
            return bool(part["single"]) and isinstance(part["single"][0], dict) and "SpecialToken" in part["single"][0]
    return None


def _read_tiktoken(path, config, n_vocab):
    """The Vocabulary of tiktoken.model: lines of a token in base64 and a rank.

    Special tokens are those of added_tokens_decoder in tokenizer_config.json; rows of the model without a token are reserved ones.
    """
    ranks = {}
    for i, line in enumerate(decode(read_bytes(path, "a tokenizer of tiktoken", MAX_JSON), path).splitlines()):
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
            if len(parts) != 2 or rank != i or not 0 < len(token) <= LONGEST_TIKTOKEN or token in ranks:
                raise ValueError
        except (ValueError, IndexError, binascii.Error):
            raise CheckpointError(f"{path}: line {i + 1} is {quote(line)}, expected a new token in base64 and the rank {i}.") from None
        ranks[token] = rank
    absent = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if absent is not None:
        raise CheckpointError(f"{path}: there is no token for byte {absent}, expected one for each of 256.")
    named = {}
    for key, token in config.fields("added_tokens_decoder", default=Fields({}, config.path)).values.items():
        token = Fields(token if isinstance(token, dict) else {}, config.path, f"added_tokens_decoder.{key}.")
        if not key.isascii() or not key.isdigit() or not len(ranks) <= int(key) < n_vocab:
            raise CheckpointError(f"{config.path}: added_tokens_decoder has the id {quote(key)}, expected {len(ranks)} to {n_vocab - 1}.")
        named[int(key)] = token.string("content")
    added = {i: (named.get(i, f"<|reserved_token_{i}|>"), True) for i in range(len(ranks), n_vocab)}
    alphabet = byte_alphabet()
    spelled = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = [" ".join(spelled[part] for part in pair) for pair in _pairs(ranks)]
    return Vocabulary({spelled[token]: rank for token, rank in ranks.items()}, added, merges, KIMI)


def _pairs(ranks):
    """The two tokens that each token of several bytes is merged of.

    They are what merging by lower ranks leaves of it. A token of which more than two parts are left can never be merged.
    """
    for token, rank in ranks.items():
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            lowest, at = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if lowest >= rank:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts


def _token_list(vocabulary, n_vocab, folder):
    """(texts, types) of all ids, as llama.cpp's converter has them."""
    of_id = {i: token for token, i in vocabulary.ids.items()}
    most = max([*of_id, *vocabulary.added], default=-1)
    if most >= n_vocab:
        raise CheckpointError(f"{folder}: the tokenizer has the id {most}, but vocab_size in config.json is {n_vocab}: they are not of one "
                              "model.")
    tokens, types = [], []
    for i in range(n_vocab):
        if i in vocabulary.added:
            text, special = vocabulary.added[i]
            looks = text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")) or text == "<pad>"
            tokens.append(text)
            types.append(CONTROL if special or looks else USER_DEFINED)
        else:
            tokens.append(of_id.get(i, f"[PAD{i}]"))
            types.append(NORMAL if i in of_id else UNUSED)
    return tokens, types


def _special_ids(config, model_config, vocabulary, ids):
    """The keys ggml.*_token_id: tokenizer_config.json's, else config.json's."""
    special = {text for text, _ in vocabulary.added.values()}
    found = {}
    if special.issuperset(GLM_SPECIAL.values()):
        found |= {key: ids[text] for key, text in GLM_SPECIAL.items()}
    for key, name in ("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"):
        value = config.values.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and (not isinstance(text, str) or text not in ids):
            raise CheckpointError(f"{config.path}: {name}_token is {kind_of(value)}, expected one of the tokens.")
        token_id = model_config.values.get(f"{name}_token_id")
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if text is not None:
            found.setdefault(key, ids[text])
        elif type(token_id) is int and 0 <= token_id < len(ids):
            found.setdefault(key, token_id)
    return {f"ggml.{key}_token_id": token_id for key, token_id in found.items()}


def _added(config, shape, vocabulary, keys, ids, notes):
    """The keys ggml.add_bos_token and add_eos_token."""
    bos = config.boolean("add_bos_token", default=vocabulary.adds_bos)
    eos = config.boolean("add_eos_token", default=None)
    if shape.arch == "deepseek32":
        if BOS_V32 in ids and keys.get("ggml.bos_token_id") != ids[BOS_V32]:
            notes.append(f"The BOS token is set to {BOS_V32}, which DeepSeek V3.2 was trained with.")
            keys["ggml.bos_token_id"] = ids[BOS_V32]
        if bos is not True:
            notes.append("BOS is to be added before a prompt, although the folder does not say so: DeepSeek V3.2 was trained with it.")
            bos = True
    if bos and "ggml.bos_token_id" not in keys:
        raise CheckpointError(f"{config.path}: BOS is to be added, but there is no bos_token, expected the text of a token.")
    if eos and "ggml.eos_token_id" not in keys:
        raise CheckpointError(f"{config.path}: EOS is to be added, but there is no eos_token, expected the text of a token.")
    return {f"ggml.add_{name}_token": value for name, value in (("bos", bos), ("eos", eos)) if value is not None}


def _chat_template(folder, config):
    """The chat template of a folder, or None.

    It is in a file of its own, or in the configuration, as a text or as several with names, of which the default one is taken.
    """
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return read_text(path, "a chat template")
    template = config.values.get("chat_template")
    path = folder / "chat_template.json"
    if template is None and os.path.lexists(path):
        template = read_json(path, "a chat template").get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{config.path}: chat_template is {kind_of(json.loads(json.dumps(template)))}, expected a text.")
    return template

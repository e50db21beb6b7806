"""Vocabularies with faults that leave their meaning clear."""
import numpy as np
import pytest
from chat_cases import MERGES, small, small_metadata

from pydsa.errors import GGUFError
from pydsa.text.tokenizer import Tokenizer

TOKENS = small_metadata()["tokenizer.ggml.tokens"]
N = len(TOKENS)


@pytest.mark.parametrize("keys, warning", [
    ({"tokens": [*TOKENS, "new"]}, f"token_type has {N} values for {N + 1} tokens; tokens without one are normal"),
    ({"tokens": [*TOKENS, ""], "token_type": np.ones(N + 1, np.int32)}, rf"token {N} has no text; it is taken as \[EMPTY_{N}\]"),
    ({"tokens": [*TOKENS, TOKENS[5]], "token_type": np.array([1] * N + [5])}, "1 unused tokens have the texts of others"),
    ({"tokens": [TOKENS[5], *TOKENS[1:]], "token_type": np.array([5] + [1] * (N - 1))}, "1 unused tokens have the texts of others"),
    ({"token_type": np.ones(3, np.int32)}, f"token_type has 3 values for {N} tokens"),
    ({"token_type": np.ones(N + 3, np.int32)}, f"token_type has {N + 3} values for {N} tokens"),
    ({"token_type": np.array([7] + [1] * (N - 1))}, "token 0 is of type 7, expected 0 to 6"),
    ({"token_type": np.array([-1] + [1] * (N - 1))}, "token 0 is of type -1, .* undefined"),
    ({"merges": [*MERGES, "hello"]}, f"1 merges are repeated or have parts that are no tokens, such as merge {len(MERGES)}, 'hello'"),
    ({"merges": ["", " h", *MERGES]}, "2 merges .* merge 0, ''"),
    ({"merges": ["he qq", "qq he", *MERGES]}, "2 merges .* 'he qq'; they are left out"),
    ({"merges": [*MERGES, MERGES[0]]}, f"1 merges .* merge {len(MERGES)}, '{MERGES[0]}'"),
    ({"eot_token_id": -1}, "eot_token_id is -1, which is no token; it is left out"),
    ({"fim_pad_token_id": 2**32 - 1}, "fim_pad_token_id is 4294967295")])
def test_vocabularies_with_faults_that_do_not_matter(keys, warning):
    """Plain text has the ids that it has without the fault, and decodes."""
    metadata = small_metadata()
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    with pytest.warns(UserWarning, match=warning):
        tokenizer = Tokenizer.from_metadata(metadata)
    text = "hello, 你好"
    assert tokenizer.encode(text) == small().encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.tokens) == len(tokenizer.token_type) == tokenizer.n_vocab and all(tokenizer.tokens)


def test_rows_without_a_token():
    """They become unused tokens, with the names of llama.cpp's converter."""
    with pytest.warns(UserWarning, match=f"has {N} tokens, but token_embd.weight {N + 2} rows; the last rows become unused tokens"):
        tokenizer = Tokenizer.from_metadata(small_metadata(), n_vocab=N + 2)
    assert tokenizer.n_vocab == N + 2 and tokenizer.decode([N, N + 1]) == f"[PAD{N}][PAD{N + 1}]"
    assert tokenizer.encode(f"[PAD{N}]") == small().encode(f"[PAD{N}]", parse_special=True)


def test_tokens_without_a_row():
    """They are left out, where no merge makes one."""
    metadata = small_metadata()
    metadata["tokenizer.ggml.tokens"] = [*TOKENS, "<extra>"]
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], 4)
    assert Tokenizer.from_metadata(metadata, n_vocab=N + 1).encode("<extra>") == [N]
    with pytest.warns(UserWarning, match=f"has {N + 1} tokens, but token_embd.weight {N} rows; the last tokens are left out"):
        tokenizer = Tokenizer.from_metadata(metadata, n_vocab=N)
    assert tokenizer.tokens == TOKENS and tokenizer.encode("<extra>") == small().encode("<extra>")
    last = max(TOKENS.index(merge.replace(" ", "")) for merge in MERGES)
    with pytest.raises(GGUFError, match=f"has {N} tokens, expected {last}, the rows of token_embd.weight: plain text needs tokens"):
        Tokenizer.from_metadata(small_metadata(), n_vocab=last)

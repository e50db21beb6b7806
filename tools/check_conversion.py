"""Check conversions with llama.cpp: it loads them, and computes the logits of transformers.

    pip install '.[peer]'
    python tools/check_conversion.py [FOLDER ...]

Each folder NAME has NAME.npz beside it, with `tokens` and `logits`, as tools/make_checkpoint.py writes them; by default those of
tests/data/checkpoints that llama.cpp can run (it knows queries without a low rank in models of 26, 27 or 48 layers only). Each is
converted in F32, also with an MTP block added where the architecture has an indexer, and in Q8_0, whose median error is shown. Ends with
exit code 1 if an error in F32 is above 1e-9, or ids of tokens differ.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pydsa  # noqa: E402
from tests.checkpoints import DATA, add_mtp, copy  # noqa: E402

BOUND, TEXT = 1e-9, "Sparse attention: 12345 tokens, it's theirs.\n\n  done"


def of_llama_cpp(path, tokens):
    """(logits [n, n_vocab], ids of TEXT) of llama.cpp, with float32 caches."""
    import llama_cpp
    model = llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, n_ubatch=256, logits_all=True, verbose=False, n_threads=1, type_k=0,
                            type_v=0)
    model.eval(tokens)
    return np.array(model.scores[:len(tokens)], np.float64), model.tokenize(TEXT.encode(), add_bos=False, special=False)


def check(folder, expected, kind, temporary):
    """The greatest error of a conversion, or infinity where ids differ.

    With other weights than F32 it is the median: some tokens attend to other keys then.
    """
    path = Path(temporary) / "model.gguf"
    pydsa.convert(folder, path, kind, overwrite=True)
    logits, ids = of_llama_cpp(path, expected["tokens"].tolist())
    if ids != pydsa.load_tokenizer(path).encode(TEXT):
        return np.inf
    errors = ((logits - expected["logits"]) ** 2).sum(-1) / (expected["logits"].astype(np.float64) ** 2).sum(-1)
    return errors.max() if kind == "F32" else np.median(errors)


def main(folders):
    """Print a line for each conversion -> whether all are right."""
    right = True
    with tempfile.TemporaryDirectory() as temporary:
        for folder in map(Path, folders or [DATA / "v32", DATA / "glm", DATA / "v3"]):
            expected = np.load(folder.with_suffix(".npz"))
            forms = [(folder, "F32", ""), (folder, "Q8_0", "")]
            if folder.parent == DATA and folder.name != "v3":
                forms.append((copy(folder.name, Path(temporary) / folder.name, add_mtp, num_nextn_predict_layers=1), "F32", " with MTP"))
            for source, kind, what in forms:
                error = check(source, expected, kind, temporary)
                right &= error < (BOUND if kind == "F32" else np.inf)
                print(f"{folder.name} {kind}{what}: {error:.1e}")
    return right


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)

"""Compare pydsa with llama.cpp: logits and text, or speed.

    python tools/compare_llama_cpp.py model.gguf
    python tools/compare_llama_cpp.py model.gguf -f chapter.txt -l 2048 -n 64
    python tools/compare_llama_cpp.py model.gguf --speed --n-prompt 512 --n-gen 64 --n-depth 0,4096

It needs llama-cpp-python (pydsa's extra `peer`) with a llama.cpp that knows the architecture. Logits are compared position by position, and
then the text that both continue with. Both have float32 caches when logits are compared, and float16 caches for speed; there llama.cpp has
flash attention.

The error is the normalised squared error, NMSE = sum((a - b)^2) / sum(b^2), with b from llama.cpp. With F32 weights expect 1e-8 or less.
With quantized ones llama.cpp rounds activations to 8 bits: 0.001 to 0.01 on random models.
"""

import sys
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

UBATCH = 512


class LlamaCpp:
    """A model in llama.cpp on the CPU, by its C interface.

    It has float32 caches, or with `fast` float16 caches and flash attention. Weights stay as they are in the file, unless `repack` lets
    llama.cpp choose: its kernels for repacked weights crash on some CPUs (seen with AMX).
    """

    def __init__(self, path, n_ctx, threads, threads_batch=None, fast=False, repack=False):
        import llama_cpp
        self.api = llama_cpp
        self.log = []
        self.keep = llama_cpp.llama_log_callback(lambda level, line, _: self.log.append(line.decode(errors="replace")))
        llama_cpp.llama_log_set(self.keep, None)
        llama_cpp.llama_backend_init()

        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = repack
        self.model = self.opened(llama_cpp.llama_model_load_from_file(str(path).encode(), options), path)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = n_ctx
        options.n_ubatch = min(n_ctx, UBATCH)
        options.type_k = options.type_v = int(fast)    # GGML_TYPE_F32 is 0, GGML_TYPE_F16 is 1
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if fast else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.n_threads, options.n_threads_batch = threads, threads_batch or threads
        self.context = self.opened(llama_cpp.llama_init_from_model(self.model, options), path)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def opened(self, handle, path):
        if not handle:
            errors = [line.strip() for line in self.log if "error" in line or "failed" in line]
            raise RuntimeError(f"llama.cpp cannot run {path}: {errors[0] if errors else 'it gives no reason'}")
        return handle

    def tokenize(self, text):
        data = text.encode()
        ids = (self.api.llama_token * (len(data) + 2))()
        n = self.api.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, False)
        return list(ids[:n])

    def decode(self, ids, first=0):
        """Logits [len(ids), n_vocab] of tokens at positions from `first` on.

        The tokens are appended to the context.
        """
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (len(ids), self.n_vocab)).copy()

    def run(self, ids, n_predict):
        """Logits of the prompt, and a greedy continuation."""
        logits = self.decode(ids)
        picked, last = [], logits[-1]
        for i in range(n_predict):
            picked.append(int(last.argmax()))
            last = self.decode(picked[-1:], len(ids) + i)[0]
        return logits, picked


def run_pydsa(model, ids, n_predict):
    """Logits of the prompt, and a greedy continuation."""
    logits = model.logits(ids)
    session = model.session()
    picked, last = [], session.prefill(ids)
    for _ in range(n_predict):
        picked.append(int(last.argmax()))
        last = session.decode(picked[-1])
    return logits, picked


def log_softmax(x):
    x = x.astype(np.float64) - x.max()
    return x - np.log(np.exp(x).sum())


def differences(a, b):
    """The measures of each position, name -> one number a position.

    a and b are logits [n, n_vocab]; b is the reference.
    """
    rows = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64)):
        log_p, log_q = log_softmax(y), log_softmax(x)
        rows.append((((x - y)**2).sum() / (y**2).sum(), np.abs(x - y).max(), np.exp(log_p) @ (log_p - log_q)))
    return dict(zip(("NMSE", "largest difference", "KL divergence"), np.array(rows).T))


def perplexity(logits, ids):
    """exp(-mean log p) of each token given those before it."""
    return float(np.exp(-np.mean([log_softmax(row)[token] for row, token in zip(logits, ids[1:])])))


def show(console, a, b, ids, texts):
    """Print the two tables of a comparison.

    a and b are the logits of pydsa and llama.cpp, texts their continuations.
    """
    from rich.table import Column, Table
    from rich.text import Text

    agree = a.argmax(axis=1) == b.argmax(axis=1)
    table = Table("over positions", *(Column(name, justify="right") for name in ("median", "90 %", "max", "at")))
    for name, values in differences(a, b).items():
        table.add_row(name, *(f"{np.quantile(values, q):.3g}" for q in (0.5, 0.9, 1.0)), str(values.argmax()))
    console.print(table, f"the same top token at {agree.sum()} of {len(ids)} positions ({agree.mean():.1%})")
    table = Table("", "pydsa", "llama.cpp")
    table.add_row("perplexity", *(f"{perplexity(logits, ids):.4f}" for logits in (a, b)))
    table.add_row("goes on", *(Text(text) for text in texts))
    console.print(table)


def continuation(model, picked, other):
    """The text, with the first token at which it differs from the other."""
    same = next((i for i, (x, y) in enumerate(zip(picked, other)) if x != y), None)
    text = repr(model.detokenize(picked))
    return text if same is None else f"{text}\n(differs from token {same})"


def fail(message):
    click.echo(message, err=True)
    sys.exit(2)


def options_of(speed):
    """The names of the options of one comparison: --speed, or logits."""
    return ("n_prompt", "n_gen", "n_depth", "repetitions", "repack") if speed else ("prompt", "file", "length", "n_predict")


@click.command(help=__doc__.split("\n")[0])
@click.argument("model_path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option("-p", "--prompt", help="text to compare on  [a page of Python's documentation]")
@click.option("-f", "--file", type=click.File(encoding="utf-8"), help="file that holds the text")
@click.option("-l", "--length", type=click.IntRange(2), default=256, help="tokens of the text to use  [256]")
@click.option("-n", "--n-predict", type=click.IntRange(0), default=24, help="tokens to go on with  [24]")
@click.option("-t", "--threads", type=click.IntRange(1), help="threads of both for generation  [physical cores]")
@click.option("-tb", "--threads-batch", type=click.IntRange(1), help="threads of both for prompts  [as -t]")
@click.option("--speed", is_flag=True, help="compare the speed; the options below are for this")
@click.option("--n-prompt", default="512", help="prompt lengths to time, with commas between; 0: none  [512]")
@click.option("--n-gen", default="64", help="numbers of tokens to generate; 0: none  [64]")
@click.option("--n-depth", default="0", help="tokens that are in the context already  [0]")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=3, help="times that each test runs; the best counts  [3]")
@click.option("--repack", is_flag=True, help="let llama.cpp repack weights, which crashes on some CPUs")
@click.pass_context
def main(context, model_path, threads, threads_batch, speed, **options):
    strangers = [name for name in options_of(not speed) if context.get_parameter_source(name).name == "COMMANDLINE"]
    if strangers:
        fail(f"--{strangers[0].replace('_', '-')} {'has no use with' if speed else 'needs'} --speed.")
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        fail("llama-cpp-python is not installed: pip install llama-cpp-python, then run this again.")
    import pydsa

    compare = compare_speeds if speed else compare_logits
    try:
        compare(model_path, {"threads": threads, "threads_batch": threads_batch}, **{name: options[name] for name in options_of(speed)})
    except (pydsa.PydsaError, RuntimeError) as error:
        fail(str(error))


def compare_speeds(model_path, threads, n_prompt, n_gen, n_depth, repetitions, repack):
    import pydsa
    from pydsa.bench import Bench, markdown
    from pydsa.cli.shared import comma_numbers
    from tools.llama_cpp_speed import compare_speed, conditions

    lists = {"--n-prompt": n_prompt, "--n-gen": n_gen, "--n-depth": n_depth}
    bench = Bench(*(comma_numbers(name, text) for name, text in lists.items()), repetitions)
    model = pydsa.load(model_path, device="cpu", n_ctx=bench.n_ctx, n_ubatch=UBATCH, **threads)
    peer = LlamaCpp(model_path, -(-bench.n_ctx // 256) * 256, model.threads, model.threads_batch, fast=True, repack=repack)
    rows = list(compare_speed(model, peer, bench))
    click.echo(f"{markdown(rows)}\n{conditions(model, repack)}")


def compare_logits(model_path, threads, prompt, file, length, n_predict):
    from pydoc_data.topics import topics
    from rich.console import Console

    import pydsa

    text = file.read() if file else topics["import"] if prompt is None else prompt
    ids = list(pydsa.load_tokenizer(model_path).encode(text, add_bos=True))[:length]
    if len(ids) < 2:
        fail("The text gives fewer than two tokens: nothing to compare.")
    n_ctx = -(-(len(ids) + n_predict) // 256) * 256
    model = pydsa.load(model_path, device="cpu", n_ctx=n_ctx, kv_type="f32", **threads)
    peer = LlamaCpp(model_path, n_ctx, model.threads, model.threads_batch)
    ours, our_picked = run_pydsa(model, ids, n_predict)
    theirs, their_picked = peer.run(ids, n_predict)
    if peer.tokenize(text)[:length] != ids:
        click.echo("The tokenizers differ on this text; both engines got pydsa's tokens.", err=True)
    texts = continuation(model, our_picked, their_picked), continuation(model, their_picked, our_picked)
    show(Console(), ours, theirs, ids, texts)


if __name__ == "__main__":
    main()

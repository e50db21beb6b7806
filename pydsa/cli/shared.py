"""What the commands share: groups of options, loading a model, reading a text."""
import dataclasses
import os

import click

from pydsa.cli.console import progress_bar
from pydsa.cli.exits import Failure
from pydsa.cli.habits import devices, gpu_layers, logit_biases
from pydsa.gguf.override import parse_overrides
from pydsa.options import PRECISIONS
from pydsa.quants import CACHE_ALIASES, CACHE_TYPES
from pydsa.terminal import visible


def options(*decorators):
    """One decorator for several options, in the order given."""
    def apply(function):
        for decorator in reversed(decorators):
            function = decorator(function)
        return function
    return apply


cache_types = click.Choice([*CACHE_TYPES, *CACHE_ALIASES])
ctx_option = click.option("-c", "--ctx-size", "n_ctx", type=int,
                          help="Tokens of context; 0: the model's limit, or what fits in memory.  [default: 8192, or the model's limit]")
ubatch_option = click.option("-ub", "--ubatch-size", "n_ubatch", type=int, default=2048, show_default=True,
                             help="Prompt tokens that run together. More tokens read the weights less often, and use more memory.")
override_option = click.option(
    "--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", callback=lambda ctx, option, texts: parse_overrides(texts),
    help="Replace or add a value of the file's metadata; TYPE: int, float, bool, str. Repeat it, or put commas between.")
residence_options = options(
    click.option("--mmap/--no-mmap", default=True, show_default=True,
                 help="Map the file; or read the weights into memory, which must hold them all."),
    click.option("--mlock", is_flag=True, help="Keep the weights in memory: the system drops none that were not used for long."))
model_options = options(
    ubatch_option,
    click.option("--kv-type", type=cache_types, default="i16", show_default=True,
                 help="Type of the cached latents; i16 and i8 (alias q8_0): integers, two scales a row."),
    click.option("--index-type", type=cache_types,
                 help="Type of the indexer's cached keys.  [default: i8; f32 if --kv-type is]"),
    click.option("--dsa-top-k", type=int, help="Number of keys that a token attends to.  [default: the model's]"),
    residence_options,
    override_option)
stream_options = options(
    click.option("--stream-from", type=int, metavar="TOKENS",
                 help="Copy experts that are on the CPU to the GPU for steps of so many tokens or more, and multiply there; 0: never.  "
                      "[default: from where on that takes less time]"),
    click.option("--no-op-offload", "stream_from", flag_value=0, type=int, help="As --stream-from 0."))
device_option = click.option(
    "--device", "-dev", default="auto", show_default=True, metavar="DEVICE[,...]", callback=devices,
    help="cpu; cuda: an NVIDIA GPU; cuda0,cuda1: several; reference: plain numpy, slow and exact; auto: a plan of what fits on the GPUs, "
         "or what PYDSA_DEVICE says.")
precision_option = click.option(
    "--precision", type=click.Choice(PRECISIONS), default=PRECISIONS[0], show_default=True,
    help="How a GPU rounds activations of prompts: to one float16, or exact: to two, which takes longer. Single tokens, and the CPU, keep "
         "15 bits or more either way.")
placement_options = options(
    device_option,
    precision_option,
    click.option("-ngl", "--gpu-layers", "--n-gpu-layers", "n_gpu_layers", metavar="N", callback=gpu_layers,
                 help="Layers on the GPUs, the last ones of the model; all; auto: what fits.  [default: auto]"),
    click.option("-cmoe", "--cpu-moe", is_flag=True, help="Leave the routed experts of all layers on the CPU."),
    click.option("-ncmoe", "--n-cpu-moe", type=int, default=0, metavar="N",
                 help="Leave those of the first N layers there.  [default: what does not fit]"),
    click.option("-ot", "--override-tensor", multiple=True, metavar="REGEX=DEVICE",
                 help="Put weights whose names match on a device, like ffn_down_exps=cpu. Repeat it, or put commas between."),
    click.option("-ts", "--tensor-split", metavar="N,...",
                 help="Proportion of the layers on each GPU, like 3,1.  [default: by what is free]"),
    click.option("--fit-margin", default="1GiB", show_default=True, metavar="SIZE", help="What a plan leaves free on each GPU."),
    stream_options)
stage_options = options(
    click.option("--stages", metavar="N|RANGES|auto",
                 help="Run the layers in stages, in so many processes of this machine. With --ray also 0-20,21-40: the layers of nodes; "
                      "auto: divided by bytes and bandwidth. Needs pip install 'pydsa[ray]'."),
    click.option("--ray", metavar="ADDRESS",
                 help="Put the stages on the nodes of this Ray cluster, like 10.0.0.1:6379; auto: the one that runs on this machine."),
    click.option("--wire", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True,
                 help="How hidden rows pass from stage to stage; bf16: half the bytes, rounded."),
    click.option("--resume", is_flag=False, flag_value="", metavar="[FOLDER]",
                 help="Start a stage again that fails, and go on. What that takes is kept in memory, or in FOLDER."))
attention_option = click.option("--attention", type=click.Choice(["auto", "sparse", "masked", "dense"]), default="auto", show_default=True,
                                help="auto: dense up to top_k tokens, sparse beyond.")
reproducible_option = click.option(
    "--reproducible", is_flag=True,
    help="Give a token the same logits, bit for bit, whatever steps it runs in: threads, -ub, reused prefixes, other conversations.")
threads_options = options(
    click.option("-t", "--threads", type=int, help="CPU threads for generation.  [default: physical cores]"),
    click.option("-tb", "--threads-batch", type=int, help="CPU threads for prompts.  [default: as -t]"),
    click.option("--numa", type=click.Choice(["distribute", "isolate", "numactl"]),
                 help="Where a machine has several nodes: threads and memory on all of them, or on the one where this starts; or threads "
                      "on the CPUs that numactl gave."))
chat_options = options(
    click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat format."),
    click.option("--special", is_flag=True, help="Encode the texts of control tokens in a --raw prompt as these tokens."),
    click.option("--system", "-sys", "--system-prompt", "system", help="A system message for the chat format."),
    click.option("--think", is_flag=True, help="Let the model reason before it answers, if it can."))
engine_options = options(threads_options, ctx_option, model_options, attention_option, reproducible_option, placement_options)
OF_STAGES = ("stages", "ray", "wire", "resume")     # the names of stage_options
sampling_options = options(
    click.option("--temp", "temperature", type=float, default=0.8, show_default=True, help="Temperature; 0: greedy."),
    click.option("--top-k", type=int, default=40, show_default=True, help="Sample from the K likeliest tokens; 0: all."),
    click.option("--top-p", type=float, default=0.95, show_default=True, help="Sample from the likeliest tokens that sum to P."),
    click.option("--min-p", type=float, default=0.05, show_default=True, help="Drop tokens less likely than P times the likeliest."),
    click.option("--repeat-penalty", type=float, default=1.0, show_default=True, help="Penalty for tokens among the last 64; 1: none."),
    click.option("--logit-bias", metavar="ID(+|-)BIAS", multiple=True, callback=logit_biases,
                 help="Add to the logit of a token, like 15043+1; 15043-inf: never pick it. Can be repeated."),
    click.option("-s", "--seed", type=click.IntRange(-1), callback=lambda context, parameter, seed: None if seed == -1 else seed,
                 help="Seed of the random numbers; -1: a new one.  [default: -1]"))


def check_chat_options(raw, special, system, think):
    """Raise UsageError where the options of chat_options exclude each other."""
    if raw and (system or think):
        raise click.UsageError("--system and --think belong to the chat format, which --raw leaves out.")
    if special and not raw:
        raise click.UsageError("--special is for --raw prompts.")


def options_with_defaults(decorator, **defaults):
    """A decorator of options, some of which have other defaults."""
    def decorate(function):
        function = decorator(function)
        for option in function.__click_params__:
            option.default = defaults.get(option.name, option.default)
        return function
    return decorate


def take_fields(kind, settings):
    """Take the options out of settings that are fields of a dataclass."""
    return {field.name: settings.pop(field.name) for field in dataclasses.fields(kind) if field.name in settings}


def load_model(path, threads=None, threads_batch=None, **settings):
    """Load a model, with its plan and progress on stderr."""
    click.echo(f"loading {visible(path)}", err=True)
    of_stages = {name: settings.pop(name) for name in OF_STAGES if name in settings}
    if of_stages:
        of_stages["resume"] = _resumes(of_stages["resume"])
        from pydsa.loading import in_stages
        if in_stages(**of_stages):
            return _load_stages(path, threads, threads_batch, of_stages | settings)
    if settings.get("n_ctx") == 0:
        settings["n_ctx"] = longest_context(path, settings)
    from pydsa.fitting import fitted
    setup = fitted(path, **settings)
    if setup.plan is not None:
        from pydsa.words import plan_in_words
        click.echo("\n".join(map(visible, plan_in_words(setup.plan))), err=True)
    with progress_bar("compiling kernels") as progress:
        from pydsa.loading import ready
        model = ready(setup, threads, threads_batch, progress)
    return _noted(model)


def _resumes(folder):
    """--resume as load() has it: None, True without a folder, or its path."""
    if folder and os.path.exists(folder) and not os.path.isdir(folder):
        raise click.UsageError(f"--resume is {folder!r}, which is a file, expected a folder; without one, put --resume behind MODEL.")
    return True if folder == "" else folder


def _load_stages(path, threads, threads_batch, settings):
    """Load a model in stages, with its plan and progress on stderr."""
    from pydsa.loading import staged
    with progress_bar("loading stages") as progress:
        return _noted(staged(path, threads=threads, threads_batch=threads_batch, progress=progress, **settings,
                             say=lambda lines: click.echo("\n".join(map(visible, lines)), err=True)))


def _noted(model):
    """A model, with a sentence on stderr about what is unusual in its options."""
    if model.n_ctx > model.config.n_ctx_train:
        click.echo(f"the context of {model.n_ctx} tokens is longer than the model's own, {model.config.n_ctx_train}", err=True)
    return model


def longest_context(path, settings):
    """The tokens of -c 0, with a sentence on stderr if memory is short."""
    from pydsa.fitting import longest_context
    n_ctx, whole = longest_context(path, **{key: value for key, value in settings.items() if key != "n_ctx"})
    click.echo(f"a context of {n_ctx} tokens, " + ("the model's own" if whole else "as many as the memory holds"), err=True)
    return n_ctx


def read_text(file, what="prompt", instead="; give it with -p"):
    """The text of a file or pipe.

    Left out are a byte order mark, with which programs of Windows begin a file, and the newline at the end. what, instead: the words of
    errors for what is read, and for what to do where it cannot be.
    """
    from pydsa.text.tokenizer import MAX_TEXT
    try:
        text = file.read(MAX_TEXT + 1)      # not all of a file without end, such as /dev/zero
    except UnicodeDecodeError as error:
        raise Failure(f"The {what} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise Failure(f"The {what} cannot be read from {file.name} ({error.strerror or error}){instead}.") from error
    if len(text) > MAX_TEXT:
        raise Failure(f"The {what} has more than {MAX_TEXT} characters, expected at most so many.")
    return text.removeprefix("\ufeff").removesuffix("\n")


def comma_numbers(name, text):
    """The integers of an option, with commas between them, as a list."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{name} is {text!r}, expected integers with commas between them.") from None
    if min(numbers) < 0:
        raise click.UsageError(f"{name} has the number {min(numbers)}, expected numbers from 0 on.")
    return numbers


def kept(out):
    """What is said of an interrupted run that writes a GGUF file."""
    return f"what is written is kept beside {visible(str(out))}; the same command goes on with it"

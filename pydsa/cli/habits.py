"""Options of llama.cpp that people type by habit.

Those that mean something here work; the others end with one sentence that says what to use instead. All are left out of --help.
"""
import click

from pydsa.cli.types import FileName


INSTEAD = {
    ("-sm", "--split-mode"): "layers are split over GPUs, by -ts or by what is free on each; leave it out.",
    ("--list-devices",): "`pydsa info MODEL` shows the devices that would be used, with their memory.",
    ("-mg", "--main-gpu"): "no GPU has more to do than its layers; name those to use with --device, or leave it out.",
    ("-nkvo", "--no-kv-offload", "-kvo", "--kv-offload"): "caches are where their layers are; -ngl leaves layers on the CPU.",
    ("-fitt", "--fit-target"): "use --fit-margin, what a plan leaves free on each GPU, such as 1GiB.",
    ("-fitc", "--fit-ctx"): "-c is the context that a plan keeps to; -c 0 takes the longest that fits.",
    ("-fa", "--flash-attn"): "attention never holds its whole matrix, so there is nothing to turn on; leave it out.",
    ("-mmp",): "use --no-mmap, to read the weights into memory.",
    ("-b", "--batch-size"): "use -ub, the tokens of a prompt that run together.",
    ("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"): "use --kv-type, the type of the latents that keys and values are made of.",
    ("-hf", "-hfr", "--hf-repo", "-mu", "--model-url"): "download the file, and name it.",
    ("-st", "--single-turn"): "with -p, -f or a pipe there is one answer anyway; leave it out.",
    ("-e", "--escape", "--no-escape"): "texts are taken as they are; write line breaks as such, or use -f.",
    ("-mli", "--multiline-input"): "a chat takes messages of several lines; /help tells how.",
    ("-sysf", "--system-prompt-file"): "give the text with --system.",
    ("-sp",): "use --special.",
    ("-np", "--parallel", "-ns", "--sequences"): "a command runs one conversation; leave it out.",
    ("-fit", "--fit"): "--device auto, the default, fits the model to the memory; -c 0 takes the longest context.",
    ("-md", "--model-draft"): "there is no speculative decoding; leave it out.",
    ("--chat-template-kwargs",): "use --think; in Python there is template_kwargs, and in requests chat_template_kwargs.",
    ("-rea", "--reasoning", "--reasoning-budget", "--reasoning-format"): "--think lets the model reason; the answer is told apart anyway.",
    ("--context-shift", "--no-context-shift"): "an answer ends where the context is full; leave it out.",
    ("-co", "--color"): "reasoning is dimmed on a terminal; leave it out.",
    ("--ignore-eos",): "ban the token that ends a turn: --logit-bias ID-inf.",
    ("--samplers", "--sampler-seq"): "the order is fixed: biases, penalties, top_k, top_p, min_p, temperature.",
    ("--rope-scaling", "--rope-scale", "--rope-freq-base", "--rope-freq-scale"): "the file has it; --override-kv replaces its values.",
    ("-fmoe", "--fused-moe", "-mla", "--mla-use", "-rtr", "--run-time-repack", "-amb"): "it is chosen by itself; leave it out.",
}


SO_ANYWAY = ("--jinja", "--no-warmup", "--no-display-prompt")       # what they ask for is always so in `run`


def options_of_what_is_so(function):
    """A decorator: a command that takes the options of SO_ANYWAY."""
    return click.option(*SO_ANYWAY, "llama_cpp_so", is_flag=True, hidden=True, expose_value=False)(function)


def llama_cpp_options(function, but=()):
    """A decorator: a command that also takes the options of INSTEAD.

    but: those that the command has itself.
    """
    for names, sentence in INSTEAD.items():
        for name in names:
            if name not in but:
                function = _refused(name, sentence)(function)
    return function


def _refused(name, sentence):
    """An option that ends the command with a sentence.

    It is eager, so that a value after it is not taken for the name of a model first; it may have a value or none.
    """
    def refuse(context, parameter, given):
        if given is not None:
            raise click.UsageError(f"{name} is an option of llama.cpp: {sentence}")
    return click.option(name, "llama_cpp" + name.replace("-", "_"), is_flag=False, flag_value="", hidden=True, expose_value=False,
                        is_eager=True, callback=refuse)


def model_argument(default=None):
    """A decorator: MODEL as an argument, or with -m.

    default: the path where neither is given; None: one of them is required.
    """
    def pick(context, parameter, given):
        named = context.meta.pop("pydsa.model", None)
        if given is not None and named is not None:
            raise click.UsageError(f"The model is given twice, as {given} and with -m: give it once.")
        if given is None and named is None and default is None:
            raise click.MissingParameter(ctx=context, param=parameter)
        return given if given is not None else named if named is not None else default

    def keep(context, parameter, given):
        if given is not None:
            context.meta["pydsa.model"] = given

    def decorate(function):
        function = click.argument("model", type=FileName(), required=False, callback=pick,
                                  metavar="MODEL" if default is None else "[MODEL]")(function)
        return click.option("-m", "--model", "named_model", type=FileName(), hidden=True, expose_value=False, is_eager=True,
                            callback=keep)(function)
    return decorate


def gpu_layers(context, parameter, given):
    """The value of -ngl: a number, "all", or None for "auto" and -1."""
    text = ("auto" if given is None else given).strip().lower()
    if text in ("auto", "-1", "all"):
        return "all" if text == "all" else None
    if not (text.isascii() and text.isdigit()):
        raise click.UsageError(f"-ngl is {given!r}, expected a number of layers, all or auto.")
    return int(text) if len(text) < 4 else "all"


def devices(context, parameter, given):
    """The value of --device, in which llama.cpp's "none" is the CPU alone."""
    from pydsa.backends.devices import HOST
    return HOST if given.strip().lower() == "none" else given


def logit_biases(context, parameter, given):
    """Values of --logit-bias, such as "15043+1" or "2-inf" -> {id: bias}."""
    biases = {}
    for text in given:
        split = next((i for i, character in enumerate(text) if character in "+-"), len(text))
        try:
            biases[int(text[:split])] = float(text[split:])
        except ValueError:
            raise click.UsageError(f"--logit-bias is {text!r}, expected a token id, + or -, and a number, like 15043+1 or 2-inf.") from None
    return biases or None

"""Run a model on a prompt, record what it does, and look at it."""
from pydsa.chat import Prompt, chat_prompt
from pydsa.errors import ContextFullError, PydsaError
from pydsa.look import Look, check_layers
from pydsa.options import counts
from pydsa.recordings.recorder import chooses
from pydsa.sampling import sampling_of
from pydsa.stepping import check_ids, check_max_tokens
from pydsa.text.answers import Reader

MAX_TOKENS = 64
FULL = "The answer ends where the context was full (-c)."
PRODUCTS = 1 << 42      # of index queries and keys that scores of a prompt are computed from again: a few minutes of one core
CHOSEN = 1 << 28        # keys that a prompt's tokens choose, which take about a gigabyte


def look(model, prompt, max_tokens=MAX_TOKENS, raw=False, system=None, thinking=False, stop=None, layers=None, mass=False, window=None,
         select=None, progress=None, **sampling):
    """Answer a prompt in a new session that is recorded -> a Look.

    prompt: a text, which becomes a user's message after the message `system`, or is continued as it is if raw; messages, as for
    Model.chat(); or token ids, an integer list. max_tokens: tokens of the answer at most; 0: the prompt alone is looked at. thinking: let
    the model reason first, if it can. stop: as for Model.generate(). layers: the numbers of those to show; None: all. mass: also measure
    the share of dense attention that the chosen keys hold, which takes longer. window: how many of the prompt's tokens are recorded, the
    last ones; None: as many as take a few minutes and a gigabyte. select: a choice of keys in place of the indexers', as Session.select.
    progress(done, total): called while the prompt runs, with tokens. sampling: fields of Sampling, as for Model.generate(); the temperature
    is 0, unless it is given.

    Raises PydsaError for options that are not valid and for a model without anything to look at, and ContextFullError if the prompt does
    not fit.
    """
    sampling = sampling_of(model.tokenizer, {"temperature": 0} | sampling)
    return look_at(model, prompt_of(model, prompt, raw, False, system, thinking), max_tokens, sampling, stop, layers, mass, window, select,
                   progress=progress)


def prompt_of(model, text, raw=False, special=False, system=None, thinking=False):
    """The chat.Prompt of a text, a list of messages, or token ids.

    special: encode the texts of control tokens in a raw text as these tokens. The other parameters are those of look(). Raises PydsaError
    for a prompt that is empty.
    """
    if isinstance(text, str) and raw:
        text = model.tokenize(text, parse_special=special)
    elif isinstance(text, str):
        text = [{"role": "user", "content": text}] if text else ()
    if not len(text):
        raise PydsaError("The prompt is empty.")
    if isinstance(text[0], dict):
        first = [{"role": "system", "content": system}] if system else []
        return chat_prompt(model.tokenizer, [*first, *text], thinking=thinking)
    return Prompt(check_ids(text, model.config.n_vocab).tolist())


def chooses_keys(model):
    """Whether a model chooses keys.

    Raises PydsaError for one that chooses neither keys nor experts.
    """
    if not chooses(model.setup) and not model.config.n_expert:
        raise PydsaError(f"{model.config.architecture} has nothing to look at here, neither a choice of keys nor experts; expected a model "
                         "with an indexer, and --attention auto or sparse.")
    return chooses(model.setup)


def default_window(config, n):
    """How many of a prompt's n tokens are recorded, if nothing else is said."""
    if config.top_k is None:
        return n
    layers = len(set(config.indexed_layers))
    products = n * layers * config.indexer_n_head * config.indexer_head_size
    return min(n, max(64, min(PRODUCTS // products, CHOSEN // (layers * config.top_k))))


def look_at(model, prompt, max_tokens, sampling, stop=None, layers=None, mass=False, window=None, select=None, show=None, progress=None):
    """Answer a chat.Prompt -> a Look.

    sampling: a Sampling. show(pieces): gets the iterator of the answer's pieces (answers.Stream), and reads it; None: nobody does. The
    other parameters, and the errors raised, are those of look().
    """
    check_max_tokens(max_tokens)
    check_layers(layers, range(model.config.n_layer))
    window, = counts(2**31 - 1, window=window)
    selection, session, written, note = chooses_keys(model), model.session(), [], None
    session.select = select
    if mass and not selection:
        raise PydsaError("There is no mass to measure, as no keys are chosen: leave it out (--mass).")
    reader, n = Reader(model.tokenizer, stop, prompt.layout), len(prompt.ids)
    if n > model.n_ctx:
        raise session.full(n)
    start = max(0, n - (window or default_window(model.config, n)))

    def told(first):
        return None if progress is None else lambda done, total: progress(first + done, n)

    def kept(tokens):
        for token in tokens:
            written.append(token)
            yield token
    fields = {"selection": selection, "scores": selection, "mass": selection and mass, "routing": bool(model.config.n_expert)}
    if start:
        session.prefill(prompt.ids[:start], told(0))
    with session.record(**fields) as recording:
        logits = session.prefill(prompt.ids[start:], told(start))
        pieces = reader.read(kept(session.sample(logits, max_tokens, sampling)), max_tokens, n)
        try:
            (list if show is None else show)(pieces)
        except ContextFullError:
            if not written:
                raise
            note = FULL
    return Look(recording, model.tokenizer, [*prompt.ids, *written], n if written else None, layers, note=note)

"""pydsa serve: answer requests over HTTP."""
import functools

import click

from pydsa import DEMO
from pydsa.cli.exits import Failure
from pydsa.cli.habits import llama_cpp_options, model_argument, options_of_what_is_so
from pydsa.cli.types import FileName, Number
from pydsa.cli.shared import engine_options, load_model, options_with_defaults, read_text, sampling_options, stage_options
from pydsa.cli.shared import take_fields


@click.command()
@model_argument(DEMO)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all of this machine's.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen at; 0: a free one.")
@click.option("--api-key", multiple=True, envvar="PYDSA_API_KEY", metavar="KEY",
              help="A key that requests must have. Can be repeated, or set in PYDSA_API_KEY.")
@click.option("--api-key-file", type=FileName(), help="A file with more keys, one a line.")
@click.option("--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN",
              help="An origin, like https://example.org, whose pages may use the server; *: all. Can be repeated.")
@click.option("--allowed-host", "allowed_hosts", multiple=True, metavar="NAME",
              help="A name, beside --host and this machine's own, by which clients call the server. Can be repeated.")
@click.option("--alias", "-a", help="Name of the model in answers.  [default: that of its file]")
@click.option("--parallel", "-np", "n_parallel", type=click.IntRange(1), default=1, show_default=True,
              help="Answers that run at the same time, each with a context of its own.")
@click.option("--queue", "n_queue", type=click.IntRange(0), default=64, show_default=True,
              help="Requests that may wait beside them; more are refused with 429.")
@click.option("--cache-ram", type=click.IntRange(0), default=8192, show_default=True, metavar="MIB",
              help="Memory for conversations that may go on, in MiB; 0: only those in slots.")
@click.option("--slot-save-path", "slot_folder", type=FileName(file_okay=False), metavar="DIR",
              help="A folder for saved slots, and for conversations beyond --cache-ram.")
@click.option("--timeout", "-to", type=Number(0.1, 86400), default=60, show_default=True,
              help="Seconds for a client to send a request, and to read; and for answers that run when the server is stopped.")
@click.option("-n", "--predict", "max_tokens", type=int, default=-1, show_default=True,
              help="Tokens to generate at most, for requests that do not say; -1: no limit.")
@options_with_defaults(sampling_options, temperature=1.0, top_p=1.0)
@engine_options
@stage_options
@functools.partial(llama_cpp_options, but=("-np", "--parallel"))
@options_of_what_is_so
@click.option("--think", "thinking", is_flag=True, help="Let the model reason first, if it can, for requests that do not say.")
@click.option("--chat-template-file", type=click.File("r", encoding="utf-8"), help="A jinja2 template instead of the model's.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="Form of the lines on requests, on stderr.")
def serve(model, api_key, api_key_file, cache_ram, max_tokens, chat_template_file, output, threads, threads_batch, **settings):
    """Answer OpenAI's and Anthropic's APIs over HTTP.

    Without MODEL it serves the demo model. A page to chat on is at http://127.0.0.1:8080. SIGTERM and Ctrl-C let answers finish. Needs
    pip install 'pydsa[serve]'.
    """
    from pydsa.sampling import Sampling
    try:
        from pydsa.server import running
        from pydsa.server.settings import Settings, read_keys
    except ModuleNotFoundError as error:
        raise Failure(f"The server needs {error.name}, which is not installed: pip install 'pydsa[serve]'.") from error
    settings["sampling"] = Sampling(**take_fields(Sampling, settings))
    ours = Settings(**take_fields(Settings, settings),
                    keys=read_keys(api_key, api_key_file), cache_bytes=cache_ram << 20, max_tokens=None if max_tokens < 0 else max_tokens,
                    template=chat_template_file and read_text(chat_template_file, "chat template", ""), json_log=output == "json")
    running.serve(ours, functools.partial(load_model, model, threads, threads_batch, n_sessions=ours.n_parallel, **settings))

"""The command line, which parses options and prints: a file for each command.

Only generated text, tables and reports go to stdout.
"""
import click

from pydsa import __version__
from pydsa.cli import bench, convert, faithful, imatrix, info, look, perplexity, quantize, run, serve, trace
from pydsa.cli.exits import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main():
    """Run models with DeepSeek Sparse Attention from GGUF files.

    \b
    pydsa run                                     chat with the demo model
    pydsa run model.gguf                          chat
    pydsa run model.gguf -p "Why is the sky blue?"
    pydsa run model.gguf -f notes.txt --raw -n 64   continue a text
    pydsa serve model.gguf                        an HTTP server, and a page to chat on
    pydsa bench model.gguf -d 0,4096              speed, also deep in a context
    pydsa look model.gguf -f notes.txt            a page of what the answer attended to
    pydsa perplexity model.gguf -f text.txt       quality, also of other settings beside it
    pydsa info model.gguf                         what the file is and needs
    pydsa faithful model.gguf -f notes.txt        whether sparse attention is right
    pydsa imatrix model.gguf -f text.txt          which inputs matter, for quantizers
    pydsa convert FOLDER model.gguf               a model of Hugging Face as a GGUF file
    pydsa quantize model.gguf small.gguf Q4_K_M   a smaller file
    """


for command in (run.run, serve.serve, bench.bench, look.look, info.info, trace.trace, perplexity.perplexity, faithful.faithful,
                imatrix.imatrix, convert.convert, quantize.quantize):
    main.add_command(command)

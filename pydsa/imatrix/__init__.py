"""Importance matrices: which inputs of a model's matrices are large.

    from pydsa import imatrix
    model = pydsa.load("model.gguf", n_ctx=512, attention="sparse")
    for matrix in imatrix.collect(model, model.tokenize(text), dataset="text.txt"):
        print(matrix.chunks)
    imatrix.save(matrix, "imatrix.gguf")

A quantizer rounds the weights that meet large inputs with more care. The files are those of llama.cpp, both ways (docs/imatrix.md).
"""
from pydsa.imatrix.collecting import Collector, collect  # noqa: F401
from pydsa.imatrix.files import CHUNK, check_target, read, save  # noqa: F401
from pydsa.imatrix.matrix import Imatrix  # noqa: F401
from pydsa.imatrix.running import Scores, collect_to_file, read_all  # noqa: F401
from pydsa.imatrix.tables import coverage, layer_statistics, statistics  # noqa: F401

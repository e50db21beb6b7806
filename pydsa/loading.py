"""load(path) returns a Model of a GGUF file."""
import os
import warnings

from pydsa.errors import PydsaError
from pydsa.fitting import MARGIN, fitted
from pydsa.model import Model
from pydsa.options import FLOAT16
from pydsa.setup import DEFAULT_N_UBATCH


def load(path, n_ctx=None, device="auto", threads=None, kv_type="i16", attention="auto", dsa_top_k=None, n_ubatch=DEFAULT_N_UBATCH,
         progress=None, index_type=None, override_kv=None, threads_batch=None, reproducible=False, mmap=True, mlock=False,
         tensor_split=None, cpu_moe=False, n_cpu_moe=0, override_tensor=(), n_gpu_layers=None, fit_margin=MARGIN, n_sessions=1, numa=None,
         stream_from=None, stages=None, ray=None, wire="f32", resume=None, precision=FLOAT16):
    """Open a GGUF file and make it ready to run -> Model.

    path: the file, or its first part if it is split.
    n_ctx: tokens that the context can hold; None: 8192, or the model's own limit if that is less.
    device: "cpu"; "cuda" (an NVIDIA GPU; needs the extra `cuda`), "cuda1" for the second one, "cuda0,cuda1" for several; "reference" for
        plain numpy; "auto": what fits on the GPUs that can be used, and the rest on the CPU (docs/placement.md), or what the environment
        variable PYDSA_DEVICE says. The plan is `model.setup.plan`, a fitting.Plan, None where all is on one device without choice.
    threads: CPU threads for steps of one token, which generate; None: one for each physical core that this process may use.
    kv_type: type of the cached latents: "f32", "f16", "bf16", "i16" (int16, with a scale for each of a row's two parts) or "i8" (int8,
        with the same scales; alias "q8_0").
    attention: "auto" (exact dense attention while the context is no longer than top_k, sparse beyond), "sparse", "masked", "dense".
    dsa_top_k: keys that a token attends to; None: the file's number.
    n_ubatch: tokens of a prompt that run together (2048); fewer take less memory.
    progress(done, total, name): called while kernels are compiled, and while weights are copied.
    index_type: type of the indexer's cached keys, as for kv_type; None: "i8", which is the fastest, or "f32" if kv_type is "f32".
    override_kv: values that replace those of the file's metadata, {key: int, float, bool or str}.
    threads_batch: CPU threads for steps of several tokens, which are those of prompts; None: as many as `threads`.
    reproducible: True: a token's logits are the same, bit for bit, whatever the steps are that run it: the number of threads, ubatches,
        other tokens in a step, prefixes that are used again. This takes longer (docs/running.md); on the CPU only.
    precision: of prompts on a GPU: "float16", one float16 for each activation, or "exact", two, which takes longer (docs/exactness.md). The
        CPU and "reference" compute alike in both, and so does a GPU for single tokens.
    mmap: False: read the weights into memory of the process, instead of mapping the file; it must hold them all. mlock: True: keep the
        weights in memory, so that the system does not drop those that were not used for long. Both as in llama.cpp, on the CPU only.
    n_gpu_layers, tensor_split, cpu_moe, n_cpu_moe, override_tensor: where layers and weights are, as in llama.cpp (placement.Placing): the
        layers at the end that are on the GPUs, None: what fits; the proportion of the layers on each, "3,1"; whether the routed experts of
        all layers stay on the CPU, or those of the first n_cpu_moe layers; texts "REGEX=DEVICE" for weights whose names match.
    fit_margin: bytes that "auto" leaves free on each GPU, or a text such as "512MiB". n_sessions: conversations for whose caches it keeps
        room.
    stream_from: tokens of a step from which on experts that lie on the CPU are copied to the GPU for it and multiplied there; 0: never;
        None: from where on that takes less time, by rates that are measured on load (docs/streaming.md).
    numa: where there are several nodes, for all models of the process: "distribute" (threads and memory on all of them), "isolate" (on the
        one where the program runs) or "numactl" (threads on the CPUs that numactl gave), as in llama.cpp; None: as the system likes.

    stages, ray: run the layers in stages, in other processes that Ray starts (docs/stages.md; needs the extra `ray`). stages: a number of
        processes on this machine; with ray, the address of a cluster ("10.0.0.1:6379", or "auto" for the one on this machine), also ranges
        of layers for its nodes, "0-20,21-40", or "auto", which divides by bytes and bandwidth. Options on devices hold on each node.
    wire: how hidden rows pass between stages: "f32", exactly, or "bf16", half the bytes. resume: True, or a folder for what that takes:
        a stage that fails is started again, and its conversations go on.

    Warns (UserWarning) of what is unusual in the file, and of what the system refuses. Raises GGUFError if the file is damaged,
    UnsupportedModelError if pydsa cannot run the model, OutOfMemoryError if memory is short, and PydsaError for options that are not valid.
    """
    settings = dict(device=device, fit_margin=fit_margin, n_sessions=n_sessions, n_ctx=n_ctx, kv_type=kv_type,
                    attention=attention, dsa_top_k=dsa_top_k, n_ubatch=n_ubatch, index_type=index_type, override_kv=override_kv,
                    reproducible=reproducible, mmap=mmap, mlock=mlock, tensor_split=tensor_split, cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe,
                    override_tensor=override_tensor, n_gpu_layers=n_gpu_layers, numa=numa, stream_from=stream_from,
                    precision=precision)
    if in_stages(stages, ray, wire, resume):
        return staged(os.fspath(path), stages, ray, wire, resume, threads, threads_batch, progress, **settings)
    return ready(fitted(os.fspath(path), **settings), threads, threads_batch, progress)


def in_stages(stages=None, ray=None, wire="f32", resume=None):
    """Whether options ask for a model in stages.

    Raises PydsaError for those that mean nothing without.
    """
    asked = stages is not None or ray is not None
    if not asked and (wire != "f32" or resume is not None):
        raise PydsaError(f"{'resume' if wire == 'f32' else 'wire'} is for a model in stages, of which there are none: give stages, or ray.")
    return asked


def staged(path, stages=None, ray=None, wire="f32", resume=None, threads=None, threads_batch=None, progress=None, say=None, **settings):
    """The Model of a file in stages, as load() gives it.

    say(lines) is called with the plan, before anything is loaded. settings: those of fitting.fitted(); an n_ctx of 0 is the model's own.
    """
    from pydsa.stages.running import Asked, StagedModel
    return StagedModel(Asked(path, stages, ray, wire, threads, threads_batch, settings), resume, say, progress)


def ready(setup, threads=None, threads_batch=None, progress=None):
    """The Model of a Setup, with the warnings and errors of load()."""
    for note in setup.notes:
        warnings.warn(f"{setup.file.metadata.path}: {note}", stacklevel=3)
    return Model(setup, threads, threads_batch, progress)

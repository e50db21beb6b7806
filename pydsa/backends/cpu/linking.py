"""What becomes of functions that kernels call: a part of each kernel's machine code, and of no other's.

Numba optimizes each function by itself and makes machine code of it, which nobody runs where it is a part of its callers, and then all
again in each of these: a third of the time to compile. Its symbols are weak, and the first of a name in a process serves all that call it:
a kernel just compiled ran other code than the same one loaded from the cache, and the last bits of its results differed.
"""
from llvmlite.binding import Linkage
from numba import _dynfunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _KernelLibrary(JITCodeLibrary):
    """A kernel's machine code. No other kernel finds functions in it."""

    def _optimize_final_module(self):
        super()._optimize_final_module()
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = "internal"


class _InlineLibrary(JITCodeLibrary):
    """A function as LLVM's IR, without machine code of its own. Kernels link it."""

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True


class _InnerLibrary(_InlineLibrary):
    """The same with the first of numba's two series of passes only.

    The second one is a third of the time to compile, and kernels run it again. Small functions that stand where they are called need it:
    without, some kernels are slower by 3 %, and without either by a tenth.
    """

    def _optimize_final_module(self):
        code = self._codegen
        passes = code._module_pass_manager(loop_vectorize=code._loopvect, slp_vectorize=False, opt=code._opt_level, cost="cheap")
        manager, *builder = passes if isinstance(passes, tuple) else (passes,)     # numba before 0.62 has no builder
        manager.run(self._final_module, *builder)


class _Pipeline(Compiler):
    """Numba's, with a library of ours."""
    library = None      # its class

    def compile_extra(self, func):
        self.state.library = self.library(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(func)


class KernelPipeline(_Pipeline):
    """Compiles a function that is called by itself."""
    library = _KernelLibrary


class InnerPipeline(_Pipeline):
    """Compiles a function that becomes a part of kernels."""

    def compile_extra(self, func):
        self.library = _InlineLibrary if self.state.flags.forceinline else _InnerLibrary
        self.state.targetctx = self.state.targetctx.subtarget(get_executable=_name_of)
        return super().compile_extra(func)


def _name_of(library, fndesc, env):
    """What numba finds the function by: an object that cannot be called."""
    library._ensure_finalized()
    return _dynfunc.make_function(fndesc.lookup_module(), fndesc.qualname.split(".")[-1], "", 0, env, (library,))

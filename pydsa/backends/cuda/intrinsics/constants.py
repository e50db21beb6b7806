"""Constant tables that every block copies to its shared memory.

There 32 lanes look up 32 different entries in a few cycles. Constant memory takes a cycle for each, and so does the first-level cache where
the entries lie in different lines.
"""
from pydsa.backends.cuda.intrinsics.device import SIMULATED, device, sync


if SIMULATED:
    def shared_table(name, values):
        """The functions prepare(thread, n_threads) and entry(i) of a table.

        values: uint32, a multiple of four. name: its name in PTX. All threads of a block call prepare() before any calls entry(); it ends
        with a barrier. The simulator reads the table where it is.
        """
        def entry(i):
            return int(values[i])
        return nothing, entry

else:
    from llvmlite import ir
    from numba.core import types
    from numba.cuda.extending import intrinsic

    I32 = ir.IntType(32)
    FOUR = ir.VectorType(I32, 4)
    GLOBAL, SHARED = 1, 3       # NVVM's numbers of the address spaces

    def shared_table(name, values):
        n, arrays = values.size, {GLOBAL: (name, values.tolist()), SHARED: (f"shared_{name}", ir.Undefined)}

        def place(builder, space, i):
            """The address of element i of an array. Numba's modules of a kernel share it by its name."""
            called, initial = arrays[space]
            if called not in builder.module.globals:
                made = ir.GlobalVariable(builder.module, ir.ArrayType(I32, n), called, space)
                made.initializer, made.linkage, made.align = ir.Constant(made.value_type, initial), "linkonce_odr", 16
                made.global_constant = space == GLOBAL      # stores cannot change it: loads need not wait for them
            return builder.gep(builder.module.globals[called], [I32(0), i])

        @intrinsic
        def copy_four(typingctx, i):
            def codegen(context, builder, signature, args):
                source, target = (builder.bitcast(place(builder, space, args[0]), FOUR.as_pointer(space)) for space in (GLOBAL, SHARED))
                builder.store(builder.load(source, align=16), target, align=16)
            return types.void(types.int64), codegen

        @intrinsic
        def entry(typingctx, i):
            def codegen(context, builder, signature, args):
                return builder.load(place(builder, SHARED, args[0]), align=4)
            return types.uint32(types.int64), codegen

        @device
        def prepare(thread, n_threads):
            for j in range((n // 4 + n_threads - 1) // n_threads):      # a constant, so that all loads come before the stores
                i = j * n_threads + thread
                if i < n // 4:
                    copy_four(4 * i)
            sync()
        return prepare, entry


@device
def nothing(thread, n_threads):
    """The prepare() of kernels without a table."""

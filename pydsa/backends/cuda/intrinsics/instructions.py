"""Machine instructions: wide loads, asynchronous copies, overlapping launches.

They are those that Numba has no function for. Each is written once, as PTX, beside what it does in the simulator. An address is an array
and an offset in bytes from its beginning, `at`, an int64. An access of n bytes needs an address that is a multiple of n. Arrays are
contiguous.

Copies to shared memory (copy_sixteen_async and so on) are under way when the next instruction runs. commit_copies() closes a group of them,
copies_left(n) waits until at most the last n groups of the thread are under way; then a barrier lets other threads read what came.
Until then the target must be neither read nor written.

A kernel that is launched as `dependent` (launch.py) may begin before the one before it has ended. Up to wait_for_earlier() it may read
weights, and nothing that another kernel of the step writes; it may write nothing that another one reads or writes.
"""
import numpy as np

from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.errors import PydsaError

if SIMULATED:
    def instruction(text, results="", operands="", simulated=None, fixed=False):
        """The function of an instruction, as below.

        In the simulator it is `simulated`, or one that raises PydsaError.
        """
        def missing(*args):
            raise PydsaError(f"Numba's simulator of CUDA cannot execute {text.split()[0]}; run this on a GPU, or with tests/ptx.")
        return simulated or missing

    def bytes_of(array):
        """The bytes of a contiguous array of a kernel in the simulator."""
        array = getattr(array, "_item", array)
        array = getattr(array, "_ary", array)
        assert array.flags.c_contiguous, "not contiguous"
        return array.reshape(-1).view(np.uint8)

else:
    from llvmlite import ir
    from numba.core import types
    from numba.cuda.extending import intrinsic

    I8, I32, I64, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
    # letter -> Numba's type, LLVM's type, letter of the constraint
    KINDS = {"r": (types.uint32, I32, "r"), "i": (types.int32, I32, "r"), "l": (types.uint64, I64, "l"), "f": (types.float32, F32, "f")}
    SHARED_SPACE = 3

    def address(context, builder, array_type, array, at, space):
        """The address of a byte of an array, as an LLVM value.

        It has 64 bits in global memory ("g"), 32 bits in shared memory ("s").
        """
        base = builder.bitcast(context.make_array(array_type)(context, builder, array).data, I8.as_pointer())
        place = builder.gep(base, [at])
        if space == "g":
            return builder.ptrtoint(place, I64)
        return builder.ptrtoint(builder.addrspacecast(place, I8.as_pointer(SHARED_SPACE)), I32)

    def _constraints(results, operands, fixed):
        letters = {"g": "l", "s": "r"} | {letter: kind[2] for letter, kind in KINDS.items()}
        return ",".join([*("=" + letters[r] for r in results), *(letters[o] for o in operands), *(["~{memory}"] if fixed else [])])

    def instruction(text, results="", operands="", simulated=None, fixed=False):
        """The function of an instruction, or of several.

        text: PTX, with $0, $1, ... for results, then operands. A letter for each of them: r uint32, i int32, l uint64, f float32; and of
        operands g and s, an address in global and in shared memory, for which the function takes an array and an offset in bytes. Several
        results are a tuple. fixed: it reads or writes memory, or waits, and is neither moved nor left out. simulated: the function in
        the simulator.
        """
        constraints = _constraints(results, operands, fixed)
        kinds = [KINDS[r][0] for r in results]
        result = types.void if not kinds else kinds[0] if len(kinds) == 1 else types.BaseTuple.from_types(kinds)

        def codegen(context, builder, signature, args):
            values, given = [], list(zip(signature.args, args))
            for letter in operands:
                kind, value = given.pop(0)
                values.append(address(context, builder, kind, value, given.pop(0)[1], letter) if letter in "gs" else value)
            made = [KINDS[r][1] for r in results]
            kind = ir.VoidType() if not made else made[0] if len(made) == 1 else ir.LiteralStructType(made)
            function = ir.FunctionType(kind, [v.type for v in values])
            answer = builder.call(ir.InlineAsm(function, text, constraints, side_effect=fixed), values)
            if len(made) < 2:
                return answer if made else context.get_dummy_value()
            return context.make_tuple(builder, signature.return_type, [builder.extract_value(answer, i) for i in range(len(made))])
        return _intrinsic(result, operands, codegen)

    def _intrinsic(result, operands, codegen):
        """Numba's intrinsic of a code generator.

        Numba looks at the names of its function's parameters, so one is written for them.
        """
        names, kinds = [], []
        for i, letter in enumerate(operands):
            names += [f"array{i}", f"at{i}"] if letter in "gs" else [f"x{i}"]
            kinds += [f"array{i}", "int64"] if letter in "gs" else [f"kinds[{letter!r}][0]"]
        space = {"result": result, "codegen": codegen, "kinds": KINDS, "int64": types.int64}
        exec(f"def typed({', '.join(['context', *names])}):\n    return result({', '.join(kinds)}), codegen", space)
        return intrinsic(space["typed"])


def _simulated_load(n):
    def load(data, at):
        words = tuple(int(w) for w in bytes_of(data)[at:at + 4 * n].view(np.uint32))
        assert at % (4 * n) == 0 and len(words) == n, f"{4 * n} bytes at {at}"
        return words if n > 1 else words[0]
    return load


def _simulated_store(n):
    def store(data, at, *words):
        assert at % (4 * n) == 0, f"{4 * n} bytes at {at}"
        bytes_of(data)[at:at + 4 * n] = np.array(words, np.uint32).view(np.uint8)
    return store


def _simulated_copy(n):
    def copy(target, to, source, at):
        assert to % n == at % n == 0, f"{n} bytes from {at} to {to}"
        bytes_of(target)[to:to + n] = bytes_of(source)[at:at + n]
    return copy


def _halves(word):
    return np.array([word], np.uint32).view(np.float16).astype(np.float64)


def _pair(values):
    return int(np.array(values, np.float64).astype(np.float16).view(np.uint32)[0])


def _nothing(*_):
    """What instructions do in the simulator that only order others: all is done at once there."""


def _load(n, how, fixed):
    """Load n uint32: an intrinsic load(data, at)."""
    vector, names = {1: ("", "$0"), 2: (".v2", "{$0,$1}"), 4: (".v4", "{$0,$1,$2,$3}")}[n]
    return instruction(f"ld.global{how}{vector}.u32 {names}, [${n}];", "r" * n, "g", _simulated_load(n), fixed)


# Weights, which no kernel writes while this one runs, and that are read once: they leave no trace in L1.
stream_four, stream_eight, stream_sixteen = (_load(n, ".nc.L1::no_allocate", False) for n in (1, 2, 4))
# Weights and tables that several threads read.
read_sixteen = _load(4, ".nc", False)
# The same, and they keep their place: begun early, they are there when they are used.
fetch_four, fetch_eight, fetch_sixteen = (_load(n, ".nc", True) for n in (1, 2, 4))
# What other kernels have written. These keep their place between other fixed instructions.
load_four, load_eight, load_sixteen = (_load(n, "", True) for n in (1, 2, 4))
# store_four(data, at, a), store_eight(data, at, a, b), store_sixteen(data, at, a, b, c, d): uint32 to global memory.
store_four = instruction("st.global.u32 [$0], $1;", "", "gr", _simulated_store(1), True)
store_eight = instruction("st.global.v2.u32 [$0], {$1,$2};", "", "grr", _simulated_store(2), True)
store_sixteen = instruction("st.global.v4.u32 [$0], {$1,$2,$3,$4};", "", "grrrr", _simulated_store(4), True)

# copy(target, to, source, at): from global to shared memory, past L1. The copies of a group come in any order.
copy_sixteen_async = instruction("cp.async.cg.shared.global [$0], [$1], 16;", "", "sg", _simulated_copy(16), True)
commit_copies = instruction("cp.async.commit_group;", "", "", _nothing, True)


def copies_left(n):
    """A function that waits until at most n groups are under way.

    They are the last ones that the thread has closed.
    """
    return instruction(f"cp.async.wait_group {n};", "", "", _nothing, True)


all_copies = copies_left(0)

# Wait until all that earlier kernels have written is there; let a dependent kernel begin when all blocks are here.
wait_for_earlier = instruction("griddepcontrol.wait;", "", "", _nothing, True)
let_later_begin = instruction("griddepcontrol.launch_dependents;", "", "", _nothing, True)

# Pairs of float16 in words, rounded to nearest even. pack_halves(upper, lower): two float32 as a pair. halves_by_low(x, y),
# halves_by_high: x times the lower, or the upper, of y. fma_by_low(x, y, z), fma_by_high: and plus z. fma_low_low(x, y, z), fma_low_high,
# fma_high_high: x times one of y, plus one of z.
pack_halves = instruction("cvt.rn.f16x2.f32 $0, $1, $2;", "r", "ff", lambda a, b: _pair([b, a]))
multiply_halves = instruction("mul.rn.f16x2 $0, $1, $2;", "r", "rr", lambda x, y: _pair(_halves(x) * _halves(y)))
add_halves = instruction("add.rn.f16x2 $0, $1, $2;", "r", "rr", lambda x, y: _pair(_halves(x) + _halves(y)))
subtract_halves = instruction("sub.rn.f16x2 $0, $1, $2;", "r", "rr", lambda x, y: _pair(_halves(x) - _halves(y)))


def _with_ones(name, *which):
    """mul or fma of pairs: the first operand, then of each other one its lower (0) or upper half (1), or all of it (None)."""
    registers, moves, operands = "".join(f".reg .b32 %{c};\n" for c in "yz"), "", ["$1"]
    for i, (half, register) in enumerate(zip(which, ("%y", "%z")), 2):
        part = "%l" if half == 0 else "%h"
        moves += "" if half is None else f"mov.b32 {{%l,%h}}, ${i};\nmov.b32 {register}, {{{part},{part}}};\n"
        operands.append(f"${i}" if half is None else register)

    def simulated(x, *others):
        y, *z = (_halves(other) if half is None else _halves(other)[half] for half, other in zip(which, others))
        return _pair(_halves(x) * y + (z[0] if z else 0))
    text = f"{{\n.reg .b16 %l;\n.reg .b16 %h;\n{registers}{moves}{name}.rn.f16x2 $0, {', '.join(operands)};\n}}"
    return instruction(text, "r", "r" * len(operands), simulated)


halves_by_low, halves_by_high = _with_ones("mul", 0), _with_ones("mul", 1)
fma_by_low, fma_by_high = _with_ones("fma", 0, None), _with_ones("fma", 1, None)
fma_low_low, fma_low_high, fma_high_high = _with_ones("fma", 0, 0), _with_ones("fma", 0, 1), _with_ones("fma", 1, 1)
count_bits = instruction("popc.b32 $0, $1;", "r", "r", lambda a: int(a).bit_count())
# quotient(a, b), toward zero, of int32. Numba divides in 64 bits, which is a call; and all products of wgmma in a kernel with calls wait
# for each other where nvJitLink assembles it.
quotient = instruction("div.s32 $0, $1, $2;", "i", "ii", lambda a, b: int(a) // int(b))

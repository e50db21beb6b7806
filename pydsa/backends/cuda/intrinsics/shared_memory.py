"""Shared memory by 32-bit addresses: loads and stores of several numbers, fragments of products, copies that go on meanwhile.

For kernels that lay out a block's shared memory themselves. An address is a uint32, as shared_address() and arithmetic give it: Numba would
compute places in arrays in 64 bits. An access of n bytes needs an address that is a multiple of n. The simulator has none of this.
"""
import numpy as np
from numba import cuda

from pydsa.backends.cuda.intrinsics.device import SIMULATED, device
from pydsa.backends.cuda.intrinsics.instructions import instruction

WHOLE_WARP = np.uint32(0xFFFFFFFF)

load_float = instruction("ld.shared.f32 $0, [$1];", "f", "r", fixed=True)
load_floats = instruction("ld.shared.v2.f32 {$0,$1}, [$2];", "ff", "r", fixed=True)
load_four_floats = instruction("ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", "ffff", "r", fixed=True)
store_float = instruction("st.shared.f32 [$0], $1;", "", "rf", fixed=True)
store_floats = instruction("st.shared.v2.f32 [$0], {$1,$2};", "", "rff", fixed=True)
store_word = instruction("st.shared.u32 [$0], $1;", "", "rr", fixed=True)
store_words = instruction("st.shared.v2.u32 [$0], {$1,$2};", "", "rrr", fixed=True)
store_four_words = instruction("st.shared.v4.u32 [$0], {$1,$2,$3,$4};", "", "rrrrr", fixed=True)
# Four matrices of 8 rows of 16 bytes, whose addresses the lanes have, eight for each: fragments of mma, as they are and transposed.
load_fragments = instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];", "rrrr", "r", fixed=True)
load_transposed = instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];", "rrrr", "r", fixed=True)
# copy(to, source, at, n): n bytes, 8 or 16 or none, from a place of an array in global memory, and zeros for the rest.
copy_eight = instruction("cp.async.ca.shared.global [$0], [$1], 8, $2;", "", "rgr", fixed=True)
copy_sixteen = instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", "", "rgr", fixed=True)

power_of_two = instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f")      # 0 for -inf
# Whether x is not 0 in any lane: 1 or 0. All lanes of the warp must call.
any_lane = instruction("""{
.reg .pred %some;
setp.ne.u32 %some, $1, 0;
vote.sync.any.pred %some, %some, 0xffffffff;
selp.u32 $0, 1, 0, %some;
}""", "r", "r", fixed=True)
# The greatest int32 of a warp, all of whose lanes must call. Unlike shuffles it tells ptxas that all lanes have the same: code that depends
# on it is not divergent. In divergent code shuffles are calls where nvJitLink assembles for 8.0 to 8.9.
greatest_integer = instruction("redux.sync.max.s32 $0, $1, 0xffffffff;", "i", "i", fixed=True)
# The same number, of which a loop computes anew what it needs: addresses that it does not change would take registers all the time.
anew = instruction("mov.b32 $0, $1;", "r", "r", fixed=True)
nearest_integer = instruction("cvt.rni.s32.f32 $0, $1;", "i", "f")      # 0 for NaN

if SIMULATED:
    shared_address = instruction("the address in shared memory")
else:
    from numba.core import types
    from numba.cuda.extending import intrinsic

    from pydsa.backends.cuda.intrinsics.instructions import address

    @intrinsic
    def shared_address(typingctx, array, at):
        """The address of a byte of an array in shared memory, uint32."""
        def codegen(context, builder, signature, args):
            return address(context, builder, signature.args[0], *args, "s")
        return types.uint32(array, types.int64), codegen


def folds(n):
    """The functions greatest(x) and total(x) of n adjacent lanes.

    n is a power of two up to 32. All lanes get float32, and all lanes of the warp must call.
    """
    steps = tuple(step for step in (16, 8, 4, 2, 1) if step < n)

    @device
    def greatest(x):
        for step in steps:
            x = max(x, cuda.shfl_xor_sync(WHOLE_WARP, x, step))
        return x

    @device
    def total(x):
        for step in steps:
            x += cuda.shfl_xor_sync(WHOLE_WARP, x, step)
        return x
    return greatest, total

"""Instructions of GPUs of capability 9.0: bulk copies, mbarriers, and wgmma.

The simulator has none of them. Addresses are as in instructions.py. A compiler does not see a mistake here: tests/ptx finds reads before a
wait, missing fences and phases that nobody ends.

An mbarrier has 8 bytes of shared memory. Its phase ends when as many threads have arrived as it was initialized for, and all bytes have
come that were expected. wait_phase(bars, at, parity) waits for the end of the phase of that parity, the first one's is 0.

wgmma multiplies A [64, 16 steps], float16 in registers or shared memory of a warpgroup (four warps), with B [16 steps, n], which lies in
shared memory by columns, in images of 64 numbers (128 bytes) a column: 16-byte piece i of column r is at i ^ (r % 8). An image begins at a
multiple of 1,024. A lane has of A what mma.m16n8k16 gives it for its warp's 16 rows, and of the sums [64, n] the pairs 2 c, 2 c + 1 of each
eight columns, of row g, then of row g + 8, where g = lane // 4 and c = lane % 4. Of int8 a step has 32 numbers, in A as in mma.m16n8k32,
and the sums are int32.
"""
from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.backends.cuda.intrinsics.instructions import instruction

# init_mbarrier(bars, at, n_arrivals); then fence_mbarriers() by that thread, and a barrier.
init_mbarrier = instruction("mbarrier.init.shared::cta.b64 [$0], $1;", "", "sr", fixed=True)
fence_mbarriers = instruction("fence.mbarrier_init.release.cluster;", fixed=True)
arrive = instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", "", "s", fixed=True)
# arrive_after_copies(bars, at): the thread arrives when its copies of cp.async up to here are there; it does not wait for them.
arrive_after_copies = instruction("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", "", "s", fixed=True)
# expect_bytes(bars, at, n): arrive, and let the phase wait for n bytes of bulk copies.
expect_bytes = instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "", "sr", fixed=True)
wait_phase = instruction("""{
.reg .pred %done;
again:
mbarrier.try_wait.parity.shared::cta.b64 %done, [$0], $1;
@!%done bra again;
}""", "", "sr", fixed=True)
# copy_bulk(target, to, source, at, n, bars, bar): n bytes, a multiple of 16, by one thread; to shared memory.
copy_bulk = instruction("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];", "", "sgrs", fixed=True)
# What this thread wrote to shared memory, or knows to be written, is there for bulk copies and wgmma.
fence_async = instruction("fence.proxy.async.shared::cta;", fixed=True)


def steps_of_rows(steps, image):
    """What each 16 numbers of rows add to the descriptor of the first.

    image: bytes from one image of 64 numbers to the next.
    """
    return [step // 4 * (image >> 4) + step % 4 * 2 for step in range(steps)]


def _at_an_address(text, operands):
    """The function of an instruction of mbarriers that takes addresses.

    They are uint32, as in shared_memory.py.
    """
    return instruction(text, "", operands, fixed=True)


init_mbarrier_at = _at_an_address("mbarrier.init.shared::cta.b64 [$0], $1;", "rr")
arrive_at = _at_an_address("mbarrier.arrive.shared::cta.b64 _, [$0];", "r")
# copy_bulk_at(to, source, at, n, bar): expect n bytes there, and begin to copy them from a place of an array.
copy_bulk_at = _at_an_address("""mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], $2;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];""", "rgrr")
wait_phase_at = _at_an_address("""{
.reg .pred %done;
again:
mbarrier.try_wait.parity.shared::cta.b64 %done, [$0], $1;
@!%done bra again;
}""", "rr")


if SIMULATED:
    def make_wgmma(n, steps, parts=1, anew=False, rest=False, image=None):
        """A function that raises PydsaError in the simulator."""
        return instruction("wgmma.mma_async")

    def make_wgmma_shared(n, a_steps, b_steps, anew=False, by_columns=False):
        """A function that raises PydsaError in the simulator."""
        return instruction("wgmma.mma_async")

    def make_wgmma_int8(n, steps):
        """A function that raises PydsaError in the simulator."""
        return instruction("wgmma.mma_async")

    def make_wgmma_wait(n, n_words, left=0):
        """A function that raises PydsaError in the simulator."""
        return instruction("wgmma.wait_group")

else:
    from llvmlite import ir
    from numba.core import types
    from numba.cuda.extending import intrinsic

    from pydsa.backends.cuda.intrinsics.instructions import F32, I32

    def _elements(context, builder, signature, args, i, n):
        """Places of the first n elements of a local array, the i-th argument."""
        data = context.make_array(signature.args[i])(context, builder, args[i]).data
        return [builder.gep(data, [I32(j)]) for j in range(n)]

    def _through(context, builder, signature, args, text, n_sums, n_words, others=(), anew=False):
        """Assembly whose results are the sums, in a local array.

        The sums, float32 or int32, are operands too, unless they are made anew, and words of A, in another one, and others.
        """
        kind, letter = (I32, "r") if signature.args[0].dtype == types.int32 else (F32, "f")
        places = _elements(context, builder, signature, args, 0, n_sums)
        words = [builder.load(p) for p in _elements(context, builder, signature, args, 1, n_words)] if n_words else []
        values = ([] if anew else [builder.load(p) for p in places]) + words + list(others)
        function = ir.FunctionType(ir.LiteralStructType([kind] * n_sums) if n_sums else ir.VoidType(), [v.type for v in values])
        kept = [] if anew else [str(i) for i in range(n_sums)]
        constraints = ["=" + letter] * n_sums + kept + ["r"] * n_words + ["l"] * len(others) + ["~{memory}"]
        made = builder.call(ir.InlineAsm(function, text, ",".join(constraints), side_effect=True), values)
        for i, place in enumerate(places):
            builder.store(builder.extract_value(made, i), place)
        return context.get_dummy_value()

    def make_wgmma(n, steps, parts=1, anew=False, rest=False, image=None):
        """multiply(sums, words, descriptors...): start sums [n / 2] += A B, of float16, and close the group.

        words [4 steps]: A, four for each of `steps` times 16 columns. parts: B is the sum of so many, each with a descriptor (uint64) of
        its first 16 numbers. anew: sums = A B. rest: A is a sum, too: words has as many more, which meet the first part of B only. image:
        bytes from one image of 64 numbers of B to the next, where there are several. Up to the wait for the group neither sums nor words
        may be used.
        """
        places = steps_of_rows(steps, image) if image else [2 * step for step in range(steps)]
        n_sums, n_words = n // 2, 4 * steps * (1 + rest)
        sums, first = ",".join(f"${i}" for i in range(n_sums)), 2 * n_sums
        lines = ["{", ".reg .b64 %there;", ".reg .b32 %low;", ".reg .b32 %high;", "wgmma.fence.sync.aligned;"]
        for step in range(steps):
            for of, part in [(step, part) for part in range(parts)] + [(steps + step, 0)] * rest:
                words = ",".join(f"${first + 4 * of + i}" for i in range(4))
                # the sum of 64 bits takes five instructions more, and moves
                lines += [f"mov.b64 {{%low, %high}}, ${first + n_words + part};", f"add.u32 %low, %low, {places[step]};",
                          "mov.b64 %there, {%low, %high};",
                          f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 {{{sums}}}, {{{words}}}, %there, "
                          f"{int(not anew or len(lines) > 6)}, 1, 1, 0;"]
        text = "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])

        def start(context, builder, signature, args):
            return _through(context, builder, signature, args, text, n_sums, n_words, args[2:])
        if parts == 1:
            @intrinsic
            def multiply(typingctx, sums, words, descriptor):
                return types.void(sums, words, types.uint64), start
        else:
            @intrinsic
            def multiply(typingctx, sums, words, descriptor, second):
                return types.void(sums, words, types.uint64, types.uint64), start
        return multiply

    def make_wgmma_int8(n, steps):
        """multiply(sums, words, descriptor): start sums [n / 2] = A B, of int8, and close the group.

        words [4 steps]: A, of `steps` times 32 columns. As make_wgmma in all else, with 128 numbers in an image's column.
        """
        n_sums, first = n // 2, n
        sums = ",".join(f"${i}" for i in range(n_sums))
        lines = ["{", ".reg .b64 %there;", "wgmma.fence.sync.aligned;"]
        for step in range(steps):
            words = ",".join(f"${first + 4 * step + i}" for i in range(4))
            lines += [f"add.s64 %there, ${first + 4 * steps}, {2 * step};",
                      f"wgmma.mma_async.sync.aligned.m64n{n}k32.s32.s8.s8 {{{sums}}}, {{{words}}}, %there, {int(step > 0)};"]
        text = "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])

        @intrinsic
        def multiply(typingctx, sums, words, descriptor):
            return types.void(sums, words, types.uint64), (lambda context, builder, signature, args: _through(
                context, builder, signature, args, text, n_sums, 4 * steps, args[2:]))
        return multiply

    def make_wgmma_shared(n, a_steps, b_steps, anew=False, by_columns=False):
        """multiply(sums, a, b): start sums [n / 2] += A B, of float16 in shared memory, and close the group.

        a, b: descriptors (uint64). a_steps, b_steps: where each step of sixteen numbers begins, in sixteens of bytes from theirs.
        by_columns: of B [16 steps, n] columns are contiguous, 64 of them 128 bytes, in place of its numbers. anew: sums = A B. Up to the
        wait for the group the sums may not be used.
        """
        n_sums, count = n // 2, 0 if anew else n // 2
        sums = ",".join(f"${i}" for i in range(n_sums))
        lines = ["{", ".reg .b64 %left;", ".reg .b64 %right;", "wgmma.fence.sync.aligned;"]
        for step, (of_a, of_b) in enumerate(zip(a_steps, b_steps, strict=True)):
            lines += [f"add.s64 %left, ${n_sums + count}, {of_a};", f"add.s64 %right, ${n_sums + count + 1}, {of_b};",
                      f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 {{{sums}}}, %left, %right, "
                      f"{int(not anew or step > 0)}, 1, 1, 0, {int(by_columns)};"]
        text = "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "}"])

        def start(context, builder, signature, args):
            return _through(context, builder, signature, args, text, n_sums, 0, args[1:], anew)

        @intrinsic
        def multiply(typingctx, sums, a, b):
            return types.void(sums, types.uint64, types.uint64), start
        return multiply

    def make_wgmma_wait(n, n_words, left=0):
        """wait(sums, words): until all products are done, but for the last `left` groups.

        sums [n / 2] and words [n_words] of what is done then go through, so that the compiler moves no use of them before it. n and
        n_words may be 0.
        """
        def codegen(context, builder, signature, args):
            return _through(context, builder, signature, args, f"wgmma.wait_group.sync.aligned {left};", n // 2, n_words)

        @intrinsic
        def wait(typingctx, sums, words):
            return types.void(sums, words), codegen
        return wait

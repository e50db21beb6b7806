"""Attention of prompts to all keys in MLA's plain form: the op, by kernels in wgmma or in mma.sync.

Latents and weights of heads become float16 images (images.py). Of these keys and values of all heads are made, for as many keys at a time
as devices.FLASH_BYTES holds, and attended to.
"""
import math
from typing import NamedTuple

import numpy as np

from pydsa.backends.cuda.flash import attend, attend_mma, heads, heads_mma, images
from pydsa.backends.cuda.flash.heads import BLOCKS, ROWS
from pydsa.backends.cuda.flash.images import TILE, WIDE
from pydsa.backends.cuda.flash.queries import QUERIES
from pydsa.backends.cuda.intrinsics.device import SIMULATED
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.current import current
from pydsa.backends.cuda.runtime.launch import blocks_for
from pydsa.backends.devices import flash_keys

LOG2_E = np.float32(math.log2(math.e))


class Form(NamedTuple):
    """Kernels in one kind of instructions."""
    shapes: dict        # (n_nope, n_rot, n_v, kv_lora) -> Shape
    flash: dict         # the same -> the kernel of attention
    heads: dict         # kv_lora -> kernels that make keys and values of heads
    capability: tuple | None = None     # of the only GPUs that have them

    def takes(self, out, q, latents, k_b, v_b):
        """Whether there are kernels for these arguments on the current GPU."""
        widths = k_b.shape[2], q.shape[2] - k_b.shape[2], v_b.shape[1], k_b.shape[1]
        return (not SIMULATED and self.capability in (None, current().capability) and widths in self.flash
                and (latents.first, latents.second) == (widths[3], widths[1])
                and not any(n % 16 for n in (q.span[0], *q.strides[:2])) and q.strides[2] == 4
                and not any(n % 8 for n in (out.span[0], *out.strides[:2])) and out.strides[2] == 4)

    def attention(self, out, q, latents, k_b, v_b, positions, scale):
        """MLA in its plain form: see mha.mha_attention.

        Rows of float32 of any strides that are multiples of 16 bytes.
        """
        (n_tokens, n_head, n_v), (_, kv_lora, n_nope) = out.shape, k_b.shape
        n_rot = q.shape[2] - n_nope
        widths, data = (n_nope, n_rot, n_v, kv_lora), (latents.data.flat, latents.data.shape[1], positions, kv_lora, n_rot)
        n_kv = min(latents.data.shape[0], latents.data.shape[0] if positions.greatest is None else positions.greatest + 1)
        at_once, key_bits = flash_keys(n_head, n_nope, n_v, n_kv), self.shapes[widths].key_bits
        maxima = scratch("greatest of latents", (2, images.MAXIMA), np.float32)
        find_maxima, make_rows = images.ROWS[latents.storage]
        find_maxima(images.MAXIMA, maxima, *data)
        (k_images, k_powers), (v_images, v_powers) = images.weights_of(k_b, "k_b"), images.weights_of(v_b, "v_b")
        rows, rotated, keys, values = (scratch(f"images of {name}", (2 * at_once * n,), np.uint8) for name, n in (
            ("latents", kv_lora), ("rotated parts", WIDE), ("keys", n_head * n_nope), ("values", n_head * n_v)))
        tops, totals = (scratch(f"{name} of queries", (n_head, n_tokens), np.float32) for name in ("greatest scores", "sums"))
        for first in range(0, n_kv, at_once):
            n_tiles = blocks_for(min(at_once, n_kv - first), TILE)
            make_rows(images.blocks_of_rows(n_tiles, kv_lora), rows, rotated, *data, maxima, first)
            parts = min(n_tiles, blocks_for(BLOCKS, n_head * blocks_for(n_nope + n_v, ROWS)))
            for make, made, of, n in zip(self.heads[kv_lora], (keys, values), (k_images, v_images), (n_nope, n_v), strict=True):
                make((n_head, blocks_for(n, ROWS), parts), made, 2 * at_once * n, of, n, key_bits, rows, n_tiles)
            self.flash[widths]((blocks_for(n_tokens, QUERIES), n_head), out, tops, totals, q, keys, rotated, values, maxima, k_powers,
                               v_powers, positions, first, at_once, np.float32(scale) * LOG2_E)


WGMMA = Form(attend.SHAPES, attend.FLASH, heads.KERNELS, heads.CAPABILITY)
MMA = Form(attend_mma.SHAPES, attend_mma.FLASH, heads_mma.KERNELS)

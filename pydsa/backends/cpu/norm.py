"""Norms and elementwise ops."""
import numpy as np

from pydsa.backends.cpu.arrays import contiguous
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.team.tasks import by_row, rows_of
from pydsa.backends.cpu.vectors.scalars import exp


@inner
def rms_norm_rows(out, x, w, eps, task):
    w = contiguous(w)
    for t in rows_of(out, task):
        row, target, squares = contiguous(x[t]), contiguous(out[t]), np.float32(0)
        for i in range(row.size):
            squares += row[i] * row[i]
        factor = np.float32(1 / np.sqrt(squares / row.size + eps))
        for i in range(row.size):
            target[i] = row[i] * factor * w[i]


@op(Stage(by_row, rms_norm_rows, light=True))
def rms_norm(out, x, w, eps):
    return 0


@inner
def layer_norm_rows(out, x, w, b, eps, task):
    w, b = contiguous(w), contiguous(b)
    for t in rows_of(out, task):
        row, target, mean, squares = contiguous(x[t]), contiguous(out[t]), np.float32(0), np.float32(0)
        for i in range(row.size):
            mean += row[i]
        mean /= np.float32(row.size)
        for i in range(row.size):
            squares += (row[i] - mean) * (row[i] - mean)
        factor = np.float32(1 / np.sqrt(squares / row.size + eps))
        for i in range(row.size):
            target[i] = (row[i] - mean) * factor * w[i] + b[i]


@op(Stage(by_row, layer_norm_rows, light=True))
def layer_norm(out, x, w, b, eps):
    return 0


@inner
def silu_mul_row(out, gate, up):
    for i in range(gate.size):
        out[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]


@inner
def silu_mul_rows(out, gate, up, task):
    for t in rows_of(out, task):
        silu_mul_row(contiguous(out[t]), contiguous(gate[t]), contiguous(up[t]))


@op(Stage(by_row, silu_mul_rows, light=True))
def silu_mul(out, gate, up):
    return 0


@inner
def scale_row(out, x, factor):
    for i in range(x.size):
        out[i] = factor * x[i]


@inner
def scale_rows(out, x, factor, task):
    for t in rows_of(out, task):
        for h in range(x.shape[1]):
            scale_row(contiguous(out[t, h]), contiguous(x[t, h]), np.float32(factor))


@op(Stage(by_row, scale_rows, light=True))
def scale(out, x, factor):
    return 0


@inner
def expert_scale_rows(out, x, ids, factors, task):
    for t in rows_of(out, task):
        for i in range(ids.shape[1]):
            scale_row(contiguous(out[t, i]), contiguous(x[t, i]), factors[ids[t, i]])


@op(Stage(by_row, expert_scale_rows, light=True))
def expert_scale(out, x, ids, factors):
    return 0


@inner
def add_rows(out, x, y, task):
    for t in rows_of(out, task):
        target, a, b = contiguous(out[t]), contiguous(x[t]), contiguous(y[t])
        for i in range(a.size):
            target[i] = a[i] + b[i]


@op(Stage(by_row, add_rows, light=True))
def add(out, x, y):
    return 0

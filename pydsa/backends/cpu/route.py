"""The router of a mixture of experts: which experts a token uses."""
import numpy as np

from pydsa.backends.cpu.arrays import contiguous, floats_at
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.rows import put
from pydsa.backends.cpu.scratch import mark_nan, task_scratch
from pydsa.backends.cpu.team.op import Stage, op
from pydsa.backends.cpu.team.tasks import rows_per_task


@inner
def softmax(p):
    """Compute p = softmax(p), in place."""
    top, total = p.max(), np.float32(0)
    for i in range(p.size):
        p[i] = np.exp(p[i] - top)
        total += p[i]
    for i in range(p.size):
        p[i] /= total


@inner
def drop_groups(s, score, n_group_used):
    """Set the scores of experts outside the best groups to -inf.

    A group's score is the sum of its two largest; ties go to the first group. score: scratch memory for them, one for each group.
    """
    n_group = score.size
    size = s.size // n_group
    for g in range(n_group):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            if s[e] > first:
                first, second = s[e], first
            elif s[e] > second:
                second = s[e]
        score[g] = first + second if size > 1 else first
    for _ in range(n_group - n_group_used):
        worst = n_group - 1
        for g in range(n_group - 1, -1, -1):
            if score[g] < score[worst]:
                worst = g
        score[worst] = np.inf
        s[worst * size:(worst + 1) * size] = -np.inf


@inner
def task_tokens(ids, logits):
    """Count the tokens of a task: for each expert used, all are searched."""
    return rows_per_task(logits.shape[1] * (2 + ids.shape[1]))


@inner
def route_rows(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale, task):
    n_expert, n_used, bias = logits.shape[1], ids.shape[1], contiguous(bias)
    memory = floats_at(task_scratch(task.thread, 4 * (2 * n_expert + n_group)), 1, 2 * n_expert + n_group)[0]
    p, s, score = memory[:n_expert], memory[n_expert:2 * n_expert], memory[2 * n_expert:]
    size = task_tokens(ids, logits)
    for t in range(task.index * size, min(len(logits), (task.index + 1) * size)):
        put(p, logits[t])
        if gating == 2:
            for e in range(n_expert):
                p[e] = 1 / (1 + np.exp(-p[e]))
        elif gating == 1:
            softmax(p)
        total = np.float32(0)       # of all experts: those that are not chosen would hide it
        for e in range(n_expert):
            s[e] = p[e] + bias[e]
            total += logits[t, e] + s[e]
        if not abs(total) < np.float32(np.inf):
            mark_nan()
        if n_group > 1:
            drop_groups(s, score, n_group_used)
        for i in range(n_used):
            best = np.argmax(s)
            ids[t, i], weights[t, i] = best, p[best]
            s[best] = -np.inf
        row = weights[t]
        if gating == 3:
            softmax(row)
        if norm:
            total = np.float32(0)
            for i in range(n_used):
                total += row[i]
            total = max(total, np.float32(6.103515625e-5))
            for i in range(n_used):
                row[i] /= total
        for i in range(n_used):
            row[i] = row[i] * scale


@inner
def by_logits(ids, weights, logits, *others):
    """Begin a stage that reads rows of logits."""
    size = task_tokens(ids, logits)
    return (len(logits) + size - 1) // size


@op(Stage(by_logits, route_rows, light=True))
def moe_route(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale):
    return 0

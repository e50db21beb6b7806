"""How rows are divided into tasks that take a few microseconds."""
from pydsa.backends.cpu.jit import inner

TASK_VALUES = 8192      # of elementwise work


@inner
def rows_per_task(row_size):
    """Count the rows of a task, each of row_size values."""
    return max(1, TASK_VALUES // max(1, row_size))


@inner
def by_row(out, *others):
    """Begin a stage that computes rows of the first argument, [n_rows, ...]."""
    size = rows_per_task(out.size // max(1, len(out)))
    return (len(out) + size - 1) // size


@inner
def by_second_row(first, second, *others):
    """Begin a stage that reads rows of the second argument."""
    return by_row(second)


@inner
def rows_of(out, task):
    """Return the range of rows of a task of by_row()."""
    size = rows_per_task(out.size // max(1, len(out)))
    return range(task.index * size, min(len(out), (task.index + 1) * size))

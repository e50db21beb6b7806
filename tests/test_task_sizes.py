"""How linear.py divides matrices into tasks."""
import pytest

from pydsa.backends.cpu.linear import ALL_TASK_BYTES, GEMV_ROWS, LEAST_TASK_BYTES, LONG_ROWS, gemm_task_tokens, gemv_task_rows


@pytest.mark.parametrize("n_tokens, n_tasks, n_threads, tokens", [
    (512, 224, 64, 256),        # 3.5 tasks a thread: 7 of half the tokens
    (512, 112, 16, 512),        # 7 tasks a thread
    (512, 48, 64, 128), (512, 8, 64, 128), (512, 5, 2, 256), (512, 57, 2, 512), (512, 56, 1, 512), (2048, 56, 16, 1024),
    (200, 1, 64, 208), (256, 1, 2, 128), (16, 3, 2, 16)])
def test_tokens_of_a_task(n_tokens, n_tasks, n_threads, tokens):
    """They are split where threads would wait for the last tasks."""
    assert gemm_task_tokens(n_tokens, n_tasks, n_threads) == tokens


@pytest.mark.parametrize("n_rows, row_bytes, n_threads, rows", [
    (7168, 1152, 16, 448), (18432, 4032, 16, 240), (18432, 4032, 2, 1856), (64, 28672, 16, LONG_ROWS), (64, 28672, 2, 32),
    (65536, 136, 1, 65536), (16, 100, 64, GEMV_ROWS), (18432, 4032, 64, 64)])
def test_rows_of_a_task(n_rows, row_bytes, n_threads, rows):
    """A task has a thread's share of the rows, or as many as it may."""
    assert gemv_task_rows(n_rows, row_bytes, n_threads) == rows
    most = max(LEAST_TASK_BYTES, ALL_TASK_BYTES // n_threads)
    assert rows in (LONG_ROWS, GEMV_ROWS) or rows * row_bytes < 1.05 * most

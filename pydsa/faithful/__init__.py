"""Whether sparse attention is right: a model's, and that of others.

    from pydsa import faithful
    report = faithful.check(model, faithful.text_ids(path))

How to read the report: docs/faithful.md.
"""
from pydsa.faithful.against import read  # noqa: F401
from pydsa.faithful.checking import check, check_possible, reference_tokens, text_ids  # noqa: F401

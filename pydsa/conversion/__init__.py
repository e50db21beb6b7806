"""Convert models of Hugging Face to GGUF.

    report = pydsa.convert("DeepSeek-V3.2", "v3.2.gguf", type="Q8_0")
    from pydsa import conversion
    conversion.Conversion("DeepSeek-V3.2").memory()       # what each type would take
"""
from pydsa.conversion.plan import Conversion, format_memory, format_plan  # noqa: F401
from pydsa.conversion.running import convert, run  # noqa: F401
from pydsa.conversion.types import NAMES as TYPES  # noqa: F401

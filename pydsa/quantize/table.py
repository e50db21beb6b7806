"""Every type that weights can be quantized to, and its Quantizer."""
from pydsa.quantize import legacy

TYPES = {**legacy.QUANTIZERS}

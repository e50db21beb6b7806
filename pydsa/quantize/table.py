"""Every type that weights can be quantized to, and its Quantizer."""
from pydsa.quantize import grids, kquants, legacy

TYPES = {**legacy.QUANTIZERS, **kquants.QUANTIZERS, **grids.QUANTIZERS}

"""Every type that weights can be quantized to, and its Quantizer."""
from pydsa.quantization import grids, kquants, legacy, ternary

TYPES = {**legacy.QUANTIZERS, **kquants.QUANTIZERS, **grids.QUANTIZERS, **ternary.QUANTIZERS}

"""Few bits a weight, written to be read: `nf4`, `int8` and `gptq`."""

from .errors import QuantError
from .gptq import Calibration, awq, calibrate, gptq, output_error, round_to_nearest
from .int8 import Int8Tensor, Linear8bit, dequantize_int8, integer_product, mixed_product, quantize_int8
from .nf4 import NF4_CODE, Linear4bit, NF4Tensor, dequantize_nf4, quantize_nf4, storage_bytes
from .sizes import FORMATS, cache_bytes, predicted_bytes, published_sizes

__all__ = [
    "FORMATS",
    "NF4_CODE",
    "Calibration",
    "Int8Tensor",
    "Linear4bit",
    "Linear8bit",
    "NF4Tensor",
    "QuantError",
    "awq",
    "cache_bytes",
    "calibrate",
    "dequantize_int8",
    "dequantize_nf4",
    "gptq",
    "integer_product",
    "mixed_product",
    "output_error",
    "predicted_bytes",
    "published_sizes",
    "quantize_int8",
    "quantize_nf4",
    "round_to_nearest",
    "storage_bytes",
]

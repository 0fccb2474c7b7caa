"""Few bits a weight, written to be read: `nf4`, `int8` and `gptq`."""

from .errors import QuantError
from .gptq import Calibration, awq, awq_stretch, calibrate, gptq, output_error
from .grid import GridLinear, GridTensor, round_to_nearest
from .int4 import Int4Linear
from .int8 import Int8Tensor, Linear8bit, dequantize_int8, integer_product, mixed_product, quantize_int8
from .methods import Scheme, calibration_ids, quantize_model
from .nf4 import NF4_CODE, Linear4bit, NF4Tensor, dequantize_nf4, quantize_nf4, storage_bytes
from .sizes import FORMATS, cache_bytes, predicted_bytes, published_sizes

__all__ = [
    "FORMATS",
    "NF4_CODE",
    "Calibration",
    "GridLinear",
    "GridTensor",
    "Int4Linear",
    "Int8Tensor",
    "Linear4bit",
    "Linear8bit",
    "NF4Tensor",
    "QuantError",
    "Scheme",
    "awq",
    "awq_stretch",
    "cache_bytes",
    "calibrate",
    "calibration_ids",
    "dequantize_int8",
    "dequantize_nf4",
    "gptq",
    "integer_product",
    "mixed_product",
    "output_error",
    "predicted_bytes",
    "published_sizes",
    "quantize_int8",
    "quantize_model",
    "quantize_nf4",
    "round_to_nearest",
    "storage_bytes",
]

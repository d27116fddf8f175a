"""Models of the transformers library: loading them, and running their attention over our blocks."""

from kvquant.models.attention_hook import record_keys_and_values
from kvquant.models.cache import QuantizedCache
from kvquant.models.context import KVHandle, quantized_kv_cache
from kvquant.models.loading import ModelShape, load_model, load_tokenizer, model_shape

__all__ = [
    "KVHandle",
    "ModelShape",
    "QuantizedCache",
    "load_model",
    "load_tokenizer",
    "model_shape",
    "quantized_kv_cache",
    "record_keys_and_values",
]

"""Blocked quantization of the KV cache during batched prefill."""

__version__ = "0.1.0"

"""How keys and values can be stored: one file per method, each a class ``Method`` that `method_class` finds by name."""

from kvquant.batched_quant import method_class

__all__ = ["method_class"]

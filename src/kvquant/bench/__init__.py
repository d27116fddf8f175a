"""Benchmarks of the operations themselves, without a model: what ``task=kernels`` is made of."""

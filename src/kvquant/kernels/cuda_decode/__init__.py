"""Decode attention in CUDA C++, compiled by NVRTC when it is first called for: for Hopper, where there are blocks
enough to keep its warps busy."""

"""Decode attention in CUDA C++, compiled by NVRTC when it is first called for; the first choice where it can run."""

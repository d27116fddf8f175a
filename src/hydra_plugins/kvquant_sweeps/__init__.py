"""Hydra plugins of KV Cache Optimizer: the resumable sweeper and the launchers that wait for every job."""

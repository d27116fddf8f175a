"""A small continuous-batching loop over a quantized cache: requests join and leave at every step."""

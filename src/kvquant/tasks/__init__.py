"""One module per task; each has ``run(cfg, context)`` and raises where it fails, never exits."""

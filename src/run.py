"""The only entry point: `python src/run.py [group=option] [key=value] [-m]`; `--help` lists groups and options.

Exit codes: 0 done, 1 failed (or interrupted), 2 wrong usage.
"""

import sys

import hydra
from omegaconf import DictConfig

from kvquant import cli


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def run(cfg: DictConfig) -> None:
    """Run one point of one experiment."""
    cli.execute(cfg)


if __name__ == "__main__":
    sys.exit(cli.main(run, sys.argv[1:]))

"""What Hydra's scan finds here: the launchers, where hydra-submitit-launcher is installed, else nothing and no warning.

`kvquant.preflight` says what is missing when one of them is asked for.
"""

import importlib.util

if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is not None:
    from hydra_plugins.kvquant_sweeps._submitit_launchers import WaitingLocalLauncher, WaitingSlurmLauncher

    __all__ = ["WaitingLocalLauncher", "WaitingSlurmLauncher"]

"""Where a model's layers are: all on one device, or spread over several by a ``device_map``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvquant.errors import ModelError
from kvquant.models.attention_hook import attention_modules


def layer_devices(model: nn.Module) -> list[torch.device]:
    """The device of every attention layer, in order: a layer's blocks live where its attention runs.

    Raises:
        ModelError: a layer is offloaded, so that its weights visit a device only while it runs.
    """
    devices = []
    for layer, module in enumerate(attention_modules(model)):
        (device, *others) = {parameter.device for parameter in module.parameters()}
        if others or device.type == "meta":
            raise ModelError(
                f"every layer must lie on one device, layer {layer} is offloaded or spread; load the model with a "
                "device_map that keeps whole layers on devices"
            )
        devices.append(device)
    return devices


def input_device(model: Any) -> torch.device:
    """The device that token ids go to."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device

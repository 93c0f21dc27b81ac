"""Copies to the host that nobody waits for until they are read."""

import torch


class HostCopy:
    """A small tensor on its way to the host.

    On a GPU the copy is asynchronous; reading it waits for the device to reach the copy, no more.
    """

    def __init__(self, tensor: torch.Tensor):
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._copy = tensor.clone()

    def tensor(self) -> torch.Tensor:
        """The values, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy

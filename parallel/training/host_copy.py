"""Copies to the host that nobody waits for until they are read."""

import torch


class HostCopy:
    """A small tensor under way to the host.

    On a GPU it is copied in the background, in the order of the device's work: reading it waits
    until the device has come to where the copy was made, and no further.
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

    def read(self) -> list[float]:
        """The values of a vector."""
        return self.tensor().tolist()

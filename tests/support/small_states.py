"""A small training state under the project's checkpoint manager, without a trainer: for tests."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.components.optimizer import default_adamw

from earlyfuse.parallel import compat
from earlyfuse.parallel.checkpoint.manager import Checkpoints


class Values:
    """Something with a state of plain values."""

    def __init__(self, **values: Any):
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(state)


class SmallState:
    """A model, its optimizer, a loader and a step: all of it follows from the step alone."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(256, 96), nn.Linear(96, 8, bias=False))
        self.optimizers = default_adamw().build(model_parts=[self.model])
        self.trainer, self.loader = Values(step=0), Values(lanes=torch.zeros(4, 3))

    def be_at(self, step: int) -> None:
        """Give everything the values it has at ``step``."""
        random = torch.Generator().manual_seed(step)
        self.loader.values["lanes"] = torch.zeros(4, 3)
        with torch.no_grad():
            for tensor in self.tensors().values():
                tensor.copy_(torch.rand(tensor.shape, generator=random))
        self.trainer.values["step"] = step

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is a tensor."""
        optimizers = self.optimizers.state_dict()
        moments = {name: value for name, value in optimizers.items() if torch.is_tensor(value)}
        return {**moments, **self.model.state_dict(), "lanes": self.loader.values["lanes"]}


class SmallRun(SmallState):
    """A small state with checkpoints in ``folder``; ``options`` are those of their config."""

    def __init__(self, folder: Path, keep: int = 0, **options: Any):
        super().__init__()
        compat.apply()
        compat.join_process_group_alone()
        config = Checkpoints.Config(interval=1, keep_latest_k=keep, **options)
        self.checkpoints: Checkpoints = config.build(
            dataloader=self.loader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=Values(last_epoch=0),
            states={"train_state": self.trainer},
            sd_adapter=None,
            base_folder=str(folder),
        )

    def save(self, *steps: int) -> bool:
        """Save at each of ``steps`` in turn; whether the last one went well, as far as is known."""
        good = False
        for step in steps:
            self.be_at(step)
            good = self.checkpoints.save(step)
        return good

    def load(self, step: int = -1) -> int:
        """Load; returns the step loaded, 0 if there is none. Everything must be of that step."""
        if not self.checkpoints.load(step):
            return 0
        loaded = self.trainer.values["step"]
        expected = SmallState()
        expected.be_at(loaded)
        found = self.tensors()
        for name, tensor in expected.tensors().items():
            assert torch.equal(tensor, found[name]), f"{name} is not that of step {loaded}"
        return loaded

    def close(self) -> None:
        """Wait for everything in the background."""
        self.checkpoints.close()

"""Optimizers of the papers."""

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

NOT_DECAYED = r"norm|bias$|scan\.(A_log|D)$"


def adamw(
    lr: float,
    pattern: str = r".*",
    not_decayed: str | None = NOT_DECAYED,
    eps: float = 1e-5,
) -> OptimizersContainer.Config:
    """Chameleon's AdamW (arXiv 2405.09818, 2.3) for the parameters that match ``pattern``.

    Betas 0.9/0.95, ``eps``, weight decay 0.1; none for ``not_decayed``: norms, biases, and the
    decay rates and skips of Mamba's scans.
    """
    decays = {pattern: 0.1} if not_decayed is None else {not_decayed: 0.0, pattern: 0.1}
    return OptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=matched,
                optimizer_name="AdamW",
                optimizer_kwargs={
                    "lr": lr,
                    "betas": (0.9, 0.95),
                    "eps": eps,
                    "weight_decay": decay,
                },
            )
            for matched, decay in decays.items()
        ]
    )

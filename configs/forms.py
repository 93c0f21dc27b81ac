"""Forms that a dense model is upcycled to, by name: ``--upcycle`` and ``--start.upcycle``."""

from earlyfuse.configs import decoders, mamba_decoders
from earlyfuse.models.decoder import Decoder


def in_form(parent: Decoder.Config, form: str) -> Decoder.Config:
    """The model that ``parent`` is upcycled to; ``ValueError`` lists the forms."""
    if form == mamba_decoders.FORM:
        return mamba_decoders.grown(parent)
    return decoders.grown(parent, form)

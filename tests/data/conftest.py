"""Fixtures of the data tests: a tiny Chameleon model, and its tokenizers as ours."""

import pytest


@pytest.fixture(scope="session")
def chameleon_model():
    from chameleon_files import chameleon, order

    return chameleon(order())


@pytest.fixture(scope="session")
def source(chameleon_model, tmp_path_factory):
    """The model's folder as Hugging Face has it."""
    from chameleon_files import save_hugging_face

    return save_hugging_face(chameleon_model, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def imported(source, tmp_path_factory):
    from chameleon_files import import_all

    return import_all(source, tmp_path_factory.mktemp("imported"))

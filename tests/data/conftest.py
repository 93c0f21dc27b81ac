"""Fixtures of the data tests: tiny prepared sources; a tiny Chameleon and its tokenizers."""

import pytest
from tiny_sources import write_three


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name → prepared source: prose, pairs, mixed."""
    return write_three(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def three(folders):
    """Folder → share."""
    return dict(zip(folders.values(), (0.3, 0.2, 0.5), strict=True))


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

"""Tokenizers of an exported model: copied from its run's data, or imported."""

import shutil
from pathlib import Path

from earlyfuse.data.atomic import sha256_file
from earlyfuse.data.json_files import JsonObject
from earlyfuse.data.tokenizers import Tokenizers, imports, text_file
from earlyfuse.data.tokenizers.text import TextTokenizer
from earlyfuse.models.state_dicts.config_json import CONFIG, REMEDY, TOKENIZERS
from earlyfuse.models.vocabulary import Modality, Vocabulary
from earlyfuse.parallel.checkpoint.file_layout import is_run, run_of
from earlyfuse.parallel.checkpoint.open_checkpoint import OpenModel
from earlyfuse.parallel.reporting.run_folder import read_config


def find_tokenizers(opened: OpenModel) -> tuple[Path | None, list[str]]:
    """Returns the folder of the model's tokenizers (beside an exported model, or in the data folder
    of a run), and remarks if they are not the ones that it was trained with.
    """
    beside = opened.folder / TOKENIZERS
    if beside.is_dir():
        return beside, []
    run = run_of(opened.folder)
    source = JsonObject(opened.source, str(opened.folder / CONFIG), REMEDY)
    trained_with = source.object("tokenizers", default={}).values
    if not trained_with or not is_run(run):
        return None, []
    data = read_config(run).object("data", default={}).field("folder", str, default="")
    folder = Path(data) / TOKENIZERS
    if not data or not folder.is_dir():
        return None, [f"{folder}: the tokenizers of the data are missing and were not copied"]
    here = {sha256_file(path) for path in folder.iterdir() if path.is_file()}
    other = [name for name, digest in trained_with.items() if digest not in here]
    if other:
        return None, [f"{folder}: the {other} tokenizers are not the run's and were not copied"]
    return folder, []


def import_tokenizers(opened: OpenModel, folder: Path) -> tuple[Vocabulary, list[str]]:
    """Writes the tokenizers beside a public model as ours into ``folder``, with its vocabulary.

    Returns the vocabulary, with begin, end and padding of documents by the text tokenizer (configs
    often leave them at their defaults), and remarks if the tokenizers cannot be imported.
    """
    ours = opened.vocabulary
    try:
        if not imports.import_text(opened.folder, folder):
            slow = (opened.folder / "vocab.json").is_file()
            advice = "; of vocab.json, save_pretrained of its fast tokenizer makes a tokenizer.json"
            return ours, [
                "no text tokenizer was found beside the model: tokenizers/ was not written"
                + (advice if slow else "")
            ]
        if Modality.IMAGE in ours.modalities:
            imports.import_vq(opened.folder, folder)
        text = TextTokenizer.load(text_file(folder))
        vocabulary = imports.with_sentinels_of(text, ours)
        imports.save_vocabulary(vocabulary, folder)
        Tokenizers.load(folder)  # refuses those that do not fit
    except ValueError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return ours, [f"tokenizers/ was not written: {str(error).removeprefix(f'{folder}: ')}"]
    if vocabulary == ours:
        return ours, []
    ids = f"{vocabulary.bos}, {vocabulary.eos} and {vocabulary.pad}"
    return vocabulary, [f"begin, end and padding of documents are {ids}, by the text tokenizer"]

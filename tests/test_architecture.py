"""The shape of the house: who may import whom, which folders exist, what is packaged."""

import ast
import fnmatch
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ITSELF = "tools/package"  # the __init__.py of earlyfuse
FOLDERS = ("configs", "data", "kernels", "models", "parallel", "tools")
TOP_LEVEL = {
    *FOLDERS,
    *("train.py", "tests", "benchmarks", "docs", "README.md", "LICENSE", "Makefile"),
    *("pyproject.toml", "constraints.txt", ".gitignore", ".ci"),
}

# What each folder may import of earlyfuse, besides itself. tools/ and train.py may import anything.
MAY_IMPORT = {
    "kernels": (),
    # configs of public checkpoints are parsed JSON, whose fields are checked as everywhere
    "models": ("kernels", "data.json_files", "data.console", "data.vocabulary"),
    "data": ("models.batch", "models.vocabulary"),
    "parallel": ("data", "kernels", "models"),
    "configs": ("data", "kernels", "models", "parallel"),
    "tools": FOLDERS,
    "train.py": FOLDERS,
}

# Where torchtitan may be imported, and which part of it.
TORCHTITAN = {
    "parallel/": ("torchtitan",),
    "configs/": ("torchtitan",),
    "data/stream/loader.py": ("torchtitan",),
    "tools/doctor.py": ("torchtitan.distributed",),
    "models/state_dicts/": ("torchtitan",),
    "models/": ("torchtitan.protocols", "torchtitan.config"),
}


def sources(*folders):
    """Python files under the folders, with train.py when it is named."""
    files = []
    for folder in folders:
        path = ROOT / folder
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [file for file in files if "__pycache__" not in file.parts]


def imported_modules(text, package=()):
    """Dotted names of everything a source imports, wherever it stands; relative ones made absolute.

    ``from a.b import c`` counts as ``a.b.c``: it may name a module or something in one.
    """
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def imports_of(file):
    package = ("earlyfuse", *file.relative_to(ROOT).parent.parts)
    return imported_modules(file.read_text(), package)


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def offences(files, allowed):
    """``file imports name`` for each import that ``allowed(relative path, name)`` refuses."""
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports_of(file)
        if not allowed(file.relative_to(ROOT).as_posix(), name)
    ]


def test_imports_are_seen_wherever_and_however_they_are_written():
    text = """
import a.b as x
def f():
    from earlyfuse.models import batch
if True:
    from . import near
    from ..other.thing import name
"""
    found = set(imported_modules(text, ("earlyfuse", "data", "raw")))
    assert found == {
        "a.b",
        "earlyfuse.models.batch",
        "earlyfuse.data.raw.near",
        "earlyfuse.data.other.thing.name",
    }


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    def allowed(_, name):
        if not within(name, "earlyfuse"):
            return True
        return any(within(name, f"earlyfuse.{other}") for other in (folder, *MAY_IMPORT[folder]))

    assert offences(sources(folder), allowed) == []


def test_own_modules_are_imported_by_their_full_name():
    everywhere = sources(*FOLDERS, "train.py", "tests", "benchmarks")

    def allowed(_, name):
        return not any(within(name, folder) for folder in FOLDERS)

    assert offences(everywhere, allowed) == []


def test_torchtitan_is_imported_only_where_it_is_met():
    def allowed(path, name):
        if not within(name, "torchtitan"):
            return True
        place = next((place for place in TORCHTITAN if path.startswith(place)), None)
        return place is not None and any(within(name, part) for part in TORCHTITAN[place])

    assert offences(sources(*FOLDERS, "train.py"), allowed) == []


@pytest.mark.parametrize("package", ["transformers", "hypothesis", "pytest"])
def test_test_packages_stay_in_tests(package):
    files = sources(*FOLDERS, "train.py")
    # convert --verify asks transformers itself, where it is installed
    exception = ("tools/compare_logits.py", "transformers")

    def allowed(path, name):
        return not within(name, package) or (path, package) == exception

    assert offences(files, allowed) == []


def test_triton_is_imported_only_by_triton_implementations():
    def allowed(path, name):
        if not within(name, "triton"):
            return True
        return path.rpartition("/")[2].startswith("triton_")

    assert offences(sources(*FOLDERS, "train.py"), allowed) == []


# Branches and routers, and the files that may know them: their own, what composes models, what
# writes them under public names, and what trains or loads causal routers
CONTRACTS = ("Attention", "Mamba", "FeedForward", "MixtureOfExperts", "ExpertChoice", "TokenChoice")
COMPOSE = (
    "models/blocks/",
    "models/routing/",
    "models/state_dicts/",
    "models/decoder.py",
    "configs/",
)


def named(node):
    """Names and last parts of dotted names in an expression."""
    inner = list(ast.walk(node))
    return {n.id for n in inner if isinstance(n, ast.Name)} | {
        n.attr for n in inner if isinstance(n, ast.Attribute)
    }


def test_branches_and_routers_are_asked_not_recognised():
    """No ``isinstance`` of them but where a public format or a command is about one of them; files
    that do not compose models do not import them.
    """
    asked = (
        "models/state_dicts/plain_decoder.py",
        "configs/decoders.py",
        "configs/start_model.py",
    )
    found = [
        f"{path}:{node.lineno}"
        for file in sources(*FOLDERS)
        for path in [file.relative_to(ROOT).as_posix()]
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and named(node.args[1]) & set(CONTRACTS)
        and path not in asked
    ]
    assert found == []
    files = [
        f for f in sources("models", "parallel") if not str(f.relative_to(ROOT)).startswith(COMPOSE)
    ]
    assert offences(files, lambda _, name: name.rpartition(".")[2] not in CONTRACTS) == []


# What opens, reads or lists files, by name: as a function, or as a method of a path.
OPENS = {
    *("open", "safe_open", "read_json", "read_json_value", "load_file", "save_file"),
    *("read_text", "read_bytes", "write_text", "write_bytes", "iterdir", "glob", "rglob"),
    *("is_file", "is_dir", "exists", "stat", "mkdir", "unlink", "atomic_write", "sha256_file"),
}


def opened(text):
    """(line, what) for each call that touches a file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in OPENS or ast.unparse(node.func) in ("torch.load", "torch.save"):
                yield node.lineno, ast.unparse(node.func)


def test_models_open_no_file():
    text = "open(path)\nfolder.glob('*')\ntorch.load(path)\njson.loads(text)\nmodel.load(path)\n"
    assert [line for line, _ in opened(text)] == [1, 2, 3]
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file in sources("models")
        for line, what in opened(file.read_text())
    ]
    assert found == []


# What unpickles, by the last part of its name, and the files that may call it, each in a safe way.
UNPICKLES = {
    "load": (
        "parallel/checkpoint/files/torch_save.py",
        "data/tokenizers/vq_files.py",
    ),  # torch.load
    "loads": (),
    "Unpickler": (),
    "_load_state_dict": (),
    "_load_state_dict_from_keys": (),
    "dcp_to_torch_save": (),
    "FsspecReader": (),
    "FileSystemReader": ("parallel/checkpoint/files/dcp_reader.py",),  # the base of the safe one
    "DefaultLoadPlanner": ("parallel/checkpoint/files/dcp_reader.py",),
    "read_pickle": (),
    "allow_pickle": (),
}
OWNERS = ("torch", "pickle", "dcp", "cPickle", "dill", "marshal", "shelve", "joblib", "checkpoint")


def unpickling(text):
    """(line, what) for each use of something that unpickles."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg in ("weights_only", "allow_pickle"):
            safe = node.arg == "weights_only"
            if not isinstance(node.value, ast.Constant) or node.value.value is not safe:
                yield node.value.lineno, node.arg
        elif isinstance(node, ast.Attribute) and node.attr in UNPICKLES:
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value
            if (owner.id if isinstance(owner, ast.Name) else owner) in OWNERS:
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            owner = (node.module or "").split(".")
            for alias in node.names:
                if alias.name in UNPICKLES and owner[0] in OWNERS:
                    yield node.lineno, alias.name
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "torch.load"
            and "weights_only" not in {keyword.arg for keyword in node.keywords}
        ):
            yield node.lineno, "torch.load without weights_only"


def test_what_unpickles_is_seen():
    text = """
import torch, pickle
import torch.distributed.checkpoint as dcp
from pickle import loads
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
torch.load(path)
torch.load(path, weights_only=False)
pickle.load(file); pickle.Unpickler(file)
dcp.load(state); torch.distributed.checkpoint.load(state); dcp.FileSystemReader(folder)
np.load(path, allow_pickle=True)
json.load(file); json.loads(text); np.load(path, allow_pickle=False)
"""
    lines = {line for line, _ in unpickling(text)}
    assert lines == set(range(4, 11))


def test_nothing_unpickles_what_a_file_holds():
    found = [
        f"{path}:{line}: {what}"
        for file in sources(*FOLDERS, "train.py", "benchmarks")
        for path in [file.relative_to(ROOT).as_posix()]
        for line, what in unpickling(file.read_text())
        if path not in UNPICKLES.get(what, ())
    ]
    # the reader's own call of DCP gives it the safe reader and planner
    assert [line for line in found if "dcp_reader.py" not in line] == []
    assert len(found) == 1 and found[0].endswith(": load"), found


def test_top_folders_and_the_root_are_no_packages():
    assert [folder for folder in (".", *FOLDERS) if (ROOT / folder / "__init__.py").exists()] == []


def test_every_subfolder_with_modules_is_a_package():
    folders = {file.parent for file in sources(*FOLDERS)} - {ROOT / folder for folder in FOLDERS}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_package_list_equals_the_tree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inits = {file.parent for file in sources(*FOLDERS) if file.name == "__init__.py"}
    folders = {ROOT / folder for folder in FOLDERS} | inits - {ROOT / ITSELF}
    expected = sorted(".".join(["earlyfuse", *f.relative_to(ROOT).parts]) for f in folders)
    assert sorted(project["packages"]) == ["earlyfuse", *expected]
    places = {f"earlyfuse.{folder}": folder for folder in FOLDERS}
    assert project["package-dir"] == {"earlyfuse": ITSELF} | places


def test_the_top_level_holds_exactly_what_it_should():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    names = {
        path.name
        for path in ROOT.iterdir()
        if path.name != ".git" and not any(fnmatch.fnmatch(path.name, p) for p in ignored)
    }
    assert names == TOP_LEVEL


def test_every_direct_dependency_is_pinned_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {name.lower().replace("_", "-") for name in pins}
    names = [requirement.split(";")[0].split("<")[0].split(">")[0] for requirement in wanted]
    assert [name for name in names if name.split("=")[0].strip() not in pinned] == []
    assert "+" not in "".join(pins.values())  # +cpu exists on some machines only


def test_pages_activate_the_environment_before_their_first_command():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        lines = [line.strip() for line in page.read_text().splitlines()]
        commands = [n for n, line in enumerate(lines) if line.startswith("python ")]
        if commands:
            assert "source .venv/bin/activate" in "\n".join(lines[: commands[0]]), page.name


def test_the_entry_stays_an_entry():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 60

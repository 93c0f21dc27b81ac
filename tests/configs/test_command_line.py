"""The command line of a run: short names, help that is true, lists without torch, short errors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from toy import make_data

from earlyfuse.configs import embedded, listing
from earlyfuse.configs.base import RECOMPUTE
from earlyfuse.configs.command_line import long_help, offered_fields, override, value_of
from earlyfuse.configs.registry import sections
from earlyfuse.parallel.training import data_config
from earlyfuse.parallel.training.config_checks import FILLED_IN, UNREAD
from earlyfuse.tools import cli, convert
from earlyfuse.tools.command import Parser


def kwargs(config, name: str) -> list[float]:
    return [group.optimizer_kwargs[name] for group in config.optimizer.param_groups]


# ---------------------------------------------------------------- short names


def test_a_short_name_sets_all_groups_but_those_with_0_and_a_full_name_refines_it():
    parent = embedded.dense()
    words = "--training.steps 5 --optimizer.weight-decay=0.2 --optimizer.lr 3e-4"
    found = override(parent, words.split())
    assert kwargs(found, "lr") == [3e-4, 3e-4] and kwargs(found, "weight_decay") == [0.0, 0.2]
    assert value_of(found, "optimizer.lr") == "0.0003" and found.training.steps == 5
    assert kwargs(parent, "lr") == [4e-3, 4e-3], "the config itself stays"
    refined = "--optimizer.param_groups.0.optimizer_kwargs.lr 1.0"
    assert kwargs(override(found, [*refined.split(), *words.split()]), "lr") == [1.0, 3e-4]
    frozen = override(parent, ["--optimizer.lr", "0"])
    with pytest.raises(ValueError, match=r"would change nothing: every parameter group .* has 0"):
        override(frozen, ["--optimizer.lr", "0.1"])


@pytest.mark.parametrize("name", ["none", "selective", "memory-budget"])
def test_recompute_stands_anywhere_and_its_options_beside_it(name):
    words = ["--training.steps", "3", "--recompute", name, "--validator.no-enable"]
    words += ["--compile.enable"] if name == "memory-budget" else []
    found = override(embedded.dense(), words)
    assert type(found.activation_checkpoint) is (RECOMPUTE[name] or type(None))
    assert value_of(found, "recompute") == name
    assert (found.training.steps, found.validator.enable) == (3, False)
    if name != "none":
        option = "--activation_checkpoint.no-preserve_rng_state"
        kept = override(override(found, [option]), ["--recompute", name])
        assert not kept.activation_checkpoint.preserve_rng_state


# ---------------------------------------------------------------- help


def test_every_field_of_the_long_help_can_be_given_as_it_is_written():
    for recompute in ("none", "selective"):
        config = override(embedded.moma_4t4i(), ["--recompute", recompute])
        words = []
        for field in offered_fields(config):
            value = field.value
            if isinstance(value, bool):
                section, _, last = field.path.rpartition(".")
                words.append(field.option if value else f"--{section}.no-{last}")
            elif isinstance(value, dict | tuple):
                words += [field.option, *map(str, value)] if value else []
            elif isinstance(value, list):
                words += [field.option, ",".join(value)] if value else []
            else:
                words.append(f"{field.option}={value}")
        assert len(words) > 80 and override(config, words) == config


def test_the_long_help_offers_no_field_that_is_refused_or_filled_in_and_none_that_nothing_reads():
    config = override(embedded.moma_4t4i(), ["--recompute", "selective"])
    offered = {field.path for field in offered_fields(config)}
    assert not offered & {*UNREAD, *FILLED_IN, "tokenizer", "model_spec"}
    titan = [m for name, m in sys.modules.items() if name.partition(".")[0] == "torchtitan"]
    files = [f for folder in ("parallel", "data", "models") for f in (ROOT / folder).rglob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    text += "\n".join(Path(m.__file__).read_text() for m in titan if getattr(m, "__file__", None))
    read = set(re.findall(r"[.\"](\w+)", text))  # as an attribute, or by getattr
    assert not {path for path in offered if path.rpartition(".")[2] not in read}
    shown = long_help("moma_4t4i", config)
    assert "--training.steps INTEGER [900]" in shown
    assert "--optimizer.lr  peak learning rate of all parameter groups" in shown
    assert "--metrics.enable_wandb | --metrics.no-enable_wandb [False]" in shown


def test_what_data_and_model_determine_is_what_is_filled_in(tmp_path, monkeypatch):
    make_data(tmp_path)
    config = embedded.dense()
    config.model_spec.model.vocab_size = 48
    config.data.folder = str(tmp_path)
    filled = []
    monkeypatch.setattr(data_config, "_fill_in", lambda *given: filled.append(given[-1]))
    data_config.DataSet(config.data).resolve(config, 1)
    assert sorted(filled) == sorted(FILLED_IN)


def test_the_short_help_has_a_line_for_what_people_change():
    config = embedded.dense()
    text = listing.help_text("dense", lambda field: value_of(config, field))
    for name in ("optimizer.lr", "recompute", "start.model", "data.shares"):
        assert f"  --{name} " in text
    assert re.search(r"--parallelism.tensor_parallel_degree .* \[1\]", text)
    assert "optimizer steps [900]" in text and "optimizer steps\n" in listing.help_text()


# ---------------------------------------------------------------- lists


def test_the_list_in_the_tree_is_up_to_date():
    found, _, text = listing.LIST_FILE.read_text("utf-8").partition("\n")
    fresh = found == listing.sources_digest()
    assert fresh, "run `python train.py --list`, which renews configs/list.txt, and commit it"
    for title, configs in sections().items():
        assert f"\n{title}\n" in f"\n{text}"
        assert all(re.search(rf"^  {name} ", text, re.M) for name in configs)
    assert text.rstrip("\n") == listing.project_list()


def test_a_list_of_other_files_is_made_anew(tmp_path, monkeypatch):
    old = tmp_path / "list.txt"
    old.write_text("of another time\nnothing\n")
    monkeypatch.setattr(listing, "LIST_FILE", old)
    assert "moma_4t4i " in listing.project_list()
    assert old.read_text().startswith(listing.sources_digest())


def test_a_user_s_file_is_listed_without_running_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        '"""Mine"""\nraise SystemExit\ndef b(x=1):\n  """second"""\ndef a(*, y=2):\n'
        '  """first\n  more"""\ndef _hidden(): ...\ndef needs(x): ...\ndef also(*, x): ...\n'
    )
    assert listing.file_list(file) == f"Mine\n  {file}:a  first\n  {file}:b  second"
    file.write_text(f"CONFIGS = dict.fromkeys(['c', 'd'], lambda: 0)\n{file.read_text()}")
    with pytest.raises(ValueError, match=r"mine.py, line 3, raised SystemExit"):
        listing.file_list(file)


LIGHT = """
import importlib, sys
from earlyfuse.configs import listing
assert "moma_4t4i" in listing.answer(["--list"]) and "usage" in listing.answer(["--help"])
for name in ("arank", "convert", "doctor", "generate", "prepare", "study.study"):
    importlib.import_module(f"earlyfuse.tools.{name}")._parser().format_help()
for name in ("train", "launch", "cli"):
    importlib.import_module(f"earlyfuse.tools.{name}")
heavy = {"torch", "torchtitan", "numpy", "matplotlib", "tyro"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_lists_and_help_of_every_tool_do_without_torch():
    found = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--training.step 3", "--training.step is unknown; did you mean --training.steps"),
        ("--steps 3", "--steps is unknown; did you mean --training.steps"),
        ("--training.steps 1.5", "--training.steps (1.5) must be a whole number"),
        ("--debug.seed x", "--debug.seed (x) must be a whole number"),
        ("--optimizer.lr fast", "--optimizer.lr (fast) must be a number"),
        ("--optimizer.lr", "--optimizer.lr must be followed by a value"),
        (
            "--recompute ful",
            "must be one of none, selective, full, memory-budget; did you mean full",
        ),
        ("activation-checkpoint:full", "give --recompute full"),
        ("steps 3", "'steps' belongs to no option"),
        ("--sampler.denoising-method eule", "invalid choice 'eule'"),
        ("--data.shares text", "--data.shares: the share of text"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(words, said):
    with pytest.raises(ValueError) as refusal:
        override(embedded.dense(), words.split())
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_unknown_config_is_refused_with_near_names_before_torch_is_imported():
    with pytest.raises(ValueError, match=r"config \('mama'\) is unknown; did you mean mamba\?"):
        listing.answer(["mama", "--training.steps", "3"])
    assert listing.answer(["mamba", "--training.steps", "3"]) is None
    assert listing.answer(["my_runs.py:mine"]) is None and listing.answer([]) is None


def test_a_tool_refuses_a_wrong_command_line_in_one_line_with_near_options(capsys):
    parser = Parser(prog="tool")
    parser.add_subparsers().add_parser("write").add_argument("--prompt")
    for words, said in (
        (
            ["write", "--promt", "x"],
            "tool: --promt is unknown; did you mean --prompt? --help lists",
        ),
        (["writ"], "tool: argument {write}: invalid choice: 'writ'"),
        (["write", "--prompt"], "tool write: argument --prompt: expected one argument; --help"),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.startswith(said) and message.count("\n") == 1


# ---------------------------------------------------------------- the console command


def test_the_console_command_knows_every_tool(monkeypatch, capsys):
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["earlyfuse", *words])
        return cli.main()

    assert run("--help") == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in shown
        assert (ROOT / "tools" / f"{name}.py").exists() or (ROOT / "tools" / name).is_dir()
    assert run("trian") == 2
    assert "trian is no command; did you mean train" in capsys.readouterr().err
    monkeypatch.setattr(cli.runpy, "run_module", lambda *_, **__: print(sys.argv))
    assert run("prepare", "inspect", "--x") == 0
    assert capsys.readouterr().out == "['earlyfuse prepare', 'inspect', '--x']\n"
    assert run("--version") == 0
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{capsys.readouterr().out.split()[1]}"' in project


def test_formats_of_convert_are_those_of_exports():
    from earlyfuse.parallel.checkpoint.export_model import TARGETS

    assert tuple(TARGETS) == convert.FORMATS

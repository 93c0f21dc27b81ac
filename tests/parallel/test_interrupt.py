"""Ctrl-C: the first saves and ends, the second kills; a shell is told by the exit status."""

import os
import signal

import pytest
from tiny_runs import tiny_config
from toy import make_data

from earlyfuse.configs import command_line, registry, start_model
from earlyfuse.parallel.reliability import preemption, tcp_timeouts
from earlyfuse.tools import launch, train


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(preemption, "_interrupted", False)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_requests_a_stop_and_the_second_kills():
    child = os.fork()
    if child == 0:
        preemption.listen()
        signal.raise_signal(signal.SIGINT)
        if preemption.requested() and preemption.interrupted():
            signal.raise_signal(signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT


def test_a_process_that_ignores_it_goes_on_ignoring_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with preemption.listening():
        signal.raise_signal(signal.SIGINT)
        assert not preemption.requested()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_saves_the_step_and_ends(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("RANK", raising=False)
    config = tiny_config(tmp_path / "run", make_data(tmp_path / "data"), steps=6)
    config.validator.enable = config.metrics.enable_tensorboard = False
    trainer = config.build()
    step = trainer.train_step

    def interrupted_in_the_second(data):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        step(data)

    monkeypatch.setattr(trainer, "train_step", interrupted_in_the_second)
    trainer.train()
    trainer.close()
    assert (tmp_path / "run" / "checkpoint" / "step-2").is_dir()
    shown = capfd.readouterr()
    assert "stopped at step 2, saved; the same command resumes" in shown.out
    assert "stopping after this step, with a checkpoint; Ctrl-C again kills" in shown.err


@pytest.mark.parametrize(("left", "status"), [(True, 130), (False, 0)])
def test_the_exit_status_tells_a_stop_from_an_end(monkeypatch, left, status):
    class Fake:
        def build(self):
            return self

        def train(self):
            with preemption.listening():
                signal.raise_signal(signal.SIGINT)

        def close(self):
            pass

        def should_continue_training(self):
            return left

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(registry, "load_config", lambda name: Fake())
    monkeypatch.setattr(command_line, "override", lambda config, words: config)
    monkeypatch.setattr(start_model, "with_start_model", lambda config: (config, ""))
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    assert train.main(["dense"]) == status
    monkeypatch.setenv("RANK", "0")  # the launcher has a status of its own
    assert train.main(["dense"]) == 0
    for number, handler in zip(preemption.SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_ctrl_c_in_the_imports_is_a_line(monkeypatch, capsys):
    def pressed(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.listing, "answer", pressed)
    assert train.main(["dense"]) == 130
    assert capsys.readouterr().err == "stopped before the first step\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nproc-per-node=x", __file__], "launch: Unsupported nproc_per_node value: x;"),
        (["--standalone", "trian.py"], "launch: script (trian.py) does not exist; give train, or"),
        (["--nodes=2", "train"], "launch: unrecognized arguments"),
        ([], "launch: the following arguments are required: training_script"),
    ],
)
def test_the_launcher_refuses_in_one_line(monkeypatch, capsys, words, said):
    from torch.distributed.launcher import api

    monkeypatch.setattr(tcp_timeouts, "watch", lambda: None)
    monkeypatch.setattr(api, "LocalElasticAgent", api.LocalElasticAgent)  # undoes the launcher's
    with pytest.raises(SystemExit) as end:
        launch._run(words)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith(said) and message.count("\n") == 1

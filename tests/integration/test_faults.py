"""Faults: killed, frozen, interrupted and diverging ranks cost time, never work or correctness."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import fault_ranks
import pytest
import torch
from places import SUPPORT
from ranks import output_of, torchrun
from tiny_runs import TIMES, state, tiny_config

from earlyfuse.models.objectives.sums import LABELS
from earlyfuse.parallel import compat
from earlyfuse.parallel.reliability.rank_consistency import Facts, differences, flattened
from earlyfuse.parallel.reliability.watchdog import DONE, Phase, Report, find_stall
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.skip_step import SkipRule

PATIENCE = 300  # seconds that a state is waited for, on any machine
NAN = float("nan")


# ---------------------------------------------------------------- one job on two ranks, many faults


@dataclass
class Story:
    """A run that met every fault, and the same one undisturbed; what each start printed of the
    first, and the last one of the other.
    """

    harmed: Path
    calm: Path
    outputs: list[str]
    calm_output: str


@pytest.fixture(scope="module")
def story(data, tmp_path_factory) -> Story:
    harmed, calm = (tmp_path_factory.mktemp(name) for name in ("harmed", "calm"))
    outputs = []
    for signalled in ("launcher-asked", "rank-asked", None):
        process = launch(harmed, calm, data)
        if signalled is not None:
            until((harmed / f"fault-{signalled}").exists, process)
            if signalled == "launcher-asked":
                process.send_signal(signal.SIGUSR1)
            else:
                os.kill(int((harmed / "pid-1").read_text()), signal.SIGTERM)
            (harmed / f"go-{signalled}").touch()
        outputs.append(output_of(process))
    outputs[-1], done, calm_output = outputs[-1].partition(f"done: {fault_ranks.STEPS} steps")
    outputs[-1] += done
    return Story(harmed, calm, outputs, calm_output)


def metrics(folder: Path) -> list[dict]:
    """Logged lines without times; strict JSON, in which null is what is not finite."""
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def launch(harmed: Path, calm: Path, data: Path) -> subprocess.Popen:
    """The same command each time; restarts, since nothing here depends on how many there are."""
    command = [sys.executable, "-m", "earlyfuse.tools.launch", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=20", str(SUPPORT / "fault_ranks.py")]
    return subprocess.Popen(
        [*command, *map(str, (harmed, calm, data)), *fault_ranks.FAULTS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def until(condition, process: subprocess.Popen) -> None:
    """Wait for ``condition()``; fails when the process ends before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"waited in vain:\n{process.communicate()[0]}")
        time.sleep(0.01)


def test_a_harmed_run_equals_the_undisturbed_one_bit_for_bit(story):
    happened = {path.name.removeprefix("fault-") for path in story.harmed.glob("fault-*")}
    assert happened == set(fault_ranks.FAULTS)
    expected, found = (torch.load(folder / "final.pt") for folder in (story.calm, story.harmed))
    assert expected.keys() == found.keys() and any("exp_avg" in key for key in found)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert metrics(story.harmed) == metrics(story.calm)
    steps = [line["step"] for line in metrics(story.harmed) if line["kind"] == "train"]
    assert steps == list(range(1, fault_ranks.STEPS + 1)), "every step once"


def test_a_stop_asked_of_the_launcher_or_of_one_rank_saves_and_exits_0(story):
    # output_of has seen the exit status 0; only the request makes a checkpoint of these steps
    for start, asked in enumerate((13, 17)):
        found = re.search(r"stopped at step (\d+), saved; the same", story.outputs[start])
        assert found and asked <= int(found[1]) < asked + 3
        assert f"resumed at step {found[1]}\n" in story.outputs[start + 1]
    assert "done: 20 steps" in story.outputs[2]


def test_a_frozen_rank_is_named_with_the_place_where_it_stood(story):
    # ranks tell it once a second at most; these steps take less, and are the same on all ranks
    place = r"last seen in step \d+, [^;]+; this rank waits in step 11, forward-backward"
    named = rf"rank 0 on \S+ \(pid \d+\) has stopped, {place}"
    assert re.search(f"the job stands still: {named}", story.outputs[0])
    told = (story.harmed / "stalls" / "rank-1.txt").read_text()
    assert re.search(named, told) and "_forward_backward" in told, "the waiting rank's stack"


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_and_counted_on_all(story):
    lines = {line["step"]: line for line in metrics(story.calm) if line["kind"] == "train"}
    assert [lines[step]["skipped_steps"] for step in (2, 3, 4, 13, 14, 20)] == [0, 1, 1, 1, 2, 2]
    assert re.search(r"step 3 skipped: loss nan .* \(first on ranks \[1\]\)", story.calm_output)
    assert [lines[step]["loss"] is None for step in (3, 4)] == [True, False]


# ---------------------------------------------------------------- skipped steps


def train(config, factors=None, until_step=None) -> Trainer:
    """Train with the loss of some steps multiplied; ``factors`` by step."""
    trainer = config.build()
    loss_of = trainer.loss_fn.loss_of

    def spoiled(*batch):
        def loss(*head):
            found = loss_of(*batch)(*head)
            factor = (factors or {}).get(trainer.step, 1.0) if torch.is_grad_enabled() else 1.0
            sums = found.sums | {"loss": found.sums["loss"] * factor}
            return found._replace(totals={LABELS: found.total * factor}, sums=sums)

        return loss

    trainer.loss_fn.loss_of = spoiled
    if until_step:
        trainer.should_continue_training = lambda: trainer.step < until_step
    trainer.train()
    trainer.close()
    return trainer


@pytest.fixture
def alone():
    compat.join_process_group_alone()


def test_a_skipped_step_moves_data_and_schedule_but_neither_parameters_nor_moments(tmp_path, data):
    before = train(tiny_config(tmp_path / "before", data), until_step=3)
    after = train(tiny_config(tmp_path / "after", data), {4: NAN}, until_step=4)
    expected, found = state(before), state(after)
    changed = {key for key in expected if not torch.equal(expected[key], found[key])}
    assert changed == {"lanes", "tokens"}
    assert after.step == 4 and after.skip.total == 1
    rates = [t.lr_schedulers.schedulers[0].last_epoch for t in (before, after)]
    assert rates == [3, 4]


def test_a_run_resumed_across_skipped_steps_equals_the_unbroken_one(tmp_path, data):
    bad = {3: NAN, 4: NAN}  # the checkpoint of step 3 is written within a run of skipped steps
    config = {name: tiny_config(tmp_path / name, data) for name in ("unbroken", "broken")}
    unbroken = train(config["unbroken"], bad)
    train(config["broken"], bad, until_step=3)
    resumed = train(tiny_config(tmp_path / "broken", data), bad)
    expected, found = state(unbroken), state(resumed)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert resumed.skip.state_dict() == unbroken.skip.state_dict() and resumed.skip.total == 2


def test_a_run_of_skipped_steps_stops_the_job_naming_step_rank_and_last_checkpoint(tmp_path, data):
    config = tiny_config(tmp_path, data, steps=20)
    config.skip.max_skipped = 3
    expected = (
        r"3 steps in a row were skipped, the first of them: step 5 skipped: loss nan .* \(first on "
        r"ranks \[0\]\); the last good checkpoint is step-6"
    )
    with pytest.raises(RuntimeError, match=expected):
        train(config, dict.fromkeys(range(5, 20), NAN))


@pytest.mark.slow
def test_the_spike_guard_skips_what_stands_out_and_remembers_across_a_restart(tmp_path, data):
    def config(folder):
        config = tiny_config(tmp_path / folder, data, steps=12)
        config.skip.spike_guard, config.skip.window = True, 8
        return config

    spikes = {8: 1e3, 11: 1e6}  # the second is judged by a window that was loaded
    unbroken = train(config("unbroken"), spikes)
    assert unbroken.skip.total == 2
    train(config("broken"), spikes, until_step=9)
    resumed = train(config("broken"), spikes)
    assert resumed.skip.state_dict() == unbroken.skip.state_dict()
    assert train(config("quiet")).skip.total == 0


def judged(rule: SkipRule, loss: float, grad_norm: float) -> str:
    """The rule's reason to skip one more step; "" if it is taken."""
    values = torch.tensor([loss, grad_norm], dtype=torch.float64)
    said = []
    rule._count = lambda what, last_checkpoint: said.append(what)
    taken = rule.decide(1, values[0], values[1], [values])
    rule.settle([torch.ones(1)], "none")
    assert bool(taken) == (not said)
    return "".join(said)


@pytest.mark.usefixtures("alone")
def test_the_spike_rule():
    def rule(**config) -> SkipRule:
        return SkipRule.Config(window=8, deviations=3.0, **config).build()

    few = rule(spike_guard=True)
    assert [judged(few, loss, 9.9) for loss in (100.0, 1.0, 100.0, 1.0)] == [""] * 4
    guard, steady = rule(spike_guard=True), [2.0, 2.1, 1.9, 2.05]
    assert [judged(guard, loss, 1.0 + loss / 10) for loss in steady * 2] == [""] * 8
    assert judged(guard, 1.0, 1.2) == "", "below the mean is no spike"
    assert "loss 9 is more than 3 standard deviations" in judged(guard, 9.0, 1.2)
    assert "gradient norm 7 is more than 3" in judged(guard, 2.0, 7.0)
    # what stays is accepted: it fills the window
    assert [bool(judged(guard, 50.0, 1.2)) for _ in range(8)].count(True) < 4
    off = rule()
    assert judged(off, 1e9, 1e9) == "" and "must be finite" in judged(off, 1.0, float("inf"))


# ---------------------------------------------------------------- who holds the job up


def report(step=7, phase=Phase.FORWARD_BACKWARD, idle=300.0, beat=60, rank=0) -> Report:
    allowed = 1800.0 if phase is Phase.CHECKPOINT else 300.0
    return Report(step, phase, idle, allowed, beat, f"host{rank // 2}", 1000 + rank)


def stall(*now: Report | None, frozen=()) -> str:
    """The finding of rank 0; ranks in ``frozen`` have not beaten since the reports before."""
    before = {
        rank: r and r._replace(beat=r.beat - (rank not in frozen)) for rank, r in enumerate(now)
    }
    return find_stall(now[0], before, dict(enumerate(now)))[0]


def test_the_watchdog_names_whoever_holds_the_job_up():
    waiting = [report(rank=rank) for rank in range(4)]
    frozen = report(step=7, phase=Phase.DATA, idle=0.4, rank=3)
    assert stall(*waiting[:3], frozen, frozen=[3]) == (
        "rank 3 on host1 (pid 1003) has stopped, last seen in step 7, data; this rank waits in "
        "step 7, forward-backward"
    )
    reading = report(phase=Phase.DATA, idle=310.0, rank=2)
    assert stall(*waiting[:2], reading, waiting[3]) == (
        "rank 2 on host1 has been in step 7, data for 310 s, the others wait further on"
    )
    assert "all ranks have been in step 7, forward-backward for 300 s" in stall(*waiting)
    assert stall(*waiting[:3], None) == "rank 3 never started"
    assert "store" in find_stall(waiting[1], {}, {})[0]
    keeper = report(idle=0.2)
    assert find_stall(waiting[1], {}, {}, keeper) == (
        "rank 0 on host0 (pid 1000) has stopped, last seen in step 7, forward-backward (it holds "
        "the job's store, which is silent); this rank waits in step 7, forward-backward",
        [keeper],
    )


def test_the_watchdog_lets_a_slow_job_go_on():
    waiting = [report(rank=rank) for rank in range(3)]
    saving = report(step=6, phase=Phase.CHECKPOINT, idle=320.0, rank=3)
    assert stall(*waiting, saving) == "", "a checkpoint may take longer"
    reading = report(phase=Phase.DATA, idle=40.0, rank=3)
    assert stall(*waiting, reading) == "", "it was late once, but moves"
    ended = report(step=6, phase=Phase.CHECKPOINT, beat=DONE, rank=3)
    assert "rank 3" not in stall(*waiting, ended, frozen=[3])
    saving_too = report(phase=Phase.CHECKPOINT)
    assert find_stall(saving_too, {}, {})[0] == "", "the store may be away for a while"


# ---------------------------------------------------------------- what ranks must have in common


def test_other_versions_and_clocks_are_reported_with_rank_and_host():
    versions = {"python": "3.11.9", "torch": "2.13.0"}
    facts = [Facts(f"host{rank // 2}", dict(versions), [100.0, 200.0, 300.0]) for rank in range(6)]
    assert differences(facts) == []
    facts[2].clocks[:] = [104.0, 204.3, 304.1]
    facts[4].clocks[:] = [100.0, 200.0, 305.0]  # late out of one barrier: no skew
    facts[3].versions["torch"] = facts[5].versions["torch"] = "2.12.1"
    assert differences(facts) == [
        "torch is 2.13.0 on rank 0 (host0), but 2.12.1 on rank 3, 5 (host1); install the same "
        "everywhere",
        "the clock of host1 (rank 2) is 4.0 s ahead of that of rank 0 (host0); synchronise the "
        "hosts (NTP)",
    ]


AGREEMENT = """
import os, sys
import torch.distributed as dist
from earlyfuse.parallel.reliability import rank_consistency
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
if rank:
    versions = rank_consistency._versions()
    rank_consistency._versions = lambda: versions | {"torch": "2.12.1"}
for seq_len in (32, 32 + rank):
    try:
        rank_consistency.check_ranks_agree({"training": {"seq_len": seq_len}, "hook": 1})
    except ValueError as error:
        print(f"rank {rank}: {error}", flush=True)
"""


def test_another_config_on_one_rank_is_refused_on_all_by_the_name_of_the_field(tmp_path):
    (tmp_path / "job.py").write_text(AGREEMENT)
    output = output_of(torchrun(2, str(tmp_path / "job.py")))
    rule = "the config of rank 1 is not that of rank 0: training.seq_len is 33 instead of 32"
    for rank in (0, 1):
        assert output.count(f"rank {rank}: {rule}") == 1, "refused on each, the second time only"
    assert output.count("but 2.12.1 on rank 1") == 2, "said once each time, on rank 0"


def test_a_config_is_compared_without_what_differs_between_processes():
    assert flattened({"a": {"b": 1, "f": flattened}, "c": [1, 2]}) == {
        "a.b": "1",
        "a.f": '"<function flattened>"',
        "c": "[1, 2]",
    }

"""A tiny run that saves every few steps: started by ``test_soak.py`` under a launcher.

… soak_ranks.py FOLDER DATA UNTIL [fallback]
"""

import os
import sys
from pathlib import Path

from tiny_runs import tiny_config

from earlyfuse.parallel.reliability import preemption

SAVE_EVERY = 20


def main(folder: Path, data: Path, until: int, *options: str) -> None:
    preemption.listen()
    config = tiny_config(folder, data, steps=1_000_000)
    config.checkpoint.interval = SAVE_EVERY
    config.checkpoint.keep_latest_k = 0
    config.checkpoint.fallback = "fallback" in options
    config.validator.freq, config.validator.batch_rows = 30, 4
    config.watchdog.timeout_seconds, config.watchdog.slow_timeout_seconds = 10.0, 90.0
    trainer = config.build()
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    trainer.should_continue_training = lambda: trainer.step < until
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])

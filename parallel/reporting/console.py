"""Shows a run on the console: a progress bar with ETA on a terminal, plain lines otherwise."""

import sys
from typing import Any

from tqdm import tqdm

from earlyfuse.data.console import printable
from earlyfuse.parallel.reporting.opening import quantity

CLEARLY_SLOWER = 1.1
_RULES = ("", "causal_", "threshold_")  # prefixes of losses: by batch, or by a causal rule
# losses have their own place in a line; z-losses are too small to show
_NOT_ADDED = [f"{rule}{name}" for rule in _RULES for name in ("loss", "z_loss")]


class Console:
    """A progress bar with ETA on a terminal, plain lines otherwise."""

    def __init__(self, step: int, steps: int):
        self.steps = steps
        self.bar: tqdm | None = None
        if sys.stdout.isatty():
            self.bar = tqdm(
                total=steps,
                initial=step,
                dynamic_ncols=True,
                # its own ETA would count validation and checkpoints
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
                file=sys.stdout,
            )

    def tick(self, step: int) -> None:
        """Advance the progress bar to ``step``."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def train(self, step: int, metrics: dict[str, Any], seconds_left: float | None) -> None:
        """Show a training step."""
        text = (
            f"{_losses('loss', metrics)}{_other_sums(metrics)} | grad {metrics['grad_norm']:.2f} | "
            f"lr {metrics['lr']:.1e} | {_rates(metrics)}"
        )
        if "slowest_rank" in metrics:
            text += f" | {_ranks(metrics)}"
        eta = "unknown yet" if seconds_left is None else tqdm.format_interval(seconds_left)
        text += f" | eta {eta}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        else:
            self._print(f"step {step:>{len(str(self.steps))}}/{self.steps} | {text}")

    def validation(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a validation."""
        tasks = "".join(
            f" | {name.removeprefix('task/')} {value:.0%}"
            for name, value in metrics.items()
            if name.startswith("task/")
        )
        tasks += "".join(
            f" | generated {name.partition('/')[2]} {value:.0%}"
            for name, value in metrics.items()
            if name.startswith("generated_accuracy/")
        )
        by_rule = [f"{rule}loss" for rule in _RULES[1:]]
        causal = "".join(f" | {_losses(name, metrics)}" for name in by_rule if name in metrics)
        losses = _losses("loss", metrics) + _other_sums(metrics)
        weights = f" ({metrics['weights']} weights)" if "weights" in metrics else ""
        self._print(f"validation at step {step}{weights} | {losses}{causal}{tasks}{_seen(metrics)}")

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _print(self, line: str) -> None:
        line = printable(line)  # names of tasks come from the data
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)


def _losses(name: str, metrics: dict[str, float]) -> str:
    """A sum per label, by modality and, if there are several, by source."""
    words = [name.replace("_", " "), f"{metrics[name]:.3f}", *_parts(f"{name}/", metrics)]
    sources = _parts(f"{name}_by_source/", metrics)
    if len(sources) > 1:
        words += ["by source", *sources]
    return " ".join(words)


def _parts(prefix: str, metrics: dict[str, float]) -> list[str]:
    return [
        f"{name.removeprefix(prefix)} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith(prefix)
    ]


def _other_sums(metrics: dict[str, float]) -> str:
    """Sums that an objective adds to its loss."""
    names = dict.fromkeys(name.rpartition("/")[0] for name in metrics)
    shown = (name for name in names if name in metrics and name not in _NOT_ADDED)
    return "".join(f" | {_losses(name, metrics)}" for name in shown)


def _rates(metrics: dict[str, Any]) -> str:
    """Throughput of training alone, or the time of the first step."""
    if "first_step_seconds" in metrics:
        return f"first step {metrics['first_step_seconds']:.3g} s"
    text = (
        f"{metrics['tokens_per_second']:,.0f} tok/s | "
        f"{quantity(1e12 * metrics['tflops_per_rank'])}FLOP/s"
    )
    if "mfu" in metrics:
        text += f" ({metrics['mfu']:.1%} mfu)"
    if "slowest_rank" in metrics:
        return f"{text} per rank"
    return f"{text} | step {metrics['step_seconds']:.3g} s"


def _seen(metrics: dict[str, Any]) -> str:
    """Tokens, FLOPs and epochs of the run so far."""
    tokens, flops = (
        sum(value for name, value in metrics.items() if name.startswith(f"{kind}/"))
        for kind in ("tokens", "flops")
    )
    prefix = "epochs_by_source/"
    epochs = [
        f"{name.removeprefix(prefix)} {value:.3g}"
        for name, value in metrics.items()
        if name.startswith(prefix)
    ]
    text = f" | {tokens:,} tokens, {quantity(flops)}FLOP" if tokens else ""
    return text + (f" | epochs {' '.join(epochs)}" if epochs else "")


def _ranks(metrics: dict[str, Any]) -> str:
    """Data wait and step times of the ranks, and the slowest rank if clearly slower."""
    slow, fast = metrics["rank_seconds/max"], metrics["rank_seconds/min"]
    text = f"data wait {metrics['data_wait']:.0%} | step {fast:.3g}–{slow:.3g} s"
    if slow > CLEARLY_SLOWER * fast:
        text += f", slowest rank {metrics['slowest_rank']} on {metrics['slowest_host']}"
    return text

"""The console command ``earlyfuse``: runs the command lines of this package by name."""

import runpy
import sys
from importlib.metadata import version

from earlyfuse.data.console import near_names, printable, protect_console

# name, also of the module → what it does
COMMANDS = {
    "train": "pretrain a config; the same command resumes",
    "prepare": "tokenise data of your own, or inspect what is prepared",
    "study": "train configs with several seeds and compare them at equal FLOPs",
    "generate": "write text, images and speech with a trained model",
    "convert": "convert checkpoints to and from public formats",
    "doctor": "what a config needs of a cluster",
    "launch": "run on several GPUs or hosts, with a graceful stop",
    "arank": "rank of attention maps by layer, to choose depth-routed layers",
}
REFUSED = 2


def main() -> int:
    """Runs ``sys.argv``; returns the exit status, unless the command ends the process itself."""
    protect_console()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return 0 if len(sys.argv) > 1 else REFUSED
    if name == "--version":
        print(f"earlyfuse {version('earlyfuse')}")
        return 0
    if name not in COMMANDS:
        near = near_names(name, COMMANDS) or ";"
        print(
            f"earlyfuse: {printable(name)} is no command{near} --help lists them", file=sys.stderr
        )
        return REFUSED
    sys.argv = [f"earlyfuse {name}", *arguments]
    # as `python -m` does, so that processes it starts find its module
    runpy.run_module(f"earlyfuse.tools.{name}", run_name="__main__", alter_sys=True)
    return 0


def help_text() -> str:
    """The commands, a line each."""
    lines = ["usage: earlyfuse COMMAND …", ""]
    lines += [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
    lines += ["", "  --version", "", "earlyfuse COMMAND --help says more."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Pretrain an early-fusion model: ``python train.py CONFIG``; the same as ``earlyfuse train``."""

import sys

from earlyfuse.tools.train import exit_after, main

if __name__ == "__main__":
    exit_after(main(sys.argv[1:]))

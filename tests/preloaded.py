"""What almost every process of the tests imports, once: processes are then copies of one that has imported it.

Four seconds of a core for each otherwise. Not where CUDA is: a copy of a process that asked for devices cannot use them.
"""

import importlib

import torch

from megacode.megatron import cpu

cpu.quiet()
cpu.install()
importlib.import_module("megacode.cli.train")
importlib.import_module("megacode.train.trainer")
torch.set_num_threads(1)

"""PyPI's distrifuser 0.0.1b1, as `rank.py` asks for it: its U-Net in patches, on Gloo and the CPU.

It is written for NCCL and CUDA. The three calls that say so are replaced here; its own code runs as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from distrifuser import utils
from distrifuser.models.distri_sdxl_unet_pp import DistriUNetPP
from rank import Cases, Settings

from distrifusion.bench.plan import LATENT
from distrifusion.bench.workload import Workload

MODES = ("corrected_async_gn", "full_sync")


def cases(settings: Settings) -> Cases:
    """Its modes, each with a model of its own, since a mode decides at the first call what the buffers hold."""
    dist.init_process_group("gloo")
    return {mode: partial(_picture, Unet(settings, mode)) for mode in MODES}


class Unet:
    """The model, wrapped."""

    def __init__(self, settings: Settings, mode: str) -> None:
        work = settings.work()
        self.model = DistriUNetPP(work.model, _config(settings, mode))
        self.work = replace(work, model=self.model)
        self.comm = utils.PatchParallelismCommManager(self.model.distri_config)
        # As its pipelines prepare theirs: one call tells what will travel, the second fills the buffers.
        self.model.set_comm_manager(self.comm)
        with torch.no_grad():
            self._call()
            self.comm.create_buffer()
            self._call()

    def _call(self) -> None:
        self.model.set_counter(0)
        self.work.run(self.work.sample(0))


def _config(settings: Settings, mode: str) -> utils.DistriConfig:
    side = settings.size // LATENT * LATENT
    with (
        mock.patch.object(utils, "check_env"),  # asks for CUDA's version
        mock.patch.object(dist, "init_process_group"),  # NCCL's; the group exists already
        mock.patch.object(torch.cuda, "set_device"),
    ):
        config = utils.DistriConfig(
            height=side,
            width=side,
            do_classifier_free_guidance=False,
            split_batch=False,
            warmup_steps=0,
            mode=mode,
            use_cuda_graph=False,
        )
    if config.world_size != dist.get_world_size():  # it falls back to one rank, and only prints that it does
        sys.exit(f"distrifuser took {config.world_size} of {dist.get_world_size()} ranks")
    config.device = torch.device("cpu")
    return config


@contextmanager
def _picture(unet: Unet) -> Iterator[Workload]:
    unet.model.set_counter(0)
    try:
        yield unet.work
    finally:
        unet.comm.clear()  # what is still under way would travel in another's turn

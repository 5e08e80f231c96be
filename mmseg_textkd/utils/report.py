# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Costs of networks, description of the machine, and tables."""
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterable, Mapping, NamedTuple, Sequence

import mmcv
import mmengine
import mmseg
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..version import __version__


class Cost(NamedTuple):
    """Size of a network.

    Attributes:
        params (int): Number of parameters.
        flops (int): Multiplications and additions of convolutions and matrix
            products, attention included, as PyTorch's ``FlopCounterMode`` has
            them; twice the multiply-accumulates.
    """
    params: int
    flops: int


def count_params(*modules: nn.Module) -> int:
    """Count the parameters of modules, frozen ones too.

    Args:
        *modules (nn.Module): The modules.

    Returns:
        int: Their number.
    """
    return sum(p.numel() for module in modules for p in module.parameters())


@torch.no_grad()
def flops_by_module(run: Callable[[], Any]) -> Dict[str, int]:
    """Count the floating-point operations of each module.

    Args:
        run (Callable): Runs a network once.

    Returns:
        dict[str, int]: FLOPs by the name of the module, which begins with the
        class of the network; all together by the name 'Global'.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return {
        name: sum(flops.values())
        for name, flops in counter.get_flop_counts().items()
    }


def count_cost(model: nn.Module, run: Callable[[], Any]) -> Cost:
    """Count parameters and floating-point operations.

    Args:
        model (nn.Module): The network, whose parameters count.
        run (Callable): Runs it once.

    Returns:
        Cost: Both.
    """
    return Cost(count_params(model), flops_by_module(run).get('Global', 0))


def cpu_name() -> str:
    """Get the name of the CPU.

    Returns:
        str: Its model, or else its architecture.
    """
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [
        line.split(':', 1)[1].strip() for line in lines
        if line.startswith('model name')
    ]
    return names[0] if names else platform.processor() or platform.machine()


def environment(*libraries: ModuleType) -> Dict[str, Any]:
    """Describe hardware, software and date of a measurement.

    Args:
        *libraries (module): Further libraries whose versions matter.

    Returns:
        dict[str, Any]: Machine, versions, threads, date, and the load (mean
        number of running processes in the last minute) before the start.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {
        m.__name__: str(m.__version__)
        for m in (torch, mmengine, mmcv, mmseg)
    }
    versions['mmseg_textkd'] = __version__
    versions.update((m.__name__, str(m.__version__)) for m in libraries)
    return dict(
        date=datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
        cpu=cpu_name(),
        cores=os.cpu_count(),
        gpu=gpu,
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2),
        versions=dict(python=platform.python_version(), **versions))


def describe(where: Mapping[str, Any]) -> str:
    """Format :func:`environment` as a paragraph.

    Args:
        where (Mapping): As of :func:`environment`.

    Returns:
        str: The paragraph.
    """
    versions = ', '.join(f'{k} {v}' for k, v in where['versions'].items())
    gpu = f', {where["gpu"]}' if where['gpu'] else ''
    return (f'{where["date"]}; {where["cpu"]}, {where["cores"]} cores{gpu}, '
            f'{where["threads"]} threads, load {where["load"]} before the '
            f'start; {versions}.')


def table(header: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> str:
    """Format a Markdown table.

    Args:
        header (Sequence[str]): Titles of the columns.
        rows (Iterable[Sequence[str]]): The cells. Defaults to ().

    Returns:
        str: The table.
    """
    lines = (header, ['---'] * len(header), *rows)
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

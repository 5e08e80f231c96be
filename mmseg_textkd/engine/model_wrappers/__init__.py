# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .cpu_distributed_data_parallel import (CPUDistributedDataParallel,
                                            join_cpu_ranks)

__all__ = ['CPUDistributedDataParallel', 'join_cpu_ranks']

# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .stage_plan import StagePlan
from .stage_schedule import StageSchedule

__all__ = ['StagePlan', 'StageSchedule']

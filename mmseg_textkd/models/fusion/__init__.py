# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .context_aware_text import ContextAwareText
from .two_way_bridge import TwoWayBridge

__all__ = ['ContextAwareText', 'TwoWayBridge']

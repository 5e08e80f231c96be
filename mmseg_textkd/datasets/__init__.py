# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .camvid import CamVidDataset
from .check_labels import CheckLabels
from .hide_classes import HideClasses
from .labelmefacade import LabelMeFacadeDataset
from .load_16bit_annotations import Load16BitAnnotations
from .load_region_embeddings import LoadRegionEmbeddings
from .pack_region_inputs import PackRegionInputs
from .toy_scenes import ToyScenesDataset

__all__ = [
    'CamVidDataset', 'CheckLabels', 'HideClasses', 'LabelMeFacadeDataset',
    'Load16BitAnnotations', 'LoadRegionEmbeddings', 'PackRegionInputs',
    'ToyScenesDataset'
]

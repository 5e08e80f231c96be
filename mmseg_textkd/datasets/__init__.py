# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .balanced_dataset_sampler import BalancedDatasetSampler
from .camvid import CamVidDataset
from .check_labels import CheckLabels
from .coco_20i_episodes import COCO20iEpisodes
from .episode_labels import EpisodeLabels
from .fss1000_episodes import FSS1000Episodes
from .hide_classes import HideClasses
from .labelmefacade import LabelMeFacadeDataset
from .load_16bit_annotations import Load16BitAnnotations
from .load_region_embeddings import LoadRegionEmbeddings
from .multi_dataset import MultiDataset
from .pack_region_inputs import PackRegionInputs
from .pascal_5i_episodes import PASCAL5iEpisodes
from .toy_scenes import ToyScenesDataset
from .video_frames import VideoFramesDataset
from .vspw import VSPWDataset

__all__ = [
    'BalancedDatasetSampler', 'COCO20iEpisodes', 'CamVidDataset',
    'CheckLabels', 'EpisodeLabels', 'FSS1000Episodes', 'HideClasses',
    'LabelMeFacadeDataset', 'Load16BitAnnotations', 'LoadRegionEmbeddings',
    'MultiDataset', 'PASCAL5iEpisodes', 'PackRegionInputs', 'ToyScenesDataset',
    'VSPWDataset', 'VideoFramesDataset'
]

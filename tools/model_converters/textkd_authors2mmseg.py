# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, List, Tuple

import torch.nn.functional as F
from torch import Tensor

READERS = ('backbone.conv_avg.conv', 'backbone.arms.0.conv_layer.conv',
           'decode_head.convs.0.conv')


def convert(state):
    new = {}
    dropped = []
    widths = {
        'backbone.conv_avg.conv': 1024,
        'backbone.arms.0.conv_layer.conv': 1024,
        'decode_head.convs.0.conv': 256
    }
    for k, v in state.items():
        if k == 'backbone.text_embeddings':
            new['score_map.text.class_embeddings'] = F.normalize(v, dim=1)
            continue
        name = k[:-len('.weight')]
        if k.endswith(
                '.weight') and name in widths and v.shape[1] > widths[name]:
            new[k] = v[:, :widths[name]]
            new[f'score_map.convs.{name.replace(".", "/")}.weight'] = v[:, widths[
                name]:]
            continue
        new[k] = v
    return new, dropped

_base_ = [
    '../stock/stdc1_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/text/toyclip_toy_scenes.py'
]
model = dict(
    type='TextKD',
    score_map=dict(
        in_channels=1024, projection=True, text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

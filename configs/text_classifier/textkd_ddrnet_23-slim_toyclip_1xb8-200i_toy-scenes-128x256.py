_base_ = [
    '../stock/ddrnet_23-slim_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/text/toyclip_toy_scenes.py'
]
model = dict(decode_head=dict(type='TextDDRHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

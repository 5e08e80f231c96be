_base_ = [
    '../stock/bisenetv2_fcn_1xb8-200i_toy-scenes-128x256.py',
    '../_base_/text/toyclip_toy_scenes.py'
]
model = dict(decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

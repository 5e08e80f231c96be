_base_ = [
    './bisenetv2_fcn_1xb8-200i_toy-scenes-coarse-fine-128x256.py',
    '../_base_/text/toyclip_toy_scenes-coarse-fine.py'
]
model = dict(
    type='MultiDatasetEncoderDecoder',
    decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

_base_ = [
    './bisenetv2_fcn_1xb8-10k_camvid-labelmefacade-360x480.py',
    '../_base_/text/vit-b16_camvid-labelmefacade.py'
]
model = dict(
    type='MultiDatasetEncoderDecoder',
    decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

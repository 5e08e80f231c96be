_base_ = [
    '../stock/bisenetv2_fcn_4xb4-40k_voc12aug-512x512.py',
    '../_base_/text/vit-b16_voc12.py'
]
model = dict(decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

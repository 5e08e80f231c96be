_base_ = [
    '../stock/erfnet_fcn_1xb8-10k_camvid-360x480.py',
    '../_base_/text/vit-b16_camvid.py'
]
model = dict(decode_head=dict(type='TextFCNHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

_base_ = [
    '../stock/ddrnet_23_in1k-pre_1xb8-10k_camvid-360x480.py',
    '../_base_/text/vit-b16_camvid.py'
]
model = dict(decode_head=dict(type='TextDDRHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

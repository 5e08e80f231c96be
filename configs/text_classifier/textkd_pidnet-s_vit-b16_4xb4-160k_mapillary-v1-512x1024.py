_base_ = [
    '../stock/pidnet-s_4xb4-160k_mapillary-v1-512x1024.py',
    '../_base_/text/vit-b16_mapillary_v1.py'
]
model = dict(decode_head=dict(type='TextPIDHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

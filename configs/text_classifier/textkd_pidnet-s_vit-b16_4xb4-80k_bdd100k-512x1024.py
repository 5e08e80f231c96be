_base_ = [
    '../stock/pidnet-s_4xb4-80k_bdd100k-512x1024.py',
    '../_base_/text/vit-b16_bdd100k.py'
]
model = dict(decode_head=dict(type='TextPIDHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

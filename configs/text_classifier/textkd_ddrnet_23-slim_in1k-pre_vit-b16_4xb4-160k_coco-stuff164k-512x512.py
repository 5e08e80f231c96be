_base_ = [
    '../stock/ddrnet_23-slim_in1k-pre_4xb4-160k_coco-stuff164k-512x512.py',
    '../_base_/text/vit-b16_coco_stuff.py'
]
model = dict(decode_head=dict(type='TextDDRHead', text=_base_.text_provider))
optim_wrapper = dict(paramwise_cfg=_base_.text_paramwise)

_base_ = [
    '../stock/stdc1_in1k-pre_1xb12-160k_cityscapes-768x1536.py',
    '../_base_/text/rn50-score-map_cityscapes.py'
]
model = dict(
    type='TextKD',
    score_map=dict(in_channels=1024, init='kaiming', text=_base_.text_fixed))

_base_ = [
    '../stock/stdc2_in1k-pre_1xb16-10k_camvid-720x960.py',
    '../_base_/text/rn50-score-map_camvid.py'
]
model = dict(
    type='TextKD',
    score_map=dict(in_channels=1024, init='kaiming', text=_base_.text_fixed))

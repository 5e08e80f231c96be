# The first form of TextKD's authors: the decode head's own classifier gives an
# embedding, whose cosines with the text, divided by 0.07, are the logits.
_base_ = [
    '../stock/stdc1_in1k-pre_1xb16-10k_camvid-720x960.py',
    '../_base_/text/rn50-score-map_camvid.py'
]
model = dict(
    decode_head=dict(
        type='TextFCNHead',
        text=_base_.text_fixed,
        text_branch=dict(
            norm='l2', scale=dict(init=1 /
                                  0.07, learnable=False), bias=False)))

# "DE": the score map joins the features before the decode head.
_base_ = './textkd_stdc1_in1k-pre_rn50-score-map_1xb16-10k_camvid-720x960.py'
model = dict(score_map=dict(convs=['decode_head.convs.0.conv']))

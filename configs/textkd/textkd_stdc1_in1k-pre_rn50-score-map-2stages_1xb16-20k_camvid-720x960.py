# Both stages in one run, each with the published schedule; stage 2 starts from
# the best checkpoint of stage 1.
_base_ = [
    '../stock/stdc1_in1k-pre_1xb16-20k_camvid-720x960.py',
    '../_base_/text/rn50-score-map_camvid.py',
    '../_base_/text/published_stage2.py'
]
model = dict(
    type='TextKD',
    score_map=dict(in_channels=1024, init='kaiming', text=_base_.text_learned))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'.text.': dict(decay_mult=0.)}))
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 10000
custom_hooks = _base_.text_two_stage_hooks

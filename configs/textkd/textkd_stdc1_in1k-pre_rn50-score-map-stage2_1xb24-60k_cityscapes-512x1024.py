# Stage 2, a run of its own from the best checkpoint of stage 1:
# `--cfg-options load_from=...`.
_base_ = [
    './textkd_stdc1_in1k-pre_rn50-score-map_1xb24-60k_cityscapes-512x1024.py',
    '../_base_/text/published_stage2.py'
]
model = dict(score_map=dict(text=dict(_delete_=True, **_base_.text_learned)))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'.text.': dict(decay_mult=0.)}))
custom_hooks = _base_.text_stage2_hooks

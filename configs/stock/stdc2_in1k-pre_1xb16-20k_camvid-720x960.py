# As long as both stages of TextKD.
_base_ = './stdc2_in1k-pre_1xb16-10k_camvid-720x960.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 20000
train_cfg = dict(max_iters=20000)

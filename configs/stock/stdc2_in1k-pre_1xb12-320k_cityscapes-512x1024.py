# As long as both stages of TextKD.
_base_ = './stdc2_in1k-pre_1xb12-160k_cityscapes-512x1024.py'
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 320000
train_cfg = dict(max_iters=320000)

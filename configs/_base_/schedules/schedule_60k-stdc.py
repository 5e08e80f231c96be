_base_ = './schedule_10k-stdc.py'
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 1001
param_scheduler[1].end = 60000
train_cfg = dict(max_iters=60000, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))

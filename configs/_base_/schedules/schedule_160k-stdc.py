_base_ = './schedule_10k-stdc.py'
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 1001
param_scheduler[1].end = 160000
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))

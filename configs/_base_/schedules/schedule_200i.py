_base_ = './schedule_10k.py'
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 20
param_scheduler[1].begin = 20
param_scheduler[1].end = 200
train_cfg = dict(max_iters=200, val_interval=200)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))

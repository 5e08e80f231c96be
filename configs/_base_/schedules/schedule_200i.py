_base_ = './schedule_10k.py'
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, start_factor=0.1, begin=0, end=20),
    dict(
        type='PolyLR',
        eta_min=0.,
        power=0.9,
        begin=20,
        end=200,
        by_epoch=False)
]
train_cfg = dict(max_iters=200, val_interval=200)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))

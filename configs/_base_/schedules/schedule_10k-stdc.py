# How TextKD's authors optimize STDC: the trunk at a tenth of the rate, no decay
# of norms, and 200 iterations of warm-up from almost 0, which multiply the
# polynomial.
_base_ = './schedule_10k.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0005),
    paramwise_cfg=dict(custom_keys={
        'backbone.backbone': dict(lr_mult=0.1),
        '.bn.': dict(decay_mult=0.)
    }))
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, start_factor=1e-5, begin=0, end=201),
    dict(
        type='PolyLR',
        eta_min=1e-6,
        power=0.9,
        begin=0,
        end=10000,
        by_epoch=False)
]

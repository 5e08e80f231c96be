# What every text config shares, whatever the network and the data.
# Prompts and scales are not decayed; `.text.` matches the text provider of
# either role.
text_paramwise = dict(custom_keys={
    '.text.': dict(decay_mult=0.),
    'log_scale': dict(decay_mult=0.)
})
# The same where the stock config lets its head learn at ten times the rate.
text_paramwise_x10 = dict(
    custom_keys={
        '.text.': dict(lr_mult=10., decay_mult=0.),
        'log_scale': dict(lr_mult=10., decay_mult=0.)
    })
# The hook freezes parameters after the model has been wrapped for DDP.
find_unused_parameters = True
custom_hooks = [
    dict(
        type='PromptLearnerHook',
        switch_at=0.9,
        param_scheduler=dict(type='CosineAnnealingLR', eta_min=0.))
]
# For the role 'auxiliary', where the text is not deployed: with the network
# frozen, stage 2 would change nothing that is.
auxiliary_hooks = [
    dict(
        type='PromptLearnerHook',
        switch_at=0.9,
        learn={
            r'\.text\.': 1.0,
            'log_scale': 1.0,
            '.': 0.1
        },
        param_scheduler=dict(type='CosineAnnealingLR', eta_min=0.))
]

# Stage 2 as published for TextKD: all but the trunk learns.
find_unused_parameters = True
# As a run of its own, by its own schedule, with `load_from`.
text_stage2_hooks = [
    dict(
        type='PromptLearnerHook',
        switch_at=0,
        learn={
            r'^backbone\.backbone\.': 0.,
            '.': 1.
        },
        # As theirs: the statistics of the trunk go on moving.
        freeze_norm=False)
]
# In one run, as long as stage 1: from its best checkpoint (set `save_best`),
# with a warm-up and a schedule of its own.
text_two_stage_hooks = [
    dict(
        type='PromptLearnerHook',
        switch_at=0.5,
        load_best=True,
        learn={
            r'^backbone\.backbone\.': 0.,
            '.': 1.
        },
        freeze_norm=False,
        param_scheduler=[
            dict(type='LinearLR', start_factor=1e-5, end=201),
            dict(type='PolyLR', power=0.9, eta_min=1e-6)
        ])
]

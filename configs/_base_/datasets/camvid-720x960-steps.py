# As TextKD's authors trained: nine sizes, in steps of a quarter.
_base_ = './camvid-720x960.py'
train_pipeline = _base_.train_pipeline
train_pipeline[3] = dict(
    type='RandomChoiceResize',
    scales=[(240 * k, 180 * k) for k in range(2, 11)],  # width, height
    keep_ratio=True)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

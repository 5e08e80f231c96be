# The same at three quarters of the resolution.
_base_ = './cityscapes-512x1024-steps.py'
train_pipeline = _base_.train_pipeline
train_pipeline[3].crop_size = (768, 1536)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (1536, 768)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# CamVid in full resolution, as papers on real-time networks use it.
# The same folders as for 360x480, with images and label maps of 960x720.
_base_ = './camvid-360x480.py'
img_scale = (960, 720)  # width, height
crop_size = (720, 960)  # height, width
train_pipeline = _base_.train_pipeline
train_pipeline[3].scale = img_scale
train_pipeline[4].crop_size = crop_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = img_scale
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

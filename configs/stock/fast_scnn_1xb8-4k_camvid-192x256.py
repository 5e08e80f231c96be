_base_ = './fast_scnn_1xb8-10k_camvid-360x480.py'
# Small crops of the same images: an iteration takes a third of the time.
crop_size = (192, 256)
train_pipeline = [
    dict(step, crop_size=crop_size) if step['type'] == 'RandomCrop' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
# All losses on the softmax, as a teacher's logits are meant; the stock ones
# are on a sigmoid for each class.
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(loss_decode=dict(use_sigmoid=False)),
    auxiliary_head=[
        dict(head, loss_decode=dict(head['loss_decode'], use_sigmoid=False))
        for head in _base_.model['auxiliary_head']
    ])
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 200
param_scheduler[1].begin = 200
param_scheduler[1].end = 4000
train_cfg = dict(max_iters=4000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=200, save_best=None))

_base_ = './cgnet_fcn_1xb8-10k_camvid-360x480.py'
# Fine-tunes the weights that CGNet's author published, which were trained on
# train + val: only test says anything. They saw RGB with these means. From
# https://github.com/wutianyiRosun/CGNet, keys renamed to MMSegmentation's.
load_from = 'data/cgnet_camvid11_trainval_mmseg.pth'
model = dict(
    data_preprocessor=dict(mean=[105.658, 103.33, 99.625], std=[1., 1., 1.]))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='PolyLR', eta_min=0., power=0.9, end=100, by_epoch=False)
]
train_cfg = dict(max_iters=100, val_interval=100)
default_hooks = dict(
    checkpoint=dict(interval=20, max_keep_ckpts=1, save_best=None))

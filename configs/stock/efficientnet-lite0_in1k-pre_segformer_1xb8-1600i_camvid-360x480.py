_base_ = [
    '../_base_/datasets/camvid-360x480.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_10k.py'
]
# MMSegmentation's TIMMBackbone, which needs timm, with SegFormer's head, which
# is light, on the features at strides 8, 16 and 32. Make the weights with
#   import timm, torch
#   net = timm.create_model('tf_efficientnet_lite0', pretrained=True,
#                           features_only=True)
#   state = {f'timm_model.{k}': v for k, v in net.state_dict().items()}
#   torch.save(state, 'data/tf_efficientnet_lite0_in1k.pth')
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    num_classes=11,
    size=(360, 480))
model['data_preprocessor'].update(mean=[127.] * 3, std=[128.] * 3)
model['backbone'] = dict(
    type='TIMMBackbone',
    model_name='tf_efficientnet_lite0',
    features_only=True,
    pretrained=False,
    out_indices=[2, 3, 4],
    init_cfg=dict(
        type='Pretrained', checkpoint='data/tf_efficientnet_lite0_in1k.pth'))
model['decode_head'].update(
    in_channels=[40, 112, 320], in_index=[0, 1, 2], channels=128)
optim_wrapper['optimizer']['lr'] = 1e-3
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, start_factor=0.1, begin=0, end=80),
    dict(
        type='PolyLR',
        eta_min=0.,
        power=0.9,
        begin=80,
        end=1600,
        by_epoch=False)
]
train_cfg = dict(max_iters=1600, val_interval=200)
default_hooks = dict(checkpoint=dict(interval=200, save_best=None))

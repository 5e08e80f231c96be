_base_ = [
    '../_base_/datasets/camvid-360x480.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_10k.py'
]
model, optim_wrapper = __import__('mmseg_textkd').stock_network(
    'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py',
    num_classes=11,
    size=(360, 480))
# The stock 0.12 is for batches of 32.
optim_wrapper['optimizer']['lr'] = 0.03

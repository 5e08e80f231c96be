# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text on every network that configs are shipped for.

Exported to ONNX or, where ``test_deploy/test_export.py`` does that,
to TorchScript.
"""
from each_case import each_case
from network_tester import CONFIGS, BaseNetworkTester, BaseSizeTester

from mmseg_textkd.deploy.export import to_torchscript

TORCHSCRIPT = dict(export=staticmethod(to_torchscript))
BLOCK, BLOCKS = dict(num_branch_blocks=1), dict(num_blocks=(2, 2))
LAYERS = dict(
    enc_stage_non_bottlenecks=(1, 2), enc_non_bottleneck_dilations=(2, 4))
# The fixed weights by which the stock boundary head joins its targets.
KERNEL = dict(idle={'auxiliary_head.2.fusion_kernel'})
POOLED = dict(onnx_size=(192, 384))
# Text head, name in the configs, and what it overrides of the tester.
NETWORKS = dict(
    BiSeNetV1=('FCN', 'bisenetv1_r18-d32-in1k-pre', {}),
    BiSeNetV2=('FCN', 'bisenetv2_fcn', {}),
    STDC1=('FCN', 'stdc1_in1k-pre', KERNEL),
    DDRNet23Slim=('DDR', 'ddrnet_23-slim_in1k-pre', {}),
    PIDNetS=('PID', 'pidnet-s', dict(shallow=BLOCK)),
    FastSCNN=('DepthwiseSeparableFCN', 'fast_scnn', POOLED | TORCHSCRIPT),
    ICNet=('FCN', 'icnet_r18-d8-in1k-pre', POOLED),
    CGNet=('FCN', 'cgnet_fcn', dict(shallow=BLOCKS)),
    ERFNet=('FCN', 'erfnet_fcn', dict(shallow=LAYERS)),
    SegFormer=('Segformer', 'segformer_mit-b0',
               dict(shallow=dict(num_layers=[1] * 4))),
    SegNeXt=('LightHam', 'segnext_mscan-t',
             dict(shallow=dict(depths=[1] * 4), **TORCHSCRIPT)))
SIZES = dict(
    STDC2=('FCN', 'stdc2_in1k-pre', KERNEL),
    DDRNet23=('DDR', 'ddrnet_23_in1k-pre', {}),
    PIDNetM=('PID', 'pidnet-m', {}),
    PIDNetL=('PID', 'pidnet-l', {}))

for name, (head, network, more) in {**NETWORKS, **SIZES}.items():
    base = BaseNetworkTester if name in NETWORKS else BaseSizeTester
    names = dict(head=f'Text{head}Head', network=network)
    globals()[f'Test{name}'] = type(f'Test{name}', (base, ), names | more)
TESTERS = [
    thing for name, thing in globals().items() if name.startswith('Test')
]


def test_every_network_has_its_tester():
    found = [tester.main_config() for tester in TESTERS]
    expected = (CONFIGS / 'text_classifier').glob('*cityscapes*.py')
    assert sorted(found) == sorted(expected) and len(found) == 15


# Of each text head one.
BY_HEAD = {
    t.head: t
    for t in TESTERS[::-1] if issubclass(t, BaseNetworkTester)
}


@each_case('tester', BY_HEAD.values())
def test_auxiliary_role_goes_through_both_stages(tmp_path, tester):
    tester().check_stages(tmp_path, 'auxiliary')

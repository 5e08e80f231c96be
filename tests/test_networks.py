# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text on every network that configs are shipped for.

Exported to ONNX or, where ``test_deploy/test_export.py`` does that,
to TorchScript.
"""
from each_case import each_case
from network_tester import CONFIGS, BaseNetworkTester, BaseSizeTester

from mmseg_textkd.deploy.export import to_torchscript


class TestBiSeNetV1(BaseNetworkTester):
    network = 'bisenetv1_r18-d32-in1k-pre'
    head = 'TextFCNHead'


class TestBiSeNetV2(BaseNetworkTester):
    network = 'bisenetv2_fcn'
    head = 'TextFCNHead'


class TestSTDC1(BaseNetworkTester):
    network = 'stdc1_in1k-pre'
    head = 'TextFCNHead'
    # The fixed weights by which the stock boundary head joins its targets.
    idle = {'auxiliary_head.2.fusion_kernel'}


class TestSTDC2(BaseSizeTester):
    network = 'stdc2_in1k-pre'
    head = 'TextFCNHead'
    idle = TestSTDC1.idle


class TestDDRNet23Slim(BaseNetworkTester):
    network = 'ddrnet_23-slim_in1k-pre'
    head = 'TextDDRHead'


class TestDDRNet23(BaseSizeTester):
    network = 'ddrnet_23_in1k-pre'
    head = 'TextDDRHead'


class TestPIDNetS(BaseNetworkTester):
    network = 'pidnet-s'
    head = 'TextPIDHead'
    shallow = dict(num_branch_blocks=1)


class TestPIDNetM(BaseSizeTester):
    network = 'pidnet-m'
    head = 'TextPIDHead'


class TestPIDNetL(BaseSizeTester):
    network = 'pidnet-l'
    head = 'TextPIDHead'


class TestFastSCNN(BaseNetworkTester):
    network = 'fast_scnn'
    head = 'TextDepthwiseSeparableFCNHead'
    export = staticmethod(to_torchscript)
    onnx_size = (192, 384)


class TestICNet(BaseNetworkTester):
    network = 'icnet_r18-d8-in1k-pre'
    head = 'TextFCNHead'
    onnx_size = (192, 384)


class TestCGNet(BaseNetworkTester):
    network = 'cgnet_fcn'
    head = 'TextFCNHead'
    shallow = dict(num_blocks=(2, 2))


class TestERFNet(BaseNetworkTester):
    network = 'erfnet_fcn'
    head = 'TextFCNHead'
    shallow = dict(
        enc_stage_non_bottlenecks=(1, 2), enc_non_bottleneck_dilations=(2, 4))


class TestSegFormer(BaseNetworkTester):
    network = 'segformer_mit-b0'
    head = 'TextSegformerHead'
    shallow = dict(num_layers=[1, 1, 1, 1])


class TestSegNeXt(BaseNetworkTester):
    network = 'segnext_mscan-t'
    head = 'TextLightHamHead'
    export = staticmethod(to_torchscript)
    shallow = dict(depths=[1, 1, 1, 1])

    def fix_random_numbers(self, model):
        # The head draws the bases of its matrix decomposition anew each time,
        # or once and for all.
        model.decode_head.hamburger.ham.rand_init = False
        self.logits(model, self.size)


TESTERS = [
    thing for name, thing in globals().items() if name.startswith('Test')
]


def test_every_network_has_its_tester():
    found = [tester.main_config() for tester in TESTERS]
    expected = (CONFIGS / 'text_classifier').glob('*cityscapes*.py')
    assert sorted(found) == sorted(expected) and len(found) == 15


# Of each text head one.
@each_case('tester', {
    t.head: t
    for t in TESTERS[::-1] if issubclass(t, BaseNetworkTester)
}.values())
def test_auxiliary_role_goes_through_both_stages(tmp_path, tester):
    tester().check_stages(tmp_path, 'auxiliary')

# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text on every network that configs are shipped for."""
from network_tester import CONFIGS, BaseNetworkTester


class TestBiSeNetV1(BaseNetworkTester):
    network = 'bisenetv1_r18-d32-in1k-pre'
    head = 'TextFCNHead'


class TestBiSeNetV2(BaseNetworkTester):
    network = 'bisenetv2_fcn'
    head = 'TextFCNHead'
    num_configs = 10  # with ToyScenes and the control


class STDCTester(BaseNetworkTester):
    head = 'TextFCNHead'
    # The fixed weights by which the stock boundary head joins its targets.
    idle = {'auxiliary_head.2.fusion_kernel'}


class TestSTDC1(STDCTester):
    network = 'stdc1_in1k-pre'
    num_configs = 8


class TestSTDC2(STDCTester):
    network = 'stdc2_in1k-pre'


class TestDDRNet23Slim(BaseNetworkTester):
    network = 'ddrnet_23-slim_in1k-pre'
    head = 'TextDDRHead'
    num_configs = 9  # with ToyScenes


class TestDDRNet23(BaseNetworkTester):
    network = 'ddrnet_23_in1k-pre'
    head = 'TextDDRHead'


class TestPIDNetS(BaseNetworkTester):
    network = 'pidnet-s'
    head = 'TextPIDHead'
    num_configs = 8


class TestPIDNetM(BaseNetworkTester):
    network = 'pidnet-m'
    head = 'TextPIDHead'


class TestPIDNetL(BaseNetworkTester):
    network = 'pidnet-l'
    head = 'TextPIDHead'


class TestFastSCNN(BaseNetworkTester):
    network = 'fast_scnn'
    head = 'TextDepthwiseSeparableFCNHead'
    onnx_size = (192, 384)


class TestICNet(BaseNetworkTester):
    network = 'icnet_r18-d8-in1k-pre'
    head = 'TextFCNHead'
    onnx_size = (192, 384)


class TestCGNet(BaseNetworkTester):
    network = 'cgnet_fcn'
    head = 'TextFCNHead'


class TestERFNet(BaseNetworkTester):
    network = 'erfnet_fcn'
    head = 'TextFCNHead'


class TestSegFormer(BaseNetworkTester):
    network = 'segformer_mit-b0'
    head = 'TextSegformerHead'


class TestSegNeXt(BaseNetworkTester):
    network = 'segnext_mscan-t'
    head = 'TextLightHamHead'

    def fix_random_numbers(self, model):
        # The head draws the bases of its matrix decomposition anew each time,
        # or once and for all.
        model.decode_head.hamburger.ham.rand_init = False
        self.logits(model, self.size)


TESTERS = [
    thing for name, thing in globals().items() if name.startswith('Test')
]


def test_every_config_belongs_to_one_network():
    claimed = [path for tester in TESTERS for path in tester.configs()]
    assert sorted(claimed) == sorted((CONFIGS / 'textkd').glob('*.py'))
    assert len(TESTERS) == 15

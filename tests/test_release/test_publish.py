# Copyright (c) mmseg_textkd contributors. All rights reserved.
import io
import json
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from mmseg_textkd.deploy.publish import check_weights, read_log, serialize

META = dict(dataset_meta=dict(classes=('a', 'b')))


def test_log_is_read_up_to_the_checkpoint(stock, tmp_path):
    lines = [json.loads(x) for x in stock.log.read_text().splitlines()]
    values = [line['mIoU'] for line in lines if 'mIoU' in line]
    assert len(values) == 2 and values[0] != values[1]
    for iteration, number in ((10, 0), (15, 0), (20, 1), (None, 1)):
        found = read_log(stock.log, iteration)
        assert found['metrics']['mIoU'] == values[number]
        assert found['iter'] == (10, 20)[number]
    with pytest.raises(ValueError, match='no validation.*iteration 9'):
        read_log(stock.log, 9)


def test_only_plain_meta_and_own_memory():
    whole = torch.arange(1e5)
    data = serialize(dict(a=whole[:3]), META)
    assert len(data) < 3000
    with ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
    with pytest.raises(ValueError, match='more than text and numbers'):
        serialize(dict(a=whole), dict(META, path=Path('a')))
    # torch's version only looks like text.
    with pytest.raises(ValueError, match='TorchVersion'):
        serialize(dict(a=whole), dict(META, torch=torch.__version__))
    check_weights(Path('a.pth'), dict(a=torch.zeros(1, dtype=int)), META)

# Copyright (c) mmseg_textkd contributors. All rights reserved.
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmseg.registry import MODELS
from processes import TOOLS, full_disk, load
from tiny import CLASSES, assert_equal, save_weights
from tool_modules import call, load_tool

from mmseg_textkd.deploy.publish import check_weights, read_log, serialize

TOOL = f'{TOOLS}/model_converters/publish_model.py'
META = dict(dataset_meta=dict(classes=CLASSES))


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    return folder


def publish(tool, *args):
    """Publish and return the path of the weights."""
    return tool.publish(tool.parse_args([str(arg) for arg in args]))


def fold(config, weights, out):
    call('model_converters/textkd2mmseg.py', config, weights, out, '--device',
         'cpu')
    return out, out.with_suffix('.py')


def read(path):
    return torch.load(path, weights_only=True)


def refuse(tool, out, match, *args):
    """Expect a message and nothing written."""
    with pytest.raises(SystemExit, match=match):
        call(tool, *args)
    assert not list(out.iterdir())


def test_log_is_read_up_to_the_checkpoint(stock):
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
    # torch's version only looks like text.
    for value, message in ((Path('a'), 'more than text and numbers'),
                           (torch.__version__, 'TorchVersion')):
        with pytest.raises(ValueError, match=message):
            serialize(dict(a=whole), dict(META, more=value))
    # An own name that ends in a date is not that of a published file.
    for name in ('a.pth', 'camvid-20240115.pth'):
        check_weights(Path(name), dict(a=torch.zeros(1, dtype=int)), META)


@pytest.mark.stacks
def test_published_file(tool, stock, out):
    path = publish(tool, stock.checkpoint(20), out, '--config', stock.config,
                   '--log', stock.log)
    source = load(stock.checkpoint(20))
    date = source['meta']['time']
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert re.fullmatch(r'\d{8}_\d{6}', date)
    assert path.name == f'tiny_1xb2_{date}-{sha}.pth'
    names = {path.name, f'{path.stem}.md', f'tiny_1xb2_{date}.json'}
    assert {p.name for p in out.iterdir()} == names

    # In a process that has never heard of the plugin.
    code = ('import sys, torch; torch.load(sys.argv[1], weights_only=True); '
            'assert "mmengine" not in sys.modules')
    subprocess.run([sys.executable, '-I', '-c', code, path], check=True)
    got = read(path)
    assert list(got) == ['state_dict', 'meta'] and len(source) > 2
    assert got['meta']['dataset_meta'] == source['meta']['dataset_meta']
    assert got['meta']['cfg'] == Config.fromfile(stock.config).pretty_text
    assert got['meta']['published_with']['torch'] == torch.__version__
    assert path.stat().st_size < .7 * stock.checkpoint(20).stat().st_size

    model = MODELS.build(Config.fromfile(stock.config).model)
    model.load_state_dict(got['state_dict'], strict=True)

    # The index accepts the name.
    index = load_tool('analysis_tools/model_index.py')
    cell = f'[model](https://a.b/{path.name}) \\| [log](https://a.b/c.json)'
    assert index.DOWNLOAD.fullmatch(cell)['name'] == 'tiny_1xb2'

    # The log, whose last line is the validation of the last iteration.
    log = out / f'tiny_1xb2_{date}.json'
    assert log.read_bytes() == stock.log.read_bytes()
    last = json.loads(stock.log.read_text().splitlines()[-1])
    metrics = {k: last[k] for k in ('aAcc', 'mIoU', 'mAcc')}
    found = dict(file=log.name, iter=20, metrics=metrics)
    assert got['meta']['training_log'] == found


def test_config_in_the_file_is_ours(tool, stock, out):
    foreign, source = load(stock.checkpoint(20)), out / 'foreign.pth'
    foreign['meta'].update(cfg='raise SystemExit', config='raise SystemExit')
    torch.save(foreign, source)
    path = publish(tool, source, out / 'a', '--config', stock.config)
    meta = read(path)['meta']
    assert meta['cfg'] == Config.fromfile(stock.config).pretty_text
    assert 'config' not in meta
    path = publish(tool, source, out / 'b')
    assert 'cfg' not in read(path)['meta']
    card = path.with_suffix('.md').read_text()
    assert 'The whole config is not in the file.' in card


def test_weights_are_the_averaged_ones(tool, stock, out):
    hook, = (h for h in stock.runner.hooks if type(h).__name__ == 'EMAHook')
    averaged = hook.ema_model.module.state_dict()
    plain = stock.runner.model.state_dict()
    name = 'decode_head.conv_seg.weight'
    assert not torch.equal(averaged[name], plain[name])
    path = publish(tool, stock.checkpoint(20), out, '--config', stock.config)
    assert_equal(dict(read(path)['state_dict']), dict(averaged))


def test_model_card(tool, stock, out):
    path = publish(tool, stock.checkpoint(20), out / 'my_net', '--config',
                   stock.config, '--log', stock.log)
    card = path.with_suffix('.md').read_text()
    model = stock.runner.model
    last = json.loads(stock.log.read_text().splitlines()[-1])
    for words in ('# my_net\n', hashlib.sha256(path.read_bytes()).hexdigest(),
                  f'| {sum(p.numel() for p in model.parameters()):,} |',
                  f'{path.stat().st_size:,} bytes', ', '.join(CLASSES),
                  '| iterations | 20 |', '| batch on each device | 2 |',
                  '| crop | 32x64 |', '| random seed | 0 |',
                  f'mIoU {last["mIoU"]:.2f}',
                  'Spread over seeds: not measured',
                  'network of `tiny_1xb2.py`', 'Folded from: not recorded'):
        assert words in card
    assert not re.search(r'\{\w*\}', card)


def test_same_input_gives_the_same_file(tool, stock, tmp_path, out):
    args = '--config', stock.config
    first = publish(tool, stock.checkpoint(20), out, *args)
    other = tmp_path / 'other'
    other.mkdir()
    second = publish(tool, stock.checkpoint(20), other, *args)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    first.with_suffix('.md').write_text('completed by hand')
    with pytest.raises(ValueError, match='exists; remove it'):
        publish(tool, stock.checkpoint(20), out, *args)
    assert first.with_suffix('.md').read_text() == 'completed by hand'
    # A published file can be published again, but not one that was changed.
    again = publish(tool, first, other / 'again', *args)
    assert again.name == first.name.replace('tiny_1xb2', 'again')
    renamed = first.with_name(first.name.replace(first.stem[-8:], '0' * 8))
    first.rename(renamed)
    with pytest.raises(ValueError, match='not the file that was published'):
        publish(tool, renamed, out / 'again')


def test_text_is_folded_first(tool, text, out, tmp_path):
    weights = text.checkpoint(2)
    refuse(tool, out, r'text in it.*class_embeddings.*textkd2mmseg\.py',
           weights, out, '--config', text.config)
    path = publish(tool, weights, out, '--config', text.config, '--keep-text')
    assert 'needs mmseg_textkd' in path.with_suffix('.md').read_text()

    folded, config = fold(text.config, weights, tmp_path / 'folded.pth')
    target = tmp_path / 'release'
    target.mkdir()
    path = publish(tool, folded, target / 'textkd_tiny', '--config', config)
    got = read(path)
    assert not [key for key in got['state_dict'] if '.text.' in key]
    assert got['meta']['cfg'] == config.read_text()
    card = path.with_suffix('.md').read_text()
    assert 'Folded from: iter_2.pth' in card and 'parameters,' in card
    # The text config is not that of the folded weights.
    with pytest.raises(ValueError, match='not of the network of the config'):
        publish(tool, folded, tmp_path / 'new', '--config', text.config)


def test_distillation_is_over(tool, stock, out, tmp_path):
    cfg = Config.fromfile(stock.config)
    cfg.model.type = 'DistilledEncoderDecoder'
    cfg.model.teacher = dict(
        config=str(stock.config), checkpoint=str(stock.checkpoint(20)))
    config, weights = tmp_path / 'tiny-kd_1xb2.py', stock.checkpoint(20)
    cfg.dump(config)
    for more in ((), ('--keep-text', )):
        refuse(tool, out, r'tiny-kd_1xb2\.py has a teacher.*textkd2mmseg\.py',
               weights, out, '--config', config, *more)
    folded, config = fold(config, weights, tmp_path / 'folded.pth')
    assert Config.fromfile(config).model.type == 'EncoderDecoder'
    path = publish(tool, folded, out / 'tiny-kd_1xb2', '--config', config)
    got, source = read(path), load(weights)
    assert got['state_dict'].keys() == source['state_dict'].keys()
    assert 'Distilled' not in got['meta']['cfg']


def test_card_says_what_needs_the_plugin(tool, text, out):
    # No text in it, but a module of ours: a kept l2 norm.
    cfg = Config.fromfile(text.config)
    head = dict(cfg.model.decode_head, type='FCNHead')
    head.pop('text')
    cfg.model.decode_head = dict(type='L2ConvSegHead', head=head, dim=8)
    config = out.parent / 'tiny-l2_1xb2.py'
    cfg.custom_imports = dict(imports=['mmseg_textkd.deploy'])
    cfg.dump(config)
    weights = save_weights(out.parent / 'l2.pth', MODELS.build(cfg.model))
    path = publish(tool, weights, out, '--config', config)
    assert ('| text in it | no, but the network needs mmseg_textkd |'
            in path.with_suffix('.md').read_text())


@each_case('damage, match', [
    ('nan', 'NaN or infinite.*conv_seg.bias.*earlier checkpoint'),
    ('nameless', 'does not name its classes'),
    ('two names', 'names 2 classes, but the network of .* has 8'),
    ('truncated', 'no checkpoint, a damaged one'),
    ('other network', 'not of the network of the config'),
])
def test_bad_checkpoints_are_refused(tool, stock, tmp_path, out, damage,
                                     match):
    found, bad = load(stock.checkpoint(20)), tmp_path / 'bad.pth'
    state, names = found['state_dict'], found['meta']['dataset_meta']
    if damage == 'nan':
        state['decode_head.conv_seg.bias'][3] = float('nan')
    elif damage == 'nameless':
        del found['meta']['dataset_meta']
    elif damage == 'two names':
        names['classes'] = ('a', 'b')
    elif damage == 'other network':
        found['state_dict'] = dict(a=torch.zeros(1))
    torch.save(found, bad)
    if damage == 'truncated':
        bad.write_bytes(bad.read_bytes()[:-1000])
    refuse(tool, out, match, bad, out, '--config', stock.config)


def test_bad_arguments_are_refused(tool, stock, tmp_path, out, capsys):
    weights = stock.checkpoint(20)
    refuse(tool, out, 'missing.pth', tmp_path / 'missing.pth', out / 'a')
    refuse(tool, out, 'is no log', weights, out / 'a', '--log', stock.config)
    refuse(tool, out, '2', weights, out)
    assert 'give --config' in capsys.readouterr().err


def test_the_folder_is_made(tool, stock, tmp_path):
    words = stock.checkpoint(20), '--config', stock.config, '--out'
    for target, name in ((f'{tmp_path}/new/', stock.config.stem),
                         (tmp_path / 'other' / 'net', 'net')):
        found = publish(tool, *words, target)
        assert found.is_file() and found.name.startswith(f'{name}_')


def test_full_disk_leaves_nothing(tool, stock, out):
    """The card and the log still fit, the weights do not."""
    with full_disk(stock.log.stat().st_size + 5000):
        refuse(tool, out, 'cannot write to .*File too large.*Nothing was left',
               stock.checkpoint(20), out / 'net', '--log', stock.log)

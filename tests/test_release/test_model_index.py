# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""metafile.yaml and model-index.yml, and the tool that makes them."""
import os
import os.path as osp
import re
import shutil
from pathlib import Path

import pytest
import yaml
from network_tester import load_config, stock_twin
from processes import ROOT, start
from tool_modules import load_tool

TOOL = 'tools/analysis_tools/model_index.py'
README = 'configs/text_classifier/README.md'
STOCK = 'bisenetv2_fcn_1xb8-10k_camvid-360x480'
TEXT = 'textkd_bisenetv2_fcn_vit-b16_1xb8-10k_camvid-360x480'
URL = 'https://example.org/weights'
# Row of a network that has been measured and published.
WEIGHTS = f'{URL}/{TEXT}_20260102_030405-0123abcd.pth'
LOG = f'{URL}/{TEXT}_20260102_030405.json'
FIELDS = dict(crop='360x480', schedule='10000', memory='3.21', device='V100')
FIELDS.update(miou='71.2 ± 0.3', config=f'[config]({TEXT}.py)')
FIELDS.update(download=f'[model]({WEIGHTS}) \\| [log]({LOG})')
ROW = ('| BiSeNetV2 + text classifier | BiSeNetV2 | {crop} | {schedule} | '
       '{memory} | 55.1 | {device} | {miou} | 72.50 | {config} | {download} |')


def lint(root, *args):
    """Run the tool of a tree; returns its status and output."""
    return start('python', osp.join(root, TOOL), *args, cwd=root)


def models(root):
    """All entries, by name, as mim reads them."""
    found = {}
    index = yaml.safe_load((root / 'model-index.yml').read_text())
    files = {str(p.relative_to(root)) for p in root.glob('configs/*/meta*')}
    assert {*index['Import']} == files
    for path in index['Import']:
        meta = yaml.safe_load((root / path).read_text())
        known = {c['Name'] for c in meta['Collections']}
        for collection in meta['Collections']:
            assert (root / collection['README']).is_file()
            assert collection['Metadata']['Training Data']
        for model in meta['Models']:
            assert model['In Collection'] in known
            assert model['Name'] not in found
            # The config that the entry is named after lies beside it.
            assert (root / path).with_name(f'{model["Name"]}.py').is_file()
            assert (root / model['Config']).is_file()
            found[model['Name']] = model
    return found


@pytest.fixture
def tree(tmp_path):
    """A copy without documentation, as in an installed package."""
    ignore = shutil.ignore_patterns('__pycache__')
    for name in ('configs', 'tools'):
        shutil.copytree(f'{ROOT}/{name}', tmp_path / name, ignore=ignore)
    shutil.copy(f'{ROOT}/model-index.yml', tmp_path)
    return tmp_path


def edit(tree, fields, name=TEXT):
    """Put a row in the place of another; returns its line number."""
    path = tree / README
    lines = path.read_text().splitlines()
    number, = (i for i, line in enumerate(lines)
               if line.startswith('|') and f'{name}.py)' in line)
    lines[number] = ROW.format(**dict(FIELDS, **fields))
    path.write_text('\n'.join(lines) + '\n')
    return number + 1


def test_files_are_up_to_date():
    status, output = lint(ROOT, '--check')
    assert status == 0, output


def test_nothing_is_claimed_that_was_not_measured():
    folders = ('text_classifier textkd lseg ebseg fusion distillation '
               'structure diversification balance multi_dataset').split()
    pages = [Path(ROOT, 'configs', f, 'README.md') for f in folders]
    rows = [
        line.split('|')[1:-1] for page in pages
        for line in page.read_text().splitlines()
        if '[config](' in line and line.startswith('|')
    ]
    found = models(Path(ROOT))
    assert len(rows) == len(found) > 0
    for cells in rows:
        model = found[re.search(r'([^/(]+)\.py\)', cells[9])[1]]
        assert ('Results' in model) == (cells[7].strip() != '-')
        assert ('Weights' in model) == ('[model]' in cells[10])


def test_a_config_that_is_gone(tree):
    """Of a tree without documentation, as it is in an installed package."""
    assert lint(tree, '--check')[0] == 0
    os.remove(tree / 'configs' / 'stock' / f'{STOCK}.py')
    status, output = lint(tree, '--check')
    assert status == 1 and f'there is no ../stock/{STOCK}.py' in output


def test_round_trip_of_a_measured_row(tree):
    before = models(tree)
    edit(tree, {})
    status, output = lint(tree, '--check')
    assert status == 1
    assert 'text_classifier/metafile.yaml is out of date' in output
    assert models(tree) == before
    assert lint(tree)[0] == 0 and lint(tree, '--check')[0] == 0
    after = models(tree)
    old, got = before.pop(TEXT), after.pop(TEXT)
    assert after == before
    expected = yaml.safe_load(f'''
        Name: {TEXT}
        In Collection: Text classifier
        Config: configs/text_classifier/{TEXT}.py
        Metadata:
            Training Data: CamVid
            Batch Size: 8
            Architecture: [BiSeNetV2, text classifier]
        Framework: PyTorch''')
    assert old == expected
    # Folded weights run with the stock config.
    more = yaml.safe_load(f'''
        Config: configs/stock/{STOCK}.py
        Results:
            Task: Semantic Segmentation
            Dataset: CamVid
            Metrics: {{mIoU: 71.2, mIoU(ms+flip): 72.5}}
        Weights: {WEIGHTS}
        Training log: {LOG}''')
    expected['Metadata'] |= {'Training Resources': '1x V100'}
    expected['Metadata'] |= {'Memory (GB)': 3.21}
    assert got == expected | more


def test_weights_run_with_the_config_of_their_entry():
    index, root = load_tool('analysis_tools/model_index.py'), Path(ROOT)
    found = dict(stock=0, own=0)
    for readme in index.READMES:
        if readme == README:  # see above
            continue
        for row in index.read_rows(readme, (root / readme).read_text()):
            path = index.read_config(row, root)
            download = FIELDS['download'].replace(TEXT, path.stem)
            row = row._replace(cells=dict(row.cells, download=download))
            entry = index.model_entry(row, root)
            assert entry['Name'] == path.stem and 'Weights' in entry
            cfg = load_config(path)
            folds = path.parent.name not in ('lseg', 'ebseg')
            folds &= "'use': 'inference'" not in str(cfg.model.to_dict())
            folds &= cfg.model.type != 'TextKD'
            found['stock' if folds else 'own'] += 1
            if not folds:
                assert root / entry['Config'] == path
                continue
            # What they load into; test_configs.py compares the two.
            name = re.sub('-(kd|cwd)_', '_', path.name)
            twin = root / 'configs/stock' / name
            if path.parent.name == 'multi_dataset':
                name = re.sub('^textkd_|_vit-b16|_toyclip', '', name)
                twin = path.with_name(name)
            elif name == path.name:
                twin = stock_twin(path)
            assert root / entry['Config'] == twin
    assert found['stock'] > 14 and found['own'] > 4


FAULTS = [
    (dict(config='[config](no_1xb8-10k_camvid-360x480.py)'),
     'there is no no_1xb8-10k_camvid-360x480.py'),
    (dict(config='[config](../../tools/train.py)'),
     '.*train.py is not named as a config, or in none of the folders'),
    (dict(config='-'), r'config must be \[config\]\(PATH\)'),
    (dict(config=f'[config](../stock/{STOCK}.py)',
          download='-'), f'{STOCK} has two rows'),
    (dict(schedule='160000'), 'Lr schd is 160000, but .* says 10000'),
    (dict(crop='480x360'), 'Crop Size is 480x360, but .* says 360x480'),
    (dict(miou='about 71'), "mIoU is 'about 71'; write -, 71.2"),
    (dict(memory=''), r"Mem \(GB\) is ''"),
    (dict(download=FIELDS['download'].replace('abcd', 'abc')),
     'download is .*DATE-SHA8'),
    (dict(download=FIELDS['download'].replace('textkd_', '')),
     'download is .*DATE-SHA8'),
    (dict(device='V100 | 8'), '12 cells, not 11'),
]


def test_faults_are_named_with_their_place(tree):
    index, path = load_tool('analysis_tools/model_index.py'), tree / README
    text = path.read_text()
    for fields, message in FAULTS:
        path.write_text(text)
        number = edit(tree, fields)
        with pytest.raises(ValueError) as error:
            index.build(tree)
        said = str(error.value)
        assert re.search(f'^{README}:([0-9]+): {message}', said, re.M)
        assert f'{README}:{number}: ' in said or 'two rows' in message
    # Nothing is half-written.
    assert lint(tree)[0] == 1 and models(tree) == models(Path(ROOT))


def test_all_faults_at_once_and_other_columns(tree):
    first = edit(tree, dict(crop='1x1'))
    second = edit(tree, dict(crop='2x2'), STOCK)
    status, output = lint(tree)
    assert status == 1
    for number in (first, second):
        assert f'{README}:{number}: Crop Size' in output
    path = tree / README
    path.write_text(path.read_text().replace('| Mem (GB) |', '| Mem |'))
    message = f"{README}:[0-9]+: the columns must be .'Method'"
    assert re.search(message, lint(tree)[1])


def test_broken_link_in_the_readme(tree):
    (tree / 'docs').mkdir()
    status, output = lint(tree, '--check')
    assert status == 1
    assert re.search(f'{README}:[0-9]+: there is no ../../docs/', output)

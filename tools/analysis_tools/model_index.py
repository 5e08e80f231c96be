# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Write configs/*/metafile.yaml and model-index.yml, or check them.

They are made of the tables under "Results and models" in the READMEs of the
methods, in MMSegmentation's format, for `mim search` and `mim download`. What
is `-` there is left out. Works in a checkout and in an installed package.
"""
import argparse
import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

import yaml

HEADER = '''# Made by tools/analysis_tools/model_index.py of the tables in
# {}; not to be edited.
'''
ROOT = Path(__file__).resolve().parents[2]
# README -> folders of its configs -> names of their collections. The last
# folder is that of the method which the README is about.
READMES = {
    'configs/text_classifier/README.md': {
        'stock': 'Stock networks',
        'text_classifier': 'Text classifier'
    },
    'configs/textkd/README.md': {
        'textkd': 'TextKD'
    },
    'configs/lseg/README.md': {
        'lseg': 'LSeg'
    },
    'configs/balance/README.md': {
        'balance': 'Balance for unseen classes'
    },
    'configs/ebseg/README.md': {
        'ebseg': 'EBSeg'
    },
    'configs/distillation/README.md': {
        'distillation': 'Distillation'
    },
    'configs/structure/README.md': {
        'structure': 'Semantic structure loss'
    },
    'configs/diversification/README.md': {
        'diversification': 'Text diversification'
    },
    'configs/fusion/README.md': {
        'fusion': 'Fusion of image and text'
    },
    'configs/multi_dataset/README.md': {
        'multi_dataset': 'Several data sets through words'
    },
}
COLUMNS = [
    'Method', 'Backbone', 'Crop Size', 'Lr schd', 'Mem (GB)', 'Inf time (fps)',
    'Device', 'mIoU', 'mIoU(ms+flip)', 'config', 'download'
]
VALUES = ('mIoU', 'mIoU(ms+flip)', 'Mem (GB)', 'Inf time (fps)')
COLLECTIONS = {k: v for c in READMES.values() for k, v in c.items()}
NAME = re.compile(r'(?:(?:textkd|lseg)_)?(.+?)_(?P<gpus>\d+)xb(?P<batch>\d+)'
                  r'-(?P<number>\d+)(?P<unit>k|i)_.+-(?P<crop>\d+x\d+)')
# Trained with text that folds or with a teacher: deployed as a stock network.
# What is `-kept` or a score map does not fold.
STOCK_TWIN = re.compile(r'(?:textkd_(?P<text>.+)_(?!.*(?:score-map|cosine))'
                        r'[^_]+(?<!-kept)|'
                        r'(?P<peer>.+)-(?:kd|cwd))(?P<rest>_\d+xb\d+-.+)')
# A mean, and the spread over seeds.
VALUE = re.compile(r'(\d+(?:\.\d+)?)(?: ± \d+(?:\.\d+)?)?')
SEPARATOR = r' (?:\\\||&#124;) '
DOWNLOAD = re.compile(
    r'\[model\]\((?P<weights>\S+/(?P<name>[^/\s]+)'
    r'_\d{8}_\d{6}-[0-9a-f]{8}\.pth)\)'
    rf'(?:{SEPARATOR}\[text\]\((?P<text>\S+-[0-9a-f]{{8}}\.pth)\))?'
    rf'{SEPARATOR}\[log\]\((?P<log>\S+\.json)\)')
LINK = re.compile(r'\]\((?!\w+:|#)([^)#\s]+)')


class Row(NamedTuple):
    """A row of a table."""
    readme: str
    number: int
    dataset: str
    cells: Dict[str, str]

    def fault(self, text: str) -> ValueError:
        """An error that says where it is."""
        return ValueError(f'{self.readme}:{self.number}: {text}')


def read_rows(readme: str, text: str) -> Iterator[Row]:
    """Read the tables of models in a README."""
    dataset, inside = '', False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith('#'):
            dataset = line.lstrip('# ')
        cells = [c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]]
        row = Row(readme, number, dataset, dict(zip(COLUMNS, cells)))
        if 'config' in cells or not cells:
            inside = bool(cells)
            if inside and cells != COLUMNS:
                raise row.fault(f'the columns must be {COLUMNS}')
        elif inside and set(line) - set('|-: '):
            if len(cells) != len(COLUMNS):
                raise row.fault(f'{len(cells)} cells, not {len(COLUMNS)}')
            yield row


def read_value(row: Row, column: str) -> Optional[float]:
    """Read a measured value, None where there is none."""
    text = row.cells[column]
    match = VALUE.fullmatch(text)
    if match is None and text != '-':
        raise row.fault(f'{column} is {text!r}; write -, 71.2 or 71.2 ± 0.3')
    return float(match[1]) if match else None


def read_config(row: Row, root: Path) -> Path:
    """Get the config that a row links to, and check the row against it."""
    link = re.fullmatch(r'\[config\]\((\S+)\)', row.cells['config'])
    if link is None:
        raise row.fault('config must be [config](PATH)')
    path = (root / row.readme).parent.joinpath(link[1]).resolve()
    parts = NAME.fullmatch(path.stem)
    if parts is None or path.parent.name not in COLLECTIONS:
        raise row.fault(f'{link[1]} is not named as a config, or in none of '
                        f'the folders {sorted(COLLECTIONS)}')
    schedule = int(parts['number']) * (1000 if parts['unit'] == 'k' else 1)
    said = {'Crop Size': parts['crop'], 'Lr schd': str(schedule)}
    for column, expected in said.items():
        if row.cells[column] != expected:
            raise row.fault(f'{column} is {row.cells[column]}, but '
                            f'{path.stem} says {expected}')
    return path


def read_download(row: Row, name: str) -> Dict[str, str]:
    """Read where weights and log are."""
    text = row.cells['download']
    if text == '-':
        return {}
    match = DOWNLOAD.fullmatch(text)
    if match is None or match['name'] != name:
        raise row.fault(
            f'download is {text!r}; write - or [model](.../{name}_DATE-SHA8'
            '.pth) \\| [log](....json), between them, where the weights with '
            'text are released too, [text](....pth)')
    keys = {
        'Weights': 'weights',
        'Text Weights': 'text',
        'Training log': 'log'
    }
    # Paths are those below the root.
    return {
        key: re.sub(r'^(\.\./)+', '', match[part])
        for key, part in keys.items() if match[part]
    }


def model_entry(row: Row, root: Path) -> Dict[str, Any]:
    """Make the entry of a row."""
    path = read_config(row, root)
    name, collection = path.stem, COLLECTIONS[path.parent.name]
    parts = NAME.fullmatch(name)
    files = read_download(row, name)
    twin = STOCK_TWIN.fullmatch(name)
    if twin and files:
        # Published weights are folded: they load into the stock network, and
        # `mim download` puts this config beside them.
        stock = f'{twin["text"] or twin["peer"]}{twin["rest"]}.py'
        folder = path.parents[1] / 'stock'
        # Those of several data sets stand beside it.
        found = [p for p in (folder / stock, path.with_name(stock))
                 if p.is_file()]  # yapf: disable
        if not found:
            raise row.fault(f'folded weights run with configs/stock/{stock}, '
                            'which is missing')
        if 'Text Weights' in files:
            files['Text Config'] = f'configs/{path.parent.name}/{path.name}'
        path = found[0]
    values = {column: read_value(row, column) for column in VALUES}
    cells = row.cells
    # A set that keeps the order: BiSeNetV2 is a backbone and a method.
    names = dict.fromkeys([cells['Backbone'], *cells['Method'].split(' + ')])
    metadata = {
        'Training Data': row.dataset,
        'Batch Size': int(parts['gpus']) * int(parts['batch']),
        'Architecture': list(names)
    }
    if cells['Device'] != '-':
        metadata['Training Resources'] = f'{parts["gpus"]}x {cells["Device"]}'
    if values['Mem (GB)'] is not None:
        metadata['Memory (GB)'] = values['Mem (GB)']
    entry = {'Name': name, 'In Collection': collection}
    metrics = {
        k: v
        for k, v in values.items() if 'mIoU' in k and v is not None
    }
    if metrics:
        entry['Results'] = dict(
            Task='Semantic Segmentation', Dataset=row.dataset, Metrics=metrics)
    config = f'configs/{path.parent.name}/{path.name}'
    return dict(
        entry, Config=config, Metadata=metadata, **files, Framework='PyTorch')


def broken_links(readme: str, text: str, root: Path) -> List[str]:
    """Find links of a README that lead nowhere."""
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        for link in LINK.findall(line):
            # A wheel has configs, but neither documentation nor weights.
            known = not any(
                f'{folder}/' in link and not (root / folder).is_dir()
                for folder in ('docs', 'model_zoo'))
            if known and not (root / readme).parent.joinpath(link).exists():
                faults.append(f'{readme}:{number}: there is no {link}')
    return faults


def build(root: Path) -> Dict[str, str]:
    """Make all files, by their paths below the root.

    Raises:
        ValueError: With all that is wrong in the READMEs.
    """
    texts = {
        readme: (root / readme).read_text(encoding='utf-8')
        for readme in READMES
    }
    faults = [f for item in texts.items() for f in broken_links(*item, root)]
    models: Dict[str, Any] = {}
    rows = (row for item in texts.items() for row in read_rows(*item))
    for row in rows if not faults else ():
        try:
            entry = model_entry(row, root)
            if entry['Name'] in models:
                raise row.fault(f'{entry["Name"]} has two rows')
            models[entry['Name']] = entry
        except ValueError as fault:
            faults.append(str(fault))
    if faults:
        raise ValueError('\n'.join(faults))
    files: Dict[str, str] = {}
    for readme, folders in READMES.items():
        paper = re.search(r'^> \[(.+)\]\((\S+)\)$', texts[readme], re.M)
        for folder, name in folders.items():
            ours = [m for m in models.values() if m['In Collection'] == name]
            data = dict.fromkeys(m['Metadata']['Training Data'] for m in ours)
            if not data:  # mim cannot read an empty list
                raise ValueError(f'{readme}: no row is of configs/{folder}')
            collection = dict(
                Name=name,
                License='Apache License 2.0',
                Metadata={'Training Data': list(data)},
                README=readme,
                Frameworks=['PyTorch'])
            if paper and folder == list(folders)[-1]:
                collection['Paper'] = dict(Title=paper[1], URL=paper[2])
            files[f'configs/{folder}/metafile.yaml'] = _dump(
                readme, dict(Collections=[collection], Models=ours))
    index = dict(Import=sorted(files))
    return {**files, 'model-index.yml': _dump('configs/*/README.md', index)}


def _dump(source: str, content: Any) -> str:
    return HEADER.format(source) + yaml.safe_dump(content, sort_keys=False)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--check',
        action='store_true',
        help='write nothing; fail if a file is out of date or a path broken')
    args = parser.parse_args(argv)
    try:
        files = build(ROOT)
    except ValueError as faults:
        sys.exit(str(faults))
    for name, text in files.items():
        path = ROOT / name
        if not args.check:
            path.write_text(text, encoding='utf-8')
        elif not path.is_file() or path.read_text(encoding='utf-8') != text:
            sys.exit(f'{name} is out of date: run '
                     '`python tools/analysis_tools/model_index.py`')
    print('\n'.join(files))


if __name__ == '__main__':
    main()

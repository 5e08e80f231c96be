# Copyright (c) mmseg_textkd contributors. All rights reserved.
import hashlib
import json
import re
import warnings
from pathlib import Path

import pytest
from each_case import each_case
from mmengine.config import Config, ConfigDict
from mmseg.datasets import (ADE20KDataset, BDD100KDataset, CityscapesDataset,
                            COCOStuffDataset, PascalContextDataset59,
                            PascalVOCDataset)
from mmseg.utils import get_predefined_templates

from mmseg_textkd import stock_config
from mmseg_textkd.datasets.camvid import CamVidDataset
from mmseg_textkd.datasets.labelmefacade import LabelMeFacadeDataset
from mmseg_textkd.datasets.toy_scenes import ToyScenesDataset
from mmseg_textkd.datasets.vspw import VSPWDataset
from mmseg_textkd.text.templates import get_templates
from mmseg_textkd.text.vocabulary import ALIASES, VOCABULARY_DIR, Vocabulary

FRAGMENTS = Path(__file__).resolve().parents[2] / 'configs/_base_/text'
# Of Mapillary Vistas' 66 names the last is `Unlabeled`, which MMSegmentation's
# base for 65 classes leaves out.
MAPILLARY = Config.fromfile(
    stock_config('_base_/datasets/mapillary_v1_65.py')).metainfo
COUNTS = dict(cityscapes=19, bdd100k=19, camvid=11, ade20k=150, voc12=21)
COUNTS.update(coco_stuff=171, toy_scenes=8, labelmefacade=8, vspw=124)
DATASETS = dict(
    zip(COUNTS, (CityscapesDataset, BDD100KDataset, CamVidDataset,
                 ADE20KDataset, PascalVOCDataset, COCOStuffDataset,
                 ToyScenesDataset, LabelMeFacadeDataset, VSPWDataset)))
CLASSES = {key: kind.METAINFO['classes'] for key, kind in DATASETS.items()}
CLASSES['mapillary_v1'] = MAPILLARY['classes']
# MMSegmentation has no dataset of the last three, only evaluated on.
COUNTS.update(mapillary_v1=65)
COUNTS.update(ade20k_847=847, fss1000=1000, pascal_context459=459)
# Names that must not reach a text encoder as they are, and what must.
MEANT = dict(
    camvid='signsymbol = traffic sign; pavement = sidewalk; '
    'bicyclist = cyclist',
    cityscapes='rider = cyclist; vegetation = tree; terrain = grass',
    bdd100k='rider = cyclist',
    ade20k='bed  = bed; pot = flowerpot; glass = drinking glass; '
    'plaything = toy; hood = range hood',
    voc12='pottedplant = potted plant; tvmonitor = television',
    coco_stuff='mouse = computer mouse; orange = orange fruit; '
    'wall-brick = brick wall; water-other = water; door-stuff = door; '
    'pavement = sidewalk',
    ade20k_847='pot = cooking pot; pot, flowerpot = flowerpot; '
    'screen, crt screen = crt screen; '
    'andiron, firedog, dog, dog-iron = andiron',
    fss1000='tebby_cat = tabby cat; earphone2 = earbud',
    pascal_context459='pottedplant = potted plant; tvmonitor = television; '
    'mouse = computer mouse',
    mapillary_v1='Ground Animal = animal; Terrain = grass; On Rails = tram; '
    'Crosswalk - Plain = pedestrian crossing; Junction Box = electrical '
    'cabinet; Lane Marking - Crosswalk = zebra crossing; Lane Marking - '
    'General = lane marking; Service Lane = road shoulder; Other Rider = '
    'person riding a horse; Traffic Sign (Back) = back of a traffic sign; '
    'Traffic Sign (Front) = traffic sign; Catch Basin = storm drain; Other '
    'Vehicle = construction vehicle; Wheeled Slow = handcart; Car Mount = '
    'camera mount on a car; Ego Vehicle = car hood seen from inside')
# Name by name as in two sources each, see the README of the vocabularies.
DIGESTS = dict(
    ade20k_847='ee311c5f3b780a16',
    fss1000='016a9a5b5356f1c6',
    pascal_context459='c9fe8ff7083d2572')
SYNONYMS = ('ade20k', 'bdd100k', 'camvid', 'cityscapes', 'toy_scenes', 'voc12')
BARE = set('other others stuff thing things misc void unlabeled unlabelled '
           'ego general'.split())


def test_every_file_is_tested():
    assert Vocabulary.keys() == sorted(COUNTS) and len(COUNTS) == 13
    # An alias has no file of its own, and everything else has one.
    assert ALIASES == {'bdd100k': 'cityscapes'}
    files = {f.stem for f in VOCABULARY_DIR.glob('*.json')}
    assert files == {*COUNTS} - {*ALIASES}
    text = (VOCABULARY_DIR / 'README.md').read_text(encoding='utf-8')
    rows = dict(re.findall(r'\| `(\w+)` \| (\d+) \|', text))
    assert rows == {key: str(count) for key, count in COUNTS.items()}
    files = (VOCABULARY_DIR / 'synonyms').glob('*.json')
    assert {f.stem for f in files} == {ALIASES.get(k, k) for k in SYNONYMS}
    for more in ('', '+synonyms'):
        assert Vocabulary.from_spec(f'bdd100k{more}') == Vocabulary.from_spec(
            f'cityscapes{more}')


@each_case('key', CLASSES)
def test_names_equal_the_datasets_classes_in_order(key):
    vocabulary = Vocabulary.from_spec(key)
    assert vocabulary.names == tuple(CLASSES[key])
    assert len(vocabulary) == len(vocabulary.phrases) == COUNTS[key]


def test_lists_are_those_that_have_been_compared():
    for key in DIGESTS:
        names = Vocabulary.from_spec(key).names
        digest = hashlib.sha256('\n'.join(names).encode()).hexdigest()
        assert digest.startswith(DIGESTS[key])


def test_lists_hold_the_classes_of_the_smaller_data_sets():
    ade, context = (
        Vocabulary.from_spec(key).names
        for key in ('ade20k_847', 'pascal_context459'))
    first = {name.split(', ')[0] for name in ade}
    small = {name.strip() for name in ADE20KDataset.METAINFO['classes']}
    assert small - first == {'crt screen'}
    assert ade[147].startswith('screen') and 'crt screen' in ade[147]
    # As the label file of PASCAL Context spells them.
    spelt = {name.replace(' ', '') for name in context}
    assert {*PascalContextDataset59.METAINFO['classes']} < spelt


def check_words(phrases):
    """Lower case words with one blank or hyphen between them.

    No underscore, digit, comma, bracket, ` - ` or blank at an end.
    """
    for phrase in phrases:
        assert re.fullmatch(r"[a-z]+([ '-][a-z]+)*", phrase), phrase
        words = phrase.split()
        assert words[0] not in ('a', 'an', 'the') and len(words) <= 8, phrase


@each_case('key', COUNTS)
def test_phrases_are_plain_words_and_stand_for_one_class(key):
    phrases = [p for ps in Vocabulary.from_spec(key).phrases for p in ps]
    assert len(phrases) >= COUNTS[key]
    check_words(phrases)
    for phrase in phrases:
        assert not BARE & {*re.split('[ -]', phrase)}, phrase
    assert len(set(phrases)) == len(phrases)


@each_case('key', [*COUNTS, *(f'{key}+synonyms' for key in SYNONYMS)])
def test_a_class_name_is_never_a_phrase_of_another_class(key):
    """Of 'rug' and 'carpet', it would draw the two together.

    Even where 'rug' itself is described in other words.
    """
    vocabulary = Vocabulary.from_spec(key)
    names = [name.strip().lower() for name in vocabulary.names]
    assert len(set(names)) == len(names) == COUNTS[key.split('+')[0]]
    for name, phrases in zip(names, vocabulary.phrases, strict=True):
        assert not ({*names} - {name}) & set(phrases), name


@each_case('key', SYNONYMS)
def test_synonyms_are_further_phrases_of_one_class(key):
    plain = Vocabulary.from_spec(key)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # of a phrase of two classes
        more = Vocabulary.from_spec(f'{key}+synonyms')
    assert more.names == plain.names
    phrases = sum(more.phrases, ())
    assert len(set(phrases)) == len(phrases)
    # Two and more words were found for each class, and three for most.
    sizes = [len(ps) for ps in more.phrases]
    assert min(sizes) > 2 and sum(sizes) >= 4 * len(sizes)
    for own, every in zip(plain.phrases, more.phrases):
        # What the vocabulary says without them stays as it is, and first.
        assert every[:len(own)] == own
        check_words(every[len(own):])


def test_synonyms_of_ones_own():
    vocabulary = Vocabulary.from_spec(['road', 'car'])
    more = vocabulary.with_synonyms(dict(car=('auto', 'motor car')))
    assert more.phrases == (('road', ), ('car', 'auto', 'motor car'))
    for words, message in ((dict(bus=('coach', )), "unknown classes: .'bus'"),
                           (dict(car=('Car', )), "'car' has a phrase twice")):
        with pytest.raises(ValueError, match=message):
            vocabulary.with_synonyms(words)


@each_case('key', MEANT)
def test_odd_names_come_first_as_what_they_mean(key):
    vocabulary = Vocabulary.from_spec(key)
    first = {n: p[0] for n, p in zip(vocabulary.names, vocabulary.phrases)}
    meant = dict(pair.split(' = ') for pair in MEANT[key].split('; '))
    assert meant == {name: first[name] for name in meant}


def test_background_is_described_by_what_is_not_an_object():
    vocabulary = Vocabulary.from_spec('voc12')
    background, *objects = vocabulary.phrases
    assert background[0] == 'background' and len(background) > 5
    assert not set(background) & {p for ps in objects for p in ps}


@each_case('key', sorted({*CLASSES} - {'toy_scenes', 'labelmefacade', 'vspw'}))
def test_every_dataset_has_a_text_fragment(key):

    def provider(name):
        return Config.fromfile(FRAGMENTS / f'vit-b16_{name}.py').text_provider

    expected = provider('cityscapes')
    expected.embeddings.update(
        file=f'data/text_embeddings/{key}_vit-b16-openai.safetensors',
        classes=key)
    expected.embeddings.build.vocabulary = key
    assert provider(key) == expected
    # One more for two data sets together.
    assert len(list(FRAGMENTS.glob('vit-b16_*.py'))) == 8


def test_from_dict_and_list():
    spec = dict(traffic_light=['traffic light', 'signal'], car='car')
    names = ('traffic_light', 'car')
    expected = Vocabulary(names, (('traffic light', 'signal'), ('car', )))
    assert Vocabulary.from_spec(spec) == expected
    assert Vocabulary.from_spec(ConfigDict(spec)) == expected
    # A list: underscores are read as spaces, and the name is kept.
    assert Vocabulary.from_spec(list(names)) == Vocabulary(
        names, (('traffic light', ), ('car', )))


def test_from_json_round_trip(tmp_path):
    ade = Vocabulary.from_spec('ade20k')
    file = tmp_path / 'mine.json'
    file.write_text(json.dumps(dict(zip(ade.names, ade.phrases))))
    assert Vocabulary.from_spec(str(file)) == ade
    assert Vocabulary.from_spec(file) == ade  # pathlib
    file.write_text('["car", "tree"]')
    assert Vocabulary.from_spec(file).phrases == (('car', ), ('tree', ))


def test_from_txt(tmp_path):
    file = tmp_path / 'names.txt'
    file.write_bytes('\ufeff# mine\r\nroad\r\n\r\nsign_post: traffic sign , '
                     'road sign\r\n  café\r\n'.encode())
    assert Vocabulary.from_spec(file) == Vocabulary(
        ('road', 'sign_post', 'café'),
        (('road', ), ('traffic sign', 'road sign'), ('café', )))


def test_is_constant_and_wraps_a_lone_phrase():
    vocabulary = Vocabulary(['road', 'car'], ['road', ['car', 'van']])
    assert vocabulary.phrases == (('road', ), ('car', 'van'))
    twin = Vocabulary(('road', 'car'), (('road', ), ('car', 'van')))
    assert hash(vocabulary) == hash(twin)
    assert Vocabulary.from_spec(vocabulary) is vocabulary
    with pytest.raises(AttributeError):
        vocabulary.names = ('a', )


@each_case('spec,error,message', [
    ([], ValueError, 'empty: it names no class'),
    ({}, ValueError, 'empty: it names no class'),
    (['car', 'tree', 'car'], ValueError,
     "'car' occurs twice in the vocabulary, as class 0 and as class 2"),
    (['bed', 'bed '], ValueError, "'bed ' occurs twice"),
    (['car', ' '], ValueError, "Class 1 .* empty name .*' '"),
    (['car', 7], ValueError, 'Class 1 .* no text: 7'),
    (dict(car=[]), ValueError, "Class 'car' has no phrase"),
    (dict(car=['van', ' ']), ValueError, "Class 'car' has an empty phrase"),
    (dict(car=['van', 3]), ValueError, "'car' has an empty .* no text: 3"),
    (dict(car=['van', 'Van']), ValueError, "'car' has a phrase twice"),
    (['car', 'bus\nstop'], ValueError, r"'bus\\nstop'.* control character"),
    (dict(car='van\x00'), ValueError, r"'van\\x00'.* control character"),
    (dict(car=3), ValueError, "'car': expected a phrase or a list .* 3"),
    ('coco_stuff+synonyms', ValueError, "'coco_stuff'.*'bdd100k'"),
    ('cars+synonyms', ValueError, "'cars'.*'camvid'"),
    ('citiscapes', ValueError,
     r"Unknown vocabulary 'citiscapes': .*'cityscapes'.* \.json or \.txt"),
    ('missing/names.txt', FileNotFoundError,
     'missing/names.txt does not exist'),
    (3, TypeError, 'dataset key, a file, a dict or a list.* int'),
])
def test_bad_vocabularies(spec, error, message):
    with pytest.raises(error, match=message):
        Vocabulary.from_spec(spec)


@each_case('spec,error,message', [
    ([], ValueError, 'The list of templates is empty'),
    (['a photo'], ValueError, "exactly one '{}'.* 'a photo'"),
    (['{} and {}'], ValueError, "exactly one '{}'.* '{} and {}'"),
    (['a {} {name}'], ValueError, "exactly one '{}'"),
    (['a {0}'], ValueError, "exactly one '{}'"),
    (['{}', 3], TypeError, 'a template is a text, but got 3'),
    ('vilt', ValueError, "Unknown templates 'vilt': .*'vild'"),
    ('missing.txt', FileNotFoundError, 'missing.txt does not exist'),
    (3, TypeError, 'a name, a file or a list of texts, but got int'),
])
def test_bad_templates(spec, error, message):
    with pytest.raises(error, match=message):
        get_templates(spec)


@each_case('name,content,message', [
    ('vocabulary.txt', '\n# nothing\n', 'names no class'),
    ('vocabulary.txt', 'car\ncar: van\n', "'car' occurs twice"),
    ('vocabulary.txt', 'car: van,\n', "'car' has an empty phrase"),
    ('vocabulary.txt', 'car:\n', "'car' has an empty phrase"),
    ('vocabulary.txt', ': van\n', 'Class 0 .* empty name'),
    ('vocabulary.json', '{"car": "van", "car": ""}', "'car' occurs twice"),
    ('vocabulary.json', '{"car": {"van": 1}}', "'car': expected a phrase"),
    ('vocabulary.json', '{"car": null, "van"}', 'Expecting'),
    ('vocabulary.json', '3', 'expected a dict .* found int'),
    ('vocabulary.json', '[1, 2]', 'Class 0 .* no text: 1'),
    ('vocabulary.txt', 'Straße'.encode('latin-1'), 'not UTF-8 .*iconv'),
    ('vocabulary.json', '["car"]'.encode('utf-16'), 'not UTF-8 .*iconv'),
    ('vocabulary.txt', 'car'.encode('utf-16-le'), 'control character'),
    ('template.txt', '\n\n', 'is empty'),
    ('template.txt', 'a {}\nno place\n', "exactly one '{}'.* 'no place'"),
    ('template.json', '[]', 'is empty'),
    ('template.json', '["a {}"', 'delimiter'),
    ('template.json', '{"a": "{}"}', 'expected a list of texts, found dict'),
    ('template.txt', 'a {} Straße'.encode('latin-1'), 'not UTF-8 .*iconv'),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    read = dict(vocabulary=Vocabulary.from_spec, template=get_templates)
    with pytest.raises(ValueError, match=message) as error:
        read[file.stem](file)
    assert f'{file.stem.title()} file {file}' in str(error.value)


def test_templates(tmp_path):
    assert get_templates('photo') == ['a photo of a {}.']
    assert get_templates('none') == ['{}']
    assert get_templates(('a {}', 'the {}')) == ['a {}', 'the {}']
    assert get_templates('a toy {}.') == ['a toy {}.']
    for name, count in (('vild', 14), ('imagenet', 31)):
        templates = get_templates(name)
        assert templates == get_predefined_templates(name)
        assert all(t.format('quux').count('quux') == 1 for t in templates)
        assert len(templates) >= count
    # The answer may be changed without harm.
    for name in ('photo', 'none', 'vild'):
        before = list(get_templates(name))
        get_templates(name).append('spoilt')
        assert get_templates(name) == before
    text, listed = tmp_path / 'templates.txt', tmp_path / 'templates.json'
    text.write_bytes('\ufeffa photo of a {}.\r\n\r\n  the {} \r\n'.encode())
    assert get_templates(str(text)) == ['a photo of a {}.', 'the {}']
    listed.write_text('["{}", "a {}"]')
    assert get_templates(listed) == ['{}', 'a {}']


def test_names_and_phrases_must_be_as_many():
    with pytest.raises(ValueError, match='2 names but phrases for 1 classes'):
        Vocabulary(('a', 'b'), (('a', ), ))
    with pytest.warns(UserWarning, match="'van' stands for both 'car' and"):
        Vocabulary.from_spec(dict(car=['car', 'van'], truck=['van']))

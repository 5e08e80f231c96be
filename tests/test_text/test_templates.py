# Copyright (c) mmseg_textkd contributors. All rights reserved.
import json

import pytest
from each_case import each_case
from mmseg.utils import get_predefined_templates

from mmseg_textkd.text.templates import get_templates


def test_own_names():
    assert get_templates('photo') == ['a photo of a {}.']
    assert get_templates('none') == ['{}']


@each_case('name,count', [('vild', 14), ('imagenet', 31)])
def test_predefined_by_mmseg(name, count):
    templates = get_templates(name)
    assert templates == get_predefined_templates(name)
    assert all(t.format('quux').count('quux') == 1 for t in templates)
    assert len(templates) >= count


def test_the_answer_may_be_changed_without_harm():
    for name in ('photo', 'none', 'vild'):
        before = list(get_templates(name))
        get_templates(name).append('spoilt')
        assert get_templates(name) == before


def test_lists_and_a_single_one():
    assert get_templates(('a {}', 'the {}')) == ['a {}', 'the {}']
    assert get_templates('a toy {}.') == ['a toy {}.']


def test_files(tmp_path):
    text = tmp_path / 'templates.txt'
    text.write_bytes('\ufeffa photo of a {}.\r\n\r\n  the {} \r\n'.encode())
    assert get_templates(str(text)) == ['a photo of a {}.', 'the {}']
    listed = tmp_path / 'templates.json'
    listed.write_text(json.dumps(['{}', 'a {}']))
    assert get_templates(listed) == ['{}', 'a {}']


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
def test_bad_specs(spec, error, message):
    with pytest.raises(error, match=message):
        get_templates(spec)


@each_case('name,content,message', [
    ('t.txt', '\n\n', 'is empty'),
    ('t.txt', 'a {}\nno place\n', "exactly one '{}'.* 'no place'"),
    ('t.json', '[]', 'is empty'),
    ('t.json', '["a {}"', 'delimiter'),
    ('t.json', '{"a": "{}"}', 'expected a list of texts, found dict'),
    ('t.txt', 'a {} Straße'.encode('latin-1'), 'not UTF-8 .*iconv'),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as error:
        get_templates(file)
    assert f'Template file {file}' in str(error.value)

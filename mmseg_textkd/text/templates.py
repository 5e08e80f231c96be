# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Prompt templates."""
import json
from pathlib import Path
from typing import List, Sequence, Union

from .vector_import import read_text_file

TEMPLATES = {
    'none': ['{}'],
    'photo': ['a photo of a {}.'],
}


def get_templates(spec: Union[str, Path, Sequence[str]]) -> List[str]:
    """Get prompt templates.

    Args:
        spec (str | Path | list[str]): One of

            - ``'photo'`` (``a photo of a {}.``) or ``'none'`` (``{}``, the
              phrase alone);
            - a set that MMSegmentation predefines, such as ``'vild'`` or
              ``'imagenet'``, see ``mmseg.utils.get_predefined_templates``;
            - a single template, recognized by its ``{}``;
            - the path of a ``.txt`` file with one template per line or of a
              ``.json`` file with a list;
            - a list of templates.

    Returns:
        list[str]: At least one template, each with exactly one ``{}``.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If ``spec`` or a template is of another type.
        ValueError: If the name is unknown, there is no template, or a
            template does not hold exactly one ``{}``.

    Examples:
        >>> [t.format('car') for t in get_templates('photo')]
        ['a photo of a car.']
    """
    if isinstance(spec, (list, tuple)):
        return _checked(spec, 'The list of templates')
    if not isinstance(spec, (str, Path)):
        raise TypeError('Templates are a name, a file or a list of texts, but '
                        f'got {type(spec).__name__}')
    if str(spec) in TEMPLATES:
        return list(TEMPLATES[str(spec)])
    if '{}' in str(spec):
        return _checked([str(spec)], 'The template')
    if Path(spec).suffix in ('.json', '.txt'):
        return _from_file(Path(spec))

    # Imported here and not above: the language side can be used, and its own
    # templates read, without mmseg being imported.
    from mmseg.utils import get_predefined_templates
    try:
        return list(get_predefined_templates(str(spec)))
    except ValueError:
        raise ValueError(
            f'Unknown templates {str(spec)!r}: neither {sorted(TEMPLATES)} '
            "nor a set that MMSegmentation predefines ('vild', 'imagenet'), "
            'nor a text with {}, nor the path of a .txt or .json file'
        ) from None


def _from_file(path: Path) -> List[str]:
    """Read a template file."""
    if not path.is_file():
        raise FileNotFoundError(f'Template file {path} does not exist')
    try:
        text = read_text_file(path)
    except ValueError as error:
        raise ValueError(f'Template file {path}: {error}') from error
    if path.suffix == '.txt':
        lines = [line.strip() for line in text.splitlines()]
        return _checked([line for line in lines if line],
                        f'Template file {path}')
    try:
        content = json.loads(text)
    except ValueError as err:
        raise ValueError(f'Template file {path}: {err}') from err
    if not isinstance(content, list):
        raise ValueError(f'Template file {path}: expected a list of texts, '
                         f'found {type(content).__name__}')
    return _checked(content, f'Template file {path}')


def _checked(templates: Sequence[str], where: str) -> List[str]:
    """Require templates with one placeholder each."""
    if not templates:
        raise ValueError(f'{where} is empty')
    for template in templates:
        if not isinstance(template, str):
            raise TypeError(f'{where}: a template is a text, but got '
                            f'{template!r}')
        # Any other brace would make str.format fail or drop it, late.
        rest = template.replace('{}', '', 1)
        if rest == template or '{' in rest or '}' in rest:
            raise ValueError(f"{where}: a template needs exactly one '{{}}' "
                             f'and no other brace, but got {template!r}')
    return list(templates)

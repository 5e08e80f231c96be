# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Plan of a study: its runs and their configs."""
import copy
import hashlib
import json
import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from mmengine.config import Config
from mmengine.utils import apply_to

from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.vector_import import EmbeddingFileError
from .run import Run
from .run_config import make_config
from .study_file import StudyError, read_study

VARIABLE = re.compile(r'\$\{(\w+)\}')
# What decides about the result of a run. The rest may change: where things
# are written, how often something is logged.
SCIENCE = ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader',
           'val_evaluator', 'test_evaluator', 'optim_wrapper',
           'param_scheduler', 'train_cfg', 'custom_hooks', 'randomness')


@dataclass
class Study:
    """A study, checked.

    Args:
        path (Path): The YAML file.
        spec (dict): Its content, with what its ``_base_`` says.
        variables (dict[str, str]): Values of ``vars``.
    """
    path: Path
    spec: Dict[str, Any]
    variables: Dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls,
             path: Union[str, Path],
             variables: Optional[Mapping[str, str]] = None) -> 'Study':
        """Read and check a study.

        Args:
            path (str or Path): The YAML file. ``_base_`` names another one
                beside it, whose mappings are completed and whose other
                entries are replaced.
            variables (Mapping[str, str], optional): Values that replace
                those of ``vars``. Defaults to None.

        Returns:
            Study: The study.

        Raises:
            StudyError: If something is missing or unknown, and where.
        """
        path = Path(path)
        spec = read_study(path)
        study = cls(path, spec)
        known = spec.get('vars') or {}
        unknown = sorted(set(variables or {}) - set(known))
        if unknown:
            raise StudyError(f'{path} has no vars {unknown}; it has '
                             f'{sorted(known)}.')
        study.variables = {**known, **(variables or {})}
        return study

    @property
    def name(self) -> str:
        """str: Name of the study."""
        return self.spec['name']

    @property
    def evaluate(self) -> Sequence[str]:
        """Sequence[str]: What the last checkpoint is measured on."""
        return self.spec['evaluate']

    def runs(self) -> List[Run]:
        """List the runs in the order in which they are to be made.

        Returns:
            list[Run]: Grid by grid, in each network by network, then by
            share of the images, seed and arm; each once.
        """
        runs: Dict[Run, None] = {}
        for grid in self.spec['grids']:
            for network, fraction, seed, arm in product(
                    grid['networks'], grid.get('train_fractions', [1]),
                    grid['seeds'], grid['arms']):
                runs[Run(network, arm, int(seed), float(fraction))] = None
        return list(runs)

    def registration(self) -> Dict[str, Any]:
        """Get the registration of the study.

        Returns:
            dict: For :meth:`Ledger.register`.
        """
        used = {run.arm for run in self.runs()}
        # Older ledgers have none: a study without any is to fit them.
        hypotheses = self.spec.get('hypotheses')
        return dict(
            study=self.name,
            title=self.spec.get('title', self.name),
            registration=self.spec.get('registration', ''),
            baseline=self.spec['baseline'],
            controls=list(self.spec.get('controls', [])),
            evaluate=list(self.evaluate),
            arms={
                name: arm.get('what', '')
                for name, arm in self.spec['arms'].items() if name in used
            },
            planned=[run.name for run in self.runs()],
            **(dict(hypotheses=hypotheses) if hypotheses else {}))

    def iterations(self, run: Run) -> int:
        """Get the number of iterations of a run.

        Args:
            run (Run): The run.

        Returns:
            int: Iterations in total, of all stages: those of the arm if it
            has its own, else those of the network.
        """
        arm = self.spec['arms'][run.arm]
        return arm.get('iterations',
                       self.spec['networks'][run.network]['iterations'])

    def config(self, run: Run, resolved: bool = True) -> Config:
        """Make the config of a run.

        Args:
            run (Run): The run.
            resolved (bool): Whether to put the values of ``vars`` in. Without
                them the config is the same on every machine. Defaults to
                True.

        Returns:
            Config: An ordinary config for ``tools/train.py``.

        Raises:
            StudyError: If a config does not exist or an option does not fit.
        """
        network = self.spec['networks'][run.network]
        arm = self.spec['arms'][run.arm]
        # MMEngine takes some keys out of what it merges.
        options = copy.deepcopy([
            owner.get('options') or {} for owner in (self.spec, network, arm)
        ])
        extra = None
        if arm.get('auxiliary_head'):
            extra = {**arm['auxiliary_head'], **network['feature']}
        try:
            cfg = make_config(
                self.path.parent / network['configs'][arm['config']],
                options=self._substitute(options) if resolved else options,
                iterations=self.iterations(run),
                val_interval=network['val_interval'],
                seed=run.seed,
                size=self.spec.get('size'),
                channels_last=self.spec.get('channels_last', False),
                auxiliary_head=self._substitute(extra) if resolved else extra)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise StudyError(f'{self.path}: no config for {run.name}: '
                             f'{error}') from error
        return cfg

    def identify(self, run: Run) -> Dict[str, Any]:
        """Tell what makes the run what it is, on any machine.

        Args:
            run (Run): The run.

        Returns:
            dict: ``config_hash``, a SHA-256 over all that decides about the
            result, and ``inputs``, the SHA-256 of each file that ``vars``
            name and the run uses.

        Raises:
            StudyError: If such a file does not exist.
        """
        cfg = self.config(run, resolved=False).to_dict()
        deciding = {key: cfg.get(key) for key in SCIENCE}
        if cfg.get('load_from'):  # older ledgers have none
            deciding['load_from'] = cfg['load_from']
        text = json.dumps(
            dict(deciding, train_fraction=run.train_fraction),
            sort_keys=True,
            default=str)
        inputs = {}
        for name in sorted(set(VARIABLE.findall(text))):
            path = Path(self._value(name))
            if not path.exists():
                raise StudyError(
                    f'{self.path}: {run.name} needs ${{{name}}}, but '
                    f'{path} does not exist. Name it by --vars {name}=PATH.')
            if path.is_file():
                inputs[name] = _hash(path)
        text += json.dumps(inputs, sort_keys=True)
        return dict(
            config_hash=hashlib.sha256(text.encode()).hexdigest(),
            inputs=inputs)

    def _value(self, name: str) -> str:
        if name not in self.variables:
            raise StudyError(f'{self.path} uses ${{{name}}}, which its vars '
                             'do not have.')
        return str(self.variables[name])

    def _substitute(self, value: Any) -> Any:
        """Put the values of ``vars`` into all texts of nested options."""
        return apply_to(
            value, lambda text: isinstance(text, str),
            lambda text: VARIABLE.sub(lambda m: self._value(m[1]), text))


def _hash(path: Path) -> str:
    """SHA-256 of the content: embeddings that were imported twice may differ
    in the order of their bytes.
    """
    try:
        return TextEmbeddings.load(path).sha256
    except EmbeddingFileError:
        return hashlib.sha256(path.read_bytes()).hexdigest()

# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Scheduler that makes the runs of a study in processes."""
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, Optional, Set

from mmengine.dataset import BaseDataset
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS

from mmseg_textkd.utils.io import write_files
from .job import Job
from .ledger import Ledger, LedgerError
from .measure import RESULT, describe_machine, git_commit, read_logs
from .plan import Study
from .run import Run, subset
from .study_file import StudyError

TAIL = 15  # lines of the log of a run that failed


class Scheduler:
    """Make the runs that a ledger does not have yet.

    Args:
        study (Study): The study.
        ledger (Ledger): Where finished runs are written to.
        work_dir (Path): Folder of logs and checkpoints.
        root (Path): Folder with ``tools``.
        jobs (int): How many runs go on side by side. Defaults to 1.
        budget (float, optional): Seconds after which everything is stopped.
            Defaults to None.
        commit (str, optional): Commit to write down. Defaults to None: what
            Git says of ``root``.
        drop_checkpoints (bool): Whether to remove the checkpoints of finished
            runs. Defaults to False.
        say (Callable): Takes lines about the progress. Defaults to print.

    Raises:
        StudyError: If the ledger has a run of this study under the same name
            but with another config.
    """

    def __init__(self,
                 study: Study,
                 ledger: Ledger,
                 work_dir: Path,
                 root: Path,
                 jobs: int = 1,
                 budget: Optional[float] = None,
                 commit: Optional[str] = None,
                 drop_checkpoints: bool = False,
                 say: Callable[[str], None] = print) -> None:
        self.study = study
        self.ledger = ledger
        self.work_dir = work_dir
        self.root = root
        self.jobs = jobs
        self.end = None if budget is None else time.monotonic() + budget
        self.commit = commit or git_commit(root)
        self.drop_checkpoints = drop_checkpoints
        self.say = say
        self.runs = study.runs()
        self.identity = {run: study.identify(run) for run in self.runs}
        self.failed: List[Run] = []
        self._elsewhere: Set[Run] = set()
        for run in self.runs:
            done = ledger.find(study.name, run)
            own = self.identity[run]['config_hash']
            if done is not None and done['config_hash'] != own:
                raise StudyError(
                    f'{ledger.path} has {run.name} of {study.name} with '
                    f'another config (hash {done["config_hash"][:12]}, now '
                    f'{own[:12]}). The study or a config was changed after '
                    'the run. Give the study a new name, or remove that line '
                    f'and {work_dir / run.name} to make the run again.')
            lacks = [s for s in study.evaluate if done and not done.get(s)]
            if lacks:
                raise StudyError(
                    f'{ledger.path} has {run.name} of {study.name} without '
                    f'{lacks}, which `evaluate` has now. Give the study a new '
                    f'name, or remove that line and {work_dir / run.name} to '
                    'make the run again.')

    def todo(self) -> List[Run]:
        """List the runs that are neither finished nor failed.

        Returns:
            list[Run]: In their order.
        """
        return [
            run for run in self.runs
            if self.ledger.find(self.study.name, run) is None
            and run not in self.failed
        ]

    def work(self) -> List[Run]:
        """Make the runs.

        Returns:
            list[Run]: The runs that are left, failed ones included.
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        own = _lock(self.work_dir / '.lock')
        if own is None:
            raise StudyError(f'another driver is at work in {self.work_dir}.')
        if self.ledger.register(self.study.registration(), _now()):
            self.say(f'registered the study in {self.ledger.path}')
        waiting, jobs, told = self.todo(), [], 0.
        # No exception in the handler: MMEngine formats configs under a bare
        # `except`, where it would be lost.
        terminated: List[int] = []
        handler = signal.signal(
            signal.SIGTERM, lambda number, frame: terminated.append(number))
        try:
            while waiting or jobs:
                if terminated:
                    sys.exit('terminated')
                if self.end is not None and time.monotonic() > self.end:
                    self.say('the budget is spent')
                    break
                self._start(waiting, jobs)
                jobs = [job for job in jobs if self._look_after(job)]
                if time.monotonic() - told > 60:
                    told = time.monotonic()
                    self.say(self.progress(jobs, waiting))
                time.sleep(.2)
        finally:
            signal.signal(signal.SIGTERM, handler)
            for job in jobs:
                job.stop()
                job.lock.close()
                self.say(f'stopped {job.run.name}')
            own.close()
        return [*self.todo(), *self.failed]

    def _start(self, waiting: List[Run], jobs: List[Job]) -> None:
        """Start runs while there are free places."""
        elsewhere = 0
        for run in [*waiting]:
            if len(jobs) + elsewhere >= self.jobs:
                break
            folder = self.work_dir / run.name
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder / '.lock')
            if lock is None:
                elsewhere += 1
                if run not in self._elsewhere:
                    self._elsewhere.add(run)
                    self.say(f'{run.name} goes on in a process that outlived '
                             'its driver, waiting for it')
                continue
            waiting.remove(run)
            self.ledger.reload()
            if self.ledger.find(self.study.name, run) is not None:
                self.say(f'{run.name} is in the ledger by now')
                lock.close()
                continue
            job = self._begin(run, lock)
            if job is not None:
                jobs.append(job)

    def _begin(self, run: Run, lock: IO) -> Optional[Job]:
        """Start or resume a run; None if there is nothing more to do."""
        folder = self.work_dir / run.name
        job = Job(run, folder, lock)
        try:
            self._write_config(job)
        except Exception as error:
            self._fail(job, f'{type(error).__name__}: {error}')
            return None
        if self._result(job) is not None:
            self._finish(job)
            return None
        resume = (folder / 'last_checkpoint').exists()
        self.say(f'{"resuming" if resume else "starting"} {run.name}')
        job.start([
            str(self.root / 'tools' / 'study.py'), '--make',
            str(folder), *self.study.evaluate
        ])
        return job

    def _write_config(self, job: Job) -> None:
        """Write the config of a run, or check that it has not changed."""
        stamp = job.folder / 'study.json'
        identity = self.identity[job.run]
        if stamp.exists() and json.loads(stamp.read_text()) != identity:
            raise StudyError(
                f'{job.folder} is of a run with another config or other '
                'vectors. Remove the folder to begin anew.')
        cfg = self.study.config(job.run)
        if job.run.train_fraction != 1:
            dataset = cfg.train_dataloader.dataset
            init_default_scope('mmseg')
            whole = DATASETS.build(dataset)
            if not isinstance(whole, BaseDataset):
                raise StudyError('a train fraction needs a plain dataset, but '
                                 f'got {dataset.type}.')
            if dataset.get('indices') is not None:
                raise StudyError('a train fraction chooses the images, so '
                                 'that the data set can have no `indices`.')
            dataset.indices = subset(len(whole), job.run)
        cfg.dump(str(job.folder / 'config.py'))
        write_files({stamp: json.dumps(identity).encode()})

    def _result(self, job: Job) -> Optional[Dict[str, Any]]:
        """Read the result of a run, if its process has finished."""
        path = job.folder / RESULT
        result = json.loads(path.read_text()) if path.exists() else {}
        return result if {*self.study.evaluate} <= {*result} else None

    def _look_after(self, job: Job) -> bool:
        """Check a job, and return whether it is still running."""
        status = job.process.poll()
        if status is None:
            return True
        if status == 0 and self._result(job) is not None:
            self._finish(job)
        else:
            self._fail(job, f'exit status {status}')
        return False

    def _fail(self, job: Job, why: str) -> None:
        self.failed.append(job.run)
        job.lock.close()
        log = job.folder / 'log.txt'
        lines = []
        if log.exists():
            lines = log.read_text(errors='replace').splitlines()[-TAIL:]
        self.say('\n'.join([
            f'FAILED {job.run.name}: {why}', *(f'    {line}' for line in lines)
        ]))

    def _finish(self, job: Job) -> None:
        run = job.run
        result = self._result(job)
        logs = read_logs(job.folder)
        del logs['last_step']
        memory = logs.pop('cuda_memory_mib')
        end = self.study.iterations(run)
        if not logs['curve'] or logs['curve'][-1][0] < end:
            # Killed in the last validation; it is what was measured again.
            logs['curve'].append((end, round(result['val']['mIoU'], 2)))
            iteration, best = max(logs['curve'], key=lambda pair: pair[1])
            logs['best_val'] = dict(iteration=iteration, mIoU=best)
        entry = dict(
            study=self.study.name,
            network=run.network,
            arm=run.arm,
            seed=run.seed,
            train_fraction=run.train_fraction,
            **self.identity[run],
            iterations=self.study.iterations(run),
            size=self.study.spec.get('size'),
            channels_last=self.study.spec.get('channels_last', False),
            classes=result['classes'],
            val=result['val'],
            test=result.get('test'),
            checkpoint='last',
            **logs,
            peak_memory_mib=memory or result['rss_mib'],
            peak_memory_of='CUDA' if memory else 'process',
            jobs=self.jobs,
            threads=os.environ.get('OMP_NUM_THREADS'),
            commit=self.commit,
            finished=_now(),
            **describe_machine())
        try:
            added = self.ledger.append(entry)
        except LedgerError as error:
            self._fail(job, str(error))
            return
        job.lock.close()
        if not added:
            self.say(f'{run.name} is in the ledger by now')
            return
        if self.drop_checkpoints:
            for pattern in ('iter_*.pth', 'best_*.pth'):
                for path in job.folder.glob(pattern):
                    path.unlink()
            (job.folder / 'last_checkpoint').unlink(missing_ok=True)
        scores = ', '.join(f'{split} {entry[split]["mIoU"]:.2f}'
                           for split in self.study.evaluate)
        self.say(f'finished {run.name}: mIoU {scores}')

    def progress(self, jobs: List[Job], waiting: List[Run]) -> str:
        """Describe the progress of the study.

        Args:
            jobs (list[Job]): The runs at work.
            waiting (list[Run]): The runs to come.

        Returns:
            str: A line.
        """
        speeds: Dict[str, List[float]] = {}
        left: Dict[Run, int] = {
            run: self.study.iterations(run)
            for run in waiting
        }
        doing = []
        for job in jobs:
            logs = read_logs(job.folder)
            step, seconds = logs['last_step'], logs['train_seconds']
            total = self.study.iterations(job.run)
            left[job.run] = total - step
            if seconds:
                speeds.setdefault(job.run.network, []).append(seconds / step)
            doing.append(f'{job.run.name} {100 * step // total} %')
        for run in self.runs:
            entry = self.ledger.find(self.study.name, run)
            if entry:
                speeds.setdefault(run.network, []).append(
                    entry['train_seconds'] / entry['iterations'])
        means = {k: sum(v) / len(v) for k, v in speeds.items()}
        text = 'time left unknown'
        if means:
            # A network that has not been seen yet is taken for the slowest.
            slowest = max(means.values())
            seconds = sum(number * means.get(run.network, slowest)
                          for run, number in left.items()) / self.jobs
            text = f'about {_duration(seconds)} left'
        done = len(self.runs) - len(waiting) - len(jobs) - len(self.failed)
        return (f'{done} of {len(self.runs)} done, {len(self.failed)} failed, '
                f'at work: {", ".join(doing) or "none"}; {text}')


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else \
        f'{max(minutes, 1)} min'


def _lock(path: Path) -> Optional[IO]:
    """Take a lock that ends with the last process that holds it."""
    file = open(path, 'w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _now() -> str:
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())

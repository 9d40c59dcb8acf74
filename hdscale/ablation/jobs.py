"""From a table's rows to recipes, and to the commands that train them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hdscale.ablation.scales import OUTPUT, Scale, Training
from hdscale.ablation.table import Row, Table
from hdscale.config.history import bears_on_result
from hdscale.config.loading import RECIPE_FILE, changed_fields, flat_fields, load_recipe, load_run_recipe
from hdscale.config.recipe import Recipe
from hdscale.errors import UserError
from hdscale.runs.folder import changed_on_the_way

_WORD = re.compile(r"@([a-z0-9_]+)(?::(\S+))?$")
_STUDENT_FILE = "student.safetensors"


class Job(NamedTuple):
    """One command of hdscale's, which is done when its marker is there."""

    name: str  # for messages and the log's file name
    script: str  # below the repository's root
    arguments: tuple[str, ...]
    marker: Path
    on_ranks: bool = True  # started by the DeepSpeed launcher
    marks: bool = False  # the command leaves no marker itself

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to do."""
        return self.marker.is_file()


class RowJobs(NamedTuple):
    """One row under one seed, and what has to be run for it."""

    row: Row
    seed: int
    recipe: Recipe
    jobs: tuple[Job, ...]  # in this order; rows and seeds share most of them
    folder: Path | None  # of the run; None: the recipe's feature teacher is measured

    @property
    def label(self) -> str:
        """Name the row and its seed."""
        return self.row.key if self.folder is None else f"{self.row.key}, seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do; what the last job was made from is not needed any more."""
        return not self.jobs or self.jobs[-1].is_done


class Settings(NamedTuple):
    """What a person chose."""

    table: Table
    scale: Scale
    output: Path
    overrides: tuple[str, ...] = ()  # of all rows, after the table's


def check_overrides(overrides: Sequence[str], scale: Scale, table: Table) -> None:
    """Refuse fields that the command sets itself, row by row: they would be passed over in silence.

    Raises:
        UserError: naming the argument and what to use instead.
    """
    instead = {
        "run.name": "runs are named after their recipes; leave it out",
        "run.root": "runs lie in --output; set that",
        "run.seed": "seeds count from 0; set --seeds",
    }
    if scale.stores_masks:
        instead["mask.store"] = "masks lie in --output; set that"
    own = {part.partition("=")[0] for row in table.rows for part in (*row.overrides, *row.demo, *row.full)}
    for override in overrides:
        field = override.partition("=")[0]
        if field in instead:
            raise UserError(f"argument {override!r}: {field} is not for ablate.py: {instead[field]}")
        if any(name == field or name.startswith(f"{field}.") for name in own):
            raise UserError(
                f"argument {override!r}: rows of table {table.key} differ in {field}, and would stand under names that "
                "are no longer theirs: leave it out, or train such a row by launch/train.py"
            )


def teacher_recipe(training: Training, output: Path) -> Recipe:
    """Return the recipe by which a teacher of an ablation in `output` is trained."""
    return load_recipe(training.recipe, _texts(training.overrides, output))


def teacher_folder(name: str, training: Training, output: Path) -> Path:
    """Return where a teacher is trained: `teachers/NAME`, or another folder if what lies there has another recipe.

    An earlier version's teacher stays, and its students with it; rows of today get one of today's.
    """
    folder, recipe = output / "teachers" / name, teacher_recipe(training, output)
    if (folder / RECIPE_FILE).is_file() and changed_fields(load_run_recipe(folder), recipe):
        return folder.with_name(f"{name}-{_run_digest(recipe, output)}")
    return folder


class JobBuilder:
    """Finds the jobs of rows; the same recipe gets the same run folder, whatever row or table it stands in."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folders: dict[str, Path] = {}  # by what a run folder's name ends with

    def build(self, rows: Sequence[Row], seeds: int) -> list[RowJobs]:
        """Resolve rows under seeds 0 .. seeds - 1; a seed's rows stand together: a whole table is there early.

        Raises:
            UserError: a row's recipe is not valid, naming the row.
        """
        # A teacher is measured once: it has no seed.
        return [self.build_row(row, seed) for seed in range(seeds) for row in rows if seed == 0 or not row.model]

    def build_row(self, row: Row, seed: int) -> RowJobs:
        """Resolve one row.

        Raises:
            UserError: its recipe is not valid, naming the row.
        """
        table, scale, _, _ = self._settings
        try:
            return self._teacher_row(row) if row.model else self._student_row(row, seed)
        except UserError as error:
            raise UserError(f"table {table.key}, row {row.key}, scale {scale.name}: {error}") from error

    def _teacher_row(self, row: Row) -> RowJobs:
        _, scale, _, added = self._settings
        overrides = [*scale.overrides, "relation_teacher=null", f"feature_teacher={row.model}", "mask.strategy=none"]
        resolved, jobs = self._resolve([*overrides, *added], seed=0)
        recipe = load_recipe(scale.recipe, resolved)
        return RowJobs(row, 0, recipe, tuple(jobs), None)

    def _student_row(self, row: Row, seed: int) -> RowJobs:
        table, scale, output, added = self._settings
        own = [*scale.overrides, *table.base, *row.overrides, *(row.demo if scale.is_demo else row.full), *added]
        resolved, jobs = self._resolve(_last_of_each(own), seed)
        resolved += [f"run.root={output / 'runs'}", f"run.seed={seed}"]
        recipe = load_recipe(scale.recipe, resolved)
        if scale.stores_masks and recipe.mask.chosen_by_teacher and recipe.mask.source == "store":
            store = output / "masks" / f"{_mask_digest(recipe, output)}-seed{seed}"
            resolved.append(f"mask.store={store}")
            arguments = ("--recipe", str(scale.recipe), *resolved)
            marker = store.with_name(f"{store.name}.done")
            jobs.append(Job(f"masks {store.name}", "launch/precompute_masks.py", arguments, marker, marks=True))
        folder = self._run_folder(row, recipe, seed)
        resolved.append(f"run.name={folder.name}")
        train = Job(folder.name, "launch/train.py", ("--recipe", str(scale.recipe), *resolved), folder / "DONE")
        return RowJobs(row, seed, load_recipe(scale.recipe, resolved), (*jobs, train), folder)

    def _run_folder(self, row: Row, recipe: Recipe, seed: int) -> Path:
        """Return the folder that a row, maybe another table's, has given this recipe, or a new one's name."""
        output = self._settings.output
        ending = f"{_run_digest(recipe, output)}-seed{seed}"
        if ending not in self._folders:
            there = [path for path in sorted((output / "runs").glob(f"*-{ending}")) if not changed_on_the_way(path)]
            there += [self._folders_by_recipe[ending]] if ending in self._folders_by_recipe else []
            done = [path for path in there if (path / "DONE").is_file()]
            folder = next(iter(done or there), None)
            begun = output / "runs" / f"{self._settings.table.key}-{row.key}-{ending}"
            if begun.exists():  # and was changed on the way
                begun = begun.with_name(f"{self._settings.table.key}-{row.key}-anew-{ending}")
            self._folders[ending] = folder or begun
        return self._folders[ending]

    @functools.cached_property
    def _folders_by_recipe(self) -> dict[str, Path]:
        """Find run folders by what their recipes mean: earlier versions ended names otherwise.

        Of several that mean the same, one that is done, then the first by name. A run whose recipe was changed on the
        way is none of them.
        """
        found: dict[str, Path] = {}
        runs = sorted((self._settings.output / "runs").glob(f"*/{RECIPE_FILE}"))
        for file in sorted(runs, key=lambda file: not (file.parent / "DONE").is_file()):
            if changed_on_the_way(file.parent):
                continue
            with contextlib.suppress(UserError):  # whatever it is, it is no row of today
                recipe = load_run_recipe(file.parent)
                # Teachers lie beside it, in what its ablation was called when it was started.
                ending = f"{_run_digest(recipe, Path(recipe.run.root).parent)}-seed{recipe.run.seed}"
                found.setdefault(ending, file.parent)
        return found

    def _resolve(self, overrides: Iterable[str], seed: int) -> tuple[list[str], list[Job]]:
        """Replace words by what they stand for; list the jobs that have to be done for it."""
        found, jobs = [], self._shards()
        for override in overrides:
            key, equals, text = override.partition("=")
            if word := _WORD.match(text):
                text, needed = self._look_up(word[1], word[2], seed)
                jobs += [job for job in needed if job not in jobs]
            found.append(f"{key}{equals}{text}")
        return _texts(found, self._settings.output), jobs

    def _look_up(self, word: str, of: str | None, seed: int) -> tuple[str, list[Job]]:
        table, scale, _, _ = self._settings
        if of is None:
            return (scale.epochs[word], []) if word in scale.epochs else self._teacher(word)
        assert word == "student", word
        taught_first = self.build_row(table.row(of), seed)
        folder = taught_first.folder
        assert folder is not None, "a teacher is no student"
        file = folder / _STUDENT_FILE
        arguments = ("--run", str(folder), "--output", str(file))
        export = Job(f"export {folder.name}", "launch/export.py", arguments, file, on_ranks=False)
        return f"{{source: file, weights: {file}, sharding: replicate}}", [*taught_first.jobs, export]

    def _teacher(self, name: str) -> tuple[str, list[Job]]:
        """Return a teacher's section as YAML, and the job that makes its file, where hdscale makes it."""
        scale, output = self._settings.scale, self._settings.output
        section = scale.teachers[name]
        jobs = []
        for trained, training in scale.trained.items():
            if f"/teachers/{trained}/" in section:
                folder = teacher_folder(trained, training, output)
                section = section.replace(f"/teachers/{trained}/", f"/teachers/{folder.name}/")
                overrides = [
                    *_texts(training.overrides, output),
                    f"run.root={folder.parent}",
                    f"run.name={folder.name}",
                ]
                arguments = ("--method", training.method, "--recipe", str(training.recipe), *overrides)
                jobs.append(Job(folder.name, "launch/pretrain_teacher.py", arguments, folder / "DONE"))
        return section, jobs

    def _shards(self) -> list[Job]:
        scale, output = self._settings.scale, self._settings.output
        if not scale.shards:
            return []
        arguments = (*scale.shards, "--output", str(output / "shards"))
        marker = output / "shards.done"
        return [Job("shards", "data_tools/make_shards.py", arguments, marker, on_ranks=False, marks=True)]


def _texts(overrides: Iterable[str], output: Path) -> list[str]:
    return [override.replace(OUTPUT, str(output)) for override in overrides]


def _last_of_each(overrides: Sequence[str]) -> list[str]:
    """Leave out what a later override of the same field replaces: a command line is for people to read."""
    keys = [override.partition("=")[0] for override in overrides]
    return [override for place, override in enumerate(overrides) if keys[place] not in keys[place + 1 :]]


def _mask_digest(recipe: Recipe, output: Path) -> str:
    mask = recipe.mask.model_dump(mode="json", exclude={"store", "source", "random_per"})  # random ones are not stored
    teacher = None if recipe.relation_teacher is None else recipe.relation_teacher.model_dump(mode="json")
    data = recipe.data.model_dump(mode="json")
    return _digest({"mask": mask, "relation_teacher": teacher, "data": data, **_precision(recipe)}, output)


def _run_digest(recipe: Recipe, output: Path) -> str:
    """Digest all that decides a run, defaults as well: one that changes must not leave a row's name as it was."""
    values = flat_fields(recipe.model_dump(mode="json", exclude={"run": True, "mask": {"store"}}))
    bearing = {field: value for field, value in values.items() if bears_on_result(field, recipe)}
    return _digest(bearing | _precision(recipe), output)


def _precision(recipe: Recipe) -> dict[str, str]:
    """Name the arithmetic that was asked for; `auto` is left out, so that folders keep the names they had."""
    return {} if recipe.run.precision == "auto" else {"precision": recipe.run.precision}


def _digest(values: dict[str, Any], output: Path) -> str:
    text = json.dumps(values, sort_keys=True).replace(str(output), OUTPUT)
    return hashlib.sha256(text.encode()).hexdigest()[:8]

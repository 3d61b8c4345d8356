"""A study of small models: a plan of runs, the job that does one of them, and the table of what came out.

``data/study_plan.csv`` has a row for each run: its shape, recipe and budgets, and what it is for (`PARTS`). A job trains the
run and evaluates the model at each budget; `collect` puts its rows into a table (``data/small_runs.csv``). A row carries the
hash of what the plan said when it was made, so that a row and a plan that do not belong together are found.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from morphlib import diagnostics, files, fitting, laws, recipes, runs, uncertainty
from morphlib.errors import InputError
from morphlib.laws import Law
from morphlib.recipes import Recipe
from morphlib.shapes import Shape

if TYPE_CHECKING:
    from morphlib.corpus import Corpus

DATA = Path(__file__).parent / "data"
PLAN, TABLE, PREDICTIONS = DATA / "study_plan.csv", DATA / "small_runs.csv", DATA / "small_predictions.csv"
LATENCIES = DATA / "latency_small.csv"
# for the learning rate, at the two smallest sizes and at two larger shapes; for laws to be fitted to; ranked before trained
PARTS = ("tuning", "fit", "largest")
RECIPE = "small"
N_PAIRS = 2000  # minimal pairs of each task, for each model
TASKS = ("agreement", "spelling")
DONE = "study.csv"  # in the folder of a job that is finished
EXPONENTS: tuple[laws.Exponents, ...] = ("tied", "free")
_COLUMNS = ("run_id", "part", "shape", "seed", "learning_rate", "base_width", "tokens_per_parameter", "cpu_minutes")


@dataclass(frozen=True, slots=True)
class Run:
    """One row of a plan. ``marks`` are budgets in tokens; ``cpu_minutes`` is the time it is expected to take on one thread."""

    run_id: str
    part: str
    shape: Shape
    recipe: Recipe
    tokens_per_parameter: tuple[float, ...]
    cpu_minutes: float

    @property
    def marks(self) -> list[int]:
        return [round(ratio * self.shape.n_params("non_embedding")) for ratio in self.tokens_per_parameter]

    @property
    def config(self) -> str:
        """A hash of all that decides the outcome, but for the text and the machine."""
        told = [str(self.shape), self.shape.norm, asdict(self.recipe), self.marks, N_PAIRS]
        # with a word before it, since a table reader takes 12e4 for a number
        return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}"


def plan(path: Path = PLAN) -> list[Run]:
    """The runs of a plan. Raises ``InputError`` naming the row for one that cannot be, and for two that are the same."""
    table = runs.read(path)
    runs.need(table, _COLUMNS, path, f"a plan has {', '.join(_COLUMNS)}")
    given = recipes.quantities(RECIPE)
    found: list[Run] = []
    lines: dict[str, int] = {}
    for line, row in enumerate(table.to_dict("records"), start=2):
        try:
            shape = replace(Shape.parse(row["shape"]), norm=given["norm"])
            width = None if pd.isna(row["base_width"]) else int(row["base_width"])
            own = {"seed": int(row["seed"]), "learning_rate": float(row["learning_rate"]), "base_width": width}
            ratios = tuple(float(ratio) for ratio in str(row["tokens_per_parameter"]).split())
            recipe = Recipe.of(given | own)
            run = Run(row["run_id"], row["part"], shape, recipe, ratios, float(row["cpu_minutes"]))
        except (ValueError, TypeError, AttributeError) as error:  # InputError is a ValueError
            raise InputError(f"{path}: row {line}: {error}; mend the row") from None
        if run.part not in PARTS or not ratios or min(ratios) <= 0 or list(ratios) != sorted(set(ratios)):
            raise InputError(
                f"{path}: row {line}: part {run.part!r} or tokens_per_parameter {ratios} cannot be; "
                f"give one of {', '.join(PARTS)}, and rising numbers above zero"
            )
        for name, what in ((run.run_id, f"write the row {run.run_id!r}"), (run.config, "train the same")):
            if name in lines:
                raise InputError(f"{path}: rows {lines[name]} and {line} both {what}; remove or change one")
            lines[name] = line
        found.append(run)
    return found


def named(run_id: str, path: Path = PLAN) -> Run:
    """The run of that name. Raises ``InputError`` where there is none."""
    found = [run for run in plan(path) if run.run_id == run_id]
    if not found:
        raise InputError(f"{path}: has no run {run_id!r}; `morph study plan` lists them")
    return found[0]


def train(
    run: Run, corpus: Corpus, folder: Path, *, device: str = "cpu", progress: Callable[[str], None] = lambda line: None
) -> pd.DataFrame:
    """Do one run: train it, evaluate the model at each budget on minimal pairs, and leave its rows in ``folder``.

    Called again it goes on where it was broken off, or returns the rows. Raises ``InputError`` as `morphlib.training.train`.
    """
    done = folder / DONE
    if done.is_file():
        return _belonging(_read(done), {run.run_id: run}, done)
    from morphlib import evaluation, scores, training

    corpus.require(run.marks[-1])
    rows = training.train(
        run.shape, corpus.train, corpus.held_out, run.marks, run.recipe, folder, device=device, progress=progress
    )
    agreement = evaluation.agreement_task(corpus.tokenizer.decode(corpus.train), N_PAIRS, progress=progress)
    tasks = evaluation.load_tasks(TASKS, [agreement, evaluation.spelling_task(corpus.held_out_texts(), N_PAIRS)])
    found = []
    for row, ratio in zip(rows, run.tokens_per_parameter, strict=True):
        checkpoint = folder / f"model-{row['budget_tokens']}"
        lm = evaluation.open_model(str(checkpoint), device=device, batch=64 if device == "cpu" else 512, progress=progress)
        accuracy: dict[str, Any] = {}
        for record in evaluation.run(lm, tasks, folder=folder / "evaluation", progress=progress):
            score, name = scores.summary(record), record["task"]
            accuracy |= {name: score["value"], f"{name}_error": score["standard_error"], f"{name}_pairs": score["n"]}
            accuracy |= {f"{name}_{part['category']}": part["value"] for part in score.get("categories", [])}
        found.append(
            {"run_id": run.run_id, "part": run.part, "config": run.config, "tokens_per_parameter": ratio}
            | {key: value for key, value in row.items() if key not in ("log", "final_share")}
            | {"name": run.run_id, **accuracy}
            | {"corpus": corpus.digest, "commit": files.commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
            | {"python": platform.python_version(), "transformers": evaluation.versions()["transformers"]}
        )
    table = pd.DataFrame(found)
    with files.replacing(done) as partial:
        table.to_csv(partial, index=False)
    return table


def load(path: Path = TABLE, plan_path: Path = PLAN) -> pd.DataFrame:
    """The rows of a study that belong to its plan, as a run table (`morphlib.runs.load`).

    Two columns are added: the aspect ratio ``R``, and ``fit_study``, 1 for rows that laws may be fitted to: those trained at
    the recipe's learning rate, each model once, and none of the part ``largest``.

    Raises ``InputError`` for a row that does not belong to its plan, for one that is there twice, and for rows of different
    texts.
    """
    known = {run.run_id: run for run in plan(plan_path)}
    _belonging(_read(path), known, path)
    table = runs.load(path)
    given = recipes.quantities(RECIPE)
    ours = (table["learning_rate"] == given["learning_rate"]) & (table["base_width"] == given["base_width"])
    # a tuning run at the recipe's own rate is the first branch of a run to be fitted, where that is there
    own = table[ours & (table["part"] != "largest")].sort_values("part", kind="stable")
    once = own.drop_duplicates(["shape", "tokens", "seed"])
    fits = table.index.isin(once.index)
    return table.assign(R=table["d_model"] / table["n_layers"], fit_study=fits.astype("int64"))


def losses(run_id: str, budget_tokens: int, table: Path = TABLE) -> pd.Series:
    """The training loss of each step of a run up to a budget, in nats per token, z-loss included, to four decimals."""
    chosen = [("run_id", "==", run_id), ("budget_tokens", "==", budget_tokens)]
    return (pd.read_parquet(_losses_of(table), filters=chosen)["loss_1e4"] / 1e4).reset_index(drop=True)


def collect(
    folders: Iterable[Path], table: Path = TABLE, plan_path: Path = PLAN, latencies: Path = LATENCIES
) -> dict[str, Any]:
    """Put the rows of finished jobs into ``table``, and the loss of every step into a file beside it.

    A run that is there already stays. ``latencies`` are measurements (`morphlib.latency.timing`), of which each row takes that
    of its shape. Returns how many runs were added, which the plan still lacks, and how many were trained on what. Nothing is
    written, and ``InputError`` raised, where a row does not belong to the plan or is there twice, and where the texts differ.
    """
    known = {run.run_id: run for run in plan(plan_path)}
    with files.locked(table.with_name(f".{table.name}.lock")):
        old = _belonging(_read(table), known, table) if table.is_file() else pd.DataFrame({"run_id": []})
        rows, curves = [old], []
        if table.is_file():
            kept = pd.read_parquet(_losses_of(table))
            curves.append(kept[kept["run_id"].isin(old["run_id"])])  # a kill can leave losses without their row
        for folder in folders:
            if not (folder / DONE).is_file():
                raise InputError(f"{folder}: holds no finished run, {DONE} is not there; call morph study run for it again")
            found = _belonging(_read(folder / DONE), known, folder / DONE)
            run_id = found["run_id"].iloc[0]
            if (old["run_id"] == run_id).any():
                continue
            rows.append(found)
            for mark in found["budget_tokens"]:
                steps = pd.read_csv(folder / f"losses-{mark}.csv")["loss"]
                told = {"run_id": run_id, "budget_tokens": mark, "loss_1e4": (1e4 * steps).round().astype("int32")}
                curves.append(pd.DataFrame(told))
        merged = pd.concat([part for part in rows if len(part)], ignore_index=True)
        place = merged["run_id"].map({run_id: place for place, run_id in enumerate(known)})
        merged = merged.assign(place=place).sort_values(["place", "tokens"], ignore_index=True).drop(columns="place")
        merged["cpu_latency_s"] = merged["shape"].map(_latencies(latencies))
        _belonging(merged, known, table)
        with files.replacing(_losses_of(table)) as partial:
            pd.concat(curves, ignore_index=True).to_parquet(partial, index=False, compression="zstd")
        with files.replacing(table) as partial:
            merged.to_csv(partial, index=False, float_format="%.6g")
    return {
        "added": int(merged["run_id"].nunique() - old["run_id"].nunique()),
        "left": [run_id for run_id in known if run_id not in set(merged["run_id"])],
        "trained_on": merged.groupby("hardware")["run_id"].nunique().to_dict(),
    }


def _losses_of(table: Path) -> Path:
    return table.with_name(f"{table.stem}_losses.parquet")


def _latencies(path: Path) -> dict[str, float]:
    """The end-to-end latency of each shape, in seconds; of several machines it would be no comparison, and is refused."""
    if not path.is_file():
        return {}
    from morphlib.latency import timing

    table = timing.load(path)
    if table["hardware"].nunique() > 1:
        raise InputError(f"{path}: was measured on {', '.join(table['hardware'].unique())}; measure all shapes on one machine")
    return dict(zip(table["shape"], table["e2e_s"], strict=True))


def forms() -> list[Law]:
    """The laws of the chapters on laws that read no more than N, D, width and depth, each once."""
    names = ["chinchilla", *(f"chinchilla+{term}" for term in laws.SHAPE_TERMS if term != "conditional-ratio")]
    names += ["width-depth", "width-depth-fixed", "gemstones"]
    every = [laws.get(name, mode) for mode in EXPONENTS for name in names]
    return list({(law.name, law.parameters): law for law in every}.values())


def ranked(table: pd.DataFrame, wanted: Sequence[Run], seed: int = 0) -> pd.DataFrame:
    """What each law of `forms` foretells of runs that it has not seen, from the rows that ``fit_study`` marks.

    The rule of choice: hold out one size at a time, fit the others, predict it; of the laws that are determined in every fold
    take the one of least root mean squared error (``error_by_size``, nats per token). One row for each law and run: law,
    exponents, error_by_size, ``weak_folds`` that do not determine it, ``chosen`` (0 or 1), ``rows`` fitted, shape, tokens,
    predicted ``loss`` with a 95 % interval from ``low`` to ``high`` (clustered by shape; the error of the form itself is not
    in it), and ``rank``, 1 for the least loss. The law chosen comes first. Raises ``InputError`` where no law is determined.
    """
    rows = table[table["fit_study"] == 1].reset_index(drop=True)
    if rows.empty or not wanted:
        raise InputError(f"there are {len(rows)} rows to fit and {len(wanted)} runs of the part largest; both are needed")
    compared = diagnostics.compare(rows, forms(), "size", n_resamples=1, seed=seed)
    sound = compared["undetermined"] == 0
    if not sound.any():
        raise InputError("the rows determine no law in every fold of one size left out; train more of the plan")
    compared = pd.concat([compared[sound], compared[~sound]], ignore_index=True)
    new = pd.DataFrame(
        [
            {"n_params": run.shape.n_params("non_embedding"), "tokens": mark, "shape": str(run.shape)}
            | {"d_model": run.shape.d_model, "n_layers": run.shape.n_layers, "n_count": "non_embedding"}
            for run in wanted
            for mark in run.marks
        ]
    )
    found = []
    for place, (name, exponents, error, weak) in enumerate(compared[["law", "exponents", "rmse", "undetermined"]].to_numpy()):
        fit = fitting.fit(rows, laws.get(name, exponents), seed=seed)
        losses = new.assign(loss=fit.predict(new), low=np.nan, high=np.nan)[["loss", "low", "high"]]
        with suppress(InputError):  # a law that the rows do not determine has no interval
            covariance = uncertainty.cluster_covariance(rows, fit, "shape")
            losses = uncertainty.prediction_interval(new, fit, rows, covariance=covariance)
        told = {"law": name, "exponents": exponents, "error_by_size": error, "weak_folds": weak, "chosen": int(place == 0)}
        told["rows"] = len(rows)
        ranks = losses["loss"].rank().astype("int64")
        found.append(new[["shape", "tokens"]].assign(**told, **losses, rank=ranks).sort_values("rank"))
    order = [*told, "shape", "tokens", "loss", "low", "high", "rank"]
    return pd.concat(found, ignore_index=True)[order]


def _read(path: Path) -> pd.DataFrame:
    table = runs.read(path)
    columns = ("run_id", "config", "shape", "seed", "corpus", "budget_tokens", "hardware")
    runs.need(table, columns, path, "it is no table of a study")
    return table


def _belonging(table: pd.DataFrame, known: dict[str, Run], where: Path) -> pd.DataFrame:
    """The table, if each row belongs to its run, each run is whole and none is there twice."""
    for run_id, rows in table.groupby("run_id", sort=False):
        at = f"{where}: row {rows.index[0] + 2}, run {run_id}"
        run = known.get(str(run_id))
        if run is None:
            raise InputError(f"{at}: is not in the plan; remove the row, or put the run back into the plan")
        if (rows["config"] != run.config).any():
            raise InputError(
                f"{at}: was made with the configuration {rows['config'].iloc[0]}, and the plan says {run.config}; "
                "remove the row and do the run again, or give the changed run another name"
            )
        for column, planned in (("shape", str(run.shape)), ("seed", run.recipe.seed)):
            if (rows[column] != planned).any():
                other = rows[column][rows[column] != planned].iloc[0]
                raise InputError(f"{at}: has the {column} {other}, and the plan says {planned}; remove the row")
        if sorted(rows["budget_tokens"]) != run.marks:
            raise InputError(f"{at}: has the budgets {sorted(rows['budget_tokens'])}, not {run.marks}; each must be there once")
    if table["corpus"].nunique() > 1:
        texts = ", ".join(f"{text} ({n} rows)" for text, n in table["corpus"].value_counts().items())
        raise InputError(f"{where}: its rows were trained on different texts, {texts}; do the runs of one again on the other")
    return table

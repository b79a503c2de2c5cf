"""`builder route-eval`, `builder route`, `builder route-diff`, `builder route-replay`, `builder expert add|drop`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from builder.errors import BuildError
from builder.files import default_cache

if TYPE_CHECKING:
    from builder.routing.evaluation import Evaluation, Row
    from routers.features import Features
    from routers.policy import Route

DEFAULT_FEATURES = "smollm2"
"""The demo zoo's base, which a package index has."""
KINDS = ("linear", "ridge", "kmeans", "knn", "mlp", "fixed")

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Cache = Annotated[Path | None, typer.Option(help="Where models and results are kept [MODELGLUE_CACHE].")]
Out = Annotated[Path, typer.Option(help="The new bundle's folder.")]
expert_app = typer.Typer(help="A bundle with one expert more or less.", no_args_is_help=True)


class Detail(StrEnum):
    """How much `route` tells."""

    basic = "basic"
    scores = "scores"
    full = "full"


def route_eval(
    matrix: Annotated[Path, typer.Argument(metavar="MATRIX.jsonl", help="Prompts and every expert's score on each.")],
    features: Annotated[str, typer.Option(help="The model whose token embeddings are used.")] = DEFAULT_FEATURES,
    trunk: Annotated[int, typer.Option(min=0, help="Use its states after so many layers instead.")] = 0,
    encoder: Annotated[Path | None, typer.Option(help="A folder in sentence-transformers' layout instead.")] = None,
    routers: Annotated[str, typer.Option(help="Which routers, with commas.")] = ",".join(KINDS),
    experts: Annotated[str | None, typer.Option(help="Only these experts of the matrix, with commas.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="Fit on MATRIX, score on this one.")] = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts of the cross-validation.")] = 5,
    unseen_tasks: Annotated[bool, typer.Option(help="Also leave out one task at a time.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 42,
    prompt_field: Annotated[str | None, typer.Option(help="The field with the prompt.")] = None,
    task_field: Annotated[str | None, typer.Option(help="The field with the task.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for scorecard.json and scorecard.svg.")] = None,
    as_json: AsJson = False,
    models_dir: Annotated[Path | None, typer.Option(help="A folder that holds models already.")] = None,
    cache: Cache = None,
) -> None:
    """Prove routers on a matrix of scores: cross-validated, and on tasks they never saw."""
    from builder.routing.evaluation import evaluate, hold_out
    from builder.routing.matrix import read
    from builder.routing.plots import plot

    kinds = routers.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise BuildError(f"no router {unknown[0]!r}; there are: {', '.join(KINDS)}")
    found = read(matrix, prompt=prompt_field, task=task_field)
    held = read(holdout, prompt=prompt_field, task=task_field) if holdout else None
    names = experts.split(",") if experts else found.experts
    found, held = found.only(names), held and held.only(names)
    if len(found.prompts) < folds:
        raise BuildError(f"{matrix} has {len(found.prompts)} prompts: too few for {folds} folds")
    space = features_of(features, trunk, encoder, found.prompts, cache or default_cache(), models_dir)
    if held:
        done = hold_out(found, held, space, kinds=kinds, seed=seed)
    else:
        done = evaluate(found, space, kinds=kinds, parts=folds, seed=seed, unseen_tasks=unseen_tasks)
    facts = _facts(done, f"{encoder or features}{f', {trunk} layers' if trunk else ''}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "scorecard.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (out / "scorecard.svg").write_text(plot(done), "utf-8")
    print(json.dumps(facts, indent=2, ensure_ascii=False)) if as_json else _print(done)


def route(
    path: BundlePath,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Route these: JSON lines, or a prompt a line.")] = None,
    detail: Annotated[Detail, typer.Option(help="How much to tell.")] = Detail.scores,
    k: Annotated[int | None, typer.Option(help="Experts to select [the bundle's].")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Only this expert; may be given again.")] = None,
    deny: Annotated[list[str] | None, typer.Option(help="Not this expert; may be given again.")] = None,
    cost_weight: Annotated[float | None, typer.Option(help="What cost counts for [the bundle's].")] = None,
) -> None:
    """Print which expert would answer a prompt, and why, as JSON; of a file's prompts a line each."""
    from routers import bundle
    from routers.explain import explain
    from routers.policy import Limits

    limits = Limits(k, frozenset(allow) if allow else None, frozenset(deny or ()), cost_weight=cost_weight)
    if (prompt is None) == (prompts is None):
        raise BuildError("say one prompt, or --prompts with a file of them")
    read = bundle.read(path)
    for each in [prompt] if prompt is not None else _logged(prompts or Path()):
        facts = explain(read, each, read.router.route(each, limits=limits), limits, detail.value)
        print(json.dumps(facts, indent=2 if prompts is None else None, ensure_ascii=False))


def route_diff(
    path: BundlePath,
    before: Annotated[Path, typer.Argument(metavar="OTHER", help="The bundle to compare with.")],
    log: Annotated[Path, typer.Argument(metavar="LOG", help="Prompts: JSON lines, or a prompt a line.")],
    as_json: AsJson = False,
) -> None:
    """Print which logged prompts go to another expert in OTHER than in BUNDLE."""
    from builder.show import print_table, table
    from routers import bundle

    first, second = bundle.read(path).router, bundle.read(before).router
    prompts = _logged(log)
    changed: list[dict[str, Any]] = []
    for prompt in prompts:
        one, other = first.route(prompt), second.route(prompt)
        if one.expert != other.expert:
            changed.append({"prompt": prompt, "from": one.expert, "to": other.expert, "margins": _margins(one, other)})
    if as_json:
        print(json.dumps({"prompts": len(prompts), "changed": changed}, indent=2, ensure_ascii=False))
        return
    if changed:
        shown = table("prompt", path.name, before.name, "margins")
        for each in changed:
            margins = ", ".join(f"{margin:.3f}" for margin in each["margins"])
            shown.add_row(" ".join(each["prompt"].split())[:120], each["from"], each["to"], margins)
        print_table(shown)
    print(f"{len(changed)} of {len(prompts)} prompts change their expert")


def route_replay(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="What `service --route-log` wrote.")],
    bundle: Annotated[Path, typer.Option(help="The bundle with the new router.")],
    router: Annotated[str | None, typer.Option(help="Fit one of this kind on its routing set instead.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 42,
    as_json: AsJson = False,
) -> None:
    """Print what a new router would have done with logged requests, and what it is worth where there was feedback."""
    from builder.routing.replay import replay
    from routers import bundle as bundles

    done = replay(log, bundles.read(bundle), kind=router, seed=seed)
    print(json.dumps(done.facts(), indent=2) if as_json else "\n".join(done.sentences()))


@expert_app.command()
def add(
    path: BundlePath,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a hub id.")],
    out: Out,
    name: Annotated[str | None, typer.Option(help="What it is called [the folder's name].")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What it is to be asked; may be given again.")] = None,
    tasks_from: Annotated[Path | None, typer.Option(help="The folder of the task files it was scored on.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="A folder that holds models already.")] = None,
    cache: Cache = None,
) -> None:
    """Score a model on the bundle's routing set, fit the routers anew, write a new bundle."""
    from builder.merge.command import locate
    from builder.progress import Terminal
    from builder.routing import edit

    progress, kept = Terminal(), cache or default_cache()
    folder = locate(model, kept, models_dir, progress)
    called = name or folder.resolve().name
    note = edit.add(
        path,
        folder.resolve(),
        out,
        name=called,
        prompts=prompt or (),
        tasks_from=tasks_from,
        cache=kept,
        progress=progress,
    )
    print(f"{note}\n{out} is written, with {called}")


@expert_app.command()
def drop(
    path: BundlePath,
    name: Annotated[str | None, typer.Argument(metavar="[EXPERT]")] = None,
    out: Annotated[Path | None, typer.Option(help="The new bundle's folder.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Only say what each expert is worth.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a new bundle without an expert; or say with --report what each is worth."""
    from builder.routing import edit

    if report:
        _report(edit.worth(path), as_json)
        return
    if name is None or out is None:
        raise BuildError("say which expert and --out, or ask for a --report")
    print(f"{edit.drop(path, name, out)}\n{out} is written, without {name}")


def features_of(
    name: str, trunk: int, encoder: Path | None, texts: Any, cache: Path, models_dir: Path | None
) -> Features:
    """Features by what the command says of them; `texts` decide what they are centred on."""
    import tempfile

    from builder.config import load_zoo
    from builder.merge.command import locate
    from builder.progress import Terminal
    from builder.routing.space import prepare
    from builder.sources import Store

    if encoder is not None:
        model = encoder
    elif name == DEFAULT_FEATURES and not Path(name).exists():
        demo = load_zoo("demo")
        model = Store(demo.model_copy(update={"models": ()}), cache, models_dir).fetch(Terminal())[name].folder
    else:
        model = locate(name, cache, models_dir, Terminal())
    with tempfile.TemporaryDirectory(prefix="modelglue-") as scratch:
        return prepare(Path(scratch), model, texts, trunk=trunk, encoder=encoder)


def _facts(done: Evaluation, features: str) -> dict[str, Any]:
    matrix = done.matrix
    return {
        "prompts": len(matrix.prompts),
        "tasks": len(set(matrix.tasks)),
        "features": features,
        "feature_p50_us": done.feature_p50,
        "singles": done.singles,
        "random": float(matrix.scores_NE.mean()),
        "oracle": float(matrix.scores_NE.max(axis=1).mean()),
        "routers": {row.kind: row.facts() for row in done.rows},
    }


def _print(done: Evaluation) -> None:
    from builder.show import print_table, table

    matrix, pair = done.matrix, any(row.card.apgr is not None for row in done.rows)
    shown = table(
        "router", "mean", "gain (95 %)", "relative", "to oracle", "unseen tasks (95 %)", "ECE", "stays", "bits", "dead",
        "us p50/p99", *(["APGR"] if pair else [])
    )  # fmt: skip
    for row in done.rows:
        shown.add_row(*_cells(row), *([_number(row.card.apgr)] if pair else []))
    print_table(shown)
    singles = ", ".join(f"{name} {score:.4f}" for name, score in sorted(done.singles.items(), key=lambda it: -it[1]))
    scores_NE = matrix.scores_NE
    print(f"always one expert: {singles}; random {scores_NE.mean():.4f}; oracle {scores_NE.max(axis=1).mean():.4f}")
    print(
        f"{len(matrix.prompts)} prompts of {len(set(matrix.tasks))} tasks; a prompt's features take "
        f"{done.feature_p50:.0f} us. Gains are over the expert that is best in hindsight; on unseen tasks over the one "
        "that was best on the others"
    )


def _cells(row: Row) -> tuple[str, ...]:
    card, away = row.card, row.elsewhere
    return (
        row.kind,
        f"{card.routed:.4f}",
        f"{card.gain:+.4f} ({card.gain_low:+.4f} to {card.gain_high:+.4f})",
        f"{100 * card.relative:+.1f} %",
        f"{100 * card.oracle_share:.1f} %",
        f"{away.gain:+.4f} ({away.low:+.4f} to {away.high:+.4f})" if away else "",
        _number(card.calibration_error),
        f"{100 * card.consistency['all']:.1f} %" if card.consistency else "",
        f"{card.entropy_bits:.2f}",
        str(len(card.dead)),
        f"{row.p50:.0f}/{row.p99:.0f}",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _margins(*routes: Route) -> list[float]:
    return [each.margin for each in routes]


def _logged(log: Path) -> list[str]:
    """The prompts of a log: a JSON object a line with a prompt or a chat's messages, or else plain lines."""
    from builder.routing.matrix import PROMPTS

    prompts = []
    for number, line in enumerate(log.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
        except ValueError as exc:
            raise BuildError(f"{log}:{number} is not JSON: {exc}") from exc
        found = next((row[name] for name in PROMPTS if isinstance(row.get(name), str)), None)
        if found is None and isinstance(row.get("messages"), list):
            turns = [str(turn.get("content")) for turn in row["messages"] if turn.get("role") == "user"]
            found = "\n".join(turns[-3:])
        if found is None:
            raise BuildError(f"{log}:{number} has neither a prompt ({', '.join(PROMPTS)}) nor messages")
        prompts.append(found)
    return prompts


def _report(found: Any, as_json: bool) -> None:
    from dataclasses import asdict

    from builder.show import print_table, table

    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    shown = table("expert", "the routed score loses without it", "share of prompts", "GB")
    for each in sorted(found.worth, key=lambda one: -one.loss):
        shown.add_row(each.expert, f"{each.loss:+.4f}", f"{100 * each.share:.1f} %", f"{each.bytes / 1e9:.2f}")
    print_table(shown)
    print(
        f"routing gains {found.gain:+.4f} over the best single expert; {', '.join(found.smallest)} keep "
        f"{found.smallest_gain:+.4f} of it and free {found.freed / 1e9:.2f} GB"
    )

"""The paper's ablations on people of the world, beside the paper's own (its tables 2 and 3, figure 6).

    python -m training.ablations --weights MOTION_WEIGHTS --data distill=FOLDER --data stream=FOLDER --out OUT

trains every variant (`training.variants`) from the weights that phase `motion` has left, in this process, measures all
of them on the same held-out trials (`training.trials`), and writes OUT/ablations.json and OUT/ablations.md. Given again
it goes on where it was stopped. `--distillation-table` writes OUT/distillation.json and .md (`training.few_steps`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stages.errors import BadConfig, UserError
from stages.messages import Floats, Keyframe, Pixels, ReferenceFeatures
from stages.pipeline import STAGE_NETWORKS, Stages, find_device, load_stages
from stages.reference import ReferenceStage
from training import few_steps, measures
from training.answers import answer, reconstruct
from training.evaluate import (
    NUM_IMPOSTORS,
    Instruments,
    Options,
    identity_figures,
    load_instruments,
    reading_figures,
    rounded,
    whole_chunks,
)
from training.handover import digest, start_model
from training.paper import budget_line, compared, markdown
from training.phases.stream import updates_per_clip
from training.probes import BUNDLED
from training.recipes import RECIPES, Recipe, changed, find_recipe
from training.run import assigned, num_processors
from training.trials import FPS, Trial, impostors, trials
from training.variants import Setting, Variant, check_weights, recipe_of, scheduled, train, trained, variants

START_FRAMES = FPS // 2
"""`dB start` is that of the first half second, right behind the transition."""


@dataclass(frozen=True)
class Exam:
    """One held-out trial with what does not depend on the variant."""

    trial: Trial
    ceiling: Pixels
    """(k, s, s, 3) the truth through the autoencoder."""
    looked: dict[str, tuple[Floats, Floats]]
    """What the probes read in the portrait (`static`), the ceiling and the truth: readings and embeddings."""


@dataclass(frozen=True)
class Room:
    """What all variants are measured with."""

    instruments: Instruments
    strangers: tuple[Pixels, Floats]
    exams: list[Exam]
    seed: int


@dataclass(frozen=True)
class CountingReference(ReferenceStage):
    """A reference stage that notes the keyframes it encodes."""

    encoded: list[Keyframe] = field(default_factory=list)

    def keyframe(self, keyframe: Keyframe) -> ReferenceFeatures:
        self.encoded.append(keyframe)
        return super().keyframe(keyframe)


def open_room(setting: Setting, options: Options) -> Room:
    """Draws the trials, as long as whole chunks of `full`. Raises BadWeights."""
    model, instruments = setting.recipe.model, load_instruments(options)
    autoencoder = load_stages(options.weights, ("reference", "decode"), options.device, options.num_threads)
    drawn = trials(options.seed, options.identities, whole_chunks(Stages(model), options.seconds), model)
    bar = tqdm(drawn, total=options.identities, desc="drawing trials", unit="identity", leave=False)
    exams = [prepared(autoencoder, instruments, trial) for trial in bar]
    return Room(instruments, impostors(options.seed, NUM_IMPOSTORS, model), exams, options.seed)


def prepared(autoencoder: Stages, instruments: Instruments, trial: Trial) -> Exam:
    """A trial with its ceiling, and what there is to read in both."""
    ceiling = reconstruct(autoencoder, trial.truth)
    static = np.repeat(trial.portrait[None], len(trial.truth), 0)
    seen = {"static": static, "ceiling": ceiling, "truth": trial.truth}
    looked = {name: instruments.probes.look(frames, trial.shown_motions) for name, frames in seen.items()}
    return Exam(trial, ceiling, looked)


def examined(stages: Stages, exam: Exam, room: Room) -> dict[str, float]:
    """All figures of one model in one trial, another person driving."""
    trial, distance = exam.trial, room.instruments.distance
    counting = CountingReference(*(getattr(stages.reference, part.name) for part in fields(ReferenceStage)))
    shown = answer(replace(stages, reference=counting), trial.portrait, trial.driving, room.seed)
    looked = exam.looked | {"cross": room.instruments.probes.look(shown, trial.shown_motions)}
    return {
        "psnr_db": measures.psnr(shown, trial.truth),
        "psnr_face_db": measures.face_psnr(shown, trial.truth, trial.face_boxes),
        "psnr_start_db": measures.psnr(shown[:START_FRAMES], trial.truth[:START_FRAMES]),
        "perceptual": measures.perceptual(shown, trial.truth, distance),
        "sharpness": measures.sharpness(shown, exam.ceiling),
        "flicker": measures.flicker(shown, trial.truth),
        "tlp": measures.tlp(shown, trial.truth, distance),
        "num_keyframes": float(len(counting.encoded)),
        **reading_figures({name: readings for name, (readings, _) in looked.items()}),
        **identity_figures(room.instruments.probes, trial, looked, room.strangers),
    }


def with_window(stages: Stages, window: Mapping[str, Any]) -> Stages:
    """The same networks with other fields of the window's config."""
    config = replace(stages.config, window=replace(stages.config.window, **window))
    return Stages(config, **{name: replace(getattr(stages, name), config=config) for name in STAGE_NETWORKS})


def evaluated(
    variant: Variant, weights: Path, options: Options, room: Callable[[], Room], out: Path
) -> list[dict[str, float]]:
    """A variant's figures per trial; from `out`, without a room, where they are those of these weights and options."""
    asked = {part: getattr(options, part) for part in ("identities", "seconds", "seed")}
    asked |= {"weights": digest(weights), "window": dict(variant.window), "probes": _probes_digest()}
    path = out / variant.name / "evaluation.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("of") != asked:
        stages = load_stages(str(weights), device=options.device, num_threads=options.num_threads)
        stages = with_window(stages, variant.window)
        bar = tqdm(room().exams, desc=f"{variant.name}, evaluation", unit="identity", leave=False)
        known = {"of": asked, "trials": [examined(stages, exam, room()) for exam in bar]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n")
    found: list[dict[str, float]] = known["trials"]
    return found


def _probes_digest() -> str:
    """Names what reads the answers: figures by other probes cannot be compared."""
    return hashlib.blake2b(BUNDLED.read_bytes(), digest_size=8).hexdigest()


def report_of(setting: Setting, options: Options, found: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Everything that was measured, with the budget it was trained by: what ablations.json holds."""
    every, recipe = variants(setting.recipe), setting.recipe
    rows = {}
    for name, figures in found.items():
        own = recipe_of(every[name], recipe)
        budget = {"num_stream_steps": own.stream.num_steps} if "full/stream" not in every[name].chain else {}
        rows[name] = {"difference": every[name].difference, **budget, **compared(name, figures, found["full"])}
    report = {
        "recipe": recipe.name,
        "set": dict(setting.changes),
        "num_distill_steps": recipe.distill.num_steps,
        "num_stream_steps": recipe.stream.num_steps,
        "num_stream_updates": recipe.stream.num_steps * updates_per_clip(recipe.stream, recipe.model.window),
        "identities": options.identities,
        "seconds": options.seconds,
        "seed": options.seed,
        "variants": rows,
    }
    values: dict[str, Any] = rounded(report)
    return values


def setting_of(args: argparse.Namespace) -> Setting:
    """What the command asks for. Raises UserError."""
    if args.identities < 1 or args.seconds <= 0 or args.seed < 0 or args.threads < 1:
        raise BadConfig("--identities and --threads must be at least 1, --seconds above 0, --seed 0 or more")
    weights = args.weights.resolve()
    check_weights(weights)
    changes = assigned(args.set)
    recipe = find_recipe(args.recipe, changes | {"seed": args.seed})
    recipe = replace(recipe, model=start_model(recipe.model, weights))
    for phase, config, num_steps in (
        ("distill", recipe.distill, args.distill_steps),
        ("stream", recipe.stream, args.stream_steps),
    ):
        if num_steps is not None and num_steps < 1:
            raise BadConfig(f"--{phase}-steps must be at least 1")
        recipe = changed(recipe, scheduled(config, phase, num_steps or config.num_steps))
    data, out, device = tuple(args.data), args.out.resolve(), find_device(args.device)
    return Setting(recipe, weights, data, out, args.threads, device, changes)


def chosen(args: argparse.Namespace, recipe: Recipe) -> list[Variant]:
    """The variants to make: all, or `full` and those named. Raises BadConfig."""
    every = variants(recipe)
    unknown = sorted(set(args.only or ()) - set(every))
    if unknown:
        raise BadConfig(f"variant {unknown[0]!r} is unknown: give of {', '.join(every)}")
    return [variant for name, variant in every.items() if not args.only or name in ("full", *args.only)]


def run(args: argparse.Namespace) -> str:
    """Trains, measures and writes; returns what is printed. Raises UserError."""
    setting = setting_of(args)
    options = Options(
        str(setting.weights), args.identities, args.seconds, args.seed, device=args.device, num_threads=args.threads
    )
    if args.distillation_table:
        return distillation_table(setting, options, args.json)
    wanted = chosen(args, setting.recipe)
    print(budget_line(report_of(setting, options, {})), file=sys.stderr)
    found: dict[str, list[dict[str, float]]] = {}
    room = cache(partial(open_room, setting, options))
    for variant in tqdm(wanted, desc="ablations", unit="variant"):
        weights = trained(variant, setting)
        found[variant.name] = evaluated(variant, weights, options, room, setting.out)
        report = report_of(setting, options, found)
        write(setting.out, "ablations", report, markdown(report))
    return json.dumps(report) if args.json else markdown(report)


def distillation_table(setting: Setting, options: Options, as_json: bool) -> str:
    """Trains `full`'s phase `distill`, unless it is there, and measures few steps before and after it."""
    torch.set_num_threads(setting.num_threads)
    after = train(variants(setting.recipe)["full"], "distill", setting.weights, setting)
    distance = load_instruments(options).distance
    rows = few_steps.table(setting.recipe, setting.weights, after, options.identities, distance, setting.device)
    report = {
        "recipe": setting.recipe.name,
        "num_distill_steps": setting.recipe.distill.num_steps,
        "identities": options.identities,
        "seed": options.seed,
        "rows": [asdict(row) for row in rows],
    }
    text = few_steps.markdown(rows)
    write(setting.out, "distillation", rounded(report), text)
    return json.dumps(rounded(report)) if as_json else text


def write(out: Path, name: str, report: Mapping[str, Any], text: str) -> None:
    """OUT/NAME.json and OUT/NAME.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / f"{name}.md").write_text(text + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    result = argparse.ArgumentParser(prog="python -m training.ablations", description=(__doc__ or "").splitlines()[0])
    add = result.add_argument
    add("--weights", required=True, type=Path, help="weights folder that phase motion has left, with all networks")
    add("--data", required=True, action="append", help="a data folder, or PHASE=FOLDER; may be given several times")
    add("--out", required=True, type=Path, help="folder for weights and tables; given again, the work goes on from it")
    add("--recipe", default="tiny", help=f"one of {', '.join(RECIPES)} (default tiny)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another field of the recipe, by dotted name")
    add("--distill-steps", type=int, help="budget of phase distill, instead of the recipe's")
    add("--stream-steps", type=int, help="budget of full's phase stream; the others make as many updates")
    add("--identities", type=int, default=8, help="how many held-out trials (default 8)")
    add("--seconds", type=float, default=6.0, help="length of each (default 6)")
    add("--seed", type=int, default=0, help="of training and trials (default 0)")
    add("--only", nargs="+", metavar="NAME", help="only full and these variants")
    add("--distillation-table", action="store_true", help="instead: few steps before and after phase distill")
    add("--json", action="store_true", help="print only the JSON")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--threads", type=int, default=num_processors(), help="of torch (default: this process's processors)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parser().parse_args(argv)
    try:
        text = run(args)
    except UserError as error:
        print(f"error ({error.code}): {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The studies: rows are recipes that differ from the bundled one in what is said here, and in nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Overrides = Mapping[str, Any]

FULL = {"sizes": [[128, 128]], "thresholds": []}
THREE = [[32, 32], [64, 64], [128, 128]]
# SwD's four steps on the bundled sizes: a size a step, and more noise at the end than an even spacing has
SCALES = [[64, 64], [80, 80], [96, 96], [128, 128]]
SWD_TIMESTEPS = [1000.0, 896.0, 737.0, 602.0]


@dataclass(frozen=True)
class Row:
    """One line of a table: sections of the bundled recipe, changed.

    kind: `student` trains the recipe; `naive` runs the base network, guided, through the recipe's ladder; `teacher` is the
    base network at full length; `noised` lets the teacher finish real images noised as `strategy` says · updates: where they
    are not the study's · begin: a row with its own number of updates, whose student this row goes on from · series: the line
    of the study's figure that this row is a point of.
    """

    name: str
    changes: Overrides = field(default_factory=dict)
    kind: Literal["student", "naive", "teacher", "noised"] = "student"
    strategy: str = ""
    timestep: float = 0.0
    updates: int | None = None
    begin: Row | None = None
    series: str = ""


@dataclass(frozen=True)
class Claim:
    """An ordering the paper shows: `better` beats `worse` in a figure (higher is better but for FID)."""

    better: str
    worse: str
    figure: str = "prompt_accuracy"


@dataclass(frozen=True)
class Study:
    """A table: its rows, the orderings it should show, how many updates each row gets and what to know when reading it.

    unseen: judged by a second judge, which no training sees; the bundled one, which then may be a reward, beside it · drawn:
    figures whose course over the updates is drawn.
    """

    title: str
    source: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    updates: int
    note: str = ""
    unseen: bool = False
    drawn: tuple[str, ...] = ()


def method(name: str, **settings: Any) -> dict[str, Any]:
    """A method section with the bundled teacher's guidance."""
    return {"method": {"name": name, "guidance_scale": 4.0, **settings}}


def rmd(**settings: Any) -> dict[str, Any]:
    """RMD as the bundled recipe has it, with some settings changed."""
    return method("rmd", **{"alpha": 0.2, "inference_alpha": 0.2, "warmup_steps": 5, **settings})


def full(name: str, **settings: Any) -> dict[str, Any]:
    """A method at full resolution, in four steps spaced as the bundled teacher's."""
    return {**method(name, **settings), "ladder": {**FULL, "spacing": 3.0}}


def swd(scales: list[list[int]] = SCALES, allocation: tuple[int, ...] = (1, 1, 1, 1), **settings: Any) -> dict[str, Any]:
    """SwD on its own timesteps, on teacher-made images."""
    ladder = {"sizes": scales, "timesteps": SWD_TIMESTEPS, "allocation": list(allocation), "thresholds": [], "shift": "none"}
    return {**method("swd", **settings), "ladder": ladder, "data": {"prompts": None, "images": "images"}}


TEACHER = Row("teacher, 28 steps, guided", kind="teacher")
NAIVE = Row("naive cascade 2+2", kind="naive")
RMD = Row("RMD 2+2", rmd())
DMD2 = Row("DMD2, 4 steps", full("dmd2"))
TDM = Row("TDM, 4 steps", full("tdm"))
SWD = Row("SwD, 4 scales", swd())


def _mixing() -> tuple[Row, ...]:
    rows = []
    for alpha in (0.0, 0.2, 0.5, 1.0):
        rows.append(Row(f"alpha {alpha:g}", rmd(alpha=alpha)))
        # without predicted noise there is no variance to undo: that row is the one above
        if alpha:
            rows.append(Row(f"alpha {alpha:g}, variance kept", rmd(alpha=alpha, preserve_variance=True)))
    return tuple(rows)


def _divided(sizes: list[list[int]], thresholds: list[float], **settings: Any) -> dict[str, Any]:
    return {**rmd(**settings), "ladder": {"sizes": sizes, "thresholds": thresholds}}


# the gradient of MMD at weight 1 is 0.004 on the bundled teacher, that of matching 0.1: its features are small
MMD_WEIGHT = 25.0
TWO_FAKE = "Two fake-score updates for each of the student's, not five, to train more students in the same time."
RL_NOTE = (
    "DMD2 in four full-size steps, distilled for 160 updates, then further in each of these ways, with two fake-score updates for "
    "each of the student's. The reward is the bundled judge's; the other figures are a second one's, which no training saw."
)
TWO = [[64, 64], [128, 128]]
SMALL = {"sizes": [[64, 64]], "thresholds": []}
ONE_RUNG = Row("0+4, one rung", {**rmd(), "ladder": FULL})
THREE_RUNGS = {
    "1+1+2": Row("32 → 64 → 128 px, 1+1+2", _divided(THREE, [-6.0, -3.5])),
    "1+2+1": Row("32 → 64 → 128 px, 1+2+1", _divided(THREE, [-6.0, -2.5])),
    "2+1+1": Row("32 → 64 → 128 px, 2+1+1", _divided(THREE, [-3.5, -2.5])),
}
NOISED = tuple(
    Row(f"{letter}, t = {timestep}: {words}", kind="noised", strategy=letter, timestep=timestep)
    for timestep in (400, 600, 800)
    for letter, words in (("A", "noise"), ("B", "shrink, enlarge, noise"), ("C", "shrink, noise, enlarge"))
)


def _better(row: str, others: Sequence[str], *figures: str) -> tuple[Claim, ...]:
    return tuple(Claim(row, other, figure) for other in others for figure in figures or ("prompt_accuracy", "fid"))


JUDGE = [{"name": "judge"}]
DISTILLED, REWARDED, HACKED = 160, 200, 280
# beside the distillation, weights of the running norms of gradients: ReFL's is nothing in most batches and a lot in those that miss
# a shape; alone, of the losses, so that gradients are about as long
BALANCED = {"refl": 30.0, "dpo": 3.0, "grpo": 10.0}
RAW = {"refl": 1.0, "dpo": 0.1, "grpo": 100.0}


def _over(row: Row, *updates: int) -> tuple[Row, ...]:
    """A row after several numbers of updates: a line of the study's figure."""
    return tuple(replace(row, name=f"{row.name}, {count} updates", series=row.name, updates=count) for count in updates)


def _rewarded(algorithm: str, alone: bool = False) -> dict[str, Any]:
    weight = (RAW if alone else BALANCED)[algorithm]
    return {"rl": {"algorithm": algorithm, "rewards": JUDGE, "weight": weight, "alone": alone, "beta": 200.0, "group": 3}}


# one leap, so that the student has far to go: in four full-size steps the untrained network, unguided, gets three captions of four
# right already, and there is nothing to start
LEAP = {"sizes": [[32, 32], [128, 128]], "steps": 2, "spacing": 1.0, "thresholds": [], "allocation": [1, 1]}
LEANING, BIASED = {"updates": 60, "real_scale": 0.5, "renoise_bias": 1.0}, {"renoise_bias": 4.0}
STATIC = {"real_scale_dynamic": False, "renoise_bias_dynamic": False}
COLD_STARTS = {
    "vanilla": None,
    "DynaDG": LEANING,
    "DynaDG + DynaRS": {**LEANING, **BIASED},
    "both, static": {**LEANING, **BIASED, **STATIC},
}
COLD_UPDATES = (20, 40, 60)
ALGORITHMS = {"refl": "ReFL", "dpo": "DPO", "grpo": "GRPO"}
INIT = Row("DMD2, where all begin", full("dmd2"), updates=DISTILLED)
CONTINUED = Row("distillation only", full("dmd2", fake_updates=2), begin=INIT)
BOTH = {
    key: Row(f"distillation + {name}", full("dmd2", fake_updates=2, **_rewarded(key)), begin=INIT)
    for key, name in ALGORITHMS.items()
}
ALONE = {
    key: Row(f"{name} only", full("dmd2", fake_updates=2, **_rewarded(key, alone=True)), begin=INIT)
    for key, name in ALGORITHMS.items()
}
LEAST = replace(THREE_RUNGS["2+1+1"], name="RMD 2+1+1", updates=DISTILLED)
RMD_RL = {
    name: Row(f"{begin.name} + ReFL", {**begin.changes, **rmd(**_rewarded("refl"))}, begin=begin)
    for name, begin in (("2+2", replace(RMD, updates=DISTILLED)), ("2+1+1", LEAST))
}
STUDIES = {
    "methods": Study(
        "Methods side by side",
        "RMD Table 1",
        (TEACHER, NAIVE, DMD2, TDM, SWD, RMD),
        _better(RMD.name, (DMD2.name, TDM.name, NAIVE.name)),
        160,
        "DMD2 and TDM take four steps at full size, with the teacher's own spacing, where TDM learns better on training captions; "
        "RMD's spacing was chosen on them too. All rows train for the same number of student updates; DMD2 and SwD make five "
        "fake-score updates for each. SwD alone sees images: 1,024 of the teacher's.",
    ),
    "components": Study(
        "What matching and upsampling each bring",
        "RMD Table 3",
        (
            Row("64 px, neither", {"ladder": SMALL}, "naive"),
            Row("64 px, matching", {**rmd(), "ladder": SMALL}),
            Row("64 → 128 px, upsampling (naive cascade)", kind="naive"),
            Row("64 → 128 px, both (RMD 2+2)", rmd()),
        ),
        (
            *_better("64 px, matching", ("64 px, neither",)),
            *_better(
                "64 → 128 px, both (RMD 2+2)", ("64 → 128 px, upsampling (naive cascade)", "64 px, matching", "64 px, neither")
            ),
        ),
        60,
        "Pictures of 64 px are enlarged (bicubic) before they are judged.",
    ),
    "mixing": Study(
        "How much predicted noise to mix in while training",
        "RMD Figure 8",
        _mixing(),
        _better("alpha 0.2", ("alpha 0", "alpha 0.5", "alpha 1")),
        60,
        "Alpha of the loss (Eq. 10); the sampler mixes 0.2 in every row. With alpha 0 there is no predicted noise whose variance "
        "could be kept.",
    ),
    "allocation": Study(
        "How many steps to take small",
        "RMD Table 4",
        (
            ONE_RUNG,
            Row("1+3", _divided(TWO, [-6.0])),
            Row("2+2", rmd()),
            Row("3+1", _divided(TWO, [-2.5])),
        ),
        (*_better("2+2", ("3+1", ONE_RUNG.name)), *_better("1+3", ("3+1",))),
        60,
    ),
    "stages": Study(
        "Three resolutions",
        "RMD Table 5",
        (ONE_RUNG, NAIVE, RMD, *THREE_RUNGS.values()),
        (
            *_better(RMD.name, (NAIVE.name, ONE_RUNG.name)),
            *_better(RMD.name, [row.name for row in THREE_RUNGS.values()], "prompt_accuracy"),
            *_better(THREE_RUNGS["1+1+2"].name, (THREE_RUNGS["2+1+1"].name,), "prompt_accuracy"),
        ),
        60,
    ),
    "shift": Study(
        "How a low rung's timestep is shifted",
        "RMD Eq. 2 and Table 6",
        (
            Row("Table 6", rmd()),
            Row("Eq. 2 as printed", {"ladder": {"shift": "printed"}}),
            Row("none", {"ladder": {"shift": "none"}}),
        ),
        _better("Table 6", ("Eq. 2 as printed", "none")),
        60,
    ),
    "mmd": Study(
        "What the MMD term brings",
        "SwD Table 6",
        (
            Row("full", swd(fake_updates=2, mmd={"weight": MMD_WEIGHT})),
            Row("MMD alone", swd(matching_weight=0.0, gan=None)),
            Row("without MMD", swd(fake_updates=2, mmd=None)),
            Row("RBF kernel", swd(fake_updates=2, mmd={"kernel": "rbf", "bandwidth": 15.0, "weight": MMD_WEIGHT})),
            Row("averaged over the batch", swd(fake_updates=2, mmd={"pool": "batch", "weight": MMD_WEIGHT})),
            Row("features without noise", swd(fake_updates=2, mmd={"timesteps": [0.0, 0.0], "weight": MMD_WEIGHT})),
        ),
        _better("full", ("MMD alone", "without MMD", "averaged over the batch", "features without noise")),
        40,
        TWO_FAKE,
    ),
    "scales": Study(
        "Growing against constant scales",
        "SwD Table 9",
        (
            Row("64, 80, 96, 128", swd(fake_updates=2)),
            Row("96, 96, 96, 128", swd([[96, 96], [128, 128]], (3, 1), fake_updates=2)),
            Row("64, 64, 64, 128", swd(TWO, (3, 1), fake_updates=2)),
        ),
        _better("64, 80, 96, 128", ("96, 96, 96, 128", "64, 64, 64, 128")),
        40,
        TWO_FAKE + " The bundled teacher has learned pictures of 64 and 128 px and nothing between.",
    ),
    "upscaling": Study(
        "Enlarge the picture and then add noise, or the other way round",
        "SwD Table 1",
        NOISED,
        tuple(
            claim
            for timestep in (400, 600, 800)
            for claim in _better(f"B, t = {timestep}: shrink, enlarge, noise", (f"C, t = {timestep}: shrink, noise, enlarge",))
        ),
        0,
        "Renders of held-out captions, noised to t; the teacher draws on from there.",
    ),
    "cold-start": Study(
        "Cold starts",
        "DMDR Table 4",
        tuple(
            row
            for name, start in COLD_STARTS.items()
            for row in _over(Row(name, {**rmd(cold_start=start), "ladder": LEAP, "training": {"ema_decay": 0.9}}), *COLD_UPDATES)
        ),
        tuple(
            claim
            for updates in COLD_UPDATES[1:]
            for better, worse in (
                ("DynaDG", "vanilla"),
                ("DynaDG + DynaRS", "vanilla"),
                ("DynaDG + DynaRS", "DynaDG"),
                ("DynaDG + DynaRS", "both, static"),
            )
            for claim in _better(f"{better}, {updates} updates", (f"{worse}, {updates} updates",), "prompt_accuracy")
        ),
        COLD_UPDATES[-1],
        "RMD from 32 to 128 px in two steps. A student of four full-size steps needs no cold start here: untrained and unguided it "
        "gets three captions of four right already.",
        drawn=("prompt_accuracy", "fid"),
    ),
    "rl": Study(
        "Distillation, rewards, and both",
        "DMDR Table 5",
        (TEACHER, INIT, CONTINUED, *ALONE.values(), *BOTH.values()),
        (
            *_better(BOTH["refl"].name, (TEACHER.name, CONTINUED.name), "prompt_accuracy"),
            *(claim for key in ALGORITHMS for claim in _better(BOTH[key].name, (ALONE[key].name,))),
            *_better(CONTINUED.name, [row.name for row in ALONE.values()], "fid"),
            *_better(ALONE["refl"].name, (INIT.name,), "reward"),
        ),
        REWARDED,
        RL_NOTE,
        unseen=True,
    ),
    "hacking": Study(
        "Rewards against an unseen judge over training",
        "DMDR Figure 10",
        (
            TEACHER,
            INIT,
            *(row for base in (ALONE["refl"], BOTH["refl"]) for row in _over(base, REWARDED, HACKED)),
        ),
        (
            *_better(f"{ALONE['refl'].name}, {HACKED} updates", (INIT.name,), "reward"),
            *_better(INIT.name, (f"{ALONE['refl'].name}, {HACKED} updates",)),
            *_better(
                f"{BOTH['refl'].name}, {HACKED} updates", (TEACHER.name, INIT.name, f"{ALONE['refl'].name}, {HACKED} updates")
            ),
        ),
        HACKED,
        RL_NOTE,
        unseen=True,
        drawn=("reward", "trained_judge", "prompt_accuracy", "fid"),
    ),
    "diversity": Study(
        "Diversity",
        "DMDR Table 6",
        (TEACHER, replace(CONTINUED, name="DMD2"), replace(BOTH["refl"], name="DMDR (ReFL)")),
        (*_better(TEACHER.name, ("DMD2", "DMDR (ReFL)"), "diversity"), Claim("DMD2", "DMDR (ReFL)", "diversity")),
        REWARDED,
        RL_NOTE,
        unseen=True,
    ),
    "rmd-rl": Study(
        "RMD with rewards",
        "nobody's table yet",
        (TEACHER, replace(INIT, name=DMD2.name), replace(RMD, updates=DISTILLED), LEAST, *RMD_RL.values()),
        (
            *_better(RMD_RL["2+2"].name, (TEACHER.name, RMD.name, DMD2.name)),
            *_better(RMD_RL["2+1+1"].name, (TEACHER.name, LEAST.name, DMD2.name)),
        ),
        (REWARDED + HACKED) // 2,
        f"Rows without ReFL trained for {DISTILLED} updates, those with it go on from there to {(REWARDED + HACKED) // 2}. The "
        "reward is the bundled judge's; the other figures are a second one's, which no training saw.",
        unseen=True,
    ),
}

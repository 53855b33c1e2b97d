"""`stepladder reproduce`: tables that resume, claims that are judged, rows that are what they say."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from stepladder.cli.main import _register, app
from stepladder.errors import UserError
from stepladder.methods import methods
from stepladder.reporting.figures import curves_figure
from stepladder.reporting.study import HEADINGS
from stepladder.reproduction.runner import Bench, _adopt, judge_claim, reproduce, run_row, sampler_of, summary
from stepladder.reproduction.studies import STUDIES, TEACHER, Claim, Row, Study, rmd, swd
from stepladder.training.trainer import latest_state

ROWS = [(name, row) for name, study in STUDIES.items() for row in study.rows]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("work"), count=16, updates=1)


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_claims_name_rows_of_their_study(name):
    study = STUDIES[name]
    names = [row.name for row in study.rows]
    assert len(set(names)) == len(names)
    assert all({claim.better, claim.worse} <= set(names) for claim in study.claims)
    assert study.claims


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}-{row.name}" for name, row in ROWS])
def test_every_row_is_a_valid_recipe_with_a_ladder(name, row, tmp_path):
    bench = Bench(tmp_path, 16)
    # the teacher's pictures are not drawn for this
    vars(bench)["images"] = tmp_path
    recipe = bench.recipe(row, 0, STUDIES[name].updates)
    ladder = recipe.ladder.build(bench.backbone)
    if row.kind == "student":
        assert len(ladder.steps) == (2 if name == "cold-start" else 4)
        assert recipe.method["guidance_scale"] == 4.0


def test_rows_that_name_an_allocation_have_it(bench):
    for name, study in STUDIES.items():
        for row in study.rows:
            said = row.name.rsplit(" ", 1)[-1].rstrip(")")
            if row.kind == "student" and "+" in said and not said.startswith("0"):
                vars(bench)["images"] = bench.folder
                assert bench.recipe(row, 0, 1).ladder.build(bench.backbone).allocation() == said, (name, row.name)
    vars(bench).pop("images", None)


def test_all_methods_are_compared():
    compared = {row.changes["method"]["name"] for row in STUDIES["methods"].rows if "method" in row.changes}
    assert compared == set(methods())


def test_the_teacher_is_guided_at_full_length_and_students_are_not(bench):
    teacher = sampler_of(bench, TEACHER, bench.recipe(TEACHER, 0, 1), None)
    assert len(teacher.ladder.steps) == 28
    assert teacher.guidance_scale == 4.0
    row = Row("x", rmd())
    assert sampler_of(bench, row, bench.recipe(row, 0, 1), None).guidance_scale == 1.0
    row = Row("x", rmd(), "naive")
    assert sampler_of(bench, row, bench.recipe(row, 0, 1), None).guidance_scale == 4.0


def runs(*values):
    return [{"prompt_accuracy": value, "fid": 1 - value} for value in values]


def test_claims_are_judged_by_twice_the_standard_error():
    rows = {"a": runs(0.90, 0.91, 0.92), "b": runs(0.80, 0.81, 0.82), "c": runs(0.85, 0.91, 0.94)}
    assert judge_claim(Claim("a", "b"), rows)["verdict"] == "holds"
    assert judge_claim(Claim("b", "a"), rows)["verdict"] == "does not hold"
    assert judge_claim(Claim("a", "c"), rows)["verdict"] == "not told apart"
    assert judge_claim(Claim("a", "b", "fid"), rows)["verdict"] == "holds"
    assert judge_claim(Claim("a", "b"), {name: found[:1] for name, found in rows.items()})["verdict"] == "one seed tells nothing"
    judged = judge_claim(Claim("a", "b"), rows)
    assert judged["difference"] == pytest.approx(0.1)
    assert judged["standard_error"] == pytest.approx((2 * 0.0001 / 3) ** 0.5)
    assert summary(rows["a"])["prompt_accuracy"] == {"mean": pytest.approx(0.91), "spread": pytest.approx(0.01)}


def test_a_table_resumes_from_its_file_without_the_work_folder(bench, tmp_path):
    study = Study("t", "s", (Row("naive", kind="naive"), Row("rmd", rmd())), (Claim("rmd", "naive"),), 1)
    told = []
    first = reproduce("t", study, bench, [0, 1], tmp_path, "cmd", told.append)
    assert len(told) == 4
    assert first["claims"][0]["verdict"]
    assert all(row["seconds_an_image"] > 0 for row in first["rows"])
    elsewhere = Bench(bench.folder / "elsewhere", 16, 1)
    vars(elsewhere)["backbone"] = bench.backbone
    again = reproduce("t", study, elsewhere, [0, 1], tmp_path, "cmd", told.append)
    assert not (elsewhere.folder / "runs").exists()
    vars(elsewhere)["teacher"] = "another"
    with pytest.raises(UserError, match="begun with something else"):
        reproduce("t", study, elsewhere, [0], tmp_path, "cmd", told.append)
    assert [row["runs"] for row in again["rows"]] == [row["runs"] for row in first["rows"]]


def test_noised_images_are_finished_by_the_teacher(bench):
    study = STUDIES["upscaling"]
    figures = run_row(bench, study, study.rows[0], 0)
    assert 0 <= figures["prompt_accuracy"] <= 1
    assert figures["nfe"] < 56


def test_the_command_draws_a_page(tmp_path, monkeypatch):
    small = Study("Title", "RMD", (Row("naive", kind="naive"), Row("swd", swd())), (Claim("swd", "naive"),), 1)
    monkeypatch.setitem(STUDIES, "small", small)
    monkeypatch.setattr("stepladder.reproduction.runner.IMAGES", 4)
    monkeypatch.setattr("stepladder.reproduction.runner.BUNDLED_STEPS", 2)
    _register()
    options = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--seeds", "0,1", "--count", "16"]
    result = CliRunner().invoke(app, ["reproduce", "small", *options])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "small.html").read_text()
    assert page.count("data:image/png") == 2
    assert "±" in page
    assert len(json.loads((tmp_path / "out" / "small.json").read_text())["rows"][1]["runs"]) == 2


def test_wrong_names_and_seeds_are_named():
    _register()
    for arguments, words in (
        (["nothing"], "choose one of"),
        (["shift", "--seeds", "1,a"], "whole numbers"),
        (["shift", "--seeds", "1,1"], "twice"),
    ):
        result = CliRunner().invoke(app, ["reproduce", *arguments])
        assert isinstance(result.exception, UserError)
        assert words in str(result.exception)


def test_an_unseen_judge_judges_beside_the_one_that_rewards(bench, monkeypatch):
    monkeypatch.setattr("stepladder.reproduction.runner.SECOND_JUDGE_UPDATES", 2)
    rewarded = rmd(rl={"algorithm": "refl", "rewards": [{"name": "judge"}]})
    study = Study("t", "s", (Row("a", rewarded), Row("b", rewarded, updates=2)), (Claim("a", "b"),), 1, unseen=True)
    vars(bench)["updates"] = None
    try:
        figures = [run_row(bench, study, row, 0) for row in study.rows]
    finally:
        vars(bench)["updates"] = 1
    # a judge of two updates knows nothing
    assert figures[0]["prompt_accuracy"] < 0.3
    assert set(figures[0]) >= {"trained_judge", "fid", "diversity"}
    # the longer row continued the shorter one's run
    assert len(list((bench.folder / "runs").rglob("update-0000002.safetensors"))) == 1
    assert (bench.folder / "second-judge.safetensors").exists()


def test_rows_that_begin_with_anothers_student_go_on_from_it(bench):
    first = Row("first", rmd(), updates=1)
    rewarded = rmd(rl={"algorithm": "refl", "rewards": [{"name": "judge"}]})
    second = Row("second", rewarded, begin=first)
    study = Study("t", "s", (first, second), (Claim("first", "second"),), 2)
    assert (bench.length(first, study), bench.length(second, study)) == (1, 2)
    figures = [run_row(bench, study, row, 5) for row in study.rows]
    assert figures[0]["key"].split("-")[1] in figures[1]["key"].split("-after-")[1]
    recipe = bench.recipe(second, 5, 2)
    state, _ = latest_state(bench.run_folder(second, recipe))
    before, _ = latest_state(recipe.training.start_from)
    assert (before["update"], state["update"]) == (1, 2)
    # Adam's count of steps went on as well
    assert state["optimizers"]["student"]["state"][0]["step"].item() == 2


def test_the_course_over_updates_is_drawn(tmp_path):
    figures = [{"mean": 0.5, "spread": 0.1}, {"mean": 0.7, "spread": 0.0}]
    rows = [
        {"name": f"a {n}", "series": "a" if n else "", "after": n, "fid": figures[n % 2], "prompt_accuracy": figures[n % 2]}
        for n in range(3)
    ]
    drawn = curves_figure({"rows": rows, "drawn": ["fid", "prompt_accuracy"]}, HEADINGS)
    assert [axes.get_title() for axes in drawn.axes] == ["FID", "prompts right"]
    line = drawn.axes[0].containers[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [0.7, 0.5])
    level = next(line for line in drawn.axes[0].lines if line.get_linestyle() == ":")
    assert set(level.get_ydata()) == {0.5}


def test_figures_of_another_teacher_are_not_taken(bench, tmp_path):
    naive = Row("naive", kind="naive")
    study = Study("t", "s", (naive,), (), 1)
    reproduce("t", study, bench, [0], tmp_path / "out", "cmd", lambda words: None)
    path = tmp_path / "out" / "t.json"
    key = json.loads(path.read_text())["rows"][0]["runs"][0]["key"]
    for teacher, adopted in ((bench.teacher, True), ("another", False)):
        found = json.loads(path.read_text()) | {"teacher": teacher}
        path.write_text(json.dumps(found))
        elsewhere = Bench(tmp_path / teacher, 16, 1)
        vars(elsewhere)["backbone"] = bench.backbone
        _adopt(elsewhere, path)
        assert (elsewhere.folder / "figures" / f"{key}.json").exists() == adopted


def test_a_number_of_updates_for_all_rows_has_runs_of_its_own(bench):
    row = Row("a", rmd(), updates=60)
    study = Study("t", "s", (row,), (), 60)
    own = Bench(bench.folder, 16)
    assert (own.length(row, study), bench.length(row, study)) == (60, 1)
    recipe = own.recipe(row, 0, 60)
    assert own.run_folder(row, recipe) != bench.run_folder(row, recipe)

"""`paceline theory`: what it prints, draws and refuses."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("tyro")

from paceline.cli import COMMANDS, main
from paceline.theory import better_gain, largest_gain, limiting_error, twin_ratio
from paceline.theory.lab import FrontierCommand, LimitCommand

# As small as each can be, and what remakes it as a figure says.
SMALL = {
    "limit": "--gain 0 0.5 --runs 20 --a 0.5 --beta 0.2",
    "family": "--e 0.1 0.01",
    "control": "--horizon 20 --coordinates 2",
    "frontier": "--coordinates 8 --half-lives 1 100 --steps 10 --drift 0.01",
    "twin": "--steps 20 --runs 4",
    "rate": "--horizons 16 32 --runs 2 --problems 20",
    "batch": "--coordinates 20 --target 0.5 --horizon 4 --batches 8 512",
    "river": "--steps 40 --runs 3 --rates 0.5 1 --noise 0.3",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each command says as JSON, and where its figures are."""
    said = {}

    def call(name):
        if name not in said:
            out = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                lines = []
                patch.setattr(
                    "rich.console.Console.print", lambda _, text, **__: lines.append(text)
                )
                assert (
                    main(["theory", name, *SMALL[name].split(), "--json", "--out", str(out)]) == 0
                )
            said[name] = json.loads(lines[0]), out
        return said[name]

    return call


def table(finding, number=0):
    columns, rows = (finding["tables"][number][key] for key in ("columns", "rows"))
    return [dict(zip(columns, row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", SMALL)
def test_each_writes_its_figure_with_the_command_under_it(name, found):
    said, out = found(name)
    assert said["command"].startswith(f"paceline theory {name} --")
    words = said["command"].split()
    assert set(words[3:]) == set(SMALL[name].split())
    svg = (out / f"{name}.svg").read_text()
    assert re.sub(r"\s+", " ", said["command"]) in svg.replace("&#8722;", "-")
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert said["figures"] == [str(out / f"{name}.svg"), str(out / f"{name}.png")]
    assert all(len(row) == len(t["columns"]) for t in said["tables"] for row in t["rows"])
    assert said["notes"]


@pytest.mark.parametrize("name", ["family", "control"])
def test_the_command_remakes_the_same_file(name, found, tmp_path, capsys):
    said, out = found(name)
    assert main([*said["command"].split()[1:], "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.svg").read_text() == (out / f"{name}.svg").read_text()
    printed = capsys.readouterr().out
    assert f"{name}.svg" in printed
    for title in (t["title"] for t in said["tables"]):
        assert title in printed


def test_limit_says_what_the_formulas_do(found):
    said, _ = found("limit")
    for row in table(said):
        exact = float(limiting_error(0.5, 0.2, row["gain"]))
        assert row["formula"] == pytest.approx(exact)
        assert row["Lyapunov"] == pytest.approx(exact)
        assert row["EMA / this"] == pytest.approx(float(limiting_error(0.5, 0.2, 0)) / exact)
        mean, spread = map(float, row["measured, 95 %"].split(" ± "))
        assert mean == pytest.approx(exact, abs=4 * spread / 1.96 + 0.01 * exact)
    assert f"gain < {float(largest_gain(0.5, 0.2)):.6g}" in said["notes"][0]
    assert f"gain < {float(better_gain(0.5, 0.2)):.6g}" in said["notes"][0]


def test_family_is_unbounded_against_the_same_ema_and_not_against_a_tuned_one(found):
    rows = table(found("family")[0])
    assert [round(row["ratio"], 2) for row in rows] == [5.25, 45.77]
    for row in rows:
        assert row["EMA β*, η* / pull"] == pytest.approx(0.5, rel=1e-3)
        assert 0.9 < row["EMA β* / pull"] < 1


def test_control_is_best_where_it_knows_the_minimum(found):
    for number in range(2):
        rows = table(found("control")[0], number)
        assert min(rows, key=lambda row: row["cost"])["knows μ*"] in ("yes", "no", "—")
        best = next(row for row in rows if row[""] == "exact optimum")
        same_average = rows[: rows.index(next(r for r in rows if "EMA" in r[""]))]
        assert all(row["cost"] >= best["cost"] * (1 - 1e-12) for row in same_average)
        assert all(
            row["cost"] == pytest.approx(row["error"] + 0.01 * row["Σ E u²"]) for row in rows
        )
        assert all(row["/ best"] == pytest.approx(row["cost"] / best["cost"]) for row in rows)


def test_control_with_the_estimate_hardly_asks_where_it_starts(found):
    near, far = ({row[""]: row for row in table(found("control")[0], i)} for i in range(2))
    for row in ("exact, ML estimate", "the ML estimate itself"):
        assert {near[row]["knows μ*"], far[row]["knows μ*"]} == {"no"}
    # Σ s²/(a²T) = (1 + 2)/20; a bound on what a short horizon and the price of control add
    estimate, steered = "the ML estimate itself", "exact, ML estimate"
    assert near[estimate]["error"] == far[estimate]["error"] == pytest.approx(3 / 20)
    assert 1 < far[steered]["error"] / near[steered]["error"] < 1.5
    assert near[steered]["error"] > near[estimate]["error"]  # it cannot know more
    running = "continuous, running mean"
    assert far[running]["error"] > 10 * near[running]["error"]


def test_frontier_has_all_methods_relative_to_the_ema(found):
    for number, tables in enumerate(found("frontier")[0]["tables"]):
        rows = table(found("frontier")[0], number)
        assert len(rows) == (8 if number == 0 else 4), tables
        if number == 0:  # the half-lives 1 and 100
            rows = [rows[0], *rows[1::2]]  # in one step only one curvature is forgotten
        for row in rows:
            assert row["EMA"] == 1
            assert row["pull, one gain"] <= 1 + 1e-4  # a gain of 1e-12, near equal modes
            assert row["PACE"] <= row["Adam, EMA"] + 1e-4
            assert row.get("floor", 0) <= 1 + 1e-9


def test_twin_has_exact_ratios(found):
    for row in table(found("twin")[0]):
        ratio = float(twin_ratio(row["a"], 0.05, row["gain"]))
        assert row["noise / twin's"] == pytest.approx(ratio)
        assert row["at β/(β+λ)"] > ratio
        assert row["half-life"] >= row["twin's"]
        assert 0.5 < row["drift / twin's"] <= 1
    shares = [row["clipped"] for row in table(found("twin")[0], 2)]
    assert shares == sorted(shares)


def test_rate_has_a_slope_for_each_average_with_and_without_a_pull(found):
    rows = table(found("rate")[0])
    assert len(rows) == 8
    for row in rows:
        mean = float(row["slope, 95 %"].split(" ± ")[0])
        # Through two points the line is exact: T^slope·√T is the ratio of the constants.
        assert 2 ** (mean + 0.5) == pytest.approx(row["32"] / row["16"], rel=2e-3)
        assert np.isfinite(list(row.values())[2:]).all()


def test_no_loss_is_above_the_bound(found):
    rows = table(found("rate")[0], 1)
    assert [row["gain"] for row in rows] == [0, 0.1, 0.5, 1]
    for row in rows:
        assert row["1/r"] == pytest.approx(1 + row["gain"] * 0.9 / 0.1)
        assert row["C"] == pytest.approx(1 + row["gain"] * 0.9 / (1 + 0.9 * (1 - row["gain"])))
        assert row["√(C/r)"] == pytest.approx((row["C"] * row["1/r"]) ** 0.5)
        for name in ("swinging", "travelling", "random, largest"):
            assert 0.2 < row[name] <= 1 + 1e-9
        assert row["swinging"] > 0.95


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "limit --gain 2.5",
            "not stable: gain must be below 1.9699 at a = 0.05 and beta = 0.02, got 2.5",
        ),
        ("limit --gain -0.1", "gain must be in [0, inf), got -0.1, 0.1 below"),
        ("limit --a 0", "a must be in (0, inf), got 0, which is the end itself"),
        ("limit --a 2.5", "not stable: a must be below 2, got 2.5, 0.5 above"),
        ("limit --beta 1.5", "beta must be in (0, 1], got 1.5, 0.5 above"),
        ("limit --a 1e-5 --beta 1e-5", "gain = 0 forgets too slowly: the experiment would take"),
        ("limit --runs 1", "runs: must be greater than or equal to 2"),
        ("family --gain 3", "not stable: gain must be below 2 at a = 0.0001"),
        ("family --e 0.1 -0.1", "a must be in (0, inf), got -0.1, 0.1 below"),
        ("control --a 2.5", "curvature must be in (0, 2), got 2.5, 0.5 above"),
        ("control --penalty 0", "--penalty"),
        ("frontier --steps 15", "steps must be multiples of 10, got (15,)"),
        ("frontier --drift -1", "drift must be in [0, inf), got -1, 1 below"),
        ("twin --gain 5", "not stable: gain must be below"),
        ("rate --horizons 64", "horizons and errors must be two or more"),
        ("rate --pullback 2", "--pullback"),
        ("batch --batches 8 4", "batches must be at least one, ascending, got (8.0, 4.0)"),
        ("batch --batches 0 4", "batches must be in (0, inf), got 0"),
        ("batch --target 1", "--target"),
        ("river --rates 1 0.5", "rates must be at least one, ascending, got (1.0, 0.5)"),
        ("river --rates 0 1", "rates must be in (0, inf), got 0"),
        ("river --noise -1", "noise must be in [0, inf), got -1, 1 below"),
        ("limt", "unknown command 'theory limt'; did you mean 'theory limit'?"),
        ("limit --bta 1", "did you mean --beta?"),
    ],
)
def test_what_cannot_be_is_one_line(command, message, tmp_path, capsys):
    assert main(["theory", *command.split(), "--out", str(tmp_path / "out")]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error or message.replace("--", "") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["theory"], ["theory", "--help"], ["theory", "-h"]])
def test_help_lists_them_all(arguments, capsys):
    assert main(arguments) == 0
    listed = re.findall(r"^  (\S.*?)  ", capsys.readouterr().out, flags=re.M)
    assert [name.strip() for name in listed] == [n for n in COMMANDS if n.startswith("theory ")]
    assert len(listed) == len(SMALL)


def test_batch_has_each_method_at_each_batch(found):
    rows = table(found("batch")[0])
    assert [row["batch"] for row in rows] == [8, 512]
    for row in rows:
        assert row["pull"] <= row["EMA"]
        assert row["EMA, momentum"] <= row["SGD, momentum"] <= row["SGD"] + 1  # other grids
    regimes = {row[""]: row for row in table(found("batch")[0], 3)}
    assert regimes["SGD"]["examples"] == 8 * rows[0]["SGD"]
    assert regimes["SGD"]["fewest steps"] == rows[1]["SGD"]
    assert len(table(found("batch")[0], 4)) == 2 * len(regimes)


def test_river_has_each_method_at_its_best_and_the_pair_at_each_rate(found):
    rows = table(found("river")[0])
    assert [row[""] for row in rows] == [
        *("constant", "EMA", "decay", "power", "pull", "Schedule-Free"),
    ]
    by_name = {row[""]: row for row in rows}
    assert by_name["constant"]["above"] == by_name["constant"]["live above"]
    assert by_name["decay"]["above"] == by_name["decay"]["live above"]
    assert by_name["EMA"]["above"] < by_name["EMA"]["live above"]
    for row in rows:
        loss, half = map(float, row["loss, 95 %"].split(" ± "))
        assert loss == pytest.approx(row["above"] - 0.02 * row["along"], abs=1e-4)
        assert half > 0
        assert row["edge"] in ("top", "bottom")  # of two rates
    assert [row["rate"] for row in table(found("river")[0], 1)] == [0.5, 1]


def test_numbers_in_commands_are_those_that_were_given():
    assert (
        LimitCommand(a=0.25, gain=(0.0, 1e-3)).command
        == "paceline theory limit --a 0.25 --gain 0 0.001"
    )
    assert FrontierCommand().command == "paceline theory frontier"


@pytest.mark.slow
def test_what_no_parameters_can_do_is_a_dash_and_null(found):
    # In a step nothing that is stable forgets half of a curvature an eighth of the largest.
    rows = table(found("frontier")[0])
    assert [row["SGD"] is None for row in rows[::2]] == [False, True, True, True]

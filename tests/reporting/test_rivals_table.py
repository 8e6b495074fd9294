"""Table T7: its cells, and costs that come from a benchmark's file alone."""

import json

from faqd_lib.reporting import grids, rivals


def test_cells_of_rivals_share_all_but_the_loss(tiny_suite):
    runs = grids.rivals(tiny_suite(shows_results=True))
    names = [grids.rival_name(run) for run in runs if run.bits == "1W32A"]
    assert names == [
        "KD", "FA", "none, KL for MSE", "FFA, k = 1", "FFA, k = 3", "FFA, k = 6", "FFA, k = 15",
        "SP", "AT", "FitNet", "CKA", "CWD",
    ]  # fmt: skip
    assert [grids.rival_name(run) for run in runs if run.bits == "1W4A"] == ["KD", "FA", "FitNet", "SQuaT"]
    assert len({(run.teacher, run.data, run.optimization) for run in runs}) == 1
    assert len(grids.rivals(tiny_suite())) == 6


def test_costs_are_those_of_the_benchmark(tiny_suite, tmp_path):
    suite = tiny_suite(shows_results=True)
    file = tmp_path / "affinity.json"
    without = rivals.table(suite, file)
    assert set(without.frame["time / KD's"]) == {"not measured"}
    assert "which is missing here" in without.caption
    file.write_text(json.dumps({"rivals": [{"loss": "SP", "time / logits": 1.25, "extra_MiB": 7.4}]}))
    shown = rivals.table(suite, file).frame.set_index(["bits", "loss"])
    assert shown.loc[("1W32A", "SP"), ["time / KD's", "extra MiB", "gain"]].tolist() == ["1.25", "7", "not run"]
    assert shown.loc[("1W32A", "AT"), "time / KD's"] == "not measured"
    assert shown.loc[("1W4A", "FA"), "weight"] == 30

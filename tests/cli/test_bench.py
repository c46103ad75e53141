"""Tables of runs: which runs they have, that an interrupted one goes on, and what they look like."""

import json
from pathlib import Path

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lightning_fscreen.cli.bench import bench, missing_runs, runs_of
from lightning_fscreen.cli.tables import by_layer, curves, markdown
from lightning_fscreen.saving.lines import read_lines

TABLES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "table").glob("*.yaml"))
TABLE = {
    "name": "small",
    "experiment": "digits_weight",
    "overrides": ["trainer.max_epochs=2"],
    "settings": {"few": ["+trainer.limit_train_batches=2"], "more": ["+trainer.limit_train_batches=4"]},
    "methods": {"ours": ["method=screening"], "random": ["method=random"], "dense": ["~callbacks.fscreen"]},
    "amounts": [0.5, 0.9],
    "seeds": [0, 1],
}


def composed(*overrides):
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        return compose("bench", overrides=list(overrides))


def line(run, error):
    named = {"setting": run.setting, "method": run.method, "amount": run.amount, "seed": run.seed}
    return named | {"test_error": error, "command": run.command}


def test_all_combinations_are_run_and_the_dense_network_once_for_all_amounts():
    runs = list(runs_of(TABLE))
    assert len(runs) == len({run.command for run in runs}) == 2 * (2 * (2 * 2 + 1))
    assert runs[0].command == (
        "fscreen experiment=digits_weight trainer.max_epochs=2 +trainer.limit_train_batches=2 method=screening "
        "callbacks.fscreen.amount=0.5 seed=0"
    )
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


@pytest.mark.parametrize("table", TABLES)
def test_every_method_and_setting_of_every_table_composes(table):
    content = OmegaConf.to_container(composed(f"table={table}").table, resolve=True)
    settings, methods = list(content["settings"]), list(content["methods"])
    # The first of both together, then the second ones, and so on.
    number = max(len(settings), len(methods))
    pairs = {(settings[place % len(settings)], methods[place % len(methods)]) for place in range(number)}
    with initialize_config_module("lightning_fscreen.conf", version_base="1.3"):
        for run in runs_of(content):  # amounts and seeds are numbers
            first = run.seed == content["seeds"][0] and run.amount in (None, content["amounts"][0])
            if first and (run.setting, run.method) in pairs:
                compose("train", overrides=list(run.overrides))
                pairs.remove((run.setting, run.method))
    assert not pairs
    assert content["name"] == table


def test_what_is_there_is_not_run_again_and_only_chooses():
    runs = list(runs_of(TABLE))
    results = [line(run, 0.1) for run in runs[:5]]
    assert missing_runs(TABLE, results) == runs[5:]
    assert {run.method for run in missing_runs(TABLE, [], ["dense"])} == {"dense"}
    assert missing_runs(TABLE | {"metric": "val_error"}, results) == runs  # these lines have no validation error
    with pytest.raises(ValueError, match="'dens'.*choose of.*dense"):
        missing_runs(TABLE, [], ["dens"])


def test_the_table_and_the_curves_show_mean_and_deviation():
    results = [line(run, 0.1 * (1 + run.seed) if run.method == "ours" else 0.5) for run in runs_of(TABLE)]
    rows = markdown(TABLE, results).splitlines()
    assert rows[0] == "| | few, 50 % pruned | few, 90 % pruned | more, 50 % pruned | more, 90 % pruned |"
    assert rows[2] == "| ours | " + " | ".join(["15.00 ± 7.07"] * 4) + " |"
    assert rows[4] == "| dense | " + " | ".join(["50.00 ± 0.00"] * 4) + " |"
    assert "2 seeds" in rows[-1]
    panels = curves(TABLE, results).axes
    assert [axes.get_title() for axes in panels] == ["few", "more"]
    assert panels[0].lines[0].get_xdata().tolist() == pytest.approx([50, 10])
    assert panels[0].lines[0].get_ydata().tolist() == pytest.approx([15, 15])


def test_more_settings_than_methods_go_down_the_table():
    table = TABLE | {"settings": {name: [f"data.batch_size={8 * place}"] for place, name in enumerate("abcd", 1)}}
    results = [line(run, 0.01 * run.seed + 0.1 * (run.setting == "c")) for run in runs_of(table)]
    rows = markdown(table, results).splitlines()
    pairs = [f"{method}, {amount} % pruned" for method in ("ours", "random") for amount in (50, 90)]
    assert rows[0] == f"| | {' | '.join(pairs)} | dense |"
    assert [row.split(" | ")[0] for row in rows[2:6]] == ["| a", "| b", "| c", "| d"]
    assert rows[4] == "| c | " + " | ".join(["10.50 ± 0.71"] * 5) + " |"


def test_where_networks_became_smaller_the_curves_show_multiply_adds_too():
    table = TABLE | {"settings": {"": []}}
    after = {0.5: 60, 0.9: 20}
    macs = [{"before": 100, "after": after[run.amount] + run.seed} if run.amount else None for run in runs_of(table)]
    results = [line(run, 0.1) | {"macs": count} for run, count in zip(runs_of(table), macs, strict=True)]
    upper, lower = curves(table, results).axes
    assert upper.get_xlabel() == "candidates kept [%]" and lower.get_xlabel() == "multiply–adds kept [%]"
    assert sorted(lower.lines[0].get_xdata()) == pytest.approx([20.5, 60.5])
    same = [result | {"macs": {"before": 100, "after": 100}} for result in results]
    assert len(curves(table, same).axes) == 1


def test_errors_of_different_magnitudes_are_drawn_on_a_logarithmic_axis():
    def scales(table, **errors):
        panels = curves(table, [line(run, errors.get(run.method, 0.04)) for run in runs_of(table)]).axes
        return {(axes.get_xscale(), axes.get_yscale()) for axes in panels}

    assert scales(TABLE, random=0.1) == scales(TABLE, random=0.8, ours=0) == {("log", "linear")}
    assert scales(TABLE, random=0.8) == {("log", "log")}
    dots = TABLE | {"amounts": [0.5]}
    assert scales(dots, random=0.1) == {("linear", "linear")} and scales(dots, random=0.8) == {("log", "linear")}


def test_what_is_kept_by_layer_is_a_table():
    layers = [{"name": "a", "total": 4000, "kept": 1000}, {"name": "b", "total": 10, "kept": 9}]
    results = [line(run, 0.1) | {"layers": layers if run.amount else []} for run in runs_of(TABLE) if run.amount != 0.9]
    results[0]["layers"] = [layers[0] | {"kept": 2000}, layers[1]]
    rows = by_layer(TABLE, results).splitlines()
    assert rows[0] == "| layer | of | method | 50 % pruned | 90 % pruned |"
    assert rows[2] == "| a | 4,000 | ours, few | 1,500 | – |" and rows[3] == "| a | 4,000 | random, few | 1,000 | – |"
    assert rows[4] == "| b | 10 | ours, few | 9 | – |" and "dense" not in "".join(rows)


def test_unequal_numbers_of_seeds_are_shown():
    results = [line(run, 0.1) for run in runs_of(TABLE) if run.seed == 0 or run.method == "ours"]
    text = markdown(TABLE, results)
    assert "| ours | 10.00 ± 0.00 (2)" in text and "| random | 10.00 (1)" in text and "in brackets" in text


def test_a_table_can_compare_validation_errors():
    table = TABLE | {"metric": "val_error", "settings": {"": []}}
    results = [line(run, 0.5) | {"val_error": 0.1} for run in runs_of(table)]
    text = markdown(table, results)
    assert "| ours | 10.00 ± 0.00 | 10.00 ± 0.00 |" in text and "(Validation error of the last epoch" in text
    assert curves(table, results).axes[0].get_ylabel() == "validation error [%]"
    with pytest.raises(ValueError, match="'small' has metric='train_error'; choose one of.*'val_error'"):
        markdown(TABLE | {"metric": "train_error"}, results)


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match="line 2 of .*a.jsonl.*delete that line"):
        read_lines(tmp_path / "a.jsonl")


def test_real_runs_are_recorded_with_what_repeats_them(tmp_path):
    config = composed(f"results={tmp_path}", "only=[random]", 'extra=["trainer.log_every_n_steps=1"]')
    config.table = TABLE | {"seeds": [3], "settings": {"": ["+trainer.limit_train_batches=2"]}, "amounts": [0.5]}
    bench(config)
    path = tmp_path / "small.jsonl"
    (result,) = read_lines(path)
    assert result["command"].startswith("fscreen experiment=digits_weight trainer.max_epochs=2")
    assert result["command"].endswith("method=random callbacks.fscreen.amount=0.5 seed=3")
    assert result["candidates"]["kept"] == pytest.approx(0.5 * result["candidates"]["total"], abs=1)
    assert 0 <= result["test_error"] <= 1 and result["seconds"] > 0
    assert set(result["versions"]) == {"lightning_fscreen", "torch", "lightning", "python"}
    assert (tmp_path / "small.md").read_text().startswith("| | 50 % pruned |")
    assert "| net.fc3 | 1,000 | random |" in (tmp_path / "small_layers.md").read_text()
    assert (tmp_path / "small.png").stat().st_size > 1000
    before = path.read_text()
    bench(config)  # nothing left to run
    assert path.read_text() == before


def test_runs_compared_by_validation_error_do_not_touch_the_test_images(tmp_path):
    config = composed(f"results={tmp_path}", "only=[random]")
    settings = {"": ["trainer.limit_test_batches=0"]}
    config.table = TABLE | {"metric": "val_error", "seeds": [3], "settings": settings, "amounts": [0.5]}
    bench(config)
    (result,) = read_lines(tmp_path / "small.jsonl")
    assert 0 <= result["val_error"] <= 1 and "test_error" not in result


def test_a_run_without_the_metric_of_its_table_fails(tmp_path, caplog):
    config = composed(f"results={tmp_path}", "only=[random]")
    settings = {"": ["data.val_size=0"]}
    config.table = TABLE | {"metric": "val_error", "seeds": [3], "settings": settings, "amounts": [0.5]}
    with pytest.raises(RuntimeError, match="these runs failed"):
        bench(config)
    assert "reports no val_error; a val_error needs images held out (data.val_size above 0)" in caplog.text
    assert read_lines(tmp_path / "small.jsonl") == []


def test_a_table_that_is_being_run_is_not_run_a_second_time(tmp_path):
    config = composed(f"results={tmp_path}", "only=[dense]")
    config.table = TABLE
    with FileLock(tmp_path / "small.lock"), pytest.raises(RuntimeError, match=r"another .*small.jsonl.* wait"):
        bench(config)
    assert not (tmp_path / "small.jsonl").exists()


def test_a_run_that_fails_is_named_and_the_others_are_recorded(tmp_path):
    config = composed(f"results={tmp_path}")
    config.table = {
        **TABLE,
        "seeds": [0],
        "amounts": [0.5],
        "settings": {"": ["+trainer.limit_train_batches=2"]},
        "methods": {"bad": ["callbacks.fscreen.scope=nowhere"], "good": ["method=magnitude"]},
    }
    with pytest.raises(RuntimeError, match="scope=nowhere"):
        bench(config)
    (result,) = [json.loads(text) for text in (tmp_path / "small.jsonl").read_text().splitlines()]
    assert result["method"] == "good"

"""Sentences of the documents that quote the committed results: one function for each, which computes its numbers."""

import itertools
import json
import math
import statistics

from lightning_fscreen.cli.tables import grouped, metric_of
from tests.benchmarks.committed import RESULTS, table_and_results

PRUNED = (0.957, 0.98, 0.99)  # shares of the weights in the tables of LeNet-300-100


def errors(name):
    """Errors in % by method and amount, one for every seed."""
    table, results = table_and_results(name)
    return {(method, amount): values for (_, method, amount), values in grouped(results, metric_of(table)).items()}


def by_method(name):
    """Lines of results by method and amount."""
    lines = {}
    for line in table_and_results(name)[1]:
        lines.setdefault((line["method"], line["amount"]), []).append(line)
    return lines


def finetuned(method, amount):
    """Lines of the results of `finetune.py`."""
    lines = map(json.loads, (RESULTS / "finetune.jsonl").read_text().splitlines())
    return [line for line in lines if (line["method"], line["amount"]) == (method, amount)]


def default_of(name):
    """The label of the default criterion in a table."""
    return next(method for method in table_and_results(name)[0]["methods"] if method.startswith("screening"))


def difference(name, first, second, amount):
    """Of two methods' mean errors, and its standard error."""
    groups = [errors(name)[method, amount] for method in (first, second)]
    means = [statistics.fmean(values) for values in groups]
    return means[0] - means[1], sum(statistics.variance(values) / len(values) for values in groups) ** 0.5


def decimals(*values):
    """Values to two decimals, without a minus before zero, joined as in prose."""
    *others, last = [f"{round(value, 2) + 0.0:.2f}" for value in values]
    return f"{', '.join(others)} and {last}"


def screening_minus_magnitude():
    """On the test images."""
    found = [difference("lenet300", default_of("lenet300"), "magnitude", amount) for amount in PRUNED]
    differences, deviations = zip(*found, strict=True)
    return f"Screening minus magnitude is {decimals(*differences)} points (standard errors {decimals(*deviations)})"


def left_in_tensors():
    """Parameters after the dead units of LeNet-300-100 are removed, and those of them that are not zero."""
    lines = by_method("lenet300")[default_of("lenet300"), 0.98]
    before, after, nonzero = (
        statistics.fmean(line["params"][key] for line in lines) for key in ("before", "after", "nonzero")
    )
    return f"{after:,.0f} of LeNet-300-100's {before:,.0f} parameters, of which {nonzero:,.0f} are not zero"


def _units(*key):
    return f"{statistics.fmean(line['layers'][0]['kept'] for line in by_method('comparators_channel')[key]):.0f}"


def _parameters(*key):
    return f"{statistics.fmean(line['params']['after'] for line in by_method('comparators_channel')[key]):,.0f}"


def _error(*key):
    return f"{statistics.fmean(errors('comparators_channel')[key]):.2f} %"


def units_left():
    """By rankings of all units together, and of each layer's."""
    ranked, slimming, alike = ("magnitude", 0.9), ("network slimming", 0.9), ("magnitude by layer", 0.9)
    assert _units(*slimming) == "1"
    return (
        f"at 90 % magnitude leaves {_units(*ranked)} of its 300 units and {_parameters(*ranked)} parameters of "
        f"{_parameters('dense', None)}, network slimming one unit; every layer alike, {_units(*alike)} units "
        f"and {_parameters(*alike)}."
    )


def units_of_a_size():
    """Errors of the networks that are nearest in size."""
    together, alike, random = ("magnitude", 0.7), ("magnitude by layer", 0.9), ("random", 0.9)
    return (
        f"Nearest in size are all units ranked together at 70 % ({_parameters(*together)} parameters, "
        f"{_error(*together)}), by layer at 90 % ({_parameters(*alike)}, {_error(*alike)}) and random units at 90 % "
        f"({_parameters(*random)}, {_error(*random)})."
    )


def units_within_a_layer():
    """Magnitude against network slimming."""
    found = errors("comparators_channel")
    spreads = [
        abs(
            statistics.fmean(found["magnitude by layer", amount])
            - statistics.fmean(found["network slimming by layer", amount])
        )
        for amount in (0.7, 0.9)
    ]
    return f"lie within {math.ceil(100 * max(spreads)) / 100:.2f} points of each other"


def digits_macs():
    """Multiply–adds that criteria leave of the small ResNet."""
    lines = by_method("digits_channel")

    def left(method):
        macs = [line["macs"] for line in lines[method, 0.9]]
        return f"{100 * statistics.fmean(count['after'] / count['before'] for count in macs):.0f} %"

    return (
        f"of the multiply–adds Taylor leaves {left('Taylor')}, SNIP {left('SNIP')}, gradient {left('gradient')} and "
        f"every layer alike {left('magnitude by layer')}, magnitude {left('magnitude')}"
    )


def all_at_once():
    """The price of one pruning instead of many small ones."""
    at_98, at_99_5 = (
        difference("fusion", "screening, all at once", "screening, λ = 0.25", amount)[0] for amount in (0.98, 0.995)
    )
    return f"pruning all at once costs {at_98:.1f} points at 98 % and {at_99_5:.0f} at 99.5 %"


def blind_spots_behind():
    """Cells within one standard error of the better of two others, and runs far behind magnitude."""
    table, results = table_and_results("blind_spots")
    by_seed = {}
    for line in results:
        cell = by_seed.setdefault((line["setting"], line["amount"], line["method"]), {})
        cell[line["seed"]] = 100 * line["test_error"]
    near, behind = [], []
    for place in itertools.product(table["settings"], table["amounts"]):
        own, magnitude, earlier = (by_seed[(*place, method)] for method in ("screening", "magnitude", "means_alone"))
        better = min(magnitude, earlier, key=lambda errors: statistics.fmean(errors.values()))
        more = statistics.fmean(own.values()) - statistics.fmean(better.values())
        variance = statistics.variance(own.values()) + statistics.variance(better.values())
        near.append(more <= (variance / len(own)) ** 0.5)
        behind += [own[seed] - magnitude[seed] > 2 for seed in own]
    return (
        f"in {sum(near)} of these {len(near)} cells. Of its {len(behind)} runs {sum(behind)} "
        f"{'is' if sum(behind) == 1 else 'are'} more than two points behind magnitude"
    )


def connected_alone():
    """What the rule for connections that do nothing gains by itself, with magnitude, where 98 % go."""
    table, results = table_and_results("blind_spots")
    own, magnitude, screening = (
        [
            statistics.fmean(
                100 * line["test_error"]
                for line in results
                if (line["setting"], line["method"], line["amount"]) == (setting, method, 0.98)
            )
            for setting in table["settings"]
        ]
        for method in ("connected magnitude", "magnitude", "screening")
    )
    gains = [before - after for before, after in zip(magnitude, own, strict=True)]
    behind = sum(error > best for error, best in zip(own, screening, strict=True))
    return (
        f"in {sum(gain > 0 for gain in gains)} of the {len(gains)} settings (from {min(gains):.1f} to {max(gains):.1f} "
        f"points, {statistics.median(gains):.1f} in the median), and is behind screening in {behind}"
    ).replace("-", "−")


def half_of_resnet20():
    """Half of its channels: size, latency, error."""
    lines, dense = finetuned("magnitude", 0.5), finetuned("dense", None)
    params, macs = (dense[0][key] / statistics.fmean(line[key] for line in lines) for key in ("params", "macs"))
    faster = statistics.fmean(line["speedup"]["64"] for line in lines)
    error, least = (100 * statistics.fmean(line["test_error"] for line in group) for group in (lines, dense))
    return (
        f"{params:.1f} × fewer parameters, {macs:.1f} × fewer multiply–adds, {faster:.1f} × lower latency in batches "
        f"of 64 on one CPU core, and a test error {error - least:.1f} points higher, after ten epochs in all"
    )


def _lines(name, method, left, network="resnet20"):
    """Errors in % by seed, of a script that leaves a share of the multiply–adds."""
    lines = map(json.loads, (RESULTS / f"{name}.jsonl").read_text().splitlines())
    cell = method, left, network
    found = [line for line in lines if (line["method"], line["left"], line.get("network", network)) == cell]
    return {line["seed"]: 100 * line["test_error"] for line in found}


def _more_errors(network, ours="errors per cost", theirs="Torch-Pruning, norms of groups"):
    """Of one method than of another, on the same dense networks at equal multiply–adds, where both leave so many."""
    cells = []
    for left in (0.75, 0.5, 0.25):
        first, second = (_lines("equal_cost", method, left, network) for method in (ours, theirs))
        more = [first[seed] - second[seed] for seed in first if seed in second]
        if not more:
            continue
        cells.append((statistics.fmean(more), statistics.stdev(more) / len(more) ** 0.5))
    more, deviations = zip(*cells, strict=True)
    listed = ", ".join(f"{value:+.2f}".replace("-", "−") for value in more)
    return f"{listed} points (standard errors {decimals(*deviations)})"


def against_torch_pruning_resnet20():
    """At equal multiply–adds."""
    return _more_errors("resnet20")


def against_torch_pruning_vgg16():
    """At equal multiply–adds."""
    return _more_errors("vgg16")


def heads_and_units_by_errors():
    """Against their magnitude, and any of them."""
    magnitude, random = (_more_errors("vit", theirs=theirs) for theirs in ("magnitude per cost", "random"))
    return f"{magnitude}; minus a random choice: {random}"


def hidden_units_against_torch_pruning():
    """Of a vision transformer."""
    return _more_errors("vit", "errors per cost, hidden units")


def _in_one_fit(network, kind, amount, method):
    """Mean error in %, and multiply–adds."""
    lines = map(json.loads, (RESULTS / "in_one_fit.jsonl").read_text().splitlines())
    cell = network, kind, amount, method
    found = [line for line in lines if tuple(line[key] for key in ("network", "kind", "amount", "method")) == cell]
    error, macs = (statistics.fmean(line[key] for line in found) for key in ("test_error", "macs"))
    return 100 * error, macs


def units_of_a_convnext():
    """By errors, and by magnitude, against any of them."""
    errors, magnitude = (_more_errors("convnext", ours, "random") for ours in ("errors per cost", "magnitude per cost"))
    return f"{errors}; by magnitude: {magnitude}"


def convnext_against_torch_pruning():
    """At equal multiply–adds."""
    return _more_errors("convnext")


def half_of_the_heads():
    """Of a vision transformer, by magnitude."""
    error, macs = _in_one_fit("vit", "heads", 0.5, "magnitude")
    least, most = _in_one_fit("vit", "both", 0.0, "dense")
    return f"half of them cost {error - least:.1f} points and save {100 * (1 - macs / most):.0f} % of the multiply–adds"


def with_streams():
    """Channels of the residual stream as candidates, too."""
    return _more_errors("resnet20", "errors per cost, streams", "errors per cost")


def regard_to_costs():
    """Errors divided by costs, and not."""
    return _more_errors("resnet20", theirs="errors alone")


def a_tenth_at_once():
    """Without training."""
    lines = map(json.loads, (RESULTS / "one_call.jsonl").read_text().splitlines())
    dense = {line["seed"]: 100 * line["dense"] for line in lines}
    costs = []
    for left in (0.9, 0.7):
        pruned = _lines("one_call", "what the others predict", left)
        costs.append(statistics.fmean(pruned[seed] - dense[seed] for seed in pruned))
    return f"a tenth costs {costs[0]:.1f} points, 30 % {costs[1]:.1f}"


FIGURES = {
    function.__name__: function
    for function in (
        screening_minus_magnitude,
        left_in_tensors,
        units_left,
        units_of_a_size,
        units_within_a_layer,
        digits_macs,
        all_at_once,
        blind_spots_behind,
        connected_alone,
        half_of_resnet20,
        against_torch_pruning_resnet20,
        against_torch_pruning_vgg16,
        heads_and_units_by_errors,
        hidden_units_against_torch_pruning,
        units_of_a_convnext,
        convnext_against_torch_pruning,
        half_of_the_heads,
        with_streams,
        regard_to_costs,
        a_tenth_at_once,
    )
}

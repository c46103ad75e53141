from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.members import Members
from lightning_fscreen.slimming import SlimmingPlan

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd, momentum and decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "sgd, Nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adam, one by one": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.01),
    "rmsprop, centred": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.01),
}
STEPS_BEFORE, STEPS_AFTER = 4, 8


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(steps):
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(10, 6, generator=rng, dtype=torch.float64), torch.randint(3, (10,), generator=rng)


def weights_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("weight")}


def members_of(model):
    return {name: Members(weight) for name, weight in weights_of(model).items()}


def some_masks(model, share=0.5):
    rng = torch.Generator().manual_seed(2)
    return {name: torch.rand(w.shape, generator=rng) < share for name, w in weights_of(model).items()}


def masked_training(model, optimizers, clip=None, kept=None):
    """The package's way: masks set after some steps, gradients masked before clipping, weights after every step."""
    masks = Masks(members_of(model))
    masks.watch(optimizers)
    for step, (x, y) in enumerate(batches(STEPS_BEFORE + STEPS_AFTER)):
        if step == STEPS_BEFORE:
            masks.set(some_masks(model) if kept is None else kept, optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        masks.mask_gradients()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
        yield masks


def reference_training(model, optimizers, clip=None):
    """The oracle: the forward pass multiplies by the masks, and nobody touches weights, gradients or states."""
    kept = some_masks(model)
    for step, (x, y) in enumerate(batches(STEPS_BEFORE + STEPS_AFTER)):
        parameters = dict(model.named_parameters())
        if step >= STEPS_BEFORE:
            parameters |= {name: parameters[name] * kept[name] for name in kept}
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(functional_call(model, parameters, (x,)), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruned_weights_stay_zero_and_the_others_train_as_if_they_did_not_exist(make, clip):
    model, reference = network(), network()
    for step, masks in enumerate(masked_training(model, [make(model.parameters())], clip)):
        if step >= STEPS_BEFORE:
            for name, weight in weights_of(model).items():
                assert (weight[~masks.kept[name]] == 0).all()
                assert (weight[masks.kept[name]] != 0).all()
    reference_training(reference, [make(reference.parameters())], clip)
    for name, parameter in reference.named_parameters():
        kept = masks.kept.get(name, torch.ones_like(parameter, dtype=torch.bool))
        torch.testing.assert_close(model.get_parameter(name)[kept], parameter[kept], rtol=1e-13, atol=0)


def test_two_optimizers_leave_pruned_weights_at_zero_after_each_of_their_steps():
    model, reference = network(), network()

    def both(model):
        return [
            torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9, weight_decay=0.1),
            torch.optim.AdamW(model[2].parameters(), 0.01, weight_decay=0.1),
        ]

    for step, masks in enumerate(masked_training(model, both(model))):
        if step >= STEPS_BEFORE:
            assert all((weight[~masks.kept[n]] == 0).all() for n, weight in weights_of(model).items())
    reference_training(reference, both(reference))
    for name, parameter in reference.named_parameters():
        kept = masks.kept.get(name, torch.ones_like(parameter, dtype=torch.bool))
        torch.testing.assert_close(model.get_parameter(name)[kept], parameter[kept], rtol=1e-13, atol=0)


def test_pruned_weights_stay_zero_even_if_nobody_masks_the_gradients():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    masks = Masks(members_of(model))
    masks.watch([optimizer])
    masks.set(some_masks(model), [optimizer])
    for x, y in batches(5):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        assert all((weight[~masks.kept[n]] == 0).all() for n, weight in weights_of(model).items())


@pytest.mark.parametrize("name", ["sgd, momentum and decay", "amsgrad", "rmsprop, centred", "adagrad"])
def test_setting_masks_zeroes_the_pruned_state_and_no_other(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for x, y in batches(3):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    before, values = copy.deepcopy(optimizer.state_dict()["state"]), copy.deepcopy(model.state_dict())
    masks = Masks(members_of(model))
    masks.set(some_masks(model), [optimizer])
    touched = 0
    for index, (parameter_name, parameter) in enumerate(model.named_parameters()):
        kept = masks.kept.get(parameter_name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, torch.where(kept, values[parameter_name], 0.0))
        for key, old in before[index].items():
            new = optimizer.state_dict()["state"][index][key]
            if isinstance(old, torch.Tensor) and old.shape == kept.shape:
                assert torch.equal(new, torch.where(kept, old, 0.0))
                touched += 1
            else:
                assert new == old
    assert touched >= 4


def test_masks_only_count_and_change_the_parameters_they_were_given():
    model = network()
    before = copy.deepcopy(model.state_dict())
    masks = Masks({"first": Members(model[0].weight)})
    assert masks.num_kept == {"first": 48}
    kept = torch.zeros(8, 6, dtype=torch.bool)
    kept[0] = True
    masks.set({"first": kept})
    assert masks.num_kept == {"first": 6}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name != "0.weight")
    assert torch.equal(model[0].weight, before["0.weight"] * kept)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda kept: kept.pop("2.weight"), r"'2\.weight'.*\(3, 8\).*no mask"),
        (lambda kept: kept.update({"2.weight": torch.zeros(8, 3)}), r"'2\.weight'.*\(3, 8\).*\(8, 3\)"),
    ],
)
def test_masks_that_do_not_fit_are_an_error_that_leaves_everything(change, said):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    *_, masks = masked_training(model, [optimizer])
    kept = {name: torch.zeros_like(mask) for name, mask in masks.kept.items()}
    change(kept)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], masks.kept, masks.num_kept))
    with pytest.raises(ValueError, match=said):
        masks.set(kept, [optimizer])
    after = (model.state_dict(), optimizer.state_dict()["state"], masks.kept, masks.num_kept)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    masks.apply()
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)


def test_a_mask_the_caller_changes_later_changes_nothing():
    model = network()
    masks, kept = Masks(members_of(model)), some_masks(model)
    masks.set(kept)
    count = sum(masks.num_kept.values())
    for mask in kept.values():
        mask.zero_()
    assert sum(int(mask.sum()) for mask in masks.kept.values()) == count


def test_before_any_mask_is_set_nothing_changes():
    model, plain = network(), network()
    masks = Masks(members_of(model))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, plain)]
    masks.watch(optimizers[:1])
    for x, y in batches(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            cross_entropy(m(x), y).backward()
            masks.mask_gradients()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_unwatch_takes_every_hook_away():
    model = network()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model.parameters(), 0.1)]
    hooks = [dict(optimizer._optimizer_step_post_hooks) for optimizer in optimizers]
    masks = Masks(members_of(model))
    masks.watch(optimizers)
    masks.set({name: torch.zeros_like(mask) for name, mask in masks.kept.items()}, optimizers)
    masks.unwatch()
    assert [dict(optimizer._optimizer_step_post_hooks) for optimizer in optimizers] == hooks
    model[2].weight.grad = torch.ones_like(model[2].weight)
    for optimizer in optimizers:
        optimizer.step()
    assert (model[2].weight != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_of_parameters_is_masked_exactly(dtype):
    model = network().to(dtype)
    values = copy.deepcopy(model.state_dict())
    masks = Masks(members_of(model))
    kept = some_masks(model)
    masks.set(kept)
    for name, weight in weights_of(model).items():
        assert weight.dtype == dtype
        assert torch.equal(weight, torch.where(kept[name], values[name], 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there they are masked by one call, here one by one")
def test_masks_are_where_the_parameters_are():
    model = network().cuda()
    masks = Masks(members_of(model))
    kept = some_masks(model)
    masks.set(kept)
    for weight in weights_of(model).values():
        weight.grad = torch.ones_like(weight)
    masks.mask_gradients()
    for name, weight in weights_of(model).items():
        assert torch.equal(weight.grad.cpu(), kept[name].double())
        assert torch.equal(weight != 0, kept[name].cuda())


def test_a_parameter_without_gradient_is_passed_over():
    model = network()
    masks = Masks(members_of(model))
    masks.set(some_masks(model))
    model[2].weight.grad = torch.ones_like(model[2].weight)
    masks.mask_gradients()
    assert model[0].weight.grad is None
    assert torch.equal(model[2].weight.grad, masks.kept["2.weight"].double())


def test_after_slimming_masks_are_known_at_full_size_and_enforced_at_the_present_one():
    kept = {"first": torch.zeros(8, 6, dtype=torch.bool), "second": torch.ones(3, 8, dtype=torch.bool)}
    kept["first"][[0, 1, 5], 0] = True
    full, plan = network(), SlimmingPlan(cuts={"0.weight": {0: (0, 2, 5)}})
    small = nn.Parameter(plan.cut("0.weight", full[0].weight.detach() * kept["first"]))
    with torch.no_grad():
        small[1, 3] = 2.0  # a constant that slimming has put there
    names = {"first": "0.weight", "second": "2.weight"}
    masks = Masks({"first": Members(small), "second": Members(full[2].weight)}, kept, plan=plan, names=names)
    assert masks.kept["first"].shape == (8, 6) and masks.num_kept == {"first": 3, "second": 24}
    assert masks.present["first"].nonzero().tolist() == [[0, 0], [1, 3], [2, 0]] and small[1, 3].item() == 2
    masks.set({"first": torch.eye(3, 6, dtype=torch.bool), "second": kept["second"]})
    assert masks.kept["first"].nonzero().tolist() == [[0, 0], [1, 0], [2, 1], [5, 2]]
    assert masks.num_kept == {"first": 4, "second": 24}
    assert small.count_nonzero() == 1


def test_what_is_zeroed_once_counts_as_pruned_and_may_grow_again():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masks, kept = Masks(members_of(model)), some_masks(model)
    masks.watch([optimizer])
    masks.zero_once(kept)
    assert not masks.held and masks.num_kept == {name: int(mask.sum()) for name, mask in kept.items()}
    assert all(torch.equal(weight != 0, kept[name]) for name, weight in weights_of(model).items())
    assert all(bool(mask.all()) for mask in masks.present.values())
    restored = Masks(members_of(model), kept=masks.kept, held=masks.held)
    for x, y in batches(1):
        cross_entropy(model(x), y).backward()
        masks.mask_gradients()
        optimizer.step()
    restored.apply()
    grown = {name: int(weight.count_nonzero()) for name, weight in weights_of(model).items()}
    assert all(grown[name] > int(mask.sum()) for name, mask in kept.items())
    assert restored.num_kept == masks.num_kept == grown
    masks.set(kept, [optimizer])
    assert masks.held and all(torch.equal(w != 0, kept[name]) for name, w in weights_of(model).items())

"""Stage two's networks: padding and batch change nothing, inputs are what they are called, averages are means."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from ichpipe.models.header import SequenceSpec
from ichpipe.models.sequence import (
    SequenceEnsemble,
    SequenceModel,
    build_sequence,
    encode_position,
    make_inputs,
    mean_logits,
    moving_average,
    reverse,
    stored_inputs,
)

DIM, PCA = 8, 3
BASE = {
    "hidden": 6,
    "layers": 2,
    "bidirectional": True,
    "dropout": 0.3,  # no dropout in evaluation
    "inputs": ("embedding",),
    "embedding_dim": DIM,
    "pca": PCA,
    "heads": 2,
}
KINDS = {
    "paper": {"cell": "lstm"},
    "bigru": {"cell": "gru"},
    "one-way": {"cell": "gru", "bidirectional": False},
    "second place": {"cell": "lstm", "residual": True, "inputs": ("embedding", "deltas"), "skip": ("embedding",)},
    "transformer": {"cell": "transformer", "inputs": ("embedding", "spacing", "position")},
    "conv": {"cell": "conv", "inputs": ("embedding", "logits"), "kernel": 5},
    "pca": {"cell": "gru", "inputs": ("pca",), "skip": ("logits", "spacing")},
    "average": {"cell": "average", "inputs": ("logits",)},
    "ensemble": {"cell": "lstm", "members": 2},
    "both orders": {"cell": "gru", "reversed": True, "inputs": ("embedding", "spacing")},
    "smoothed": {"cell": "lstm", "smoothed": True},
}


def build(kind, **changes):
    torch.manual_seed(1)
    model = build_sequence(SequenceSpec(**BASE | KINDS[kind] | changes)).eval()
    for buffer in model.buffers():
        torch.nn.init.normal_(buffer)
    return model


def series_of(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return {
        "embedding": torch.randn(length, DIM, generator=generator),
        "logits": torch.randn(length, 6, generator=generator),
        "pca": torch.randn(length, PCA, generator=generator),
        "position_mm": torch.cumsum(1 + 9 * torch.rand(length, generator=generator), 0) - 400,
    }


def batch_of(series, extra=0, padding=0.0):
    lengths = torch.tensor([len(each["logits"]) for each in series])
    whole = {}
    for name in series[0]:
        padded = pad_sequence([each[name] for each in series], batch_first=True, padding_value=padding)
        filler = torch.full((len(series), extra, *padded.shape[2:]), padding)
        whole[name] = torch.cat([padded, filler], dim=1)
    return whole, lengths


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), padding=st.floats(-1e3, 1e3), extra=st.integers(0, 3)
)
def test_padding_never_changes_an_output(kind, lengths, padding, extra):
    model = build(kind)
    series = [series_of(length, seed) for seed, length in enumerate(lengths)]
    with torch.no_grad():
        together = model(*batch_of(series, extra, padding))
        for row, each in enumerate(series):
            alone = model(*batch_of([each]))[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_batch_nor_order_of_the_batch_matters(kind):
    model = build(kind)
    series = [series_of(length, seed) for seed, length in enumerate((5, 9, 3, 9))]
    with torch.no_grad():
        first = model(*batch_of(series))
        for order in itertools.islice(itertools.permutations(range(4)), 5, 24, 6):
            logits = model(*batch_of([series[number] for number in order]))
            for row, number in enumerate(order):
                length = len(series[number]["logits"])
                torch.testing.assert_close(logits[row, :length], first[number, :length], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pca"])
def test_one_series_is_a_batch_of_one(kind):
    model, series = build(kind), series_of(7)
    with torch.no_grad():
        whole = model(*batch_of([series]))[0]
        alone = model.one_series(series["embedding"], series["logits"], series["position_mm"])
    torch.testing.assert_close(alone, whole)


def flip(series):
    return {name: values.flip(0) for name, values in series.items()}


def swap_directions(model):
    """Exchange the weights of both directions, and the halves of whatever reads their concatenated output."""
    state, swapped = model.state_dict(), {}
    for name in state:
        forward, backward = (name, f"{name}_reverse") if "_l" in name else (name, name)
        if name.endswith("_reverse"):
            forward, backward = name, name.removesuffix("_reverse")
        weights = state[backward if "_l" in forward else name].clone()
        if "weight_ih_l1" in name or name == "head.weight":
            weights = torch.cat(weights.chunk(2, dim=1)[::-1], dim=1)
        swapped[name] = weights
    model.load_state_dict(swapped)
    return model


@pytest.mark.parametrize("kind", ["paper", "bigru"])
@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 15), seed=st.integers(0, 99))
def test_a_flipped_series_through_exchanged_directions_gives_the_flipped_answer(kind, length, seed):
    series = series_of(length, seed)
    with torch.no_grad():
        plain = build(kind)(*batch_of([series]))[0]
        exchanged = swap_directions(build(kind))(*batch_of([flip(series)]))[0]
    torch.testing.assert_close(exchanged.flip(0), plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["both orders", "average"])
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_a_flipped_series_gives_the_flipped_answer(kind, lengths):
    model, series = build(kind), [series_of(length, seed) for seed, length in enumerate(lengths)]
    with torch.no_grad():
        plain, flipped = model(*batch_of(series)), model(*batch_of([flip(each) for each in series]))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(flipped[row, :length].flip(0), plain[row, :length], atol=1e-5, rtol=1e-4)


def test_each_input_by_hand():
    sources = {
        "embedding": torch.tensor([[[1.0, 10.0], [4.0, 30.0], [9.0, 60.0], [77.0, 77.0]]]),
        "position_mm": torch.tensor([[-20.0, -15.0, 60.0, 99.0]]),
    }
    made = make_inputs(("deltas", "spacing", "position"), sources, torch.tensor([3]))[0, :3]
    assert made.tolist() == [
        [0, 0, -3, -20, 0, 1, -1],
        [3, 20, -5, -30, 1, 4, pytest.approx(-0.875)],  # 75 mm are told as 20
        [5, 30, 0, 0, 4, 0, 1],
    ]


def test_a_lone_slice_and_slices_at_one_place_have_finite_inputs():
    sources = {"position_mm": torch.tensor([[3.0, 0.0], [5.0, 5.0]])}
    made = make_inputs(("spacing", "position"), sources, torch.tensor([1, 2]))
    assert torch.isfinite(made).all()


def test_only_what_is_wanted_is_read():
    assert stored_inputs(("embedding", "deltas", "position", "logits")) == ("embedding", "logits")
    assert stored_inputs(("spacing",)) == ()


def test_positions_are_encoded_by_millimetres_not_by_number():
    thick, thin = torch.arange(0, 100, 5.0)[None], torch.arange(0, 96, 1.0)[None]
    coarse = encode_position(thick, torch.tensor([20]), 16)[0]
    fine = encode_position(thin, torch.tensor([96]), 16)[0]
    torch.testing.assert_close(coarse, fine[::5], atol=1e-4, rtol=0)


def test_the_moving_average_by_hand():
    values = torch.tensor([[[0.0], [3.0], [6.0], [0.0], [9.0]]])
    assert moving_average(values, torch.tensor([4]), 3)[0, :4, 0].tolist() == [1.5, 3.0, 3.0, 3.0]
    assert moving_average(values, torch.tensor([5]), 1)[0, :, 0].tolist() == [0, 3, 6, 0, 9]


def test_an_ensemble_averages_probabilities():
    first, second = SequenceModel(SequenceSpec(**BASE | KINDS["paper"])), build("paper")
    both = SequenceEnsemble(second.spec, [first.eval(), second])
    batch = batch_of([series_of(6), series_of(4)])
    with torch.no_grad():
        mean = (torch.sigmoid(first(*batch)) + torch.sigmoid(second(*batch))) / 2
        torch.testing.assert_close(torch.sigmoid(both(*batch)), mean)
    assert both.spec.members == 2


def test_the_mean_of_sure_logits_stays_finite():
    extreme = torch.tensor([[90.0, -90.0], [80.0, 90.0]])
    assert mean_logits(extreme)[0] == pytest.approx(80.69, abs=0.01)
    assert mean_logits(extreme)[1] == pytest.approx(0.0, abs=1e-4)


def test_skipped_logits_pass_as_they_are_at_the_start():
    model = build("pca")
    with torch.no_grad():
        model.head.weight[:, : model.context.width] = 0
        model.head.weight[:, -2:] = 0
        series = series_of(5)
        torch.testing.assert_close(model(*batch_of([series]))[0], series["logits"])


def test_turning_padded_series_round_leaves_the_padding():
    padded = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7], [8, 0, 0, 0]])
    assert reverse(padded, torch.tensor([3, 4, 1])).tolist() == [[3, 2, 1, 0], [7, 6, 5, 4], [8, 0, 0, 0]]


def test_smoothed_is_half_of_the_network_and_half_of_the_moving_average():
    alone, joined = build("paper"), build("smoothed")
    joined.members[0].load_state_dict(alone.state_dict())
    sources = {name: values[None] for name, values in series_of(9).items()}
    lengths = torch.tensor([9])
    expected = (alone(sources, lengths) + build("average")(sources, lengths)) / 2
    torch.testing.assert_close(joined(sources, lengths), expected.float(), rtol=0, atol=1e-6)
    assert joined.spec.all_inputs == ("embedding", "logits")

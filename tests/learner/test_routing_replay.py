"""Routing replay against the model itself and against a MoE layer written out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from learner.backends.routing_replay import (
    UNKNOWN,
    pad_routing,
    recorded_routing,
    replayed_routing,
)
from ringasync.errors import TrainingError

from .kit import VOCAB, tiny_model
from .moe_kit import tiny_moe

ROWS, WIDTH = 3, 7


def ids() -> Tensor:
    return torch.randint(0, VOCAB, (ROWS, WIDTH), generator=torch.Generator().manual_seed(5))


def other_choice(seed: int = 1) -> Tensor:
    """Two different experts of four at random for each token and layer, [B, T, 2, 2]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((ROWS, WIDTH, 2, 4), generator=generator).argsort(-1)
    return order[..., :2]


def logprobs(model: Any) -> Tensor:
    result: Tensor = model(input_ids=ids(), use_cache=False).logits.log_softmax(-1)
    return result


@contextmanager
def watched_layers(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs [B * T, H] of the MoE blocks of a forward."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.mlp.register_forward_hook(
            lambda _module, inputs, output: seen.append(
                (inputs[0].detach().flatten(0, 1), output.detach().flatten(0, 1))
            )
        )
        for layer in model.model.layers
    ]
    yield seen
    for handle in handles:
        handle.remove()


def moe_layer(
    hidden: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor
) -> Tensor:
    """A MoE layer token by token: router [E, H], gate_up [E, 2 I, H], down [E, H, I]."""
    rows = []
    for token, chosen in zip(hidden, experts.tolist(), strict=True):
        probabilities = torch.exp(router @ token) / torch.exp(router @ token).sum()
        total = sum(probabilities[expert] for expert in chosen)
        row = torch.zeros_like(token)
        for expert in chosen:
            gate, up = (gate_up[expert] @ token).chunk(2)
            row = row + probabilities[expert] / total * (
                down[expert] @ (gate * torch.sigmoid(gate) * up)
            )
        rows.append(row)
    return torch.stack(rows)


def weights(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    mlp = layer.mlp
    return mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj


def test_replaying_the_own_choice_changes_nothing() -> None:
    model = tiny_moe().eval()
    with torch.no_grad(), recorded_routing(model) as record:
        expected = logprobs(model)
    chosen = record.experts(ROWS)
    assert chosen.shape == (ROWS, WIDTH, 2, 2)
    with torch.no_grad(), replayed_routing(model, chosen):
        assert torch.equal(logprobs(model), expected)
    with torch.no_grad():
        assert torch.equal(logprobs(model), expected)  # and nothing stays behind


def test_recorded_experts_are_those_of_the_largest_router_logits() -> None:
    model = tiny_moe().eval()
    with torch.no_grad(), recorded_routing(model) as record, watched_layers(model) as seen:
        logprobs(model)
    for layer, (hidden, _) in enumerate(seen):
        router, _, _ = weights(model.model.layers[layer])
        best = (hidden @ router.T).argsort(dim=-1, descending=True)[:, :2]
        found = record.experts(ROWS)[:, :, layer].flatten(0, 1)
        assert torch.equal(found.sort(-1).values, best.sort(-1).values)


def test_replaying_another_choice_is_the_layer_written_out_by_hand() -> None:
    model = tiny_moe().eval()
    chosen = other_choice()
    with torch.no_grad(), replayed_routing(model, chosen), watched_layers(model) as seen:
        replayed = logprobs(model)
        assert len(seen) == 2
        for layer, (hidden, output) in enumerate(seen):
            expected = moe_layer(
                hidden, *weights(model.model.layers[layer]), chosen[:, :, layer].flatten(0, 1)
            )
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(replayed, logprobs(model), atol=1e-2)


def test_tokens_with_an_unknown_choice_are_routed_by_the_model() -> None:
    model = tiny_moe().eval()
    chosen = other_choice()
    chosen[:, 4:] = UNKNOWN
    chosen[1, :, 1] = UNKNOWN
    chosen[2, 0, 0, 1] = UNKNOWN  # half a choice is none
    with torch.no_grad(), replayed_routing(model, chosen), watched_layers(model) as seen:
        logprobs(model)
    for layer, (hidden, output) in enumerate(seen):
        router, gate_up, down = (each.detach() for each in weights(model.model.layers[layer]))
        own = (hidden @ router.T).topk(2).indices
        asked = chosen[:, :, layer].flatten(0, 1)
        used = torch.where((asked >= 0).all(-1, keepdim=True), asked, own)
        expected = moe_layer(hidden, router, gate_up, down, used)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_all_unknown_is_no_replay() -> None:
    model = tiny_moe().eval()
    with torch.no_grad():
        expected = logprobs(model)
        with replayed_routing(model, torch.full((ROWS, WIDTH, 2, 2), UNKNOWN)):
            assert torch.equal(logprobs(model), expected)


def test_gradients_are_those_of_the_layer_written_out_by_hand() -> None:
    model = tiny_moe(num_hidden_layers=1).eval()
    block = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn((1, WIDTH, 32), generator=generator, requires_grad=True)
    pull = torch.randn((WIDTH, 32), generator=generator)
    chosen = other_choice()[:1, :, :1]
    with replayed_routing(model, chosen):
        output = block(hidden)
    (output[0] * pull).sum().backward()  # after the block
    router, gate_up, down = (
        each.detach().clone().requires_grad_() for each in weights(model.model.layers[0])
    )
    by_hand = moe_layer(hidden.detach()[0], router, gate_up, down, chosen[0, :, 0])
    (by_hand * pull).sum().backward()  # type: ignore[no-untyped-call]
    for mine, hand in zip(weights(model.model.layers[0]), (router, gate_up, down), strict=True):
        assert mine.grad is not None
        assert float(mine.grad.abs().max()) > 0
        torch.testing.assert_close(mine.grad, hand.grad, rtol=1e-3, atol=1e-5)


def test_a_policy_gradient_reaches_every_router() -> None:
    model = tiny_moe().eval()
    with replayed_routing(model, other_choice()):
        functional.nll_loss(logprobs(model).flatten(0, 1), ids().flatten()).backward()  # type: ignore[no-untyped-call]
    for layer in model.model.layers:
        assert float(layer.mlp.gate.weight.grad.abs().max()) > 0


def test_weights_are_not_normalised_where_the_architecture_does_not() -> None:
    model = tiny_moe(num_hidden_layers=1, norm_topk_prob=False).eval()
    chosen = other_choice()[:, :, :1]
    hidden = torch.randn((ROWS * WIDTH, 32), generator=torch.Generator().manual_seed(2))
    router = model.model.layers[0].mlp.gate
    with torch.no_grad(), replayed_routing(model, chosen):
        _, scores, experts = router(hidden)
    expected = (hidden @ router.weight.T).softmax(-1).gather(-1, chosen.reshape(-1, 2))
    assert torch.equal(experts, chosen.reshape(-1, 2))
    torch.testing.assert_close(scores, expected)


def test_columns_may_count_dense_layers_too() -> None:
    model = tiny_moe(num_hidden_layers=3, mlp_only_layers=[1]).eval()
    with torch.no_grad(), recorded_routing(model) as record:
        expected = logprobs(model)
    chosen = record.experts(ROWS)
    assert chosen.shape[2] == 2
    for dense in (UNKNOWN, 0):  # vLLM leaves zeros, which as a choice would be one expert twice
        every = torch.full((ROWS, WIDTH, 3, 2), dense)
        every[:, :, [0, 2]] = chosen
        with torch.no_grad(), replayed_routing(model, every):
            assert torch.equal(logprobs(model), expected)


def test_padding_cuts_and_fills() -> None:
    long = np.arange(8, dtype=np.uint8).reshape(4, 1, 2)
    short = np.array([[[5, 255]]], np.uint8)
    padded = pad_routing([long, None, short], 3)
    assert padded is not None
    assert padded.shape == (3, 3, 1, 2)
    assert padded[0].tolist() == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert padded[1].tolist() == [[[-1, -1]], [[-1, -1]], [[-1, -1]]]
    assert padded[2].tolist() == [[[5, -1]], [[-1, -1]], [[-1, -1]]]
    assert pad_routing([None, None], 3) is None
    with pytest.raises(TrainingError, match="differ in shape"):
        pad_routing([long, np.zeros((4, 2, 2), np.uint8)], 3)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (torch.zeros((ROWS, WIDTH, 2), dtype=torch.int64), r"\[B, T, L, K\]"),
        (torch.zeros((ROWS, WIDTH, 5, 2), dtype=torch.int64), "5 layers; the model has 2 MoE"),
        (torch.zeros((ROWS, WIDTH, 2, 3), dtype=torch.int64), "3 a token, the model takes 2"),
        (torch.tensor([1, 4]).expand(ROWS, WIDTH, 2, 2), "from 1 to 4; the model has 0 to 3"),
        (torch.tensor([1, -2]).expand(ROWS, WIDTH, 2, 2), "from -2 to 1"),
        (torch.tensor([1, 1]).expand(ROWS, WIDTH, 2, 2), "an expert twice"),
        (torch.tensor([0, 1]).expand(ROWS, WIDTH + 1, 2, 2), "of 24 tokens, this forward has 21"),
    ],
)
def test_a_choice_that_is_none_of_the_models_is_refused(chosen: Tensor, words: str) -> None:
    model = tiny_moe().eval()
    with pytest.raises(TrainingError, match=words), replayed_routing(model, chosen):
        logprobs(model)
    assert not model.model.layers[0].mlp.gate._forward_hooks


def test_a_dense_model_is_refused() -> None:
    with (
        pytest.raises(TrainingError, match="Qwen3ForCausalLM has none"),
        replayed_routing(tiny_model(), other_choice()),
    ):
        pass

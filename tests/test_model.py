"""model.py: equal to transformers on the golden models. That a text read in several forwards is the
same text: test_reward.py (a prompt and its branches), test_sample.py (decode steps)."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import assert_close
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model import Config, Prefix, Transformer, rope_table, visible
from support.weights import load_model

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))


def random_tokens(seed: int, *shape: int) -> Tensor:
    """Tokens of a tiny model."""
    vocab = tiny.SIZES["vocab_size"]
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- against transformers
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    model, expected = load_model(GOLDEN / name), load_file(GOLDEN / name / "expected.safetensors")
    logits = model(expected["tokens"]) @ model.lm_head.weight.T
    assert_close(logits, expected["logits"], 1e-4)


def test_recomputation_keeps_less():
    """That it changes no gradient: test_train.py."""
    model, tokens, kept = tiny.model(), random_tokens(5, 2, 6), []
    for model.recompute in (False, True):
        saved = []  # numbers that the graph keeps
        with saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            model(tokens)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2


# ---- attention as a GPU computes it: the fixture `flash`
def branches_and_gradients(model: Transformer, tokens: Tensor, branches: Tensor) -> list[Tensor]:
    prefix = Prefix()
    prompt = model(tokens, prefix)
    hidden = model(branches, prefix)
    goal = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden.dtype)
    model.zero_grad()
    ((hidden * goal).sum() + prompt.sum()).backward()
    grads = [parameter.grad.clone() for parameter in model.layers.parameters()]
    return [hidden.detach(), *grads]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_branches_under_a_lower_right_triangle_equal_those_under_the_mask(heads, request):
    shape = dict(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
    model = tiny.model(**shape)
    inputs = (model, random_tokens(7, 1, 5), random_tokens(8, 3, 9))
    expected = branches_and_gradients(*inputs)
    request.getfixturevalue("flash")
    ours = branches_and_gradients(*inputs)
    for tensor, other in zip(ours, expected, strict=True):
        assert_close(tensor, other, 1e-12)


@pytest.mark.parametrize("window, masked", [(None, False), (14, False), (13, True)])
def test_branches_need_a_mask_only_where_a_window_is_shorter_than_they_are(window, masked, flash):
    config = Config(**tiny.SIZES, head_dim=8, sliding_window=window)
    # A prompt of 5 tokens, branches of 9.
    mask = visible(5, torch.arange(5, 14), 14, config, like=torch.empty(0))
    assert (type(mask) is Tensor) == masked


# ---- settings and positions
def test_cudnn_does_not_build_a_plan_for_every_new_shape_of_attention():
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # on in torch itself


def test_positions_are_not_rounded_in_a_bf16_model():
    config = Config(**tiny.SIZES, head_dim=8)
    positions = torch.tensor([0, 255, 257, 1001, 4095])
    cos, sin = rope_table(positions, config, torch.bfloat16)
    angle = positions.double()[:, None] * 10000.0 ** -(torch.arange(0, 8, 2).double() / 8)
    cos_twice = torch.cat([angle.cos(), angle.cos()], dim=1)
    sin_twice = torch.cat([-angle.sin(), angle.sin()], dim=1)
    for got, exact in ((cos, cos_twice), (sin, sin_twice)):
        assert got.dtype == torch.bfloat16 and got.shape == (1, 1, 5, 8)
        # 2^-8 is the rounding of the result. Rounding the position would move the angle by 1.
        assert (got[0, 0].double() - exact).abs().max() < 2**-8

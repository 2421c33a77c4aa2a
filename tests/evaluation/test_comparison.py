"""What `compare` says of models beside another, against NumPy in float64 on logits of `score`."""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_map
from numpy.typing import NDArray

from dbrx_fn.data.corpus import Document
from dbrx_fn.data.token_file import TokenFile, write_token_file
from dbrx_fn.errors import InputError
from dbrx_fn.evaluation.comparison import Comparison, Model, check_same_model, compare, experts_in_common, kl_divergence
from dbrx_fn.evaluation.perplexity import Evaluation, evaluate
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.model.transformer import score
from dbrx_fn.ops.formats import Format
from dbrx_fn.text.bpe import SMALLEST_VOCABULARY, save_tokenizer, train_bpe
from dbrx_fn.text.tokenizer import read_tokenizer
from tests.support.tiny_runs import TINY, sentences
from tests.support.trees import as_float64, case_of

CASE = case_of({**TINY, "vocab_size": SMALLEST_VOCABULARY + 4}, np.random.default_rng(0))
CONFIG, FIRST = CASE.config, Model(CASE.params, CASE.config)
THREE = Format(3, 32)
QUANTIZED = Model(quantize(CASE.params, CONFIG, Quantization(THREE, THREE, THREE, THREE, THREE)), CONFIG)
TEXT = " ".join(sentences(8))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenFile]:
    folder = tmp_path_factory.mktemp("files")
    save_tokenizer(train_bpe([TEXT], SMALLEST_VOCABULARY + 4), folder)
    tokenizer = read_tokenizer(folder)
    plain = [Document("a", ((TEXT[:90], True),)), Document("b", ((TEXT[90:200], True),))]
    masked = [Document("c", ((TEXT[:70], False), (TEXT[70:90], True))), Document("d", ((TEXT[90:100], True),))]
    empty = [Document("e", ((TEXT, False), ("", True)))]
    return {
        name: write_token_file(folder / name, documents, tokenizer)
        for name, documents in (("plain", plain), ("masked", masked), ("empty", empty))
    }


def run(
    file: TokenFile, *others: Model, first: Model = FIRST, batch_size: int = 4, sequence_length: int = 16
) -> tuple[Evaluation, list[Comparison]]:
    return compare(first, others, file, batch_size=batch_size, sequence_length=sequence_length)


def log_softmax(logits: mx.array) -> NDArray[np.float64]:
    values = as_float64(logits)
    values = values - values.max(axis=-1, keepdims=True)
    shifted: NDArray[np.float64] = values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return shifted


def by_hand(other: Model, file: TokenFile, sequence_length: int) -> tuple[float, float, NDArray[np.float64]]:
    """Divergence, top-1 and router agreement, window by window, token by token."""
    divergences, same, common = [], [], []
    tokens = np.asarray(file.tokens, np.int32)
    for start in range(0, len(tokens) - 1, sequence_length):
        window = mx.array(tokens[None, start : start + sequence_length + 1][:, :-1])
        inputs = window[:, : len(tokens) - 1 - start]
        said = [score(model.params, inputs, model.config) for model in (FIRST, other)]
        one, two = (log_softmax(logits[0]) for logits, _ in said)
        experts = [np.array(routing.top_experts)[:, 0] for _, routing in said]
        for place in range(inputs.shape[1]):
            common.append([len({*a[place]} & {*b[place]}) / len(a[place]) for a, b in zip(*experts, strict=True)])
            if file.targets is None or file.targets[start + place + 1]:
                divergences.append((np.exp(one[place]) * (one[place] - two[place])).sum())
                same.append(one[place].argmax() == two[place].argmax())
    return float(np.mean(divergences)), float(np.mean(same)), np.mean(common, axis=0)


@pytest.mark.parametrize("name", ["plain", "masked"])
@pytest.mark.parametrize(("batch_size", "sequence_length"), [(1, 16), (4, 16), (100, 16), (3, 7), (1, 1000)])
def test_it_is_what_numpy_says_in_float64(
    name: str, batch_size: int, sequence_length: int, files: dict[str, TokenFile]
) -> None:
    """Neither prompts nor the padding of windows, rows and batches count."""
    divergence, same, common = by_hand(QUANTIZED, files[name], sequence_length)
    _, (found,) = run(files[name], QUANTIZED, batch_size=batch_size, sequence_length=sequence_length)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-5)
    assert found.top1_agreement == pytest.approx(same, rel=1e-12)
    np.testing.assert_allclose(found.router_agreement, common, rtol=1e-12)
    # Else the figures above say nothing.
    assert divergence > 0.01
    assert same < 1
    assert (common < 1).all()


def test_a_model_is_no_way_from_itself(files: dict[str, TokenFile]) -> None:
    _, (found,) = run(files["plain"], FIRST)
    assert found.kl_divergence == 0
    assert found.top1_agreement == 1
    assert found.router_agreement.tolist() == [1] * CONFIG.n_layers


@pytest.mark.parametrize("name", ["plain", "masked"])
def test_evaluations_are_those_of_evaluate(name: str, files: dict[str, TokenFile]) -> None:
    evaluation, comparisons = run(files[name], QUANTIZED, FIRST)
    for found, model in zip(
        (evaluation, *(comparison.evaluation for comparison in comparisons)), (FIRST, QUANTIZED, FIRST), strict=True
    ):
        expected = evaluate(model.params, model.config, files[name], batch_size=4, sequence_length=16)
        assert (found.nats_per_token, found.bits_per_byte) == (expected.nats_per_token, expected.bits_per_byte)
        assert found.tokens == expected.tokens
        assert found.expert_share.tolist() == expected.expert_share.tolist()
        assert found.perplexity == np.exp(expected.nats_per_token)


def test_models_do_not_touch_each_other(files: dict[str, TokenFile]) -> None:
    """Several at once are what each is alone, and the quantized one what it stands for."""
    dense = Model(dequantize(QUANTIZED.params, CONFIG), CONFIG)
    _, together = run(files["plain"], dense, FIRST, QUANTIZED)
    for model, found in zip((dense, FIRST, QUANTIZED), together, strict=True):
        _, (alone,) = run(files["plain"], model)
        assert (found.kl_divergence, found.top1_agreement) == (alone.kl_divergence, alone.top1_agreement)
        assert found.router_agreement.tolist() == alone.router_agreement.tolist()
    assert together[0].kl_divergence == pytest.approx(together[2].kl_divergence, rel=1e-4)


def test_experts_in_another_order_are_another_routing_and_the_same_model(files: dict[str, TokenFile]) -> None:
    """Experts are told apart by number: a permutation of all four, with the routers' rows, changes no logits."""
    order = mx.array([1, 2, 3, 0])
    transformer: Any = CASE.params["transformer"]
    blocks: Any = [
        {**block, "ffn": tree_map(lambda array: array[order], block["ffn"])} for block in transformer["blocks"]
    ]
    permuted = Model({**CASE.params, "transformer": transformer | {"blocks": blocks}}, CONFIG)
    _, (found,) = run(files["plain"], permuted)
    assert abs(found.kl_divergence) < 1e-7
    assert found.top1_agreement == 1
    assert found.router_agreement.max() < 0.9


def test_other_dtypes_can_be_compared(files: dict[str, TokenFile]) -> None:
    config = replace(CONFIG, dtype="bfloat16")
    rounded = Model(tree_map(lambda array: array.astype(mx.bfloat16), CASE.params), config)
    _, (found,) = run(files["plain"], rounded)
    _, (quantized,) = run(files["plain"], QUANTIZED)
    assert 0 < found.kl_divergence < 0.1 * quantized.kl_divergence


def test_progress_counts_every_pass(files: dict[str, TokenFile]) -> None:
    seen: list[tuple[int, int]] = []
    file = files["plain"]
    compare(
        FIRST,
        [QUANTIZED, FIRST],
        file,
        batch_size=3,
        sequence_length=7,
        progress=lambda done, total: seen.append((done, total)),
    )
    passes = 3 * math.ceil(math.ceil((len(file) - 1) / 7) / 3)
    assert seen == [(done, passes) for done in range(1, passes + 1)]


@given(st.integers(0, 2**32), st.floats(-50, 50), st.floats(0.01, 20))
def test_divergence_is_positive_and_blind_to_what_softmax_is_blind_to(seed: int, shift: float, scale: float) -> None:
    one, two = np.random.default_rng(seed).normal(0, scale, (2, 3, 50)).astype(np.float32)
    logs = log_softmax(mx.array(one)), log_softmax(mx.array(two))
    expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)
    assert (expected > 0).all()
    found = np.array(kl_divergence(mx.array(one) + shift, mx.array(two)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


def test_divergence_of_half_precision_is_computed_in_float32() -> None:
    one, two = (mx.random.normal((50, 300), mx.bfloat16, key=mx.random.key(seed)) for seed in (0, 1))
    logs = log_softmax(one), log_softmax(two)
    found = kl_divergence(one, two)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1), rtol=1e-5)


@given(st.permutations(range(6)), st.permutations(range(6)), st.integers(1, 6))
def test_experts_in_common_are_those_of_sets(one: list[int], two: list[int], top_k: int) -> None:
    found = experts_in_common(*(mx.array([chosen[:top_k]], mx.uint32) for chosen in (one, two)))
    assert found.tolist() == [len({*one[:top_k]} & {*two[:top_k]})]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 999}, "vocab_size 999"),
        ({"n_layers": 3}, "n_layers 3"),
        ({"d_model": 64}, "d_model 64"),
        ({"ffn": replace(CONFIG.ffn, moe_num_experts=8)}, "ffn_config.moe_num_experts 8"),
        ({"ffn": replace(CONFIG.ffn, moe_top_k=1)}, "ffn_config.moe_top_k 1"),
        ({"attn": replace(CONFIG.attn, rope_theta=5e5)}, "attn_config.rope_theta 500000.0"),
    ],
)
def test_another_model_is_refused_by_what_differs(
    changes: dict[str, Any], said: str, files: dict[str, TokenFile]
) -> None:
    other = replace(CONFIG, **changes)
    with pytest.raises(InputError, match=rf"^four has {said} where dense has .*: compare checkpoints of one model\.$"):
        check_same_model(CONFIG, other, "dense", "four")
    with pytest.raises(InputError, match=said):
        run(files["plain"], Model(CASE.params, other))


def test_what_no_logits_depend_on_may_differ() -> None:
    ffn = replace(CONFIG.ffn, moe_jitter_eps=None, moe_loss_weight=0.5)
    check_same_model(CONFIG, replace(CONFIG, ffn=ffn, dtype="bfloat16", max_seq_len=9, initializer_range=1), "a", "b")


@pytest.mark.parametrize(("batch_size", "sequence_length"), [(0, 16), (4, 0)])
def test_sizes_must_be_positive(batch_size: int, sequence_length: int, files: dict[str, TokenFile]) -> None:
    with pytest.raises(InputError, match="is 0 where at least 1"):
        run(files["plain"], FIRST, batch_size=batch_size, sequence_length=sequence_length)


def test_a_text_without_anything_to_predict_is_refused(files: dict[str, TokenFile]) -> None:
    with pytest.raises(InputError, match="nothing to predict"):
        run(files["empty"], FIRST)

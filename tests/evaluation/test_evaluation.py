"""What `evaluate` says of a text, against logits of `forward` and sums by hand."""

import math

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from dbrx_fn.data.corpus import Document
from dbrx_fn.data.token_file import TokenFile, write_token_file
from dbrx_fn.errors import InputError
from dbrx_fn.evaluation.perplexity import Evaluation, evaluate
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.ops.formats import Format
from dbrx_fn.text.bpe import SMALLEST_VOCABULARY, save_tokenizer, train_bpe
from dbrx_fn.text.tokenizer import read_tokenizer
from tests.support.tiny_runs import TINY, sentences
from tests.support.trees import as_float64, case_of

CASE = case_of({**TINY, "vocab_size": SMALLEST_VOCABULARY + 4}, np.random.default_rng(0))
CONFIG, PARAMS = CASE.config, CASE.params
TEXT, ANSWER = " ".join(sentences(5)), "when the hurlybürly is done"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenFile]:
    folder = tmp_path_factory.mktemp("files")
    save_tokenizer(train_bpe([TEXT], SMALLEST_VOCABULARY + 4), folder)
    tokenizer = read_tokenizer(folder)
    plain = [Document("a", ((TEXT[:90], True),)), Document("b", ((TEXT[90:200], True),))]
    masked = [Document("c", ((TEXT[:70], False), (ANSWER, True))), Document("d", ((TEXT[70:100], True),))]
    empty = [Document("e", ((TEXT, False), ("", True)))]
    return {
        name: write_token_file(folder / name, documents, tokenizer)
        for name, documents in (("plain", plain), ("masked", masked), ("empty", empty))
    }


def test_tokens_that_the_model_has_no_rows_for(files: dict[str, TokenFile]) -> None:
    config = case_of({**TINY, "vocab_size": SMALLEST_VOCABULARY}, np.random.default_rng(0)).config
    with pytest.raises(InputError, match=r"holds the token \d+ where the model's vocabulary ends at 259"):
        evaluate(PARAMS, config, files["plain"], batch_size=1, sequence_length=16)


def by_hand(file: TokenFile, sequence_length: int) -> tuple[float, int, NDArray[np.float64]]:
    """All the targets' nats, how many they are, and how many (token, choice) pairs went to each expert."""
    nats, targets, pairs = 0.0, 0, np.zeros((CONFIG.n_layers, CONFIG.ffn.moe_num_experts))
    tokens = np.asarray(file.tokens, np.int32)
    for start in range(0, len(tokens) - 1, sequence_length):
        window = tokens[start : start + sequence_length + 1]
        logits, _ = forward(PARAMS, mx.array(window[None, :-1]), init_cache(CONFIG, 1, 0))
        shifted = as_float64(logits[0])
        logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        for place, (row, token) in enumerate(zip(logprobs, window[1:], strict=True), start=start + 1):
            if file.targets is None or file.targets[place]:
                nats, targets = nats - row[token], targets + 1
        chosen = np.array(score(PARAMS, mx.array(window[None, :-1]), CONFIG)[1].top_experts)
        for layer, experts in enumerate(chosen):
            pairs[layer] += np.bincount(experts.ravel(), minlength=pairs.shape[1])
    return nats, targets, pairs


def run(file: TokenFile, batch_size: int = 4, sequence_length: int = 16) -> Evaluation:
    return evaluate(PARAMS, CONFIG, file, batch_size=batch_size, sequence_length=sequence_length)


@pytest.mark.parametrize("name", ["plain", "masked"])
@pytest.mark.parametrize(("batch_size", "sequence_length"), [(1, 16), (4, 16), (100, 16), (3, 7), (1, 1000)])
def test_it_is_the_sum_over_windows(
    name: str, batch_size: int, sequence_length: int, files: dict[str, TokenFile]
) -> None:
    """Whether windows divide the text or not, and however many are done at a time."""
    file = files[name]
    nats, targets, pairs = by_hand(file, sequence_length)
    found = run(file, batch_size, sequence_length)
    assert found.tokens == targets == file.target_count
    assert found.nats_per_token == pytest.approx(nats / targets, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / file.bytes, rel=1e-6)
    np.testing.assert_allclose(found.expert_share, pairs / pairs.sum(axis=1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(found.expert_share.sum(axis=1), 1, rtol=1e-12)
    assert found.busiest_expert == found.expert_share.max() * CONFIG.ffn.moe_num_experts


def test_bytes_are_those_to_be_predicted(files: dict[str, TokenFile]) -> None:
    assert files["plain"].bytes == len(TEXT[:200].encode())
    assert files["masked"].bytes == len((ANSWER + TEXT[70:100]).encode())


def test_quantized_parameters_are_evaluated_as_they_are(files: dict[str, TokenFile]) -> None:
    """Eight bits change the loss by little, three by more."""
    dense = run(files["plain"]).nats_per_token
    eight, three = (
        evaluate(
            quantize(PARAMS, CONFIG, Quantization(Format(bits, 32), None, None, Format(bits, 32), None)),
            CONFIG,
            files["plain"],
            batch_size=4,
            sequence_length=16,
        ).nats_per_token
        for bits in (8, 3)
    )
    assert 0 < abs(eight - dense) < 0.01 * dense
    assert abs(eight - dense) < abs(three - dense) < dense


@pytest.mark.parametrize(("batch_size", "sequence_length"), [(0, 16), (4, 0)])
def test_sizes_must_be_positive(batch_size: int, sequence_length: int, files: dict[str, TokenFile]) -> None:
    with pytest.raises(InputError, match="is 0 where at least 1"):
        run(files["plain"], batch_size, sequence_length)


def test_a_text_without_anything_to_predict_is_refused(files: dict[str, TokenFile]) -> None:
    with pytest.raises(InputError, match="nothing to predict"):
        run(files["empty"])

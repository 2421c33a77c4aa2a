"""The built-in ChatML as a template: the same text for every conversation, here and in transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbrx_fn import train
from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.bpe import save_tokenizer, train_bpe
from dbrx_fn.text.chat import ChatFormat, render_chat
from dbrx_fn.text.chatml_template import chatml_template
from dbrx_fn.text.tokenizer import read_tokenizer
from tests.support.tiny_runs import arguments, sentences, write_config, write_conversations, write_text

CONTENT = st.text(max_size=12) | st.sampled_from(
    [" To be ", "\n", "", "{{ x }}", "{% if %}", "<|im_end|>", "\\n", "'\"", "Ärger — naïve", "\u2028", "a\r\nb"]
)
SAID = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), CONTENT
)
SYSTEM = st.lists(CONTENT.map(lambda content: {"role": "system", "content": content}), max_size=1)
CONVERSATIONS = st.builds(lambda system, said: system + said, SYSTEM, st.lists(SAID, min_size=1, max_size=5))


@given(CONVERSATIONS, st.booleans(), st.booleans(), st.sampled_from([None, "", "Be kind."]))
def test_it_renders_what_the_built_in_form_does(
    messages: list[dict[str, str]], default_system: bool, add_generation_prompt: bool, system: str | None
) -> None:
    if messages[0]["role"] == "system":
        system = None
    texts = {
        render_chat(
            messages,
            ChatFormat(template, default_system),
            system=system,
            add_generation_prompt=add_generation_prompt,
        )
        for template in (None, chatml_template(default_system=default_system))
    }
    assert len(texts) == 1


def test_other_roles_are_refused_there_too() -> None:
    form = ChatFormat(chatml_template(default_system=False))
    with pytest.raises(TokenizerError, match="The role tool is none of system, user and assistant"):
        render_chat([{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}], form)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and texts; a tokenizer whose stop tokens no generation_config.json names; models tuned on them."""
    folder = tmp_path_factory.mktemp("made")
    write_config(folder / "config.json")
    write_text(folder / "text.md")
    write_conversations(folder / "chats.jsonl")
    save_tokenizer(train_bpe(sentences(300), 300), folder / "bare", default_system_prompt=True)
    (folder / "bare" / "generation_config.json").unlink()
    for name, data, more in (
        ("plain", "text.md", {}),
        ("chats", "chats.jsonl", {}),
        ("of bare", "chats.jsonl", {"tokenizer": folder / "bare", "sequence_length": 60}),
    ):
        given = arguments(folder / name, folder / "config.json", [folder / data], steps=1, **more)
        assert train.main(given) == 0
    return folder


@pytest.mark.parametrize(("name", "default_system"), [("chats", False), ("of bare", True)])
def test_a_model_tuned_on_chats_is_saved_with_their_template(name: str, default_system: bool, made: Path) -> None:
    for folder in (made / name / "tokenizer", made / name / "checkpoints" / "step-00000001", made / name / "model"):
        template = (folder / "chat_template.jinja").read_text()
        assert template == chatml_template(default_system=default_system)
        tokenizer = read_tokenizer(folder)
        stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert {tokenizer.decode([stop], skip_special_tokens=False) for stop in stops} == {
            "<|endoftext|>",
            "<|im_end|>",
        }
        assert tokenizer.stop_tokens == {*stops}
        # And is tuned further as it was.
        assert tokenizer.chat_format.template is not None


def test_a_model_of_plain_text_gets_none(made: Path) -> None:
    """mlx-lm would put every prompt into it."""
    assert not (made / "plain" / "model" / "chat_template.jinja").exists()


def test_a_template_of_its_own_stays(made: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(made / "chats" / "model", own)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    (own / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    assert train.main(arguments(tmp_path / "run", None, [made / "chats.jsonl"], steps=1, model=own)) == 0
    saved = (tmp_path / "run" / "model" / "chat_template.jinja").read_bytes()
    assert saved == (own / "chat_template.jinja").read_bytes()


@pytest.fixture(scope="module")
def in_transformers(made: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="the tests' group doesn't have transformers")
    return {
        name: transformers.AutoTokenizer.from_pretrained(made / name / "model")
        for name in ("plain", "chats", "of bare")
    }


@given(CONVERSATIONS, st.booleans(), st.sampled_from([("chats", False), ("of bare", True)]))
def test_transformers_renders_the_same(
    in_transformers: dict[str, Any],
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
    tuned: tuple[str, bool],
) -> None:
    name, default_system = tuned
    theirs = in_transformers[name].apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    form = ChatFormat(default_system=default_system)
    assert theirs == render_chat(messages, form, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("name", ["chats", "of bare"])
def test_transformers_and_mlx_lm_stop_where_a_turn_ends(name: str, made: Path, in_transformers: dict[str, Any]) -> None:
    transformers, mlx_lm = pytest.importorskip("transformers"), pytest.importorskip("mlx_lm.utils")
    stops = transformers.GenerationConfig.from_pretrained(made / name / "model").eos_token_id
    expected = read_tokenizer(made / name / "model").stop_tokens
    assert {*stops} == expected
    theirs = mlx_lm.load_tokenizer(made / name / "model")
    wrapped = mlx_lm.load(str(made / name / "model"))[1]
    assert {*wrapped.eos_token_ids} == expected
    assert wrapped.has_chat_template
    assert theirs.chat_template == in_transformers[name].chat_template
    assert in_transformers["plain"].chat_template is None

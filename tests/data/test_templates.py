"""Chat templates: what is trained is the assistant's words and end-of-turn, exactly, or the template is refused."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from chat_families import CONTROL, FAMILIES, LLAMA2, LLAMA3, QWEN, Family
from small_tokenizers import KINDS, small

from pegbox.core.errors import DataError
from pegbox.data import templates
from pegbox.data.rejects import RowError
from pegbox.data.templates import BUILT_IN, prove, render, template_of, trained_tokens
from pegbox.data.tokenise import encode

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo!"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "So."},
]
MARKED = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{- m.content }}END{% endgeneration %}AFTER
{%- else %}{{- m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("kind", KINDS)


def said(messages, tokenizer, proof=None, tools=None):
    """The texts trained, turn by turn."""
    rendered = render(messages, tokenizer, proof or prove(tokenizer), tools)
    return tuple(rendered.text[turn.start : turn.stop] for turn in rendered.turns)


def trained_text(encoded, tokenizer):
    return tokenizer.decode([label for label in encoded.labels if label != -100])


def bare(text):
    """Less blanks, which SentencePiece writes as a letter and decoding does not bring back one for one."""
    return text.replace(" ", "").replace("▁", "")


@kinds
@families
def test_trains_exactly_the_assistants_words_and_end_of_turn(family, kind):
    tokenizer = small(kind, FAMILIES[family])
    proof = prove(tokenizer)
    assert "several turns" in proof.probes
    assert said(CHAT, tokenizer, proof) == FAMILIES[family].trains


@kinds
@families
def test_labels_say_the_same_token_by_token(family, kind):
    tokenizer = small(kind, FAMILIES[family])
    encoded = encode({"id": "a", "messages": CHAT}, tokenizer, max_length=999)
    assert list(encoded.input_ids) == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert all(label in (-100, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    assert bare(trained_text(encoded, tokenizer)) == bare("".join(FAMILIES[family].trains))
    assert encoded.end_trained


@families
def test_any_content_is_trained_whole_and_nothing_else(family):
    """However odd the words, taking what is trained out of the text leaves the same skeleton."""
    tokenizer = small("byte-level", FAMILIES[family])
    proof = prove(tokenizer)
    header = said(CHAT, tokenizer, proof)[0]
    odd = [
        "x",
        " x",
        "x\n\n",
        "<|im_start|>",
        "assistant",
        "Yo!",
        "</s>",
        header,
        "é🎉",
        "{{ m }}",
        "\ue000",
        "[/INST] y",
    ]
    draw = random.Random(0)
    for _ in range(30):
        contents = ["".join(draw.choices(odd, k=draw.randint(1, 3))) for _ in range(2)]
        chat = [*CHAT[:1], CHAT[1] | {"content": contents[0]}, CHAT[2], CHAT[3] | {"content": contents[1]}]
        rendered = render(chat, tokenizer, proof)
        for turn, content in zip(rendered.turns, contents, strict=True):
            assert content.strip() in rendered.text[turn.start : turn.stop]
            assert turn.closed
        assert skeleton(rendered) == skeleton(render(CHAT, tokenizer, proof))


def skeleton(rendered):
    edges = [0, *itertools.chain(*((turn.start, turn.stop) for turn in rendered.turns)), len(rendered.text)]
    return [rendered.text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2)]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_are_proven(name):
    tokenizer = small()
    proof = prove(tokenizer, name)
    assert "several turns" in proof.probes
    text = render(CHAT, tokenizer, proof).text
    assert text.count("<s>") == {"llama2": 2, "chatml": 0}.get(name, 1)
    assert all(word.strip().startswith(("Yo!", "So.")) for word in said(CHAT, tokenizer, proof))


# -- the proof bites -----------------------------------------------------------------------------------------------

MUTANTS = {
    "one token late": lambda r: range(r.start + 1, r.stop + 1),
    "one token early": lambda r: range(r.start - 1, r.stop - 1),
    "without the first token": lambda r: range(r.start + 1, r.stop),
    "without the end token": lambda r: range(r.start, r.stop - 1),
    "with a token of the header": lambda r: range(r.start - 1, r.stop),
    "with the header": lambda r: range(max(0, r.start - 4), r.stop),
    "with what follows": lambda r: range(r.start, r.stop + 1),
    "nothing": lambda r: range(r.start, r.start),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@families
def test_a_wrong_mask_is_caught(family, kind, mutant, monkeypatch):
    def wrong(offsets, text, turns):
        return [
            range(max(0, r.start), min(r.stop, len(offsets)))
            for r in map(MUTANTS[mutant], trained_tokens(offsets, text, turns))
        ]

    monkeypatch.setattr(templates, "trained_tokens", wrong)
    with pytest.raises(DataError, match=r"probe '(one turn|several turns)' failed: wrong mask: it trains"):
        prove(small(kind, FAMILIES[family]))


@pytest.mark.parametrize("moved", ["from the beginning", "from its second character", "no further than its first"])
@families
def test_a_wrong_span_is_caught(family, moved, monkeypatch):
    def move(turn):
        return {
            "from the beginning": replace(turn, start=0),
            "from its second character": replace(turn, start=turn.start + 1 + (family in ("llama2", "mistral"))),
            "no further than its first": replace(turn, stop=turn.start + 1),
        }[moved]

    def wrong(*args, **kwargs):
        rendered = render(*args, **kwargs)
        return replace(rendered, turns=tuple(map(move, rendered.turns)))

    monkeypatch.setattr(templates, "render", wrong)
    with pytest.raises(DataError, match="probe 'one turn' failed: wrong mask"):
        prove(small("byte-level", FAMILIES[family]))


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "no end of turn"),
        ("{% for m in messages %}{{ m.role + (m.content | lower) + '</s>' }}{% endfor %}", "probe 'one turn' failed"),
        ("{% for m in messages %}{{ m.content + m.content + '</s>' }}{% endfor %}", "not written once"),
        ("{{ raise_exception('not for chat') }}", "template refuses: not for chat"),
        ("{{ '<s><s>' }}{% for m in messages %}{{ m.role + m.content + '</s>' }}{% endfor %}", "doubled BOS"),
    ],
)
def test_an_unprovable_template_is_refused_with_its_probe_and_a_way_out(template, fault):
    with pytest.raises(DataError, match=fault) as error:
        prove(small(), template)
    assert "pass another template= (one of: alpaca, chatml" in str(error.value)


# -- generation marks ----------------------------------------------------------------------------------------------


def test_the_templates_own_marks_are_used():
    template = MARKED.replace("END", "{{- '<|im_end|>' }}").replace("AFTER", "{{- '\\n' }}")
    tokenizer = small("byte-level", replace(FAMILIES["qwen"], template=template))
    proof = prove(tokenizer)
    assert (proof.by, proof.note) == ("marks", "")
    assert said(CHAT, tokenizer, proof) == ("Yo!<|im_end|>", "So.<|im_end|>")


def test_marks_without_the_end_token_are_passed_over_and_said_so():
    template = MARKED.replace("END", "").replace("AFTER", "{{- '<|im_end|>\\n' }}")
    tokenizer = small("byte-level", replace(FAMILIES["qwen"], template=template))
    proof = prove(tokenizer)
    assert proof.by == "sentinels"
    assert "marks are not used" in proof.note
    assert said(CHAT, tokenizer, proof) == ("Yo!<|im_end|>", "So.<|im_end|>")


@pytest.mark.parametrize(
    ("end", "after", "by"),
    [
        ("{{- '<|im_end|>\\n' }}", "", "marks"),  # a newline too many is left out
        ("{{- '<|im_end|>\\n<|im_start|>' }}", "", "sentinels"),
    ],
)
def test_marks_that_go_beyond_the_end_token(end, after, by):
    template = MARKED.replace("END", end).replace("AFTER", after)
    tokenizer = small("byte-level", replace(FAMILIES["qwen"], template=template))
    proof = prove(tokenizer)
    assert proof.by == by
    assert said(CHAT, tokenizer, proof) == ("Yo!<|im_end|>", "So.<|im_end|>")


def test_marks_around_the_header_are_passed_over():
    template = MARKED.replace("END", "{{- '<|im_end|>' }}").replace("AFTER", "{{- '\\n' }}")
    template = template.replace("{% generation %}{{- m.content }}", "{% generation %}{{- '> ' + m.content }}")
    template = template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n> '")
    tokenizer = small("byte-level", replace(FAMILIES["qwen"], template=template))
    proof = prove(tokenizer)
    assert "it trains '> A pegbox.<|im_end|>' where the assistant wrote 'A pegbox.<|im_end|>'" in proof.note
    assert said(CHAT, tokenizer, proof) == ("Yo!<|im_end|>", "So.<|im_end|>")


# -- what templates do to messages ---------------------------------------------------------------------------------


def test_contents_that_a_template_trims_are_trained_as_written():
    chat = [CHAT[0], CHAT[1] | {"content": "  Yo!\n"}]
    assert said(chat, small("byte-level", FAMILIES["llama3"])) == ("Yo!<|eot_id|>",)
    assert said(chat, small("byte-level", FAMILIES["qwen"])) == ("  Yo!\n<|im_end|>",)


def test_a_system_prompt_merged_into_the_users_turn_is_not_trained():
    tokenizer = small("byte-level", FAMILIES["llama2"])
    chat = [{"role": "system", "content": "Yo!"}, *CHAT]
    assert said(chat, tokenizer) == FAMILIES["llama2"].trains


@pytest.mark.parametrize(("family", "role"), [("mistral", "system"), ("vicuna", "system"), ("zephyr", "tool")])
def test_a_message_that_the_template_leaves_out_is_an_error_of_the_row(family, role):
    tokenizer = small("byte-level", FAMILIES[family])
    with pytest.raises(RowError, match=f"template drops '{role}' messages"):
        render([{"role": role, "content": "Be brief."}, *CHAT], tokenizer, prove(tokenizer))


def test_roles_that_the_template_refuses_are_an_error_of_the_row():
    tokenizer = small("byte-level", FAMILIES["gemma"])
    proof = prove(tokenizer)
    assert "system" in proof.refused
    with pytest.raises(RowError, match="template refuses: System role not supported"):
        render([{"role": "system", "content": "Be brief."}, *CHAT], tokenizer, proof)
    with pytest.raises(RowError, match="template refuses: roles must alternate"):
        render([*CHAT, CHAT[1]], tokenizer, proof)


def test_reasoning_is_trained_where_the_template_keeps_it():
    tokenizer = small("byte-level", FAMILIES["qwen3"])
    chat = [
        m | {"content": f"<think>\nwhy\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m for m in CHAT
    ]
    assert said(chat, tokenizer) == ("Yo!<|im_end|>", "<think>\nwhy\n</think>\n\nSo.<|im_end|>")
    quick = prove(tokenizer, options={"enable_thinking": False})
    assert said(CHAT, tokenizer, quick)[1] == "So.<|im_end|>"


def test_reasoning_that_the_template_drops_is_not_missed():
    tokenizer = small("byte-level", FAMILIES["deepseek"])
    chat = [CHAT[0], CHAT[1] | {"content": "<think>\nwhy\n</think>Yo!"}]
    assert said(chat, tokenizer) == ("Yo!<｜end▁of▁sentence｜>",)


CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Cremona"}}}
TOOL_CHAT = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "sun"},
    {"role": "assistant", "content": "No."},
]


@pytest.mark.parametrize(
    ("family", "ends"), [("qwen", ("\n</tool_call><|im_end|>", "No.<|im_end|>")), ("mistral", ("}]</s>", " No.</s>"))]
)
def test_tool_calls_are_trained_and_tool_answers_are_not(family, ends):
    tokenizer = small("byte-level", FAMILIES[family])
    call, answer = said(TOOL_CHAT, tokenizer)
    assert '"Cremona"' in call
    assert call.endswith(ends[0])
    assert answer == ends[1]


def test_tool_calls_that_the_template_leaves_out_are_an_error_of_the_row():
    tokenizer = small("byte-level", FAMILIES["llama3"])
    with pytest.raises(RowError, match="template drops tool_calls"):
        render(TOOL_CHAT, tokenizer, prove(tokenizer))


def test_a_tool_answer_inside_the_assistants_turn_is_never_trained():
    """A template that writes call, answer and last words as one turn can be trained on, but not on such rows."""
    template = QWEN.replace("<|im_start|>user\\n<response>", "<response>").replace(
        "</response><|im_end|>\\n", "</response>"
    )
    template = template.replace("{{- '<|im_end|>\\n' }}", "{% if not m.tool_calls %}{{- '<|im_end|>\\n' }}{% endif %}")
    tokenizer = small("byte-level", replace(FAMILIES["qwen"], template=template))
    proof = prove(tokenizer)
    assert proof.unproven == {"tool"}
    assert "rows with tool messages are rejected: probe 'tool' failed" in proof.note
    assert said(CHAT, tokenizer, proof) == FAMILIES["qwen"].trains
    with pytest.raises(RowError, match="template is not proven with 'assistant' messages"):
        render(TOOL_CHAT, tokenizer, proof)


def test_a_turn_that_ends_otherwise_at_the_end_of_the_conversation():
    template = LLAMA3.replace("<|eot_id|>", "{{ X }}").replace("'{{ X }}'", "('</s>' if loop.last else '<|eot_id|>')")
    tokenizer = small("byte-level", replace(FAMILIES["llama3"], template=template, eos="</s>"))
    assert said(CHAT, tokenizer) == ("Yo!<|eot_id|>", "So.</s>")


def test_a_template_for_one_turn_is_proven_for_one_turn():
    template = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + LLAMA2
    tokenizer = small("byte-level", replace(FAMILIES["llama2"], template=template))
    proof = prove(tokenizer)
    assert "several turns" in proof.refused
    assert "says the header" in proof.probes
    assert said(CHAT[:2], tokenizer, proof) == (" Yo! </s>",)


def test_content_in_parts():
    template = QWEN.replace(
        "m.role + '\\n' + m.content", "m.role + '\\n' + (m.content if m.content is string else m.content[0].text)"
    )
    tokenizer = small("byte-level", replace(FAMILIES["qwen"], template=template))
    chat = [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "Yo!"}]}]
    assert said(chat, tokenizer) == ("Yo!<|im_end|>",)


# -- which messages are trained ------------------------------------------------------------------------------------


@families
def test_a_turn_marked_train_false_is_not_trained(family):
    tokenizer = small("byte-level", FAMILIES[family])
    chat = [CHAT[0], CHAT[1] | {"train": False}, CHAT[2], CHAT[3] | {"train": True}]
    encoded = encode({"id": "a", "messages": chat}, tokenizer, max_length=999)
    assert trained_text(encoded, tokenizer).strip() == FAMILIES[family].trains[1].strip()
    plain = encode({"id": "a", "messages": CHAT}, tokenizer, max_length=999)
    assert encoded.input_ids == plain.input_ids


def test_training_on_a_users_turn_is_refused():
    tokenizer = small("byte-level", FAMILIES["qwen"])
    with pytest.raises(RowError, match="only the assistant is trained"):
        render([CHAT[0] | {"train": True}, CHAT[1]], tokenizer, prove(tokenizer))


# -- which template ------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_template_names_the_choices():
    with pytest.raises(DataError, match=r"has no chat template; pass template=.* alpaca, chatml, gemma, llama2, plain"):
        prove(small())


def test_an_unknown_template_suggests_the_nearest():
    with pytest.raises(DataError, match="unknown chat template 'chatlm'; did you mean 'chatml'"):
        template_of(small(), "chatlm")


def test_a_named_template_of_the_tokenizer():
    tokenizer = small()
    tokenizer.chat_template = {"default": QWEN, "short": LLAMA2}
    assert template_of(tokenizer) == QWEN
    assert template_of(tokenizer, "short") == LLAMA2


def test_a_built_in_whose_end_of_turn_the_tokenizer_does_not_know_is_refused():
    from small_tokenizers import word_piece

    with pytest.raises(DataError, match=r"'<\|im_end\|>' is not a token of this tokenizer"):
        prove(word_piece(), "chatml")


def test_a_slow_tokenizer_is_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(DataError, match="ByT5Tokenizer, which does not say what characters a token came from"):
        prove(ByT5Tokenizer(), "plain")


def test_blank_of_the_header_that_joins_the_first_word_is_trained_and_other_text_is_not():
    text = "A: Hello</s>"
    turn = templates.Turn(1, 3, 12, True)
    assert trained_tokens([(0, 2), (2, 8), (8, 12)], text, [turn]) == [range(1, 3)]
    assert trained_tokens([(0, 1), (1, 8), (8, 12)], text, [turn]) == [range(2, 3)]


# -- templates of real models --------------------------------------------------------------------------------------

SHIPPED = sorted((Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates").glob("*.jinja"))
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|END_OF_TURN_TOKEN|>")


def test_templates_of_real_models_are_proven_or_refused_with_a_reason():
    """TRL ships the templates of many families, some with marks; those for images want contents in parts."""
    proven, refusals = [], []
    for path in SHIPPED:
        source = path.read_text()
        eos = next((end for end in ENDS if end in source), "<｜end▁of▁sentence｜>")
        tokenizer = small("byte-level", Family(source, ("", ""), eos, "<s>"))
        control = sorted({*re.findall(r"<[|｜]\w+[|｜]>", source), *CONTROL})
        tokenizer.add_special_tokens({"extra_special_tokens": control})
        try:
            proof = prove(tokenizer)
        except DataError as error:
            refusals.append(str(error))
            continue
        for words, text in zip(("Yo!", "So."), said(CHAT, tokenizer, proof), strict=True):
            assert re.fullmatch(rf"(.*[>\n])?{re.escape(words)}(<[^>]+>\s?)+", text, re.DOTALL), (path.name, text)
            assert "assistant" not in text
        proven.append(path.name)
    assert len(proven) > 0.8 * len(SHIPPED)
    assert all(re.search("template refuses|not written once|no end of turn|probe '", text) for text in refusals)

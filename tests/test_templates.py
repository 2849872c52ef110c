"""Chat templates that change what they are given: each answer is trained whole, or its pair is refused by name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from orpo_kernels.text.messages import carries_text
from orpo_kernels.transformers import PreferenceCollator, UnusablePair, tokenize_pair, tokenize_pairs
from orpo_kernels.transformers.versions import version_of

from .chats import assistant, message, system, user
from .test_collator import CHATML, byte_level

EOT, HEADER = "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA = (
    "{% for m in messages %}{{'<|start_header_id|>'+m['role']+'<|end_header_id|>\n\n'+m['content']|trim+'<|eot_id|>'}}"
    "{% endfor %}"
)
OPENS = "{% if add_generation_prompt %}{{'<|start_header_id|>assistant<|end_header_id|>\n\n'}}{% endif %}"


def add_special_tokens(tokenizer: Any, tokens: list[str]) -> None:
    name = "additional" if version_of("transformers") < (5,) else "extra"
    tokenizer.add_special_tokens({f"{name}_special_tokens": tokens})


def of_template(template: str, *special: str) -> Any:
    tokenizer = byte_level()
    add_special_tokens(tokenizer, ["<|start_header_id|>", "<|end_header_id|>", EOT, *special])
    tokenizer.chat_template = template
    return tokenizer


def pair(chosen: Any, rejected: Any = "red", **more: Any) -> dict[str, Any]:
    return {"prompt": [user("What is it?")], "chosen": chosen, "rejected": rejected, **more}


def trained(example: dict[str, Any], tokenizer: Any, side: str = "chosen", **options: Any) -> str:
    """The text that is trained on; what is trained is what is there."""
    tokenized: Any = tokenize_pair(example, tokenizer, **options)
    ids, labels = tokenized[f"{side}_input_ids"], tokenized[f"{side}_labels"]
    assert all(label in (-100, own) for own, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != -100])


# --- templates with a fault ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "behind"), [("single", EOT), ("trl", f"{EOT}<|im_end|>")])
def test_a_template_that_always_opens_the_next_turn(end, behind):
    tokenizer = of_template(LLAMA + "{{'<|start_header_id|>assistant<|end_header_id|>\n\n'}}")
    assert trained(pair("blue please"), tokenizer, end=end) == "blue please" + behind
    assert trained(pair("blue please"), tokenizer, "rejected", end=end) == "red" + behind


def test_a_template_that_strips_reasoning():
    tokenizer = of_template(LLAMA.replace("m['content']|trim", "m['content'].split('</think>')[-1]") + OPENS)
    reason = "the chat template changes its chosen answer: of its content it prints 'blue'"
    with pytest.raises(UnusablePair, match=reason):
        tokenize_pair(pair("<think>hm</think>blue"), tokenizer)
    assert trained(pair("blue"), tokenizer) == f"blue{EOT}"
    earlier = {**pair("blue"), "prompt": [user("Hi"), assistant("<think>hm</think>Hello"), user("What is it?")]}
    assert trained(earlier, tokenizer) == f"blue{EOT}"  # of earlier turns it is left out by design


def test_a_template_that_writes_reasoning_its_own_way():
    template = LLAMA.replace("m['content']|trim", "m['content']|replace('<think>', '<think>\n')")
    assert trained(pair("<think>hm</think>blue"), of_template(template + OPENS)) == f"<think>\nhm</think>blue{EOT}"


def test_an_opening_that_a_finished_turn_does_not_have():
    tokenizer = of_template(LLAMA + OPENS.replace("\n\n'}}", "\n\n<think>\n'}}"))
    lists = pair("<ol> one", "<ul> two")
    assert trained(lists, tokenizer) == f"<ol> one{EOT}"
    assert trained(lists, tokenizer, "rejected") == f"<ul> two{EOT}"


def test_an_end_of_turn_that_stands_before_another_turn_alone():
    """The turn of the user ends otherwise once there is an answer: what is between is not the answer's."""
    tokenizer = of_template(LLAMA.replace("+'<|eot_id|>'", "+('' if loop.last else '<|eot_id|>')") + OPENS)
    assert trained(pair("blue"), tokenizer) == "blue<|im_end|>"
    ids = tokenize_pair(pair("blue"), tokenizer)["chosen_input_ids"]
    assert tokenizer.decode(ids).endswith(f"What is it?{EOT}{HEADER}blue<|im_end|>")


def test_what_a_finished_turn_has_behind_its_opening_is_trained():
    channel = LLAMA.replace("+m['content']", "+('<say>' if m['role'] == 'assistant' else '')+m['content']")
    assert trained(pair("blue"), of_template(channel + OPENS)) == f"<say>blue{EOT}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("m['content']|upper", "it prints 'BLUE'"),
        (
            "(m['content'] if m['role'] == 'assistant' else 'Hi')",
            "leaves out the content of a message by 'user' in its",
        ),
        ("(m['content'][:3] if m['role'] == 'assistant' else m['content'])", "it prints 'blu'"),
        ("(m['content'] if m['role'] == 'user' else '')", "it prints ''"),
        ("m['content']+m['content']", "it prints 'blueblue'"),
        ("m['content']~' ('~m['content']|length~')'", "it prints 'blue (4'"),
        ("('Answer: ' if m['content'] == 'blue' else '')+m['content']", "it prints 'Answer: blue'"),
        ("m['no']['such']", "the chat template refuses it: UndefinedError: "),
    ],
)
def test_a_template_that_changes_text(change, reason):
    _, (refusal,) = tokenize_pairs([pair("blue")], of_template(LLAMA.replace("m['content']|trim", change) + OPENS))
    assert reason in refusal.reason


def test_a_template_that_leaves_out_a_system_message():
    template = LLAMA.replace("in messages", "in messages if m['role'] != 'system'") + OPENS
    example = {**pair("blue"), "prompt": [system("Be brief."), user("What is it?")]}
    with pytest.raises(UnusablePair, match="leaves out the content of a message by 'system' in its prompt"):
        tokenize_pair(example, of_template(template))
    assert trained(example, of_template(LLAMA + OPENS)) == f"blue{EOT}"


def test_a_template_that_raises_for_one_row_loses_that_row_alone():
    template = "{% if messages[0]['content'] == 'bad' %}{{ 1 / 0 }}{% endif %}" + LLAMA + OPENS
    examples = [pair("blue"), {**pair("blue"), "prompt": [user("bad")]}, pair("green")]
    pairs, refused = tokenize_pairs(examples, of_template(template))
    assert len(pairs) == 2
    assert [refusal.index for refusal in refused] == [1]
    assert refused[0].reason == "the chat template refuses it: ZeroDivisionError: division by zero"


def refusal(example: dict[str, Any], tokenizer: Any) -> str | None:
    """Why a pair is refused; None if it is not."""
    _, refused = tokenize_pairs([example], tokenizer)
    return refused[0].reason if refused else None


FILLED = st.lists(
    st.sampled_from([*"ab <>|é\n", "<think>", "</think>", "Apple", "red", "foo", "assistant"]), min_size=1, max_size=12
)
FILLED = FILLED.map("".join).filter(str.strip)
TRIMS = {"m['content']": lambda text: text, "m['content']|trim": str.strip}
STRIPS = {"m['content'].split('</think>')[-1]": lambda text: text.split("</think>")[-1], **TRIMS}
OPENINGS = {
    "only when asked": OPENS,
    "with more than is kept": OPENS.replace("\n\n'}}", "\n\n<think>\n'}}"),
    "always": "{{'<|start_header_id|>assistant<|end_header_id|>\n\n'}}",
    "never": "",
}
ENDS = (EOT, EOT + "\n", "<|im_end|>\n", EOT + "<|im_end|>", "")


@given(
    prompt=FILLED,
    chosen=FILLED,
    rejected=FILLED,
    content=st.sampled_from(sorted(STRIPS)),
    opening=st.sampled_from(sorted(OPENINGS)),
    tail=st.sampled_from(ENDS),
)
def test_any_template_trains_the_answer_whole_with_one_end_or_is_refused(
    prompt, chosen, rejected, content, opening, tail
):
    template = LLAMA.replace("m['content']|trim", content).replace(EOT, tail.replace("\n", "\\n")) + OPENINGS[opening]
    tokenizer = of_template(template)
    example = {"prompt": [user(prompt)], "chosen": chosen, "rejected": rejected}
    printed = [STRIPS[content](text) for text in (prompt, chosen, rejected)]
    lost = any("</think>" in text for text in (prompt, chosen, rejected)) and "split" in content
    if lost or printed[1] == printed[2]:
        assert refusal(example, tokenizer)
        return
    found = [trained(example, tokenizer, side) for side in ("chosen", "rejected")]
    end = EOT if EOT in tail else "<|im_end|>"
    for text, answer in zip(printed[1:], found, strict=True):
        assert answer == text + end


# --- the templates of models ---------------------------------------------------------------------------------------


def templates_of_models() -> list[Path]:
    """The chat templates that TRL knows models by, of 40 models; none where it is not installed."""
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path()
    return sorted(path for path in folder.glob("*.jinja") if not path.stem.endswith("_training"))


SPECIAL = re.compile(
    "<[|\uff5c]"
    r"[^<>'\"\s]*?"
    "[|\uff5c]?"
    r">|<(?:start|end)_of_(?:turn|utterance)>|<[a-z_]+\|>|<bos>|<eos>|\[/?INST\]|</?s>"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks it up.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = assistant(tool_calls=[{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Bern"}}}])
RESULT = message("tool", "twenty below", name="look_up")
# What is asked of a template, and the texts that have to be trained.
ASKED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "text": (pair("It is a cat. ", "No <b>idea</b>"), ["It is a cat."]),
    "lists": (pair("<ol> one", "<ul> two"), ["<ol> one"]),
    "reasoning": (pair("<think>\nlet me see\n</think>\n\nA cat"), ["let me see", "A cat"]),
    "reasoning apart": (
        pair([assistant("A cat", reasoning_content="let me see")], [assistant("Not", reasoning_content="hm hm")]),
        ["let me see", "A cat"],
    ),
    "a tool call alone": (pair([CALL], tools=TOOLS), ["look_up", "Bern"]),
    "turns with a tool": (pair([CALL, RESULT, assistant("Cold")], tools=TOOLS), ["look_up", "Bern", "Cold"]),
    "turns with the user": (
        pair([assistant("first it"), user("and then?"), assistant("second it")]),
        ["first it", "second it"],
    ),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("path", templates_of_models(), ids=lambda path: path.stem)
def test_templates_of_models(path, asked):
    example, said = ASKED[asked]
    source = path.read_text()
    tokenizer = byte_level(bos=True)
    add_special_tokens(tokenizer, sorted(set(SPECIAL.findall(source))))
    tokenizer.chat_template = source
    if reason := refusal(example, tokenizer):
        assert asked not in ("text", "lists"), reason  # every model speaks
        assert reason.startswith(("the chat template changes its chosen answer", "the chat template refuses it"))
        return
    text = trained(example, tokenizer)
    where = [text.index(words) for words in said]
    assert where == sorted(where)
    for heard in ("What is it?", "twenty below", "and then?"):
        assert heard not in text
    last = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
    assert last in tokenizer.all_special_ids


# --- more than words -----------------------------------------------------------------------------------------------

WITH_TOOLS = (
    "{% if think %}{{ '<think>' }}{% endif %}{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}"
    "{{'<|start_header_id|>'+m['role']+'<|end_header_id|>\n\n'+m['content']}}"
    "{% for t in m.tool_calls %}{{ '<tool>'+(t.function|tojson)+'</tool>' }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    + OPENS
)


def test_tools_and_tool_calls_are_given_to_the_template():
    tokenizer = of_template(WITH_TOOLS)
    example = pair([CALL, RESULT, assistant("Cold")], tools=TOOLS)
    call = '<tool>{"name": "look_up", "arguments": {"city": "Bern"}}</tool>'
    assert trained(example, tokenizer) == f"{call}{EOT}Cold{EOT}"
    assert tokenizer.decode(tokenize_pair(example, tokenizer)["rejected_input_ids"]).startswith('[{"type": "function"')
    as_text = {"function": {"name": "look_up", "arguments": '{"city": "Bern"}'}}
    assert trained(pair([assistant(None, tool_calls=[as_text])]), tokenizer) == f"{call}{EOT}"
    with pytest.raises(UnusablePair, match="of its tool_calls it prints ''"):
        tokenize_pair(example, of_template(LLAMA + OPENS))
    with pytest.raises(UnusablePair, match="the chat template does not print its tools"):
        tokenize_pair(pair("blue", tools=TOOLS), of_template(LLAMA + OPENS))
    with pytest.raises(UnusablePair, match="its tools have no names"):
        tokenize_pair(pair("blue", tools=[{"x": 1}]), tokenizer)


def test_options_are_given_to_the_template():
    tokenizer = of_template(WITH_TOOLS)
    ids = tokenize_pair(pair("blue", chat_template_kwargs={"think": True}), tokenizer)["chosen_input_ids"]
    assert tokenizer.decode(ids).startswith("<think><|start_header_id|>user")
    with pytest.raises(UnusablePair, match="set tokenize, which is not for"):
        tokenize_pair(pair("blue", chat_template_kwargs={"tokenize": True}), tokenizer)


def test_contents_in_parts_are_text():
    tokenizer = of_template(LLAMA + OPENS)
    parts = {"prompt": [user([{"type": "text", "text": "What is"}, {"type": "text", "text": " it?"}])]}
    assert tokenize_pair(pair("blue") | parts, tokenizer) == tokenize_pair(pair("blue"), tokenizer)
    with pytest.raises(UnusablePair, match="a part of type 'image', but only text is served"):
        tokenize_pair(pair("blue") | {"prompt": [user([{"type": "image"}])]}, tokenizer)


@pytest.mark.parametrize("extra", ["history", "context", "input", "explain"])
def test_what_nothing_reads_is_not_dropped(extra):
    tokenizer = of_template(LLAMA + OPENS)
    with pytest.raises(UnusablePair, match=f"it has '{extra}' beside prompt, chosen and rejected, which nothing reads"):
        tokenize_pair(pair("blue", **{extra: "good morning all"}), tokenizer)
    about = {"id": 3, "source": "some web page", "score_chosen": 7.5, "messages": [user("What is it?"), "blue"]}
    assert tokenize_pair(pair("blue", **about), tokenizer) == tokenize_pair(pair("blue"), tokenizer)


@given(st.text(st.characters(codec="utf-8"), max_size=8), st.text(max_size=6), st.booleans())
def test_a_key_of_a_message_is_printed_or_names_the_row(key, value, in_answer):
    """Whatever a message holds: the pair is as without it, or refused by that key."""
    tokenizer = of_template(LLAMA + OPENS)
    assume(key not in ("role", "content", "from"))
    more = {key: f"{value} words more" if value.strip() else None}
    example = pair([assistant("blue", **(more if in_answer else {}))])
    if not in_answer:
        example["prompt"] = [{**user("What is it?"), **more}]
    if reason := refusal(example, tokenizer):
        assert carries_text(key, more[key])
        assert key in reason or "tool calls" in reason
    else:
        assert not carries_text(key, more[key])
        assert tokenize_pair(example, tokenizer) == tokenize_pair(pair("blue"), tokenizer)


# --- length and weight ---------------------------------------------------------------------------------------------


def test_what_length_costs_is_said():
    tokenizer = of_template(CHATML)
    long = pair("blue " * 30, "red " * 30)
    whole, cut = tokenize_pair(long, tokenizer), tokenize_pair(long, tokenizer, max_length=20)
    assert "cut_tokens" not in whole
    lengths = [sum(len(made[f"{side}_input_ids"]) for side in ("chosen", "rejected")) for made in (whole, cut)]
    assert cut["cut_tokens"] == lengths[0] - lengths[1] > 0
    longest = max(len(whole["chosen_input_ids"]), len(whole["rejected_input_ids"]))
    with pytest.raises(UnusablePair, match=f"it has {longest} tokens, more than max_length=20"):
        tokenize_pair(long, tokenizer, max_length=20, too_long="refuse")
    fits = tokenize_pair(long, tokenizer, max_length=longest, too_long="refuse")
    assert fits == whole
    with pytest.raises(ValueError, match="Pair 0 of the batch cannot be used: it has"):
        PreferenceCollator(tokenizer, max_length=20, too_long="refuse")([long])
    with pytest.raises(ValueError, match="too_long must be one of"):
        PreferenceCollator(tokenizer, too_long="drop")


@pytest.mark.parametrize("packing", ["padded", "shared"])
def test_weights_go_into_the_batch(packing):
    collator = PreferenceCollator(of_template(CHATML), packing=packing)
    weighted = [pair("blue", weight=2), pair("green"), pair("white", weight=0.5)]
    assert collator(weighted)["pair_weights"].tolist() == [2, 1, 0.5]
    assert collator([collator.tokenized(example) for example in weighted])["pair_weights"].tolist() == [2, 1, 0.5]
    assert "pair_weights" not in collator([pair("blue"), pair("green", weight=None)])


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "2", True])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(UnusablePair, match="its weight is"):
        tokenize_pair(pair("blue", weight=weight), of_template(CHATML))

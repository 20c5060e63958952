"""Freezes a Jinja chat template into pieces of text, by rendering conversations around marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimvlm.bundle import PromptTemplate
from trimvlm.errors import UserError
from trimvlm.text import Turn

# Marks that no template contains.
QUESTION, ANSWER, SECOND = "Qone1", "Aone1", "Qtwo2"


def freeze_template(processor: Any, *, source: str) -> PromptTemplate:
    """Cuts the pieces out of conversations rendered around marks.

    Args:
        processor: transformers' processor.
        source: what errors name.

    Raises:
        UserError: there is no template, or it is not made of such pieces.
    """
    if not processor.chat_template:
        raise UserError(
            f"{source}: no chat template; add chat_template.jinja, or use the checkpoint's processor"
        )
    if "strftime_now" in str(processor.chat_template):
        raise UserError(f"{source}: the chat template writes today's date; a frozen one cannot, remove it")

    def rendered(turns: Sequence[Turn], generate: bool = False) -> str:
        try:
            return render_by_template(processor, turns, generate)
        except Exception as error:  # noqa: BLE001 templates raise what they like
            raise UserError(
                f"{source}: the chat template fails on a conversation of text and images ({error})"
            ) from None

    ask = Turn(text=QUESTION)
    answered = Turn(text=QUESTION, answer=ANSWER)
    try:
        begin, user_end = rendered([ask]).split(QUESTION)
        generate = _after(rendered([ask], True), begin + QUESTION + user_end)
        answer_start, answer_end = _after(rendered([answered]), begin + QUESTION + user_end).split(ANSWER)
        user_start = _after(
            rendered([answered, Turn(text=SECOND)]),
            begin + QUESTION + user_end + answer_start + ANSWER + answer_end,
        ).split(SECOND)[0]
        start = begin[: -len(user_start) or None]
        if start + user_start != begin:
            raise ValueError
        image, text_start = _between(begin, rendered([Turn(text=QUESTION, images=1)]).split(QUESTION)[0])
        user_start = user_start.removesuffix(text_start)
        if start + user_start + text_start != begin:
            raise ValueError
    except UserError:
        raise
    except ValueError:
        raise not_frozen(source, QUESTION) from None
    return PromptTemplate(
        start=start,
        user_start=user_start,
        image=image,
        text_start=text_start,
        user_end=user_end,
        answer_start=answer_start,
        answer_end=answer_end,
        generate=generate,
    )


def render_by_template(processor: Any, turns: Sequence[Turn], generate: bool) -> str:
    """transformers' rendering: contents as lists, images first."""
    messages = []
    for turn in turns:
        content = [*({"type": "image"} for _ in range(turn.images)), {"type": "text", "text": turn.text}]
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            answer = [{"type": "text", "text": turn.answer}]
            messages.append({"role": "assistant", "content": answer})
    return processor.apply_chat_template(messages, add_generation_prompt=generate)


def _after(text: str, prefix: str) -> str:
    """What follows `prefix`; ValueError where the text does not begin with it."""
    if not text.startswith(prefix):
        raise ValueError
    return text[len(prefix) :]


def _between(plain: str, longer: str) -> tuple[str, str]:
    """What stands in the middle of `longer` and not in `plain`, and what follows it; ValueError where there
    is no such place."""
    for split in range(len(plain), -1, -1):
        before, after = plain[:split], plain[split:]
        if longer.startswith(before) and longer.endswith(after):
            return longer[split : len(longer) - len(after)], after
    raise ValueError


def not_frozen(source: str, text: str) -> UserError:
    """The error for a template that does more than put fixed pieces around images and texts."""
    return UserError(
        f"{source}: the chat template cannot be frozen into fixed pieces around images (first) and texts "
        f"(shown by {text!r}); simplify chat_template.jinja"
    )

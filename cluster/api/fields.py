"""Fields of OpenAI's API, and of servers beside us, that would change an answer's meaning and that
this server does not have: refused by name unless they ask for nothing.

`docs/openai.md` lists them; a field that is in no list is ignored, as OpenAI ignores hints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.api.errors import ForbiddenValueError

# Name: values that ask for nothing. Null always does.
BOTH: Mapping[str, tuple[Any, ...]] = {
    # Other servers' samplers and filters.
    "allowed_token_ids": (),
    "bad_words": ([],),
    "add_special_tokens": (True,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_p": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
CHAT: Mapping[str, tuple[Any, ...]] = {
    **BOTH,
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": ([], ["text"]),
    "moderation": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
TEXT: Mapping[str, tuple[Any, ...]] = {
    **BOTH,
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}


def refuse(body: Any, table: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises `ForbiddenValueError` for the first field of `table` that asks for something."""
    if not isinstance(body, dict):
        return
    for name in sorted(body.keys() & table.keys()):
        value = body[name]
        if value is not None and value not in table[name]:
            raise ForbiddenValueError(
                f"{name} is not supported by this server; leave it out", param=name
            )

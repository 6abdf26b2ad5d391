"""Recipes by hand that make a vocabulary: union, the base's or one model's, single tokens, padding, chat templates."""

_LINEAR = """
        merge_method: linear
        models: [{{model: {}, parameters: {{weight: 1}}}}, {{model: {}, parameters: {{weight: 3}}}}]
        dtype: float32
        """
_DELTAS = """
        merge_method: task_arithmetic
        base_model: $base
        models: [{{model: {}, parameters: {{weight: 0.5}}}}, {{model: {}, parameters: {{weight: 0.8}}}}]
        dtype: float32
        """
_MORE, _SHUFFLED, _PADDED = "$tokens-ada", "$tokens-bob", "$tokens-cyd"

TOKENIZERS = {
    "tokens-same-union": _LINEAR.format("$ada", "$bob") + "tokenizer_source: union",
    "tokens-same-base": _DELTAS.format("$ada", "$bob") + "tokenizer_source: base",
    "tokens-union": _DELTAS.format(_MORE, _SHUFFLED) + "tokenizer_source: union",
    "tokens-union-without-base": _LINEAR.format(_MORE, _SHUFFLED)
    + "tokenizer_source: union",
    "tokens-base": _DELTAS.format(_MORE, _SHUFFLED) + "tokenizer_source: base",
    "tokens-of-model": _DELTAS.format(_MORE, _SHUFFLED) + f"tokenizer_source: {_MORE}",
    "tokens-of-shuffled-model": _LINEAR.format(_MORE, _SHUFFLED)
    + f"tokenizer_source: {_SHUFFLED}",
    "tokens-rows-without-tokens": _DELTAS.format(_PADDED, "$ada")
    + "tokenizer_source: base",
    "tokens-rows-without-tokens-union": _DELTAS.format(_PADDED, _MORE)
    + "tokenizer_source: union",
    "tokens-block": _DELTAS.format(_MORE, _SHUFFLED) + "tokenizer: {source: union}",
    "tokens-pad": _DELTAS.format(_MORE, _SHUFFLED)
    + "tokenizer: {source: union, pad_to_multiple_of: 16}",
    "tokens-pad-base": _DELTAS.format("$ada", "$bob")
    + "tokenizer: {source: base, pad_to_multiple_of: 64}",
    "tokens-from-model": _DELTAS.format(_MORE, _SHUFFLED)
    + f'tokenizer: {{source: union, tokens: {{"<|tool|>": {{source: {_SHUFFLED}}}, "<|bot|>": {{source: {_MORE}, force: true}}}}}}',
    "tokens-forced": _DELTAS.format(_MORE, _SHUFFLED)
    + f'tokenizer: {{source: union, tokens: {{"a": {{source: {_SHUFFLED}, force: true}}, "b": {{source: $base}}}}}}',
    "tokens-like-another": _DELTAS.format(_MORE, _SHUFFLED)
    + 'tokenizer: {source: union, tokens: {"<|bot|>": '
    + f'{{source: {{kind: model_token, model: {_SHUFFLED}, token: "z"}}, force: true}}}}}}',
    "tokens-like-another-id": _DELTAS.format(_MORE, _SHUFFLED)
    + f'tokenizer: {{source: union, tokens: {{"<|bot|>": {{source: {{kind: model_token, model: {_SHUFFLED}, token_id: 5}}}}}}}}',
    "tokens-new": _DELTAS.format(_MORE, _SHUFFLED)
    + 'tokenizer: {source: union, tokens: {"<|new|>": {source: {kind: model_token, model: $base, token: "q"}, force: true}}}',
    "tokens-zero": _DELTAS.format(_MORE, _SHUFFLED)
    + 'tokenizer: {source: union, tokens: {"<|bot|>": {source: {kind: zero}, force: true}}}',
    "tokens-zero-for-those-without": _LINEAR.format(_MORE, "$ada")
    + 'tokenizer: {source: union, tokens: {"<|bot|>": {source: {kind: zero}}}}',
    "tokens-ties": """
        merge_method: ties
        base_model: $base
        models: [{model: $tokens-ada, parameters: {weight: 1, density: 0.5}}, {model: $tokens-bob, parameters: {weight: 0.5, density: 0.5}}]
        tokenizer_source: union
        dtype: float32""",
    "template-chatml": _DELTAS.format("$ada", "$bob")
    + "tokenizer_source: base\n        chat_template: chatml",
    "template-auto": _DELTAS.format(_MORE, "$bob")
    + "tokenizer_source: union\n        chat_template: auto",
    "template-text": _DELTAS.format("$ada", "$bob")
    + 'chat_template: "{% for m in messages %}[{{ m.content }}]{% endfor %}"',
}

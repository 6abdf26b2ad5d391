"""Recipes that mergekit refuses or fails on, and that we refuse with a sentence."""

BOTH_REFUSE = {
    "unknown-method": "{merge_method: linaer, models: [{model: $ada}], parameters: {weight: 1}}",
    "missing-weight": "{merge_method: linear, models: [{model: $ada}, {model: $bob, parameters: {weight: 1}}]}",
    "missing-t": "{merge_method: slerp, base_model: $base, models: [{model: $base}, {model: $ada}]}",
    "t-on-a-source": "{merge_method: slerp, base_model: $base, models: [{model: $base}, {model: $ada, parameters: {t: 0.5}}]}",
    "slerp-without-base": "{merge_method: slerp, models: [{model: $base}, {model: $ada}], parameters: {t: 0.5}}",
    "slerp-of-three": "{merge_method: slerp, base_model: $base, models: [{model: $ada}, {model: $bob}], parameters: {t: 0.5}}",
    "nuslerp-of-three": "{merge_method: nuslerp, models: [{model: $ada}, {model: $bob}, {model: $cyd}], parameters: {weight: 1}}",
    "nearswap-of-three": "{merge_method: nearswap, base_model: $base, models: [{model: $ada}, {model: $bob}], parameters: {t: 1}}",
    "fusion-of-three": "{merge_method: arcee_fusion, base_model: $base, models: [{model: $ada}, {model: $bob}]}",
    "stock-of-two": "{merge_method: model_stock, base_model: $base, models: [{model: $ada}]}",
    "passthrough-of-two": "{merge_method: passthrough, models: [{model: $ada}, {model: $bob}]}",
    "ties-without-base": "{merge_method: ties, models: [{model: $ada}, {model: $bob}], parameters: {weight: 1, density: 0.5}}",
    "della-epsilon": "{merge_method: della, base_model: $base, models: [{model: $ada}], parameters: {weight: 1, density: 0.9}}",
    "unequal-slices": "{merge_method: linear, parameters: {weight: 1}, "
    "slices: [{sources: [{model: $ada, layer_range: [0, 2]}, {model: $bob, layer_range: [0, 3]}]}]}",
    "slice-beyond-the-depth": "{merge_method: passthrough, slices: [{sources: [{model: $ada, layer_range: [2, 6]}]}]}",
    "slice-below-zero": "{merge_method: passthrough, slices: [{sources: [{model: $ada, layer_range: [-2, 2]}]}]}",
    "unequal-depths": "{merge_method: linear, models: [{model: $ada}, {model: $deep}], parameters: {weight: 1}}",
    "unequal-vocabularies": "{merge_method: linear, models: [{model: $ada}, {model: $tokens-ada}], parameters: {weight: 1}}",
    "unequal-widths": "{merge_method: linear, models: [{model: $gpt2-ada}, {model: $qwen-ada}], parameters: {weight: 1}}",
    "filter-of-one-entry": "{merge_method: linear, models: [{model: $ada}], parameters: {weight: {filter: mlp, value: 0.9}}}",
    "empty-gradient": "{merge_method: linear, models: [{model: $ada}], parameters: {weight: []}}",
    "option-of-half": "{merge_method: linear, models: [{model: $ada}], parameters: {weight: 1, normalize: 0.5}}",
    "wild-dtype": "{merge_method: linear, models: [{model: $ada}], parameters: {weight: 1}, dtype: float7}",
    "nothing": "{merge_method: linear, dtype: float32}",
    "models-and-slices": "{merge_method: linear, models: [{model: $ada}], slices: [{sources: [{model: $ada, layer_range: [0, 2]}]}]}",
    "token-that-its-model-lacks": "{merge_method: linear, models: [{model: $ada}], parameters: {weight: 1}, "
    'tokenizer: {source: union, tokens: {"<|new|>": {source: $ada}}}}',
}
